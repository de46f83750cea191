"""A server in this process whose clock and sockets a test owns, and what tests ask it.

Only this file knows where a server keeps its loop and its counters.
"""

import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer

THREE = ("BTC", "ETH", "XRP")


class Clock:
    """Seconds that pass only when a test says so: `PriceServer(..., clock=Clock())`."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Socket:
    """In the place of an accepted socket. It takes `room` bytes and no more until that is set again.

    before: called before each send and receive. sizes: how many bytes each send was given.
    """

    def __init__(self, sock: socket.socket, room: float):
        self.socket = sock
        self.room = room
        self.before: Callable[[], object] = lambda: None
        self.sizes: list[int] = []

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        self.before()
        if not self.room:
            time.sleep(0.001)  # the real socket is not full, and so always ready: the loop would spin
            raise BlockingIOError
        self.sizes.append(len(data))
        sent = self.socket.send(data[: int(min(self.room, len(data)))], flags)
        self.room -= sent
        return sent

    def recv(self, size: int) -> bytes:
        self.before()
        return self.socket.recv(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


class Listener:
    """In the place of a listening socket: it accepts `Socket`s, and fails while `error` is set."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.accepted: list[Socket] = []
        self.room = math.inf  # of the next ones
        self.address = ""  # that they are said to come from
        self.error = self.failed = 0

    def accept(self) -> tuple[Socket, Any]:
        if self.error:
            self.failed += 1
            raise OSError(self.error, "Too many open files")
        sock, address = self.socket.accept()
        self.accepted.append(Socket(sock, self.room))
        return self.accepted[-1], (self.address or address[0], *address[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


class RiggedServer(PriceServer):
    """One whose sockets a test can fill, watch and break: `server.listener.accepted`, the newest last."""

    socket: Any

    def server_activate(self) -> None:
        super().server_activate()
        self.socket = self.listener = Listener(self.socket)


def narrow(server: RiggedServer, room: int = 0) -> Socket:
    """Let the socket that was accepted last take so many bytes and no more."""
    narrowed = server.listener.accepted[-1]
    call(server, lambda: setattr(narrowed, "room", room))
    return narrowed


def widen(server: PriceServer, narrowed: Socket, room: int) -> None:
    """Give it room, and return when the server has used it; it must have something to send."""
    narrowed.room = room
    wait_for(lambda: not narrowed.room, what="sent what there is room for")
    call(server, lambda: None)


class Blocked:
    """`with Blocked(server):` keeps the server thread busy, so that what arrives meanwhile is met in one go."""

    def __init__(self, server: PriceServer):
        self.server = server
        self.began, self.release = threading.Event(), threading.Event()

    def _block(self) -> None:
        self.began.set()
        assert self.release.wait(20)

    def __enter__(self) -> "Blocked":
        call_soon(self.server, self._block)
        assert self.began.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()


# What tests give a server


def poll(price: float, *assets: str) -> list[PriceUpdate]:
    return [PriceUpdate(asset, price, "t") for asset in assets or THREE]


def with_an_hour(start_server: Callable[..., Any], assets: tuple[str, ...] = ASSETS) -> RiggedServer:
    """A server whose history has a poll every 10 s for an hour, and whose clocks stand still."""
    wall_clock = Clock()
    wall_clock.now = 1_800_000_000.0
    server: RiggedServer = start_server(assets, kind=RiggedServer, clock=Clock(), wall_clock=wall_clock)
    for number in range(360):
        wall_clock.now += 10.0
        server.publish(poll(45_000.5 + number, *assets))
    return server


# What tests ask a server


def call(server: PriceServer, function: Callable[[], Any]) -> Any:
    """Run it in the server thread."""
    return server._loop.call(function)


def call_soon(server: PriceServer, function: Callable[[], Any]) -> None:
    server._loop.call_soon(function)


def pass_time(server: PriceServer, seconds: float) -> None:
    """Let this time pass at once, and return when the housekeeping and the heartbeats that fell due are done."""
    clock = server._loop.clock
    assert isinstance(clock, Clock)
    call(server, lambda: None)  # a step that is under way still sets its deadline by the old time
    clock.now += seconds
    for _ in range(5):  # timers run after the functions that wait, and hand over further ones
        call(server, lambda: None)


def sample(server: PriceServer, name: str) -> float:
    """One sample of /metrics, by its name without `price_tracker_`; a request for it would be a visitor."""
    lines = call(server, server._status.metrics).splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == f"price_tracker_{name}"]
    return float(value)


def dropped(server: PriceServer) -> dict[str, int]:
    """How many clients were dropped, by reason."""
    return {reason: number for reason, number in server._status.dropped.items() if number}


def held(server: PriceServer) -> float:
    return sample(server, "held_bytes")


def connections(server: PriceServer) -> float:
    """How many are open, clients or not."""
    return sample(server, "clients") + sample(server, "visitors")


def gone(server: PriceServer) -> None:
    wait_for(lambda: not server.clients, what="no client left")


def wait_for_value(read: Callable[[], object], value: object) -> None:
    wait_for(lambda: read() == value, what=f"{value}")


def in_thread(function: Callable[[], object]) -> threading.Thread:
    """A thread that runs it; daemon, so that one that hangs fails its test and not the run."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread
