"""The clients of the soak and of the storm, good and rude, all in one selector loop: `soak_clients.py WHAT NUMBERS...`.

It says a line on stdout when all have connected, and for each on stdin what was seen, as JSON.
"""

import heapq
import itertools
import json
import random
import re
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

from bench_sides import raise_file_limit
from raw import BINARY, CLOSE, PING, PONG, TEXT, frame, get, request, reset
from running import ASSETS
from soak_source import WITHOUT_DOT

ENOUGH_TO_FILL = 280  # polls of 731 bytes, 0.2 MB: more than the buffers on both sides hold
DRIBBLE = 0.5  # seconds between two bytes: 20 of them until the server's 10 s are over
HALF = request()[:100]
PINGS = frame(PING) * 700
PRICE = re.compile(rb'\{"asset_id":"([A-Z]+)","price":([0-9]+)\.0,"time":"[^"]+"\}')


def parse_frames(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """The whole frames at the start of what a server sent, (first byte, payload), and their size."""
    found, start = [], 0
    while len(data) - start >= 2:
        size, head = data[start + 1], 2
        if size == 126:
            head, size = 4, int.from_bytes(data[start + 2 : start + 4], "big")
        if size > 126 and head == 2:
            raise ValueError(f"no frame that this server sends: {data[start : start + 20]!r}")
        if len(data) < start + head + size:
            break
        found.append((data[start], data[start + head : start + head + size]))
        start += head + size
    return found, start


class Crowd:
    """The selector and the timers of all the clients, and what was seen."""

    def __init__(self, port: int, seconds: float = 0.0):
        self.port = port
        self.seconds = seconds
        self.selector = selectors.DefaultSelector()
        self.random = random.Random(6)
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.newest = 0  # the counter of the latest poll that any client has seen
        self.parsed: dict[tuple[tuple[str, ...], bytes], tuple[int, ...]] = {}

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.order), action))

    def run(self, clients: "list[Client]") -> None:
        """Until stdin ends."""
        for client in clients:
            client.open()
        print("{}", flush=True)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            delay = self.timers[0][0] - time.monotonic() if self.timers else 1.0
            for key, events in self.selector.select(max(delay, 0)):
                if key.data is None:
                    if not sys.stdin.readline():
                        return
                    self.tell(clients)
                elif key.fileobj is key.data.socket:  # not left or opened again earlier in this turn
                    key.data.serve(events)
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def tell(self, clients: "list[Client]") -> None:
        for key in list(self.selector.get_map().values()):
            if key.data and key.fileobj is key.data.socket:
                key.data.read()
        last = {client.last for client in clients if isinstance(client, Steady)}
        print(json.dumps({"seen": self.seen, "wrong": self.wrong, "last": sorted(last)}), flush=True)

    def polls(self, assets: tuple[str, ...], data: bytes) -> tuple[tuple[int, ...], int]:
        """Which whole polls the data is, and how many bytes that were.

        Ten clients of a poll get the same bytes: they are taken apart once.
        """
        known = self.parsed.get((assets, data))
        if known:
            return known, len(data)
        counters: list[int] = []
        group: list[bytes] = []
        position = used = 0
        found, _ = parse_frames(data)
        for first, payload in found:
            position += 2 + len(payload)
            asset_id, counter = parse_price(first, payload)
            if not group:
                counters.append(counter)
            group.append(asset_id.encode())
            expected = [asset for asset in assets if asset != "DOT" or counter % WITHOUT_DOT]
            if counter != counters[-1] or asset_id != expected[len(group) - 1]:
                raise ValueError(f"poll {counters[-1]} is {b' '.join(group).decode()} {counter}")
            if len(group) == len(expected):
                used, group = position, []
        if group:
            counters.pop()
        if used == len(data):
            if len(self.parsed) > 1000:
                self.parsed.clear()
            self.parsed[assets, data] = tuple(counters)
        return tuple(counters), used


def parse_price(first: int, payload: bytes) -> tuple[str, int]:
    """A price message's asset and counter."""
    match = PRICE.fullmatch(payload)
    if first != 0x81 or not match:
        raise ValueError(f"no price message: {first:#x} {payload[:80]!r}")
    return match[1].decode(), int(match[2])


