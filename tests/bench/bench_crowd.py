"""The benchmark's readers where there is no C compiler: what bench_crowd.c does, in Python, and not as fast."""

import json
import math
import selectors
import socket
import sys
import time
from collections import deque

from bench_sides import ACCEPT, HOST, raise_file_limit

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="  # what ACCEPT answers
PING, PONG = b"\x89\x00", b"\x8a\x80\x00\x00\x00\x00"  # as the tracker sends it; the masked answer
CONNECT_TIMEOUT = 30.0  # seconds for one command
ROUND_TIMEOUT = 20.0  # seconds


class Client:
    __slots__ = ("missing", "seen", "sock")

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.missing = 0  # bytes, in this round
        self.seen = b""  # what came, in a round that checks it


class Reader:
    """Opens connections and reads them, all in one thread; does what it is told on stdin."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.clients: list[Client] = []
        self.stalled: list[socket.socket] = []  # never read
        self.buffer = bytearray(1 << 16)

    def run(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(self, command.pop("do"))(**command)
            except (OSError, ValueError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)

    def connect(self, port: int, clients: int, in_flight: int, stall: bool) -> dict[str, float]:
        """Open this many connections, `in_flight` at a time."""
        opening: deque[socket.socket] = deque()
        start = time.monotonic()
        for number in range(clients + in_flight):
            if number >= in_flight and opening:
                self.finish(opening.popleft(), stall)
            if number < clients:
                opening.append(self.begin(port, stall))
            if time.monotonic() > start + CONNECT_TIMEOUT:
                raise TimeoutError(f"{number} of {clients} connections in {CONNECT_TIMEOUT:g} s")
        return {"seconds": time.monotonic() - start}

    def begin(self, port: int, stall: bool) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(CONNECT_TIMEOUT)
        if stall:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((HOST, port))
        sock.send(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        return sock

    def finish(self, sock: socket.socket, stall: bool) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(4096)
            if not data:
                raise ConnectionError(f"client {len(self.clients) + 1} was hung up on in its handshake")
            head += data
        if ACCEPT not in head:
            raise ConnectionError(f"no handshake: {head[:60]!r}")
        sock.setblocking(False)
        if stall:
            self.stalled.append(sock)
        else:
            self.clients.append(Client(sock))
            self.selector.register(sock, selectors.EVENT_READ, self.clients[-1])

    def round(self, poll: int, expected: str) -> dict[str, float]:
        """Read until every client got `poll` bytes more: when 99 % of them had, and when the last had."""
        for client in self.clients:
            client.missing = poll
        print("{}", flush=True)  # ready
        done: list[float] = []
        deadline = time.monotonic() + ROUND_TIMEOUT
        while len(done) < len(self.clients):
            ready = self.selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{len(self.clients) - len(done)} clients lack bytes after {ROUND_TIMEOUT:g} s")
            for key, _ in ready:
                client = key.data
                client.missing -= self.read(client, bool(expected))
                if client.missing == 0:
                    done.append(time.monotonic())
                elif client.missing < 0:
                    raise ValueError(f"a client got {-client.missing} bytes too many")
        for client in self.clients:
            if client.seen != bytes.fromhex(expected):
                raise ValueError(f"a client got other bytes: {client.seen[:80]!r}")
            client.seen = b""
        return {"p99": done[math.ceil(len(done) * 0.99) - 1], "last": done[-1]}

    def drain(self, quiet: float, seconds: float) -> dict[str, float]:
        """Read on until nothing came for `quiet` seconds, or for `seconds` in all."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = self.selector.select(min(quiet, left))
            if not ready and quiet < left:
                break
            for key, _ in ready:
                self.read(key.data)
        return {}

    def read(self, client: Client, keep: bool = False) -> int:
        """How many bytes of messages came. Pings are answered; their bytes stand in no price."""
        size = client.sock.recv_into(self.buffer)
        if not size:
            raise ConnectionError("a client was hung up on")
        if keep:
            client.seen += self.buffer[:size]
        if (size == 2 or size > client.missing) and PING in self.buffer[:size]:
            client.sock.send(PONG)
            client.seen = client.seen.replace(PING, b"")
            size -= len(PING)
        return size


if __name__ == "__main__":
    raise_file_limit()
    Reader().run()
