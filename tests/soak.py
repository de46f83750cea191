"""A tracker under load for minutes: 1,000 clients, some of them rude, and a CoinAPI that fails now and then.

`python tests/soak.py [--minutes 2] [--clients 1000]` prints figures and exits 1 when a promise broke.

The stand-in's price is a counter of its good answers, so a poll that a client missed is a gap, and
its `time` is the monotonic clock, so a message tells how long it took. This process runs the
stand-in and the tracker; a second one (`--crowd`) has all the clients in one selector loop.
"""

import argparse
import heapq
import itertools
import json
import random
import re
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from running import ASSETS, Tracker, wait_for
from stand_in import KEY, OUT_OF_CREDITS, StandIn, rates_body

INTERVAL = 0.1  # seconds
ENOUGH_TO_FILL = 280  # polls of 731 bytes, 0.2 MB: more than the buffers on both sides hold
WITHOUT_DOT = 50  # every so many polls, DOT has no rate
MEMORY_ROOM = 8 << 20  # bytes of growth after the warm-up, 5 MiB in half an hour: history 0.7, the rest malloc settling
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) \S.*")
PRICE = re.compile(rb'\{"asset_id":"([A-Z]+)","price":([0-9]+)\.0,"time":"([0-9.]+)"\}')


# CoinAPI


class Source(StandIn):
    """Counts its good answers; `fail` makes the next ones bad."""

    def __init__(self) -> None:
        super().__init__()
        self.good = 0
        self.bad: Counter[str] = Counter()
        self.trouble = ""
        self.left = 0  # bad answers still to give
        self.answer = self.reply

    def __enter__(self) -> "Source":
        super().__enter__()
        return self

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        if self.left:
            self.left -= 1
            self.bad[self.trouble] += 1
            TROUBLES[self.trouble](self, handler)
            return
        self.good += 1
        rates = dict.fromkeys(ASSETS, float(self.good))
        if self.good % WITHOUT_DOT == 0:
            rates.pop("DOT")
        self.send(handler, rates_body(rates, at=f"{time.monotonic():.6f}"))

    def fail(self, trouble: str, times: int) -> None:
        self.trouble, self.left = trouble, times


def _status(status: int, body: bytes = b'{"error": "no"}', **headers: str) -> Callable[..., None]:
    return lambda source, handler: source.send(handler, body, status, **headers)