class Client:
    """One connection after another; this base reads prices and answers pings."""

    buffer_size = 0  # bytes of SO_RCVBUF, 0 for the default

    def __init__(self, crowd: Crowd, number: int = 0):
        self.crowd = crowd
        self.number = number
        self.assets = ASSETS if number % 4 else ("BTC", "ETH")
        self.socket: socket.socket | None = None
        self.opened = 0  # how often

    def open(self, head: bytes | None = None) -> None:
        self.buffer = b""
        self.open_already = False
        self.last = 0
        self.opened += 1
        assert self.socket is None
        sock = self.socket = socket.socket()
        if self.buffer_size:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer_size)
        sock.settimeout(5.0)
        try:
            sock.connect(("127.0.0.1", self.crowd.port))
            if head is None:
                head = request("/ws" if self.assets is ASSETS else f"/ws?assets={','.join(self.assets)}")
            sock.sendall(head)
        except OSError as error:
            self.wrong(f"no connection: {error}")
        sock.setblocking(False)
        self.crowd.selector.register(sock, selectors.EVENT_READ, self)
        self.crowd.seen[f"{self.kind} connections"] += 1

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    def wrong(self, what: str) -> None:
        self.crowd.wrong[f"{self.kind} client: {what}"] += 1

    def while_open(self, seconds: float, action: Callable[[], None]) -> None:
        """Do it later, but not to the next connection."""
        sock = self.socket
        self.crowd.later(seconds, lambda: action() if sock and self.socket is sock else None)

    def forget(self, close: Callable[[socket.socket], object] = socket.socket.close) -> None:
        """Close the socket as it is; with `reset`, without a goodbye."""
        if self.socket:
            if self.socket in self.crowd.selector.get_map():
                self.crowd.selector.unregister(self.socket)
            close(self.socket)
            self.socket = None

    def send(self, data: bytes) -> int:
        """How many bytes were taken: none by a socket that is full or gone, which `read` will tell."""
        try:
            return self.socket.send(data) if self.socket else 0
        except OSError:
            return 0

    def serve(self, events: int) -> None:
        self.read()

    def read(self) -> None:
        assert self.socket
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lost()
            self.forget()
            return
        try:
            self.received(data)
        except ValueError as error:
            self.wrong(str(error))
            self.forget()

    def received(self, data: bytes) -> None:
        self.buffer += data
        if not self.open_already:
            head, end, rest = self.buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                raise ValueError(f"not upgraded: {head[:80]!r}")
            self.buffer, self.open_already = rest, True
            self.became_open()
        if self.buffer:
            self.parse()

    def became_open(self) -> None:
        pass

    def lost(self) -> None:
        self.wrong("the server hung up")

    def parse(self) -> None:
        """Take whole polls off the buffer; each must be the one behind the last."""
        if not self.last:
            self.parse_snapshot()
        while self.buffer[:2] == b"\x89\x00":
            self.buffer = self.buffer[2:]
            self.crowd.seen["pings"] += 1
            self.send(frame(PONG))
        if not self.last or not self.buffer:
            return
        ping = self.buffer.find(b"\x89\x00")
        counters, used = self.crowd.polls(self.assets, self.buffer if ping < 0 else self.buffer[:ping])
        self.buffer = self.buffer[used:]
        for counter in counters:
            if counter != self.last + 1:
                self.wrong(f"poll {counter} came behind {self.last}")
            self.last = counter
        if counters:
            self.crowd.newest = max(self.crowd.newest, self.last)
            self.crowd.seen["polls checked"] += len(counters)
        if ping >= 0 and used == ping:
            self.parse()

    def parse_snapshot(self) -> None:
        found, _ = parse_frames(self.buffer)
        prices = [parse_price(*frame) for frame in found[: len(self.assets)]]
        if len(prices) < len(self.assets):
            return
        self.last = max(counter for _, counter in prices)
        right = [(asset, self.last - (asset == "DOT" and self.last % WITHOUT_DOT == 0)) for asset in self.assets]
        if prices != right:
            raise ValueError(f"snapshot is {prices}")
        self.buffer = self.buffer[sum(2 + len(payload) for _, payload in found[: len(prices)]) :]


class Steady(Client):
    """Connects once and misses nothing."""


