"""Network namespaces, in which a test has machines of its own."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from running import outside

CLONE_NEWNET = 0x40000000
FRONT = "front"  # the machine that has the switch


def only_root() -> None:
    """Skip the test for others; in CI it has to be root."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("only root can make namespaces")


@contextmanager
def network(file: str) -> Iterator[None]:
    """In the block, sockets, threads and processes that this thread makes are in this network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as here, open(file) as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(here.fileno(), CLONE_NEWNET) == 0


class Machines:
    """`with Machines(front="192.0.2.11", two="192.0.2.12") as machines:` makes a namespace for each, and joins them.

    A bridge in the first one, which must be called front, does what a switch would.
    """

    def __init__(self, **addresses: str):
        outside("ip")
        only_root()
        self.addresses = addresses
        self.mark = f"pt{os.getpid()}"

    def __enter__(self) -> "Machines":
        for name, address in self.addresses.items():
            self.ip(f"netns add {self.mark}{name}")
            self.ip(f"-n {self.mark}{name} link set lo up")
            if name == FRONT:
                self.ip(f"-n {self.mark}{FRONT} link add lan type bridge")
            else:
                self.ip(f"-n {self.mark}{FRONT} link add {name} type veth peer name lan netns {self.mark}{name}")
                self.ip(f"-n {self.mark}{FRONT} link set {name} master lan up")
            self.ip(f"-n {self.mark}{name} address add {address}/24 dev lan")
            self.ip(f"-n {self.mark}{name} link set lan up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", self.mark + name], check=False)

    def cable(self, name: str, state: str) -> None:
        """Plug a machine's cable in ("up"), or pull it out ("down")."""
        self.ip(f"-n {self.mark}{FRONT} link set {name} {state}")

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """In the block, sockets, threads and processes that this thread makes are on this machine."""
        with network(f"/run/netns/{self.mark}{name}"):
            yield

    @staticmethod
    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True)