def _hang_up(source: Source, handler: BaseHTTPRequestHandler, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    handler.close_connection = True


def _half(source: Source, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"asset_id_base": "USD", "rates": [')
    handler.close_connection = True


def _drip(source: Source, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(15):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(1)
    handler.close_connection = True


def _garbage(source: Source, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
    handler.close_connection = True


TROUBLES: dict[str, Callable[[Source, BaseHTTPRequestHandler], None]] = {
    "500": _status(500),
    "503, retry after 1 s": _status(503, Retry_After="1"),
    "550": _status(550),
    "400": _status(400),
    "401": _status(401),
    "403, out of credits": _status(403, json.dumps(OUT_OF_CREDITS).encode()),
    "429, retry after 1 s": _status(429, Retry_After="1"),
    "redirect": _status(302, Location="http://127.0.0.1:9/"),
    "not JSON": _status(200, b"<html>"),
    "empty": _status(200, b""),
    "no list of rates": _status(200, b'{"rates": null}'),
    "no sound rate": _status(200, b'{"rates": [{"asset_id_quote": "BTC", "rate": null, "time": "x"}]}'),
    "broken gzip": _status(200, b"\x1f\x8b\x08broken", Content_Encoding="gzip"),
    "over 1 MiB": _status(200, b" " * (1 << 20) + b"{}"),
    "no HTTP": _garbage,
    "hangs up": _hang_up,
    "half an answer": _half,
}
SHORT = tuple(TROUBLES)
SLOW_TROUBLES: dict[str, Callable[[Source, BaseHTTPRequestHandler], None]] = {
    "silent for 12 s": lambda source, handler: _hang_up(source, handler, 12),
    "drips": _drip,
}
LONG = SHORT + tuple(SLOW_TROUBLES)
TROUBLES |= SLOW_TROUBLES | {"the end": _status(500)}


# The clients, in a process of their own


def client_frame(first: int, payload: bytes) -> bytes:
    """One frame as a client sends it, with a mask of zeros."""
    size = len(payload)
    length = struct.pack("!B", 0x80 | size) if size < 126 else struct.pack("!BH", 0xFE, size)
    return bytes([first]) + length + bytes(4) + payload


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


def request(path: str = "/ws", **headers: str) -> bytes:
    fields = {
        "Host": "127.0.0.1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


class Crowd:
    """All the clients, their selector, and what was seen."""

    def __init__(self, port: int, clients: int, seconds: float):
        self.port = port
        self.seconds = seconds
        self.selector = selectors.DefaultSelector()
        self.random = random.Random(6)
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.delays: Counter[int] = Counter()  # milliseconds from CoinAPI's answer to a steady client
        self.newest = 0  # the counter of the latest poll that any client has seen
        self.parsed: dict[tuple[tuple[str, ...], bytes], tuple[tuple[int, ...], float]] = {}
        few = max(1, clients // 10)
        self.clients: list[Client] = [Steady(self, number) for number in range(clients - 4 * few)]
        self.clients += [Passing(self, number) for number in range(2 * few)]
        self.clients += [Stalling(self, number) for number in range(few)]
        self.clients += [Rude(self, number) for number in range(few)]

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.order), action))

    def run(self) -> None:
        """Until a line on stdin: the counter that every steady client must have seen by then."""
        for client in self.clients:
            client.open()
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            delay = self.timers[0][0] - time.monotonic() if self.timers else 1.0
            for key, _ in self.selector.select(max(delay, 0)):
                if key.data is None:
                    line = sys.stdin.readline()
                    if line:  # else the first process is gone
                        self.finish(int(line))
                    return
                if key.fileobj is key.data.socket:  # not left or opened anew earlier in this turn
                    key.data.read()
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def finish(self, last: int) -> None:
        for key in list(self.selector.get_map().values()):
            if key.data and key.fileobj is key.data.socket:
                key.data.read()
        for client in self.clients:
            if isinstance(client, Steady) and client.last != last:
                self.wrong[f"a steady client saw poll {client.last} last, it was {last}"] += 1
            client.forget()

    def polls(self, assets: tuple[str, ...], data: bytes) -> tuple[tuple[int, ...], float, int]:
        """Which whole polls the data is, when the last one was made, and how many bytes that were.

        Ten clients of a poll get the same bytes: they are taken apart once.
        """
        known = self.parsed.get((assets, data))
        if known:
            return *known, len(data)
        counters: list[int] = []
        group: list[bytes] = []
        made = 0.0
        position = used = 0
        found, _ = parse_frames(data)
        for first, payload in found:
            position += 2 + len(payload)
            asset_id, counter, at = parse_price(first, payload)
            if not group:
                counters.append(counter)
            group.append(asset_id.encode())
            expected = [asset for asset in assets if asset != "DOT" or counter % WITHOUT_DOT]
            if counter != counters[-1] or asset_id != expected[len(group) - 1]:
                raise ValueError(f"poll {counters[-1]} is {b' '.join(group).decode()} {counter}")
            if len(group) == len(expected):
                made, used, group = at, position, []
        if group:
            counters.pop()
        if used == len(data):
            if len(self.parsed) > 1000:
                self.parsed.clear()
            self.parsed[assets, data] = tuple(counters), made
        return tuple(counters), made, used


def parse_price(first: int, payload: bytes) -> tuple[str, int, float]:
    """A price message's asset, counter and time."""
    match = PRICE.fullmatch(payload)
    if first != 0x81 or not match:
        raise ValueError(f"no price message: {first:#x} {payload[:80]!r}")
    return match[1].decode(), int(match[2]), float(match[3])


class Client:
    """One connection after another; this base reads prices and answers pings."""

    buffer_size = 0  # bytes of SO_RCVBUF, 0 for the default

    def __init__(self, crowd: Crowd, number: int):
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
        self.crowd.seen["connections"] += 1

    def wrong(self, what: str) -> None:
        self.crowd.wrong[f"{type(self).__name__.lower()} client: {what}"] += 1

    def while_open(self, seconds: float, action: Callable[[], None]) -> None:
        """Do it later, but not to the next connection."""
        sock = self.socket
        self.crowd.later(seconds, lambda: action() if sock and self.socket is sock else None)

    def forget(self) -> None:
        """Close the socket as it is."""
        if self.socket:
            if self.socket in self.crowd.selector.get_map():
                self.crowd.selector.unregister(self.socket)
            self.socket.close()
            self.socket = None

    def reset(self) -> None:
        if self.socket:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.forget()

    def send(self, data: bytes) -> None:
        try:
            if self.socket:
                self.socket.send(data)
        except OSError:
            pass  # full or gone: `read` will tell

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
            self.send(client_frame(0x8A, b""))
        if not self.last or not self.buffer:
            return
        ping = self.buffer.find(b"\x89\x00")
        counters, made, used = self.crowd.polls(self.assets, self.buffer if ping < 0 else self.buffer[:ping])
        self.buffer = self.buffer[used:]
        for counter in counters:
            if counter != self.last + 1:
                self.wrong(f"poll {counter} came behind {self.last}")
            self.last = counter
        if counters:
            self.crowd.newest = max(self.crowd.newest, self.last)
            self.polled(len(counters), made)
        if ping >= 0 and used == ping:
            self.parse()

    def parse_snapshot(self) -> None:
        found, _ = parse_frames(self.buffer)
        prices = [parse_price(*frame) for frame in found[: len(self.assets)]]
        if len(prices) < len(self.assets):
            return
        self.last = max(counter for _, counter, _ in prices)
        right = [(asset, self.last - (asset == "DOT" and self.last % WITHOUT_DOT == 0)) for asset in self.assets]
        if [(asset_id, counter) for asset_id, counter, _ in prices] != right:
            raise ValueError(f"snapshot is {prices}")
        self.buffer = self.buffer[sum(2 + len(payload) for _, payload in found[: len(prices)]) :]

    def polled(self, polls: int, made: float) -> None:
        self.crowd.seen["polls checked"] += polls


class Steady(Client):
    """Connects once and misses nothing."""

    def polled(self, polls: int, made: float) -> None:
        super().polled(polls, made)
        self.crowd.delays[int((time.monotonic() - made) * 1000)] += 1


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
                self.reset()
                self.again()
            case 1:
                self.forget()
                self.again()
            case 2:
                self.leaving = True
                self.send(client_frame(0x88, b"\x03\xe8"))
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
                self.send(client_frame(0x8A, payload))
                continue
            asset_id, counter, _ = parse_price(first, payload)
            if counter < self.prices.get(asset_id, 0):
                self.wrong(f"{asset_id} went back from {self.prices[asset_id]} to {counter}")
            self.prices[asset_id] = counter

    def lost(self) -> None:
        if self.pause > 40:
            self.crowd.seen["dropped as behind"] += 1
        else:
            super().lost()
        self.crowd.later(0.5, self.open)


# name: (request or None for a proper one, what follows it, status or close code, or None for "we reset")
RUDE: dict[str, tuple[bytes | None, bytes, int | None]] = {
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"", 400),
    "headers of 40 KB": (b"GET /ws HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", b"", 431),
    "POST": (b"POST /ws HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", b"", 405),
    "old version": (request(Sec_WebSocket_Version="8"), b"", 426),
    "bad key": (request(Sec_WebSocket_Key="abc"), b"", 400),
    "unknown asset": (request("/ws?assets=NOSUCH"), b"", 400),
    "unknown path": (request("/nowhere"), b"", 404),
    "/prices": (request("/prices"), b"", 200),
    "/history": (request("/history"), b"", 200),
    "/metrics": (request("/metrics"), b"", 200),
    "half a request, reset": (request()[:60], b"", None),
    "half a request, silence": (request()[:60], b"", 0),
    "no mask": (None, b"\x81\x01a", 1002),
    "reserved bit": (None, client_frame(0xC1, b"a"), 1002),
    "unknown opcode": (None, client_frame(0x83, b"a"), 1002),
    "ping of 126 bytes": (None, client_frame(0x89, b"a" * 126), 1002),
    "ping in fragments": (None, client_frame(0x09, b"a"), 1002),
    "length not minimal": (None, b"\x81\xfe\x00\x01\x00\x00\x00\x00a", 1002),
    "continuation of nothing": (None, client_frame(0x80, b"a"), 1002),
    "2 GiB announced": (None, b"\x82\xff\x00\x00\x00\x00\x80\x00\x00\x00", 1009),
    "not UTF-8": (None, client_frame(0x81, b"\xff\xfe"), 1007),
    "close code 1005": (None, client_frame(0x88, b"\x03\xed"), 1002),
    "a good close": (None, client_frame(0x88, b"\x0f\xa0bye"), 4000),
    "60 KB of text, close": (None, client_frame(0x81, b"a" * 60_000) + client_frame(0x88, b"\x03\xe8"), 1000),
    "500 pings, reset": (None, client_frame(0x89, b"ping") * 500, None),
    "half a frame, reset": (None, client_frame(0x81, b"a" * 100)[:50], None),
    "random bytes, reset": (None, random.Random(7).randbytes(500), None),
}


class Rude(Client):
    """Does one thing after another that no good client does, and wants the right answer to each."""

    def open(self, head: bytes | None = None) -> None:
        self.name, (head, self.then, self.right) = list(RUDE.items())[(self.opened + self.number) % len(RUDE)]
        self.all = b""
        super().open(request() if head is None else head)
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
        self.reset()
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


def run_crowd(port: int, clients: int, seconds: float) -> None:
    """The second process: its result is JSON on stdout."""
    crowd = Crowd(port, clients, seconds)
    crowd.run()
    result = {"seen": crowd.seen, "wrong": crowd.wrong, "delays": crowd.delays}
    print(json.dumps(result), flush=True)


# The first process


class Run:
    """One soak; `wrong` says what promise broke."""

    def __init__(self, minutes: float, clients: int):
        self.seconds = minutes * 60
        self.clients = clients
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int, int, int]] = []  # seconds, threads, files, memory
        self.bursts = 0

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def go(self) -> bool:
        with Source() as source, Tracker("--interval", f"{INTERVAL}", COIN_API_KEY=KEY, COIN_API_URL=source.url) as t:
            wait_for(lambda: source.good > 3)
            before = t.usage()
            crowd = self.start_crowd(t.port)
            warm = min(60.0, self.seconds / 4)
            start = time.monotonic()
            troubles = itertools.cycle(LONG if self.seconds >= 120 else SHORT)
            pause = min(5.0, self.seconds / 25)
            next_trouble, recovered = start + 1.0, source.good
            while (passed := time.monotonic() - start) < self.seconds and t.process.poll() is None:
                threads, files, memory, _ = t.usage()
                self.samples.append((passed, threads, files, memory))
                if time.monotonic() >= next_trouble and source.good >= recovered + 5:
                    name = next(troubles)
                    source.fail(name, 1 if name in SLOW_TROUBLES or "1 s" in name else 1 + self.bursts % 3)
                    self.bursts += 1
                    next_trouble, recovered = time.monotonic() + pause, source.good
                time.sleep(min(0.5, self.seconds / 50))
            usage = t.usage()
            result = self.end(source, t, crowd)
            self.report(source, t, result, before, warm, usage)
        for line in self.wrong:
            print("WRONG", line)
        print("failed" if self.wrong else "passed")
        return not self.wrong

    def start_crowd(self, port: int) -> "subprocess.Popen[str]":
        command = [sys.executable, __file__, "--crowd", str(port), str(self.clients), str(self.seconds)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self, source: Source, tracker: Tracker, crowd: "subprocess.Popen[str]") -> dict[str, Any]:
        """Let the last poll arrive, have the clients leave, stop; what the clients saw."""
        source.fail("the end", 1 << 30)
        wait_for(lambda: source.bad["the end"], 30)  # so the good answer before it is published
        time.sleep(1.0)
        self.metrics = metrics(tracker)
        try:
            output, _ = crowd.communicate(f"{source.good}\n", timeout=30)
            result: dict[str, Any] = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError):
            crowd.kill()
            result = {"seen": {}, "wrong": {"the process of the clients ended without a result": 1}, "delays": {}}
        try:
            wait_for(lambda: metrics(tracker)["clients"] == 0 and tracker.usage()[0] <= 4, 15)
        except AssertionError:
            pass  # the report tells
        self.after = tracker.usage()
        started = time.monotonic()
        status = tracker.stop(signal.SIGTERM)
        self.check(status == 0, f"exit status {status}")
        self.check(time.monotonic() - started < 2, "took over 2 s to stop")
        return result

    def report(
        self,
        source: Source,
        tracker: Tracker,
        result: dict[str, Any],
        before: tuple[int, int, int, float],
        warm: float,
        usage: tuple[int, int, int, float],
    ) -> None:
        seen, delays = Counter(result["seen"]), {int(ms): times for ms, times in result["delays"].items()}
        window = max(1.0, warm / 3)
        early = [sample for sample in self.samples if warm <= sample[0] < warm + window]
        late = [sample for sample in self.samples if sample[0] >= self.samples[-1][0] - window]
        rows = [
            ("before any client", *before[:3]),
            (f"after {warm:.0f} s", *(statistics.median(column) for column in list(zip(*early, strict=True))[1:])),
            (
                f"after {self.seconds:.0f} s",
                *(statistics.median(column) for column in list(zip(*late, strict=True))[1:]),
            ),
            ("clients gone", *self.after[:3]),
        ]
        print(f"{'':20}{'threads':>10}{'files':>10}{'memory':>12}")
        for name, threads, files, memory in rows:
            print(f"{name:20}{threads:>10.0f}{files:>10.0f}{memory / (1 << 20):>8.1f} MiB")
        most = [max(column) for column in list(zip(*self.samples, strict=True))[1:]]
        print(
            "MiB over time:      ",
            *(f"{self.samples[len(self.samples) * n // 11][3] / (1 << 20):.1f}" for n in range(1, 11)),
        )
        print(f"{'at the most':20}{most[0]:>10}{most[1]:>10}{most[2] / (1 << 20):>8.1f} MiB")
        cpu = (usage[3] - before[3]) / self.seconds
        print(f"\n{self.clients} clients, {self.seconds:.0f} s, CPU of the tracker {cpu:.0%}")
        print(f"polls: {source.good} good, {source.bad.total()} failed in {self.bursts} bursts")
        print(f"clients: {', '.join(f'{number} {what}' for what, number in seen.items())}")
        print(f"clients dropped: {', '.join(f'{n:.0f} {w}' for w, n in self.metrics.items() if 'dropped' in w)}")
        print(f"messages sent: {self.metrics['messages_sent_total']:.0f}")
        if delays:
            quantiles: dict[float, int] = {}
            total, summed = sum(delays.values()), 0
            for ms in sorted(delays):
                summed += delays[ms]
                for share in (0.5, 0.99, 1.0):
                    if summed >= share * total:
                        quantiles.setdefault(share, ms)
            print(
                "from answer to steady client: " + ", ".join(f"{q:.0%} in {ms + 1} ms" for q, ms in quantiles.items())
            )
        print(f"log: {len(tracker.log)} lines\n")

        for what, times in result["wrong"].items():
            self.check(False, f"{times} times: {what}")
        self.check(rows[2][3] - rows[1][3] < MEMORY_ROOM, "memory grew")
        # A handshake that says nothing has its thread for 10 s; so one for each rude client at the most.
        self.check(most[0] <= before[0] + self.clients // 10 + 10, "more threads than rude clients")
        self.check(warm < 30 or rows[2][1] <= rows[1][1] + 10, "more threads than after the warm-up")
        self.check(
            warm < 30 or abs(rows[2][2] - rows[1][2]) <= self.clients / 20,
            "other number of files than after the warm-up",
        )
        self.check(self.after[0] <= before[0], "threads left when the clients are gone")
        self.check(self.after[1] <= before[1], "files left when the clients are gone")
        self.check(seen["polls checked"] > self.clients * source.good * 0.5, "too few polls were checked")
        self.check(seen["rude acts"] > 0 and seen["stalls"] > 0 and seen["caught up"] > 0, "nothing rude happened")
        strange = [line for line in tracker.log if not LOG_LINE.fullmatch(line)]
        self.check(not strange, f"log: {strange[:5]}")
        # A burst is a warning and its end; DOT is missed and back; the start and the stop have two each.
        lines = 2 * (self.bursts + 1) + 2 * (source.good // WITHOUT_DOT) + 4
        self.check(len(tracker.log) <= lines, f"log: more than {lines} lines")
        self.check(KEY not in tracker.text, "log: shows the key")


def metrics(tracker: Tracker) -> dict[str, float]:
    with urllib.request.urlopen(f"{tracker.http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.removeprefix("tracker_").rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def main() -> int:
    if sys.argv[1:2] == ["--crowd"]:
        run_crowd(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description="A tracker under load.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=1000)
    options = parser.parse_args()
    return 0 if Run(options.minutes, options.clients).go() else 1


if __name__ == "__main__":
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, ValueError, OSError):
        pass  # the clients say so when it is too low
    sys.exit(main())