class Passing(Client):
    """Stays for some seconds and misses nothing meanwhile."""

    leaving = False  # its close frame is sent
    echoed = False

    def became_open(self) -> None:
        self.leaving = self.echoed = False
        self.while_open(self.crowd.random.uniform(0.2, min(10.0, self.crowd.seconds / 4)), self.leave)

    def leave(self) -> None:
        match self.crowd.random.randrange(3):
            case 0:
                self.forget(reset)
                self.again()
            case 1:
                self.forget()
                self.again()
            case 2:
                self.leaving = True
                self.send(frame(CLOSE, b"\x03\xe8"))
                self.while_open(4.0, lambda: self.wrong("not hung up on behind a close"))

    def parse(self) -> None:
        if not self.leaving:
            super().parse()
            return
        found, used = parse_frames(self.buffer)
        if any(first == 0x88 and payload == b"\x03\xe8" for first, payload in found):
            self.crowd.seen["closes echoed"] += 1
            self.echoed = True
        self.buffer = self.buffer[used:]

    def lost(self) -> None:
        if not self.echoed:
            super().lost()
        self.again()

    def again(self) -> None:
        self.crowd.later(self.crowd.random.uniform(0.05, 1.0), self.open)


class Stalling(Client):
    """Reads nothing for a while; then it must have current prices, or be dropped if it was long."""

    buffer_size = 4096

    def became_open(self) -> None:
        self.assets = ASSETS
        self.prices: dict[str, int] = {}
        self.stall_later()

    def open(self, head: bytes | None = None) -> None:
        self.pause = 0.0
        super().open(request())

    def stall_later(self) -> None:
        self.while_open(self.crowd.random.uniform(0.5, 2.0), self.stall)

    def stall(self) -> None:
        assert self.socket
        self.crowd.selector.unregister(self.socket)
        self.pause = self.crowd.random.choice((2.0, 8.0, 20.0, 70.0) if self.crowd.seconds >= 120 else (1.0, 2.0))
        self.crowd.seen["stalls"] += 1
        newest = self.crowd.newest
        self.full = False

        def look() -> None:
            self.full = self.crowd.newest - newest >= ENOUGH_TO_FILL

        self.while_open(35.0, look)  # it must be behind from here on, or CoinAPI failed too often
        self.while_open(self.pause, self.resume)

    def resume(self) -> None:
        assert self.socket
        self.crowd.selector.register(self.socket, selectors.EVENT_READ, self)
        newest = self.crowd.newest
        self.while_open(3.0, lambda: self.check(newest))

    def check(self, newest: int) -> None:
        if self.pause > 40 and self.full:
            self.wrong(f"not dropped after {self.pause} s without reading")
        elif min(self.prices.values()) < newest - 1:
            self.wrong(f"still behind 3 s after a stall of {self.pause} s: {self.prices}, {newest} was sent before")
        else:
            self.crowd.seen["caught up"] += 1
            self.stall_later()

    def parse(self) -> None:
        found, used = parse_frames(self.buffer)
        self.buffer = self.buffer[used:]
        for first, payload in found:
            if first == 0x89:
                self.send(frame(PONG, payload))
                continue
            asset_id, counter = parse_price(first, payload)
            if counter < self.prices.get(asset_id, 0):
                self.wrong(f"{asset_id} went back from {self.prices[asset_id]} to {counter}")
            self.prices[asset_id] = counter

    def lost(self) -> None:
        if self.pause > 40:
            self.crowd.seen["dropped as behind"] += 1
        else:
            super().lost()
        self.crowd.later(0.5, self.open)


# name: (request, what follows it, status or close code, or None for "we reset")
RUDE: dict[str, tuple[bytes, bytes, int | None]] = {
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"", 400),
    "headers of 40 KB": (b"GET /ws HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", b"", 431),
    "unknown asset": (request("/ws?assets=NOSUCH"), b"", 400),
    "/history": (get("/history"), b"", 200),
    "/metrics": (get("/metrics"), b"", 200),
    "half a request, reset": (request()[:60], b"", None),
    "half a request, silence": (request()[:60], b"", 0),
    "no mask": (request(), frame(TEXT, b"a", masked=False), 1002),
    "2 GiB announced": (request(), frame(BINARY, length=b"\x7f" + (1 << 31).to_bytes(8, "big")), 1009),
    "not UTF-8": (request(), frame(TEXT, b"\xff\xfe"), 1007),
    "a good close": (request(), frame(CLOSE, b"\x0f\xa0bye"), 4000),
    "60 KB of text, close": (request(), frame(TEXT, b"a" * 60_000) + frame(CLOSE, b"\x03\xe8"), 1000),
    "500 pings, reset": (request(), frame(PING, b"ping") * 500, None),
    "half a frame, reset": (request(), frame(TEXT, b"a" * 100)[:50], None),
    "random bytes, reset": (request(), random.Random(7).randbytes(500), None),
}


