"""How messages are written to a client: WebSocket frames or Server-Sent Events.

A third format is a class here, an entry in FORMATS and a route in web.py. A format has no state, because all clients of
its kind share it.
"""

from typing import Protocol

from .frames import Opcode, encode_close, encode_frame, encode_message


class Format(Protocol):
    name: str  # of its clients in /metrics
    heartbeat: bytes  # sent every 20 s, because proxies close a silent connection
    is_two_way: bool  # whether its clients send frames; one that is alive answers each heartbeat
    carries_bytes: bool  # whether `encode_message` takes bytes too

    def encode_price(self, message: str) -> bytes:
        """One price, given as the JSON that clients get."""

    def encode_message(self, message: str | bytes) -> bytes:
        """A message of user code. Raises ValueError for bytes, unless `carries_bytes`."""

    def encode_close(self, status: int, reason: str | bytes) -> bytes:
        """The last bytes that a client gets. Raises ValueError for a reason that is too long."""


class WebSocketFormat:
    name = "websocket"
    heartbeat = encode_frame(Opcode.PING, b"")
    is_two_way = carries_bytes = True

    def encode_price(self, message: str) -> bytes:
        return encode_frame(Opcode.TEXT, message.encode())

    def encode_message(self, message: str | bytes) -> bytes:
        return encode_message(message)

    def encode_close(self, status: int, reason: str | bytes) -> bytes:
        return encode_close(status, reason)


class EventStreamFormat:
    """Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

    name = "event_stream"
    heartbeat = b":\n"  # a comment line; no empty line, because some libraries would then see an event without data
    is_two_way = carries_bytes = False

    def encode_price(self, message: str) -> bytes:
        return b"data: %b\n\n" % message.encode()

    def encode_message(self, message: str | bytes) -> bytes:
        if isinstance(message, bytes):
            raise ValueError("an event stream carries text: send a str, not bytes")
        lines = message.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return "".join([*(f"data: {line}\n" for line in lines), "\n"]).encode()

    def encode_close(self, status: int, reason: str | bytes) -> bytes:
        return b""  # the end of the connection is the end of the stream


FORMATS: tuple[Format, ...] = (WebSocketFormat(), EventStreamFormat())
