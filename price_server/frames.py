"""RFC 6455: bytes to frames and messages, and back. No socket, no thread: functions of bytes.

`MessageReader` takes apart what one client sends; the `encode_` functions make what goes to it.
Numbers in brackets are the RFC's sections.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum

MAX_MESSAGE = 64 << 10  # bytes of one message from a client, fragments summed
MAX_CONTROL = 125  # bytes of a control frame's payload (5.5)
MAX_REASON = MAX_CONTROL - 2  # bytes of a close frame's reason, after its code


class Opcode(IntEnum):
    """What a frame is (5.2)."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


OPCODES = frozenset(Opcode)


class ProtocolError(Exception):
    """A client broke the RFC; `code` is the close code that says how, the text is its reason."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """One whole, unmasked frame, as a server sends it (5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def encode_message(message: str | bytes) -> bytes:
    """A text frame for str, a binary one for bytes."""
    if isinstance(message, str):
        return encode_frame(Opcode.TEXT, message.encode())
    return encode_frame(Opcode.BINARY, message)


def encode_close(status: int = 1000, reason: str | bytes = b"") -> bytes:
    """A close frame (5.5.1); ValueError for a reason of more than 123 bytes of UTF-8."""
    reason = reason.encode() if isinstance(reason, str) else reason
    if len(reason) > MAX_REASON:
        raise ValueError(f"close reason of {len(reason)} bytes: at most {MAX_REASON} are allowed")
    return encode_frame(Opcode.CLOSE, struct.pack("!H", status) + reason)


def reply_to_close(payload: bytes) -> bytes:
    """The close frame that answers a client's: its code and no reason (5.5.1).

    Raises ProtocolError 1002 for a code that may not be sent (7.4), 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return encode_frame(Opcode.CLOSE, b"")
    code = int.from_bytes(payload[:2], "big")
    known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    if len(payload) == 1 or not (known or 3000 <= code <= 4999):
        raise ProtocolError(1002, "close frame without a code that may be sent")
    _decode_text(payload[2:])
    return encode_frame(Opcode.CLOSE, payload[:2])


class MessageReader:
    """Parses what one client sends: `read` yields each message, ping, pong and close in turn.

    A peer that dribbles costs nothing: each byte is appended once, and only a frame's header is read again.
    Messages are str for text and bytes for the rest.
    """

    __slots__ = ("_buffer", "_fragments", "_opcode")

    def __init__(self) -> None:
        self._buffer = bytearray()  # received, and not a whole frame yet
        self._fragments: bytearray | None = None  # so far, of a message whose last frame has not come
        self._opcode = 0  # of that message

    @property
    def held(self) -> int:
        """Bytes of the frame and the message that are not complete."""
        return len(self._buffer) + len(self._fragments or b"")

    @property
    def is_idle(self) -> bool:
        """Whether no frame and no message is begun."""
        return self._fragments is None and not self._buffer

    @property
    def is_fragmented(self) -> bool:
        """Whether a message's first fragment has come, and its last has not."""
        return self._fragments is not None

    def receive_data(self, data: bytes) -> None:
        self._buffer += data

    def read(self) -> Iterator[tuple[int, str | bytes]]:
        """Yield (opcode, message) for all that is complete. The caller may stop at any, and call it again later.

        Raises ProtocolError for a violation, as soon as the header shows it; nothing may be read after that.
        """
        while (frame := self._take_frame()) is not None:
            final, opcode, payload = frame
            if opcode >= Opcode.CLOSE:
                yield opcode, payload
            elif final and self._fragments is None:
                yield opcode, _decode_text(payload) if opcode == Opcode.TEXT else payload
            else:
                message = self._add_fragment(final, opcode, payload)
                if message is not None:
                    yield self._opcode, message

    def _add_fragment(self, final: bool, opcode: int, payload: bytes) -> str | bytes | None:
        """The whole message after its last fragment; None before (5.4)."""
        if self._fragments is None:
            self._fragments, self._opcode = bytearray(), opcode
        self._fragments += payload
        if not final:
            return None
        message, self._fragments = bytes(self._fragments), None
        return _decode_text(message) if self._opcode == Opcode.TEXT else message

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        """Remove the first frame from the buffer: (final, opcode, payload), or None while it is not complete."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x7F
        _check_head(buffer[0], buffer[1])
        if opcode < Opcode.CLOSE and (opcode == Opcode.CONTINUATION) != (self._fragments is not None):
            raise ProtocolError(1002, "continuation without a start, or a start inside a fragmented message")
        start = 2
        if size >= 126:
            start, smallest, layout = (4, 126, "!H") if size == 126 else (10, 1 << 16, "!Q")
            if len(buffer) < start:
                return None
            (size,) = struct.unpack_from(layout, buffer, 2)
            if size < smallest or size >> 63:
                raise ProtocolError(1002, "frame length is not minimal")
        if opcode < Opcode.CLOSE and size > MAX_MESSAGE - len(self._fragments or b""):
            raise ProtocolError(1009, f"message is over {MAX_MESSAGE} bytes")
        end = start + 4 + size
        if len(buffer) < end:
            return None
        payload = _unmask(bytes(buffer[start : start + 4]), buffer[start + 4 : end])
        del buffer[:end]
        return final, opcode, payload


def _check_head(first: int, second: int) -> None:
    """Raises ProtocolError for a violation in the first two bytes of a client's frame (5.2, 5.5)."""
    opcode = first & 0x0F
    if first & 0x70:
        raise ProtocolError(1002, "reserved bit set")
    if opcode not in OPCODES:
        raise ProtocolError(1002, f"unknown opcode {opcode}")
    if not second & 0x80:
        raise ProtocolError(1002, "frame is not masked")
    if opcode >= Opcode.CLOSE and (second & 0x7F > MAX_CONTROL or not first & 0x80):
        raise ProtocolError(1002, f"control frame is fragmented or over {MAX_CONTROL} bytes")


def _unmask(mask: bytes, data: bytearray) -> bytes:
    """Remove the client's mask (5.3): one XOR of two long integers, because a loop would take milliseconds."""
    size = len(data)
    masks = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(masks, "big")).to_bytes(size, "big")


def _decode_text(payload: bytes) -> str:
    """The text of a message or close reason. Raises ProtocolError 1007 if it is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(1007, "text is not UTF-8") from None