class Rude(Client):
    """Does one thing after another that no good client does, and wants the right answer to each."""

    def open(self, head: bytes | None = None) -> None:
        self.name, (head, self.then, self.right) = list(RUDE.items())[(self.opened + self.number) % len(RUDE)]
        self.all = b""
        super().open(head)
        if self.right is None:
            self.while_open(0.5, self.done)
        else:  # silence is cut off after 10 s
            self.while_open(4.0 if self.right else 14.0, self.late)

    def became_open(self) -> None:
        assert self.socket
        self.socket.settimeout(5.0)
        try:
            self.socket.sendall(self.then)
        except OSError:
            pass  # `read` will tell
        self.socket.setblocking(False)

    def done(self) -> None:
        self.crowd.seen["rude acts"] += 1
        self.forget(reset)
        self.crowd.later(self.crowd.random.uniform(0.1, 1.0), self.open)

    def late(self) -> None:
        self.wrong(f"not hung up on in time: {self.name}")
        self.done()

    def received(self, data: bytes) -> None:
        self.all += data
        if self.then and not self.open_already and b"\r\n\r\n" in self.all:
            self.open_already = True
            self.became_open()

    def lost(self) -> None:
        head, _, rest = self.all.partition(b"\r\n\r\n")
        status = head[9:12].decode() if head.startswith(b"HTTP/1.1 ") else "0"
        if status == "101":
            found, used = parse_frames(rest)
            first, payload = found[-1] if found and used == len(rest) else (0, b"")
            status = str(int.from_bytes(payload[:2], "big")) if first == 0x88 else "no close frame"
        if self.right is not None and status != str(self.right):
            self.wrong(f"{self.name} was answered {status}, not {self.right}: {head[:80]!r}")
        self.done()


# The clients of the storm


class Returning(Client):
    """Comes again when the server has hung up."""

    def lost(self) -> None:
        self.crowd.seen[f"{self.kind} connections ended by the server"] += 1
        self.crowd.later(DRIBBLE, self.open)


class Dribbler(Returning):
    """Sends half a request, a byte at a time."""

    def open(self, head: bytes | None = None) -> None:
        super().open(b"")
        self.dribble(0)

    def dribble(self, sent: int) -> None:
        sent += self.send(HALF[sent : sent + 1])
        self.while_open(DRIBBLE, lambda: self.dribble(sent))


class HistoryReader(Client):
    """Asks for the history and never reads it."""

    buffer_size = 4096

    def open(self, head: bytes | None = None) -> None:
        super().open(get("/history"))
        self.crowd.selector.unregister(self.socket)  # type: ignore[arg-type]


class Pinger(Returning):
    """Pings as fast as it can."""

    def became_open(self) -> None:
        self.position = 0
        self.crowd.selector.modify(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)  # type: ignore[arg-type]

    def serve(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            sent = self.send(PINGS[self.position :])
            self.position = (self.position + sent) % len(PINGS)
            self.crowd.seen["bytes of pings"] += sent
        if events & selectors.EVENT_READ:
            self.read()

    def parse(self) -> None:
        self.buffer = b""


def soak(port: int, clients: int, seconds: int) -> None:
    crowd, few = Crowd(port, seconds), max(1, clients // 10)
    kinds = [Steady] * (clients - 4 * few) + [Passing] * (2 * few) + [Stalling] * few + [Rude] * few
    crowd.run([kind(crowd, number) for number, kind in enumerate(kinds)])


def storm(port: int, dribblers: int, readers: int, pingers: int) -> None:
    crowd = Crowd(port)
    crowd.run([kind(crowd) for kind in [Dribbler] * dribblers + [HistoryReader] * readers + [Pinger] * pingers])


if __name__ == "__main__":
    raise_file_limit()
    what, numbers = sys.argv[1], [int(number) for number in sys.argv[2:]]
    if what == "soak":
        soak(*numbers)
    else:
        storm(*numbers)
