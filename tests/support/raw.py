"""Clients that send any bytes, and a parser for what comes back.

What comes back is read by the frame parser of `websockets`, which is as strict as a client may be.
"""

import json
import secrets
import socket
import struct
from collections.abc import Callable, Generator, Iterator
from http.client import HTTPResponse
from typing import BinaryIO

from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from price_server import PriceServer

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG
HEADERS = {  # the handshake of RFC 6455, 1.3
    "Host": "server.example.com",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


# What is sent


def request(
    target: str = "/ws", method: str = "GET", version: str = "HTTP/1.1", more: str = "", **headers: str | None
) -> bytes:
    """An upgrade request; a header given as None is left out, and `more` lines are added."""
    changed = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in changed.items() if value is not None]
    return f"{method} {target} {version}\r\n{''.join(lines)}{more}\r\n".encode("latin-1")


def get(path: str) -> bytes:
    """A plain request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def frame(opcode: int, payload: bytes = b"", fin: bool = True, masked: bool = True, length: bytes = b"") -> bytes:
    """One frame as a client sends it; `length` replaces the length field by any other."""
    size = len(payload)
    if not length:
        short = bytes([size]) if size < 126 else struct.pack("!BH", 126, min(size, 65_535))
        length = short if size < 1 << 16 else struct.pack("!BQ", 127, size)
    mask = secrets.token_bytes(4) if masked else b""
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload)) if masked else payload
    return bytes([fin << 7 | opcode, length[0] | masked << 7]) + length[1:] + mask + body


def fragments(opcode: int, *parts: bytes) -> bytes:
    """One message in as many frames as there are parts."""
    last = len(parts) - 1
    return b"".join([frame(CONT if index else opcode, part, fin=index == last) for index, part in enumerate(parts)])


def octets(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


# What comes back


def read_frame(read: Callable[[int], Generator[None, None, bytes]]) -> tuple[int, bytes]:
    """Opcode and payload of one frame, parsed and checked by `websockets`."""

    def run() -> Generator[None, None, None]:
        parsed.append((yield from Frame.parse(read, mask=False)))

    parsed: list[Frame] = []
    assert list(run()) == []  # it never asks for more than `read` gives
    assert parsed[0].fin
    return parsed[0].opcode, bytes(parsed[0].data)


def parse(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Opcode and payload of every frame in a stream, which must end with the end of a frame."""
    view, position = memoryview(stream), 0

    def read(size: int) -> Generator[None, None, bytes]:
        nonlocal position
        assert position + size <= len(view), "the stream ends within a frame"
        position += size
        yield from ()
        return bytes(view[position - size : position])

    while position < len(view):
        yield read_frame(read)


def read_head(file: BinaryIO) -> bytes:
    """The head of an answer with its empty line, or what came of it before the end."""
    head = b""
    while line := file.readline():
        head += line
        if line == b"\r\n":
            break
    return head


class RawClient:
    """A client that sends any bytes; `with RawClient(port) as client:` leaves it connected and upgraded."""

    def __init__(self, port: int, upgrade: bytes = b"", after: bytes = b"", receive_buffer: int = 0):
        self.socket = visit(port, receive_buffer=receive_buffer)
        self.file = self.socket.makefile("rb")
        self.socket.sendall((upgrade or request()) + after)
        self.status = read_head(self.file).partition(b"\r\n")[0]

    def __enter__(self) -> "RawClient":
        assert self.status == b"HTTP/1.1 101 Switching Protocols"
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes, chop: int = 0) -> None:
        """In one segment, or in several of `chop` bytes."""
        for start in range(0, len(data), chop or len(data)):
            self.socket.sendall(data[start : start + (chop or len(data))])

    def _read(self, size: int) -> Generator[None, None, bytes]:
        data = self.file.read(size)
        if len(data) < size:
            raise EOFError
        yield from ()
        return data

    def read(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame."""
        return read_frame(self._read)

    def read_close(self) -> int | None:
        """The code of the close frame that comes next, and as the last: a reset would raise."""
        opcode, payload = self.read()
        assert opcode == CLOSE
        self.socket.shutdown(socket.SHUT_WR)
        assert self.file.read() == b""
        return int.from_bytes(payload[:2], "big") if payload else None

    def prices(self, number: int) -> list[tuple[str, float]]:
        """The next price messages, as (asset_id, price); what comes between them is passed over."""
        found: list[tuple[str, float]] = []
        while len(found) < number:
            opcode, payload = self.read()
            if opcode == TEXT and payload.startswith(b"{"):
                update = json.loads(payload)
                found.append((update["asset_id"], update["price"]))
        return found

    def has_nothing_to_read(self) -> bool:
        """Whether nothing has come that was not read yet, the end neither."""
        self.socket.setblocking(False)
        try:
            if not self.file.peek(1):
                self.socket.recv(1, socket.MSG_PEEK)  # b"" for the end
            return False
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(10)

    def reset(self) -> None:
        self.file.close()
        reset(self.socket)


def visit(port: int, data: bytes = b"", receive_buffer: int = 0, host: str = "127.0.0.1") -> socket.socket:
    """A connection that has sent these bytes."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, receive_buffer)
    sock.settimeout(10)
    sock.connect((host, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(data)
    return sock


def reset(sock: socket.socket) -> None:
    """Hang up without a goodbye: the other side's next step on it fails."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side hangs up; a reset would raise."""
    return b"".join(iter(lambda: sock.recv(65_536), b""))


def ask(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to an HTTP request."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(data)
        with HTTPResponse(sock, method=data.partition(b" ")[0].decode("latin-1")) as response:
            response.begin()
            return response.status, dict(response.headers), b"" if response.status == 101 else response.read()


def honest(server: PriceServer, path: str = "/ws") -> ClientConnection:
    """A client of another maker, which reads all that arrives."""
    return connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None, max_queue=None)


def prices(client: ClientConnection, number: int) -> list[tuple[str, float]]:
    """The next messages of a client, as (asset_id, price)."""
    messages = [json.loads(client.recv(timeout=10)) for _ in range(number)]
    return [(message["asset_id"], message["price"]) for message in messages]
