"""Trackers on several machines, each a network namespace of its own: one is cut off for a while."""

import ctypes
import json
import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from caching import Nameserver, every_second, soon_stale, start_cache
from crowd import Crowd
from proxies import HAProxy, deployed, free_port, get, make_certificate, put, readme_block
from running import outside, wait_for
from stand_in import StandIn

# As in deploy/README.md and nginx-cache-tls.conf.
ADDRESSES = {"front": "192.0.2.11", "two": "192.0.2.12", "three": "192.0.2.13"}
CLONE_NEWNET = 0x40000000
CLIENTS = 60


class Machines:
    """Namespaces that a bridge in the first one joins, as a switch would."""

    def __init__(self) -> None:
        self.mark = f"pt{os.getpid()}"

    def __enter__(self) -> "Machines":
        for name, address in ADDRESSES.items():
            self.ip(f"netns add {self.mark}{name}")
            self.ip(f"-n {self.mark}{name} link set lo up")
            if name == "front":
                self.ip(f"-n {self.mark}front link add switch type bridge")
                self.ip(f"-n {self.mark}front address add {address}/24 dev switch")
                self.ip(f"-n {self.mark}front link set switch up")
            else:
                self.ip(f"-n {self.mark}front link add {name} type veth peer name lan netns {self.mark}{name}")
                self.ip(f"-n {self.mark}front link set {name} master switch up")
                self.ip(f"-n {self.mark}{name} address add {address}/24 dev lan")
                self.ip(f"-n {self.mark}{name} link set lan up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", self.mark + name], check=False)

    def cable(self, name: str, state: str) -> None:
        """Plug its network cable in ("up"), or pull it out ("down")."""
        self.ip(f"-n {self.mark}front link set {name} {state}")

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """In the block, sockets, threads and processes that this thread makes are on this machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{self.mark}{name}") as there:
            assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(here.fileno(), CLONE_NEWNET) == 0

    @staticmethod
    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    outside("ip", "haproxy", "nginx", "openssl")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    with Machines() as running, running.on("front"):
        yield running


def environment_of_a_tracker(certificate: Path) -> dict[str, str]:
    lines = put(readme_block("COIN_API_URL=https:"), ("/etc/price-tracker-cache.crt", certificate))
    return dict(line.split("=", 1) for line in lines.splitlines())


def cache_certificate(folder: Path) -> Path:
    """As the README's command makes it."""
    command, _, _ = readme_block("CN=price-tracker-cache").partition("\ncp ")
    subprocess.run(["sh", "-euc", put(command, ("/etc/nginx/", f"{folder}/"))], check=True, stderr=subprocess.DEVNULL)
    # What Python 3.13 and newer insist on.
    file = folder / "price-tracker-cache.crt"
    subprocess.run(["openssl", "verify", "-x509_strict", "-CAfile", file, file], check=True, capture_output=True)
    return file


def test_machine_that_is_cut_off_loses_its_clients_to_the_others_and_serves_again_later(
    machines: Machines, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "DNS:rest.coinapi.io")
    trusted = cache_certificate(tmp_path)
    port = free_port()
    door = deployed("nginx-cache-tls.conf", ("/etc/nginx/", f"{tmp_path}/"), ("127.0.0.1:3040", f"127.0.0.1:{port}"))
    changes = (*every_second(), ("/etc/ssl/certs/ca-certificates.crt", certificate.chain))
    (tmp_path / "haproxy").mkdir()
    with ExitStack() as stack:
        coin_api = stack.enter_context(StandIn())
        nameserver = stack.enter_context(Nameserver("rest.coinapi.io"))
        stack.enter_context(start_cache(tmp_path, port, coin_api, certificate, nameserver, changes, (door,)))
        local = {"COIN_API_URL": f"http://127.0.0.1:{port}", "COIN_API_KEY": "added-by-the-cache"}
        trackers = [stack.enter_context(soon_stale(tmp_path, **local))]
        for name in ("two", "three"):
            with machines.on(name):
                tracker = soon_stale(tmp_path, "--host", ADDRESSES[name], **environment_of_a_tracker(trusted))
                trackers.append(stack.enter_context(tracker))
        places = [
            f"127.0.0.1:{trackers[0].port}",
            *(f"{ADDRESSES[n]}:{trackers[i].port}" for i, n in enumerate(("two", "three"), 1)),
        ]
        proxy = stack.enter_context(HAProxy(tmp_path / "haproxy", places, certificate))

        def status(name: str, number: int) -> str:
            with machines.on(name):
                return str(json.loads(get(f"http://{ADDRESSES[name]}:{trackers[number].port}/healthz")[1])["status"])

        wait_for(lambda: status("two", 1) == status("three", 2) == "ok", what="prices through the cache's door")
        # From an address that is not listed, with the right certificate.
        context = ssl.create_default_context(cafile=str(trusted))
        code, body, _ = get(f"https://{ADDRESSES['front']}:3443/v1/exchangerate/USD", context)
        assert (code, "your address is not listed" in json.loads(body)["error"]) == (403, True)

        before, start = len(coin_api.requests), time.monotonic()
        crowd = stack.enter_context(Crowd(f"wss://localhost:{proxy.port}/ws?assets=BTC", CLIENTS, certificate.context))

        def all_served(since: float) -> None:
            wait_for(lambda: crowd.served_since(since) == CLIENTS, what="prices for all clients")

        all_served(start)
        assert min(proxy.sessions().values()) >= CLIENTS // 3 - 5
        assert (len(coin_api.requests) - before) <= time.monotonic() - start + 2, "more than one request an interval"

        machines.cable("two", "down")
        cut = time.monotonic()
        all_served(cut + 0.5)
        wait_for(lambda: status("two", 1) == "stale", what="the machine alone says that its prices are stale")
        assert status("three", 2) == "ok"
        came = crowd.newcomers
        wait_for(lambda: crowd.newcomers > came + 20, what="new clients")
        assert crowd.refused == []
        # Whoever was being connected to it when HAProxy gave it up was hung up on, and nobody later.
        assert all(when < cut + 5 for when, _ in crowd.unserved), crowd.unserved
        crowd.unserved.clear()

        machines.cable("two", "up")
        wait_for(lambda: status("two", 1) == "ok", 25, "prices are current again")
        wait_for(lambda: proxy.sessions()["3032"] > 0, what="new clients on the machine that is back")
        all_served(time.monotonic())
        assert (crowd.refused, crowd.unserved) == ([], [])
