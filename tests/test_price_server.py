"""A PriceServer in this process: RFC 6455 by the book, limits, the library's interface, what is sent.

Raw sockets send what no honest client would. What comes back is read by the frame parser of
`websockets`, which is as strict as a client may be.
"""

import json
import logging
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator
from http.client import HTTPResponse
from typing import Any

import psutil
import pytest
from running import ASSETS, wait_for
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from coin_api import PriceUpdate
from price_server import PriceServer
from price_server.connection import Connection
from price_server.frames import MAX_MESSAGE, encode_frame

CONT, TEXT, BINARY = Opcode.CONT, Opcode.TEXT, Opcode.BINARY
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG
HEADERS = {  # the handshake of RFC 6455, 1.3
    "Host": "server.example.com",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
Start = Callable[..., PriceServer]
Updates = Callable[[float], list[PriceUpdate]]


def request(
    target: str = "/ws", method: str = "GET", version: str = "HTTP/1.1", more: str = "", **headers: str | None
) -> bytes:
    """An upgrade request; a header given as None is left out, and `more` lines are added."""
    changed = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}\r\n" for name, value in changed.items() if value is not None]
    return f"{method} {target} {version}\r\n{''.join(lines)}{more}\r\n".encode("latin-1")


def frame(
    opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, masked: bool = True, length: bytes = b""
) -> bytes:
    """One frame as a client sends it; `length` replaces the length field by any other."""
    size = len(payload)
    if not length:
        short = bytes([size]) if size < 126 else struct.pack("!BH", 126, min(size, 65_535))
        length = short if size < 1 << 16 else struct.pack("!BQ", 127, size)
    mask = secrets.token_bytes(4) if masked else b""
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload)) if masked else payload
    return bytes([fin << 7 | rsv << 4 | opcode, length[0] | masked << 7]) + length[1:] + mask + body


def fragments(opcode: int, *parts: bytes) -> bytes:
    """One message in as many frames as there are parts."""
    last = len(parts) - 1
    return b"".join([frame(CONT if index else opcode, part, fin=index == last) for index, part in enumerate(parts)])


def octets(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


class RawClient:
    """A client that sends any bytes; `with RawClient(port) as client:` leaves it connected and upgraded."""

    def __init__(
        self, port: int, upgrade: bytes | None = None, behind: bytes = b"", receive_buffer: int = 0, timeout: float = 10
    ):
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, receive_buffer)
        self.unsent = b""  # the rest of a frame
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")
        self.socket.sendall((upgrade or request()) + behind)
        self.status = self.file.readline()
        while self.file.readline() not in (b"\r\n", b""):
            pass

    def __enter__(self) -> "RawClient":
        assert self.status == b"HTTP/1.1 101 Switching Protocols\r\n"
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

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.socket.close()


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


def ask(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to an HTTP request."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(data)
        with HTTPResponse(sock, method=data.partition(b" ")[0].decode("latin-1")) as response:
            response.begin()
            return response.status, dict(response.headers), b"" if response.status == 101 else response.read()


def honest(server: PriceServer, path: str = "/ws") -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None, max_queue=None)


def prices(client: ClientConnection, number: int) -> list[tuple[str, float]]:
    """The next messages of a client, as (asset_id, price)."""
    messages = [json.loads(client.recv(timeout=10)) for _ in range(number)]
    return [(message["asset_id"], message["price"]) for message in messages]


def handshakes() -> int:
    """How many handshakes are under way in this process."""
    return [thread.name for thread in threading.enumerate()].count("handshake")


def gone(server: PriceServer) -> None:
    wait_for(lambda: not server.clients, what="no client left")


@pytest.fixture(scope="module", autouse=True)
def quick_stops() -> Iterator[None]:
    """A stop waits less long for clients that do not hang up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PriceServer, "stop_timeout", 0.3)
        yield


@pytest.fixture(scope="module")
def echo() -> Iterator[PriceServer]:
    """A server without prices that sends every message back, as Autobahn|Testsuite wants it."""
    server = PriceServer(ASSETS)
    server.set_fn_message_received(lambda client, server, message: server.send_message(client, message))
    server.run_forever(threaded=True)
    yield server
    server.shutdown_gracefully()


@pytest.fixture
def client(echo: PriceServer) -> Iterator[RawClient]:
    with RawClient(echo.port) as client:
        yield client


@pytest.fixture(autouse=True)
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Tests fail when something was logged as an error; one that means to provoke it clears the list."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield logged
    logging.getLogger().removeHandler(handler)
    assert logged == []


# The opening handshake (RFC 6455, 4.2)


def test_the_handshake_is_answered_as_in_the_rfc(server: PriceServer) -> None:
    status, headers, _ = ask(server.port, request())
    assert (status, headers["Upgrade"], headers["Connection"]) == (101, "websocket", "Upgrade")
    assert headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize(
    "upgrade",
    [
        request(Connection="keep-alive, Upgrade"),  # as Firefox sends it
        request(Connection=None, more="Connection: keep-alive\r\nConnection: upgrade\r\n"),
        request(Upgrade="h2c, WebSocket"),
        request(more="Origin: https://example.org\r\n"),
        request(more="Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: chat\r\n"),
        request(more=f"X-Long: {'x' * 30_000}\r\n"),
        request("/ws?assets="[:3]),
        request("/%77s"),
        request("http://server.example.com/ws"),
    ],
)
def test_a_proper_upgrade_is_accepted(echo: PriceServer, upgrade: bytes) -> None:
    with RawClient(echo.port, upgrade) as client:
        client.send(frame(TEXT, b"hello"))
        assert client.read() == (TEXT, b"hello")


@pytest.mark.parametrize(
    ("upgrade", "status", "header", "error"),
    [
        (request(Upgrade=None), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(Upgrade="websockets"), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(Upgrade="xwebsocket, h2c"), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(Connection=None), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(Connection="keep-alive"), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(Connection="upgraded"), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(version="HTTP/1.0"), 426, ("Upgrade", "websocket"), "speaks WebSocket"),
        (request(method="HEAD"), 426, ("Upgrade", "websocket"), ""),
        (request(Sec_WebSocket_Version=None), 426, ("Sec-WebSocket-Version", "13"), "must be 13"),
        (request(Sec_WebSocket_Version="8"), 426, ("Sec-WebSocket-Version", "13"), "must be 13"),
        (request(Sec_WebSocket_Version="013"), 426, ("Sec-WebSocket-Version", "13"), "must be 13"),
        (request(Sec_WebSocket_Version="13, 13"), 426, ("Sec-WebSocket-Version", "13"), "must be 13"),
        (request(Host=None), 400, None, "one Host header"),
        (request(more="Host: another\r\n"), 400, None, "one Host header"),
        (request(Sec_WebSocket_Key=None), 400, None, "16 bytes in base64"),
        (request(Sec_WebSocket_Key=""), 400, None, "16 bytes in base64"),
        (request(Sec_WebSocket_Key="dGhlIHNhbXBsZQ=="), 400, None, "16 bytes in base64"),
        (request(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ"), 400, None, "16 bytes in base64"),
        (request(Sec_WebSocket_Key="!!!!IHNhbXBsZSBub25jZQ=="), 400, None, "16 bytes in base64"),
        (request(Sec_WebSocket_Key="\xe9\xe9\xe9\xe9IHNhbXBsZSBub25jZQ=="), 400, None, "16 bytes in base64"),
        (request(more=f"Sec-WebSocket-Key: {HEADERS['Sec-WebSocket-Key']}\r\n"), 400, None, "16 bytes in base64"),
        (request("http://[/ws"), 400, None, "not a URL"),
        (request(method="POST"), 405, ("Allow", "GET, HEAD"), "method POST"),
        (request("/wss"), 404, None, "not found"),
        (request(more=f"X-Long: {'x' * 33_000}\r\n"), 431, None, ""),
        (request(more=f"X: {'x' * 900}\r\n" * 37), 431, None, ""),
        (request(more="X: x\r\n" * 200), 431, None, ""),
        (b"GET /" + b"x" * 40_000, 431, None, ""),
        (b"hello\r\n\r\n", 400, None, ""),
        (b"GET /ws HTTP/2.0\r\n\r\n", 505, None, ""),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, None, ""),
    ],
)
def test_what_is_no_proper_upgrade_is_refused(
    echo: PriceServer, upgrade: bytes, status: int, header: tuple[str, str] | None, error: str
) -> None:
    answer = ask(echo.port, upgrade)
    assert answer[0] == status
    if header:
        assert answer[1][header[0]] == header[1]
    if error:
        assert error in json.loads(answer[2])["error"]


def test_a_request_cut_off_before_its_end_is_not_upgraded(echo: PriceServer) -> None:
    with socket.create_connection(("127.0.0.1", echo.port), timeout=5) as sock:
        sock.sendall(request()[:-2])
        sock.shutdown(socket.SHUT_WR)
        assert not sock.recv(100).startswith(b"HTTP/1.1 101")


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://example.org", 101),
        ("HTTPS://Example.ORG", 101),
        ("http://server.example.com", 101),  # the page came from this server
        (None, 101),  # no browser
        ("https://example.com", 403),
        ("https://example.org.evil.net", 403),
        ("http://example.org", 403),
        ("null", 403),
    ],
)
def test_only_the_allowed_origins_may_read(start_server: Start, origin: str | None, status: int) -> None:
    server = start_server(allow_origins=["https://example.org/"])
    answer = ask(server.port, request(Origin=origin))
    assert answer[0] == status
    if status == 403:
        assert json.loads(answer[2]) == {"error": f"origin {origin} is not allowed"}


def test_an_unknown_asset_is_answered_400_with_what_is_tracked(start_server: Start) -> None:
    server = start_server(("BTC", "ETH"))
    for target in ("/ws?assets=BTC,doge", "/ws?assets=DOGE&assets=ETH"):
        status, _, body = ask(server.port, request(target))
        assert (status, json.loads(body)) == (400, {"error": "unknown asset 'DOGE': this server tracks BTC, ETH"})
    assert ask(server.port, request("/ws?assets="))[0] == 400


def test_the_one_over_max_clients_gets_503_and_is_let_in_when_one_leaves(start_server: Start) -> None:
    server = start_server(max_clients=2)
    with honest(server), honest(server):
        status, headers, body = ask(server.port, request())
        assert (status, headers["Retry-After"]) == (503, "10")
        assert json.loads(body) == {"error": "full, clients connected: 2"}
    gone(server)
    assert ask(server.port, request())[0] == 101


@pytest.mark.parametrize("size", [10, 8_000, 60_000])
def test_frames_in_the_segment_of_the_upgrade_request_are_answered(echo: PriceServer, size: int) -> None:
    behind = frame(PING, b"early") + frame(TEXT, b"x" * size) + frame(CLOSE, b"\x03\xe8")
    with RawClient(echo.port, behind=behind) as client:
        assert client.read() == (PONG, b"early")
        assert client.read() == (TEXT, b"x" * size)
        assert client.read_close() == 1000


def test_a_dribbled_request_is_served(echo: PriceServer) -> None:
    with socket.create_connection(("127.0.0.1", echo.port), timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in octets(request() + frame(PING, b"one by one")):
            sock.sendall(octet)
        with sock.makefile("rb") as file:
            assert file.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
            while file.readline() != b"\r\n":
                pass
            assert file.read(12) == b"\x8a\x0aone by one"


# Autobahn|Testsuite's groups 1 to 7 and 10: what they send, and what has to come back

SIZES = [0, 125, 126, 127, 128, 65_535, 65_536]
HELLO = b"Hello, world!"
PARTS = b"fragment1", b"fragment2"


@pytest.mark.parametrize("chop", [0, 997])
@pytest.mark.parametrize("size", SIZES)
def test_text_of_any_size_comes_back(client: RawClient, size: int, chop: int) -> None:  # 1.1
    client.send(frame(TEXT, b"*" * size), chop)
    assert client.read() == (TEXT, b"*" * size)
    client.send(frame(CLOSE, b"\x03\xe8"))
    assert client.read_close() == 1000


@pytest.mark.parametrize("chop", [0, 997])
@pytest.mark.parametrize("size", SIZES)
def test_binary_of_any_size_comes_back(client: RawClient, size: int, chop: int) -> None:  # 1.2
    payload = b"\x00\xfe" * (size // 2) + b"\xff" * (size % 2)
    client.send(frame(BINARY, payload), chop)
    assert client.read() == (BINARY, payload)


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, "8100"),
        (125, "817d"),
        (126, "817e007e"),
        (65_535, "817effff"),
        (65_536, "817f0000000000010000"),
    ],
)
def test_frames_from_the_server_have_the_shortest_header(client: RawClient, size: int, header: str) -> None:
    client.send(frame(TEXT, b"*" * size))
    assert client.file.read(len(header) // 2 + size) == bytes.fromhex(header) + b"*" * size


@pytest.mark.parametrize("chop", [0, 1])
@pytest.mark.parametrize("payload", [b"", HELLO, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125])
def test_a_pong_has_the_exact_bytes_of_the_ping(client: RawClient, payload: bytes, chop: int) -> None:  # 2.1 to 2.6
    client.send(frame(PING, payload), chop)
    assert client.read() == (PONG, payload)


@pytest.mark.parametrize("payload", [b"", b"unsolicited pong payload"])
def test_an_unsolicited_pong_is_ignored(client: RawClient, payload: bytes) -> None:  # 2.7 to 2.9
    client.send(frame(PONG, payload) + frame(PING, b"ping payload"))
    assert client.read() == (PONG, b"ping payload")


@pytest.mark.parametrize("chop", [0, 1])
def test_twenty_pings_in_one_segment_are_answered_in_order(client: RawClient, chop: int) -> None:  # 2.10, 2.11
    client.send(b"".join([frame(PING, b"payload-%d" % number) for number in range(20)]), chop)
    assert [client.read() for _ in range(20)] == [(PONG, b"payload-%d" % number) for number in range(20)]


def test_a_thousand_random_pings_are_answered_with_their_bytes(echo: PriceServer) -> None:
    chance = random.Random(3)
    with honest(echo) as client:
        for number in range(1_000):
            payload = chance.randbytes(chance.randrange(126) if number > 125 else number)
            assert client.ping(payload).wait(10), f"no pong for {payload!r}"
        client.send("still here")
        assert client.recv(timeout=10) == "still here"


# Each: what is sent, the frames that come back first, the close code. Sent whole, and octet by octet.
VIOLATIONS: dict[str, tuple[bytes, list[tuple[int, bytes]], int]] = {
    "2.5 ping of 126 bytes": (frame(PING, b"\xfe" * 126), [], 1002),
    "pong of 126 bytes": (frame(PONG, b"\xfe" * 126), [], 1002),
    "ping with a 64-bit length": (frame(PING, b"", length=b"\x7f" + bytes(8)), [], 1002),
    "3.1 RSV 1": (frame(TEXT, HELLO, rsv=1), [], 1002),
    "3.2 RSV 2 behind a message": (
        frame(TEXT, HELLO) + frame(TEXT, HELLO, rsv=2) + frame(PING),
        [(TEXT, HELLO)],
        1002,
    ),
    "3.3 RSV 3": (frame(TEXT, HELLO) + frame(TEXT, HELLO, rsv=3) + frame(PING), [(TEXT, HELLO)], 1002),
    "3.4 RSV 4": (frame(TEXT, HELLO) + frame(TEXT, HELLO, rsv=4) + frame(PING), [(TEXT, HELLO)], 1002),
    "3.5 RSV 5 binary": (frame(BINARY, b"\x00\xff", rsv=5), [], 1002),
    "3.6 RSV 6 ping": (frame(PING, HELLO, rsv=6), [], 1002),
    "3.7 RSV 7 close": (frame(CLOSE, b"\x03\xe8", rsv=7), [], 1002),
    "RSV on a continuation": (frame(TEXT, b"a", fin=False) + frame(CONT, b"b", rsv=4), [], 1002),
    **{
        f"4 opcode {opcode}": (
            frame(TEXT, HELLO) + frame(opcode, payload) + frame(PING),
            [(TEXT, HELLO)],
            1002,
        )
        for opcode, payload in zip((3, 4, 5, 6, 7, 11, 12, 13, 14, 15), (b"", HELLO) * 5, strict=True)
    },
    "5.1 fragmented ping": (fragments(PING, *PARTS), [], 1002),
    "5.2 fragmented pong": (fragments(PONG, *PARTS), [], 1002),
    "fragmented close": (fragments(CLOSE, b"\x03", b"\xe8"), [], 1002),
    "5.9 stray last continuation": (frame(CONT, b"stray") + frame(TEXT, HELLO), [], 1002),
    "5.12 stray first continuation": (frame(CONT, b"stray", fin=False) + frame(TEXT, HELLO), [], 1002),
    "5.15 stray continuation behind a message": (
        fragments(TEXT, *PARTS) + frame(CONT, b"stray", fin=False) + frame(TEXT, HELLO),
        [(TEXT, b"fragment1fragment2")],
        1002,
    ),
    "5.16 stray continuation before a message": (
        (frame(CONT, b"stray", fin=False) + fragments(TEXT, *PARTS)) * 2,
        [],
        1002,
    ),
    "5.18 a new message inside fragments": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [], 1002),
    "a new binary message inside fragments": (frame(TEXT, b"a", fin=False) + frame(BINARY, b"b"), [], 1002),
    "unmasked text": (frame(TEXT, HELLO, masked=False), [], 1002),
    "unmasked empty text": (frame(TEXT, b"", masked=False), [], 1002),
    "unmasked ping": (frame(TEXT, HELLO) + frame(PING, b"x", masked=False), [(TEXT, HELLO)], 1002),
    "unmasked close": (frame(CLOSE, b"\x03\xe8", masked=False), [], 1002),
    "16-bit length for 125 bytes": (frame(TEXT, b"x" * 125, length=struct.pack("!BH", 126, 125)), [], 1002),
    "16-bit length for none": (frame(BINARY, b"", length=struct.pack("!BH", 126, 0)), [], 1002),
    "64-bit length for 126 bytes": (frame(TEXT, b"x" * 126, length=struct.pack("!BQ", 127, 126)), [], 1002),
    "64-bit length for 65535 bytes": (frame(TEXT, b"", length=struct.pack("!BQ", 127, 65_535)), [], 1002),
    "64-bit length with the highest bit": (frame(TEXT, b"", length=struct.pack("!BQ", 127, 1 << 63)), [], 1002),
    "65,537 bytes": (frame(BINARY, b"", length=struct.pack("!BQ", 127, 65_537)), [], 1009),
    "2^40 bytes, header only": (bytes.fromhex("81 ff 00000100 00000000"), [], 1009),
    "fragments of 65,537 bytes": (
        frame(BINARY, b"x" * 40_000, fin=False) + frame(CONT, b"", length=struct.pack("!BH", 126, 25_537)),
        [],
        1009,
    ),
    "7.3.2 close body of one byte": (frame(CLOSE, b"a"), [], 1002),
    "7.3.6 close reason of 124 bytes": (frame(CLOSE, b"\x03\xe8" + b"*" * 124), [], 1002),
    "7.5.1 close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xce\xba\xed\xa0\x80edited"), [], 1007),
    "close reason cut inside a character": (frame(CLOSE, b"\x03\xe8\xce"), [], 1007),
}


@pytest.mark.parametrize("chop", [0, 1])
@pytest.mark.parametrize(("sent", "back", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_answered_with_a_close_frame_that_says_which(
    client: RawClient, sent: bytes, back: list[tuple[int, bytes]], code: int, chop: int
) -> None:
    client.send(sent, 0 if len(sent) > 1_000 else chop)
    assert [client.read() for _ in back] == back
    assert client.read_close() == code


def test_65537_bytes_sent_whole_are_refused_without_a_reset(client: RawClient) -> None:
    client.send(frame(TEXT, b"x" * 65_537))
    assert client.read_close() == 1009


def test_fragments_of_65536_bytes_come_back(client: RawClient) -> None:
    client.send(fragments(BINARY, b"x" * 40_000, b"", b"y" * 25_536))
    assert client.read() == (BINARY, b"x" * 40_000 + b"y" * 25_536)


@pytest.mark.parametrize("chop", [0, 1, 15])
def test_fragments_come_back_as_one_message(client: RawClient, chop: int) -> None:  # 5.3 to 5.5
    client.send(fragments(TEXT, *PARTS), chop)
    assert client.read() == (TEXT, b"fragment1fragment2")


@pytest.mark.parametrize("chop", [0, 1, 15])
def test_a_ping_between_fragments_is_answered_at_once(client: RawClient, chop: int) -> None:  # 5.6 to 5.8
    client.send(frame(TEXT, b"fragment1", fin=False) + frame(PING, b"ping payload"), chop)
    assert client.read() == (PONG, b"ping payload")
    client.send(frame(CONT, b"fragment2"), chop)
    assert client.read() == (TEXT, b"fragment1fragment2")


def test_pings_between_five_fragments_are_answered_in_turn(client: RawClient) -> None:  # 5.19, 5.20
    for sent in (frame(TEXT, b"1", fin=False), frame(CONT, b"2", fin=False), frame(PING, b"pongme 1!")):
        client.send(sent)
    assert client.read() == (PONG, b"pongme 1!")
    for sent in (frame(CONT, b"3", fin=False), frame(CONT, b"4", fin=False), frame(PING, b"pongme 2!")):
        client.send(sent)
    assert client.read() == (PONG, b"pongme 2!")
    client.send(frame(CONT, b"5"))
    assert client.read() == (TEXT, b"12345")


@pytest.mark.parametrize("parts", [(b"", b"", b""), (b"", b"middle frame payload", b"")])
def test_empty_fragments_are_parts_of_a_message(client: RawClient, parts: tuple[bytes, ...]) -> None:  # 6.1
    client.send(fragments(TEXT, *parts))
    assert client.read() == (TEXT, b"".join(parts))


# Markus Kuhn's sequences, as in Autobahn's group 6
KOSME = bytes.fromhex("ceba e1bdb9 cf83 cebc ceb5")  # "κόσμε" as Kuhn has it: one character of three bytes
VALID_UTF8 = [
    *("Hello-µ@ßöäüàá-UTF-8!!".encode(), "κόσμε".encode(), KOSME),
    *(KOSME[:size] for size in (2, 5, 7, 9)),
    *(b"\x00", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"),
    *(b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"),
    *(b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd"),
    *(b"\xef\xbf" + bytes([last]) for last in range(0xB9, 0xC0)),
    *(chr(plane << 16 | last).encode() for plane in range(1, 17) for last in (0xFFFE, 0xFFFF)),
]
OVERLONG = [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf", b"\xfc\x80\x80\x80\x80\xaf"]
OVERLONG += [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf", b"\xfc\x83\xbf\xbf\xbf\xbf"]
OVERLONG += [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x80\x80\x80\x80", b"\xfc\x80\x80\x80\x80\x80"]
INCOMPLETE = [b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80"]
INCOMPLETE += [b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf"]
SURROGATES = [b"\xed\xa0\x80", b"\xed\xad\xbf", b"\xed\xae\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80", b"\xed\xbe\x80"]
SURROGATES += [b"\xed\xbf\xbf"]
INVALID_UTF8 = [
    *(KOSME + b"\xed\xa0\x80edited", KOSME + b"\xf4\x90\x80\x80edited"),
    *(KOSME[:size] for size in (1, 3, 4, 6, 8, 10)),
    *(b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"),
    *(b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf", b"\xf4\x90\x80\x80"),
    *(b"\x80", b"\xbf", *(b"\x80\xbf" * size for size in (1, 2, 3)), b"\x80\xbf\x80", bytes(range(0x80, 0xC0))),
    *(b" ".join(octets(bytes(range(first, last)))) + b" " for first, last in ((0xC0, 0xE0), (0xE0, 0xF0))),
    *(b" ".join(octets(bytes(range(first, last)))) + b" " for first, last in ((0xF0, 0xF8), (0xF8, 0xFE))),
    *INCOMPLETE,
    b"".join(INCOMPLETE),
    *(b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"),
    *OVERLONG,
    *SURROGATES,
    *(high + low for high in SURROGATES[:4] for low in (b"\xed\xb0\x80", b"\xed\xbf\xbf")),
]


def test_text_in_utf8_comes_back_however_it_is_cut(client: RawClient) -> None:  # 6.2, 6.5 to 6.23
    for text in VALID_UTF8:
        client.send(frame(TEXT, text) + fragments(TEXT, *octets(text)))
        client.send(frame(TEXT, text), chop=1)
        assert [client.read() for _ in range(3)] == [(TEXT, text)] * 3


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "octets"])
@pytest.mark.parametrize("text", INVALID_UTF8, ids=bytes.hex)
def test_text_that_is_not_utf8_is_answered_1007(client: RawClient, text: bytes, cut: bool) -> None:  # 6.3 to 6.21
    client.send(fragments(TEXT, *octets(text)) if cut else frame(TEXT, text))
    assert client.read_close() == 1007


def test_binary_need_not_be_utf8(client: RawClient) -> None:
    for data in INVALID_UTF8:
        client.send(fragments(BINARY, *octets(data)))
        assert client.read() == (BINARY, data)


@pytest.mark.parametrize(
    "behind",
    [frame(CLOSE, b"\x03\xe8"), frame(PING), frame(TEXT, HELLO), frame(3), b"\xff" * 99],
    ids=["close", "ping", "text", "reserved", "garbage"],
)
def test_nothing_is_answered_behind_a_close_frame(client: RawClient, behind: bytes) -> None:  # 7.1.1 to 7.1.4
    client.send(frame(TEXT, HELLO) + frame(CLOSE, b"\x03\xe8") + behind)
    assert client.read() == (TEXT, HELLO)
    assert client.read_close() == 1000


def test_a_close_inside_fragments_ends_the_message(client: RawClient) -> None:  # 7.1.5
    client.send(frame(TEXT, b"fragment1", fin=False) + frame(CLOSE, b"\x03\xe8") + frame(CONT, b"fragment2"))
    assert client.read_close() == 1000


def test_a_close_behind_a_long_message_does_not_cut_it_off(client: RawClient) -> None:  # 7.1.6
    client.send(frame(TEXT, b"BAsd7&jh23" * 6_553) + frame(CLOSE, b"\x03\xe8") + frame(PING))
    assert client.read() == (TEXT, b"BAsd7&jh23" * 6_553)
    assert client.read_close() == 1000


def test_a_close_frame_without_a_code_is_echoed_without_one(client: RawClient) -> None:  # 7.3.1
    client.send(frame(CLOSE))
    assert client.read_close() is None


@pytest.mark.parametrize("reason", [b"", HELLO, b"*" * 123, "κόσμε".encode()])  # 7.3.3 to 7.3.5
@pytest.mark.parametrize("chop", [0, 1])
def test_a_close_frame_is_echoed_with_its_code(client: RawClient, reason: bytes, chop: int) -> None:
    client.send(frame(CLOSE, b"\x03\xe8" + reason), chop)
    assert client.read_close() == 1000


SENDABLE = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]  # 7.7
UNSENDABLE = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]  # 7.9, 7.13


@pytest.mark.parametrize(("sent", "code"), [(code, code) for code in SENDABLE] + [(code, 1002) for code in UNSENDABLE])
def test_a_close_code_is_echoed_if_it_may_be_sent(client: RawClient, sent: int, code: int) -> None:
    client.send(frame(CLOSE, sent.to_bytes(2, "big") + b"reason"))
    assert client.read_close() == code


def test_a_message_in_fragments_of_1300_bytes_comes_back(client: RawClient) -> None:  # 10.1.1
    payload = b"*" * 65_536
    client.send(fragments(TEXT, *[payload[start : start + 1_300] for start in range(0, 65_536, 1_300)]))
    assert client.read() == (TEXT, payload)


def test_the_server_hangs_up_first_and_does_not_wait_for_the_client(client: RawClient) -> None:
    client.send(frame(CLOSE, b"\x03\xe8"))
    assert client.read() == (CLOSE, b"\x03\xe8")
    assert client.file.read() == b""


def test_an_honest_client_sees_1000_not_1006(echo: PriceServer) -> None:
    with honest(echo) as client:
        client.close(1000, "bye")
        assert client.close_code == 1000


# Prices


def test_a_new_client_gets_all_known_prices_in_the_order_tracked(server: PriceServer, updates: Updates) -> None:
    server.publish(reversed(updates(7.0)))
    with honest(server) as client:
        assert client.recv() == '{"asset_id":"BTC","price":7.0,"time":"2026-11-22T07:44:05.1234567Z"}'
        assert prices(client, 9) == [(asset, 7.0) for asset in ASSETS[1:]]


def test_a_poll_reaches_every_client_at_once_in_the_order_polled(server: PriceServer, updates: Updates) -> None:
    with honest(server) as first, honest(server) as second:
        server.publish(updates(1.0))
        for client in (first, second):
            assert prices(client, 10) == [(asset, 1.0) for asset in ASSETS]


def test_a_partial_publish_sends_only_what_is_new(server: PriceServer, updates: Updates) -> None:
    server.publish([PriceUpdate("SOL", 1.0, "a"), PriceUpdate("ETH", 2.0, "b")])
    with honest(server) as client:
        assert prices(client, 2) == [("ETH", 2.0), ("SOL", 1.0)]
        server.publish([PriceUpdate("SOL", 3.0, "c")])
        server.publish([PriceUpdate("BTC", 4.0, "d")])
        assert prices(client, 2) == [("SOL", 3.0), ("BTC", 4.0)]
        with honest(server) as late:
            assert prices(late, 3) == [("BTC", 4.0), ("ETH", 2.0), ("SOL", 3.0)]


@pytest.mark.parametrize("query", ["?assets=sol,eth", "?assets=ETH&assets=%20SOL", "?assets=ETH,SOL,ETH"])
def test_a_client_gets_only_the_assets_it_asked_for(server: PriceServer, updates: Updates, query: str) -> None:
    server.publish(updates(1.0))
    with honest(server, f"/ws{query}") as client:
        server.publish([PriceUpdate("BTC", 2.0, "not for this client")])
        server.publish(updates(3.0))
        assert prices(client, 4) == [("ETH", 1.0), ("SOL", 1.0), ("ETH", 3.0), ("SOL", 3.0)]


def test_an_untracked_asset_is_not_published(server: PriceServer, updates: Updates) -> None:
    with honest(server) as client:
        with pytest.raises(ValueError, match="unknown asset 'DOGE': this server tracks BTC, ETH"):
            server.publish([PriceUpdate("BTC", 1.0, ""), PriceUpdate("DOGE", 1.0, "")])
        server.publish([PriceUpdate("ETH", 2.0, "")])
        assert prices(client, 1) == [("ETH", 2.0)]


def test_a_client_that_comes_during_publishes_misses_nothing(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1))
    with RawClient(server.port) as early:
        came = [early]
        for price in range(2, 100):
            thread = threading.Thread(target=lambda: came.append(RawClient(server.port)))
            thread.start()
            server.publish(updates(price))
            thread.join()
        server.disconnect_clients_gracefully()
        for each in came:
            messages = [json.loads(data) for opcode, data in parse(each.file.read()) if opcode == TEXT]
            each.__exit__()
            assert [message["asset_id"] for message in messages[:10]] == list(ASSETS)
            for asset in ASSETS:
                seen = [message["price"] for message in messages if message["asset_id"] == asset]
                assert seen == list(range(seen[0], 100)), "skipped, twice or back in time"
    assert len(came) == 99


def fill(server: PriceServer, client: RawClient) -> Connection:
    """Ping without reading until the server reads no more; its connection."""
    connection: Connection = server.clients[-1]["handler"]
    client.socket.settimeout(0.2)
    full = False
    while not (full and connection.deadline):
        client.unsent = client.unsent or frame(PING, b"x" * 125) * 100
        try:
            client.unsent = client.unsent[client.socket.send(client.unsent) :]
        except TimeoutError:
            full = True
        assert len(connection.kept) < 100_000, "the server reads on, and pongs pile up"
    client.socket.settimeout(10)
    return connection


def test_a_client_that_catches_up_gets_the_current_prices_and_no_backlog(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096) as client:
        fill(server, client)
        for price in range(1, 1_001):
            server.publish(updates(price))
        messages: list[dict[str, Any]] = []
        while len(messages) < 10:
            opcode, payload = client.read()
            if opcode == TEXT:
                messages.append(json.loads(payload))
        assert [(message["asset_id"], message["price"]) for message in messages] == [(asset, 1000) for asset in ASSETS]
        server.publish(updates(1_001))
        while (answer := client.read())[0] == PONG:
            pass
        assert answer == (TEXT, b'{"asset_id":"BTC","price":1001,"time":"2026-11-22T07:44:05.1234567Z"}')


def test_nothing_follows_a_close_frame_that_waits_behind_a_full_socket(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096) as client:
        connection = fill(server, client)
        server.publish(updates(1.0))
        connection.send_close(1001, "server is stopping")
        server.send_message_to_all("late")
        server.publish(updates(2.0))
        frames = list(parse(client.file.read()))
    assert {opcode for opcode, _ in frames[:-1]} == {PONG}
    assert frames[-1] == (CLOSE, b"\x03\xe9server is stopping")


def test_a_client_that_never_reads_absorbs_under_a_fifth_of_a_megabyte(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096):
        connection = server.clients[0]["handler"]
        published = 0
        while not connection.kept and published < 10_000:
            server.publish(updates(1.0))
            published += 1
        assert published * 690 < 200_000


def test_ten_thousand_publishes_tear_no_frame_and_end_with_the_last_price(
    start_server: Start, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.server.SEND_BUFFER", 4096)
    server = start_server()
    chance = random.Random(5)
    clients = [RawClient(server.port, receive_buffer=2048 << chance.randrange(4)) for _ in range(12)]
    streams = [bytearray() for _ in clients]
    finished = threading.Event()
    reader = threading.Thread(target=read_at_random_speeds, args=(clients, streams, finished), daemon=True)
    reader.start()
    for price in range(1, 10_001):
        server.publish(updates(float(price)))
        if price % 500 == 0:
            server.send_message_to_all(f"note {price} " + "x" * (price // 10))
            for each in server.clients:
                frame_ = encode_frame(PING, b"ping %d" % price)
                server.call(lambda h=each["handler"], f=frame_: h.send_frames(f))
    assert any(client["handler"].owed for client in server.clients), "nobody is behind: nothing is tested"
    wait_for(lambda: all(has_last_prices(stream) for stream in streams), 20, "the last prices at every client")
    server.disconnect_clients_gracefully()
    finished.set()
    reader.join()
    for client, stream in zip(clients, streams, strict=True):
        client.__exit__()
        check_stream(stream)


def read_at_random_speeds(clients: list[RawClient], streams: list[bytearray], finished: threading.Event) -> None:
    """Each client pauses up to its own longest time, and then reads a random number of bytes."""
    chance = random.Random(6)
    pauses = [0.001 * 2**index for index in range(6)] * 2  # seconds, up to 32 ms
    due = [0.0] * len(clients)
    for client in clients:
        client.socket.setblocking(False)
    while not finished.wait(0.001):
        for index, client in enumerate(clients):
            if time.monotonic() >= due[index]:
                due[index] = time.monotonic() + chance.random() * pauses[index]
                try:
                    streams[index] += client.socket.recv(chance.randrange(1, 8_192))
                except BlockingIOError:
                    pass  # it has read all
    for index, client in enumerate(clients):
        client.socket.settimeout(10)
        while data := client.socket.recv(65_536):
            streams[index] += data


def has_last_prices(stream: bytearray) -> bool:
    return all(b'{"asset_id":"%b","price":10000.0,' % asset.encode() in stream[-5_000:] for asset in ASSETS)


def check_stream(stream: bytearray) -> None:
    last: dict[str, float] = {}
    notes: list[bytes] = []
    pings: list[bytes] = []
    for opcode, payload in parse(bytes(stream)):
        if opcode == TEXT and payload.startswith(b"{"):
            update = json.loads(payload)
            assert update["price"] >= last.get(update["asset_id"], 0), "back in time"
            last[update["asset_id"]] = update["price"]
        elif opcode != CLOSE:
            (notes if opcode == TEXT else pings).append(payload)
    assert last == dict.fromkeys(ASSETS, 10_000.0)
    assert notes == [b"note %d " % price + b"x" * (price // 10) for price in range(500, 10_001, 500)]
    assert pings == [b"ping %d" % price for price in range(500, 10_001, 500)]


# Limits


def test_the_limits_are_those_of_the_design() -> None:
    assert PriceServer.request_timeout == 10.0
    assert PriceServer.behind_timeout == 30.0
    assert PriceServer.ping_interval * PriceServer.max_unanswered == 60.0
    assert PriceServer.ping_interval == 20.0
    assert MAX_MESSAGE == 65_536
    assert PriceServer.max_queue == 1_048_576
    assert PriceServer.request_queue_size == 1_024


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, start_server: Start) -> PriceServer:
    """A server that waits half a second, or one, where it otherwise waits 5 to 60."""
    monkeypatch.setattr(PriceServer, "request_timeout", 0.5)
    monkeypatch.setattr(PriceServer, "close_timeout", 0.5)
    monkeypatch.setattr(PriceServer, "ping_interval", 0.5)
    monkeypatch.setattr(PriceServer, "max_unanswered", 2)
    return start_server()


def test_half_handshakes_are_cut_off_though_they_dribble(impatient: PriceServer) -> None:
    socks = [socket.create_connection(("127.0.0.1", impatient.port), timeout=5) for _ in range(20)]
    began = time.monotonic()
    ended: list[float] = []
    octet = iter(request(more="X: x\r\n" * 1_000))
    while len(ended) < 20 and time.monotonic() < began + 10:
        data = bytes([next(octet)])
        for sock in socks[len(ended) :]:
            try:
                sock.send(data)
            except OSError:
                ended.append(time.monotonic() - began)
        threading.Event().wait(0.01)
    for sock in socks:
        sock.close()
    assert len(ended) == 20
    assert 0.4 < ended[0] <= ended[-1] < 2.5
    assert impatient.clients == []
    wait_for(lambda: handshakes() == 0, what="the handshake threads gone")


def test_a_client_that_answers_no_ping_is_dropped_and_others_stay(impatient: PriceServer) -> None:
    with RawClient(impatient.port) as silent, honest(impatient) as client:
        began = time.monotonic()
        while silent.read() == (PING, b"") and silent.socket.recv(1, socket.MSG_PEEK) != b"":
            pass
        assert 1.0 <= time.monotonic() - began < 4.0
        wait_for(lambda: len(impatient.clients) == 1)
        assert client.ping().wait(5)
    assert impatient.counts['clients_dropped_total{reason="no_pong"}'] == 1


def test_a_client_whose_socket_stays_full_is_dropped_and_others_stay(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PriceServer, "behind_timeout", 1.0)
    server = start_server()
    with honest(server) as client, RawClient(server.port, receive_buffer=4096) as stuck:
        fill(server, stuck)
        wait_for(lambda: len(server.clients) == 1, 4.0, "the stuck one dropped")
        assert client.ping().wait(5)
    assert server.counts['clients_dropped_total{reason="behind"}'] == 1


def test_a_client_behind_that_catches_up_in_time_stays(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PriceServer, "behind_timeout", 2.0)
    server = start_server()
    with RawClient(server.port, receive_buffer=4096) as client:
        for _ in range(3):
            connection = fill(server, client)
            while connection.deadline:
                client.socket.recv(65_536)
        assert len(server.clients) == 1


def test_a_client_that_does_not_hang_up_behind_a_close_is_hung_up_on(impatient: PriceServer) -> None:
    with RawClient(impatient.port) as client:
        client.send(frame(CLOSE, b"\x03\xe8"))
        assert client.read() == (CLOSE, b"\x03\xe8")
        wait_for(lambda: not impatient.clients, 4.0)


def test_a_slot_for_handshakes_is_found_for_the_newest(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_server, "MAX_HANDSHAKES", 20)
    server = start_server()
    socks = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(60)]
    with honest(server) as client:
        assert client.ping().wait(5)
    assert [sock.recv(1) for sock in socks[:40]] == [b""] * 40
    wait_for(lambda: handshakes() <= 20)
    for sock in socks:
        sock.close()


def test_threads_do_not_grow_with_clients(server: PriceServer) -> None:
    with RawClient(server.port):
        wait_for(lambda: handshakes() == 0)
        threads = threading.active_count()
        clients = [RawClient(server.port) for _ in range(300)]
        wait_for(lambda: threading.active_count() <= threads, what="no thread per client")
        assert len(server.clients) == 301
        for each in clients:
            each.__exit__()


def test_clients_leave_no_file_behind(server: PriceServer) -> None:
    process = psutil.Process()
    before = process.num_fds()
    for number in range(200):
        with RawClient(server.port) as client:
            if number % 2:
                client.reset()
    gone(server)
    wait_for(lambda: process.num_fds() <= before, what="files closed")


def test_a_flood_of_messages_takes_no_turn_from_another_client(echo: PriceServer) -> None:
    with RawClient(echo.port) as flooding, honest(echo) as client:
        flooding.socket.setblocking(False)
        flood = frame(BINARY, b"x" * 60_000) * 20
        for _ in range(50):
            try:
                flooding.socket.send(flood)
            except BlockingIOError:
                pass
            assert client.ping().wait(1.0)


# The library's interface


def test_each_client_comes_once_and_leaves_once(server: PriceServer) -> None:
    came: list[int] = []
    left: list[int] = []
    server.set_fn_new_client(lambda client, server: came.append(client["id"]))
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    for _ in range(10):
        with honest(server):
            pass
        RawClient(server.port).reset()
        with RawClient(server.port) as client:
            client.send(b"garbage" * 1_000)
        with RawClient(server.port, behind=frame(CLOSE, b"\x03\xe8")):
            pass
        ask(server.port, request(Upgrade=None))
    gone(server)
    assert sorted(came) == sorted(left) == list(range(1, 41))


def test_a_client_is_known_by_its_number_handler_and_address(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        (known,) = server.clients
        assert known["id"] == 1
        assert known["address"] == client.socket.getsockname()
        assert server.handler_to_client(known["handler"]) is known


def test_a_callback_that_raises_reaches_no_client(server: PriceServer, errors: list[str]) -> None:
    calls: list[str] = []

    def callback(name: str) -> Callable[..., None]:
        def fail(client: dict[str, Any], *_: object) -> None:
            calls.append(f"{name} {client['id']}")
            raise RuntimeError(name)

        return fail

    server.set_fn_new_client(callback("came"))
    server.set_fn_client_left(callback("left"))
    server.set_fn_message_received(callback("message"))
    with honest(server) as client:
        client.send("one")
        client.send("two")
        assert client.ping().wait(5)
    gone(server)
    assert calls == ["came 1", "message 1", "message 1", "left 1"]
    assert errors == [f"the callback {name} failed" for name in ("new_client", "message_received", "client_left")]
    errors.clear()


def test_a_blocking_callback_delays_no_prices(server: PriceServer, updates: Updates) -> None:
    blocking, release = threading.Event(), threading.Event()

    def block(client: dict[str, Any], server: PriceServer, message: str) -> None:
        blocking.set()
        release.wait(10)

    server.set_fn_message_received(block)
    with honest(server) as client, honest(server) as other:
        client.send("block")
        assert blocking.wait(5)
        server.publish(updates(1.0))
        assert prices(other, 10) == prices(client, 10) == [(asset, 1.0) for asset in ASSETS]
        release.set()


def test_messages_are_str_for_text_and_bytes_for_binary(server: PriceServer) -> None:
    received: list[tuple[int, str | bytes]] = []
    server.set_fn_message_received(lambda client, server, message: received.append((client["id"], message)))
    with honest(server) as client:
        client.send("κόσμε")
        client.send(b"\xff\x00")
        client.send(["in ", "fragments"])
        assert client.ping().wait(5)
    assert received == [(1, "κόσμε"), (1, b"\xff\x00"), (1, "in fragments")]


def test_send_message_reaches_one_client_and_send_message_to_all_every_one(server: PriceServer) -> None:
    with honest(server) as first, honest(server) as second:
        server.send_message(server.clients[0], "for the first")
        server.send_message(server.clients[1], b"\xffor the second")
        server.send_message_to_all("for all")
        assert [first.recv(5), first.recv(5)] == ["for the first", "for all"]
        assert [second.recv(5), second.recv(5)] == [b"\xffor the second", "for all"]


def test_a_dead_client_does_not_keep_the_message_from_the_others(server: PriceServer) -> None:
    dead = [RawClient(server.port) for _ in range(5)]
    with honest(server) as client:
        for each in dead:
            each.reset()
        for number in range(20):
            server.send_message_to_all(f"number {number}")
            assert client.recv(5) == f"number {number}"


def test_a_greeting_sent_from_new_client_comes_behind_the_known_prices(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1.0))
    server.set_fn_new_client(lambda client, server: server.send_message(client, "welcome"))
    with honest(server) as client:
        assert prices(client, 10) == [(asset, 1.0) for asset in ASSETS]
        assert client.recv(5) == "welcome"


def test_messages_queue_up_to_a_mebibyte_and_past_it_the_client_is_dropped(server: PriceServer) -> None:
    with RawClient(server.port, receive_buffer=4096) as client, RawClient(server.port, receive_buffer=4096):
        message, slow, stuck = "x" * 10_000, *server.clients
        for _ in range(100):
            server.send_message(slow, message)
        for _ in range(130):
            server.send_message(stuck, message)
        assert [client.read() for _ in range(100)] == [(TEXT, message.encode())] * 100
        wait_for(lambda: server.clients == [slow])
        assert server.counts['clients_dropped_total{reason="queue_full"}'] == 1


def test_new_connections_are_denied_with_the_given_close_and_allowed_again(server: PriceServer) -> None:
    came: list[int] = []
    server.set_fn_new_client(lambda client, server: came.append(client["id"]))
    with honest(server) as old:
        server.deny_new_connections(status=4001, reason=b"maintenance")
        with honest(server) as denied, pytest.raises(ConnectionClosedError) as closed:
            denied.recv(timeout=5)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "maintenance")
        assert old.ping().wait(5)
        server.allow_new_connections()
        with honest(server) as new:
            assert new.ping().wait(5)
    assert came == [1, 2]


def test_clients_are_disconnected_gracefully_and_the_server_goes_on(server: PriceServer) -> None:
    with honest(server) as client:
        server.disconnect_clients_gracefully(4002, b"come again")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4002, "come again")
    gone(server)
    with honest(server) as client:
        assert client.ping().wait(5)


def test_clients_are_disconnected_abruptly_and_the_server_goes_on(server: PriceServer) -> None:
    with honest(server) as client:
        server.disconnect_clients_abruptly()
        with pytest.raises(ConnectionClosedError) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd is None
    gone(server)
    with honest(server) as client:
        assert client.ping().wait(5)


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda server: server.shutdown_gracefully(), 1000),
        (lambda server: server.shutdown_gracefully(1001, b"server is stopping"), 1001),
        (lambda server: server.shutdown_abruptly(), None),
    ],
)
def test_a_shutdown_ends_clients_port_and_threads(
    server: PriceServer, stop: Callable[[PriceServer], None], code: int | None
) -> None:
    left: list[int] = []
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    client, quiet = honest(server), RawClient(server.port)
    stop(server)
    with client, pytest.raises(ConnectionClosed) as closed:
        client.recv(timeout=5)
    quiet.__exit__()
    assert (closed.value.rcvd.code if closed.value.rcvd else None) == code
    assert sorted(left) == [1, 2]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_shutdown_from_a_callback_stops_the_server(server: PriceServer) -> None:
    server.set_fn_message_received(lambda client, server, message: server.shutdown_gracefully(1001, b"as told"))
    with honest(server) as client:
        client.send("stop")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1001
    gone(server)


# Moments that are hard to hit


def test_a_client_that_resets_in_the_middle_of_its_upgrade_is_taken_out(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted, proceed = threading.Event(), threading.Event()
    admit = server.admit

    def slow_admit(*arguments: Any) -> Connection:
        connection = admit(*arguments)
        admitted.set()
        assert proceed.wait(5)
        return connection

    monkeypatch.setattr(server, "admit", slow_admit)
    client = RawClient(server.port)
    assert admitted.wait(5)
    client.reset()
    proceed.set()
    gone(server)


def test_a_client_whose_handshake_ends_late_does_not_end_the_reader(
    server: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_callback: list[threading.Event] = [threading.Event(), threading.Event()]
    release: list[threading.Event] = [threading.Event(), threading.Event()]
    finish, late = Handler.finish, threading.Event()

    def block(client: dict[str, Any], server: PriceServer, message: str) -> None:
        in_callback[int(message)].set()
        release[int(message)].wait(10)

    server.set_fn_message_received(block)
    with RawClient(server.port) as blocking:
        wait_for(lambda: handshakes() == 0)
        monkeypatch.setattr(Handler, "finish", lambda self: (late.wait(10), finish(self)))
        with RawClient(server.port, receive_buffer=4096) as client:
            wait_for(lambda: server.clients[1]["handler"].watched, what="the reader to know both")
            blocking.send(frame(TEXT, b"0"))
            assert in_callback[0].wait(5)
            blocking.send(frame(TEXT, b"1"))
            client.socket.shutdown(socket.SHUT_WR)
            release[0].set()
            assert in_callback[1].wait(5)
            for price in range(300):
                server.publish(updates(price))
            release[1].set()
            wait_for(lambda: len(server.clients) == 1)
            blocking.send(frame(PING, b"alive"))
            while (answer := blocking.read())[0] != PONG:
                pass
            assert answer == (PONG, b"alive")
            late.set()
