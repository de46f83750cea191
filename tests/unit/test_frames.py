"""frames: RFC 6455 as bytes alone. Numbers after tests are those of Autobahn|Testsuite's cases.

What a client would send is made by the frame writer of `websockets`, or stands here byte by byte.
"""

import random

import pytest
from raw import fragments, octets
from texts import INVALID_UTF8, VALID_UTF8
from websockets.frames import Frame
from websockets.frames import Opcode as Op

from price_server.frames import (
    MAX_CONTROL,
    MAX_MESSAGE,
    MAX_REASON,
    MessageReader,
    Opcode,
    ProtocolError,
    encode_close,
    encode_frame,
    encode_message,
    reply_to_close,
)

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x00\x00\x00\x00"  # leaves the payload as it is
Message = tuple[int, str | bytes]


def frame(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    """One proper frame as a client sends it."""
    return Frame(Op(opcode), payload, fin).serialize(mask=True)


def read(*chunks: bytes) -> list[Message]:
    """All messages of what comes in these chunks; what breaks the RFC is the last, as its code and reason."""
    reader, messages = MessageReader(), list[Message]()
    try:
        for chunk in chunks:
            reader.receive_data(chunk)
            messages += reader.read()
    except ProtocolError as error:
        messages.append((error.code, str(error)))
    return messages


# What comes


def test_the_examples_of_the_rfc_are_read() -> None:
    """RFC 6455, 5.7."""
    assert read(bytes.fromhex("8185 37fa213d 7f9f4d5158")) == [(TEXT, "Hello")]
    assert read(bytes.fromhex("8a85 37fa213d 7f9f4d5158")) == [(PONG, b"Hello")]


def test_text_is_str_and_everything_else_bytes() -> None:
    sent = frame(TEXT, "κόσμε".encode()) + b"".join([frame(each, b"\x03\xe8") for each in (BINARY, PING, PONG, CLOSE)])
    messages = read(sent)
    assert messages == [(TEXT, "κόσμε"), *((each, b"\x03\xe8") for each in (BINARY, PING, PONG, CLOSE))]
    assert {type(message) for _, message in messages[1:]} == {bytes}
    assert type(read(fragments(BINARY, b"a", b"b"))[0][1]) is bytes


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 65_535, 65_536])
def test_messages_of_any_size_are_read(size: int) -> None:  # 1.1, 1.2
    payload = random.Random(size).randbytes(size)
    assert read(frame(BINARY, payload) + frame(TEXT, b"*" * size)) == [(BINARY, payload), (TEXT, "*" * size)]


@pytest.mark.parametrize("size", range(10))
def test_each_byte_of_the_mask_is_taken_off(size: int) -> None:
    mask, payload = b"\x01\x20\x03\xf0", bytes(range(250, 256)) + bytes(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload[:size]))
    assert read(bytes([0x82, 0x80 | size]) + mask + masked) == [(BINARY, payload[:size])]


@pytest.mark.parametrize("parts", [(b"a", b"b"), (b"", b"", b""), (b"", b"ab", b""), (b"a", b"b", b"c", b"d", b"e")])
def test_fragments_are_one_message(parts: tuple[bytes, ...]) -> None:  # 5.3 to 5.5, 6.1
    for opcode, message in ((TEXT, b"".join(parts).decode()), (BINARY, b"".join(parts))):
        assert read(fragments(opcode, *parts) + frame(TEXT, b"next")) == [(opcode, message), (TEXT, "next")]


def test_a_control_frame_between_fragments_comes_at_once() -> None:  # 5.6 to 5.8, 5.19, 5.20, 7.1.5
    reader = MessageReader()
    for sent, came in (
        (frame(TEXT, b"1", fin=False) + frame(PING, b"ping"), [(PING, b"ping")]),
        (frame(CONT, b"2", fin=False) + frame(PONG, b"pong") + frame(CLOSE), [(PONG, b"pong"), (CLOSE, b"")]),
        (frame(CONT, b"3") + frame(CONT, b"stray")[:1], [(TEXT, "123")]),
    ):
        reader.receive_data(sent)
        assert list(reader.read()) == came


def test_reading_may_stop_after_a_message_and_go_on_later() -> None:
    reader = MessageReader()
    reader.receive_data(frame(TEXT, b"one") + fragments(TEXT, b"t", b"wo") + frame(PING, b"three") + frame(TEXT)[:3])
    assert [next(reader.read()) for _ in range(3)] == [(TEXT, "one"), (TEXT, "two"), (PING, b"three")]
    assert list(reader.read()) == []
    assert not reader.is_idle


STREAM = (
    frame(TEXT, "grüß".encode())
    + fragments(TEXT, *octets("κόσμε".encode()))
    + frame(PING, b"p" * 125)
    + frame(BINARY, bytes(range(256)))
    + frame(BINARY, b"a", fin=False)
    + frame(PING)
    + frame(CONT, b"b" * 126)
    + frame(CLOSE, b"\x03\xe8bye")
)
MESSAGES: list[Message] = [
    *((TEXT, "grüß"), (TEXT, "κόσμε"), (PING, b"p" * 125), (BINARY, bytes(range(256)))),
    *((PING, b""), (BINARY, b"a" + b"b" * 126), (CLOSE, b"\x03\xe8bye")),
]


def test_bytes_cut_anywhere_give_the_same_messages() -> None:
    assert read(STREAM) == read(*octets(STREAM)) == MESSAGES
    for cut in range(len(STREAM)):
        assert read(STREAM[:cut], STREAM[cut:]) == MESSAGES


def test_what_waits_for_more_is_counted_until_it_is_whole() -> None:
    reader, last = MessageReader(), frame(CONT, b"def")
    assert (reader.held, reader.is_idle) == (0, True)
    for sent, held, idle in (
        (b"\x01", 1, False),  # half a header of the text frame "", not the last
        (b"\x80" + MASK, 0, False),  # whole and empty, but the message is begun
        (frame(CONT, b"abc", fin=False), 3, False),
        (frame(PING, b"x" * 100), 3, False),
        (last[:-1], 3 + 8, False),
        (last[-1:], 0, True),
        (frame(BINARY, b"x" * 200)[:-50], 8 + 150, False),
    ):
        reader.receive_data(sent)
        list(reader.read())
        assert (reader.held, reader.is_idle) == (held, idle)


# What must not come


@pytest.mark.parametrize("first", [0xC1, 0xA1, 0x91, 0xF1, 0xD2, 0xB9, 0xE8, 0xC0])
def test_a_reserved_bit_is_refused(first: int) -> None:  # 3
    assert read(frame(TEXT, b"before") + bytes([first, 0x80])) == [(TEXT, "before"), (1002, "reserved bit set")]


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
def test_an_unknown_opcode_is_refused(opcode: int) -> None:  # 4
    assert read(frame(TEXT) + bytes([0x80 | opcode, 0x80])) == [(TEXT, ""), (1002, f"unknown opcode {opcode}")]


@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
def test_a_frame_without_a_mask_is_refused(opcode: int) -> None:
    assert read(Frame(Op(opcode), b"x").serialize(mask=False)) == [(1002, "frame is not masked")]
    assert read(bytes([0x80 | opcode, 0])) == [(1002, "frame is not masked")]


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_control_frame_is_whole_and_short(opcode: int) -> None:  # 2.5, 5.1, 5.2, 7.3.6
    error = (1002, "control frame is fragmented or over 125 bytes")
    assert read(frame(opcode, b"\x03\xe8" + b"x" * 123)) == [(opcode, b"\x03\xe8" + b"x" * 123)]
    for header in ((0x80 | opcode, 0xFE), (0x80 | opcode, 0xFF), (opcode, 0x80), (opcode, 0x85)):
        assert read(bytes(header)) == [error]


@pytest.mark.parametrize(
    ("header", "read_so_far"),
    [
        ("81fe 007d", [(1002, "frame length is not minimal")]),
        ("81fe 0000", [(1002, "frame length is not minimal")]),
        ("81fe 007e", []),
        ("82ff 000000000000ffff", [(1002, "frame length is not minimal")]),
        ("82ff 000000000000007e", [(1002, "frame length is not minimal")]),
        ("82ff 8000000000010000", [(1002, "frame length is not minimal")]),
        ("82ff ffffffffffffffff", [(1002, "frame length is not minimal")]),
        ("82ff 0000000000010000", []),
        ("82ff 0000000000010001", [(1009, "message is over 65536 bytes")]),
        ("02ff 0000000000010001", [(1009, "message is over 65536 bytes")]),
        ("82ff 0000010000000000", [(1009, "message is over 65536 bytes")]),
        ("81ff 7fffffffffffffff", [(1009, "message is over 65536 bytes")]),
    ],
)
def test_a_length_is_judged_as_soon_as_it_has_come(header: str, read_so_far: list[Message]) -> None:
    data = bytes.fromhex(header)
    assert read(*octets(data)) == read_so_far
    assert read(data[:-1]) == []


def test_fragments_together_have_at_most_64_kib() -> None:
    assert MAX_MESSAGE == 65_536
    most = fragments(BINARY, b"x" * 40_000, b"", b"y" * 25_536)
    assert read(most + most) == [(BINARY, b"x" * 40_000 + b"y" * 25_536)] * 2
    begun = frame(TEXT, b"x" * 40_000, fin=False) + frame(PING, b"p" * 125) + frame(CONT, b"y" * 25_000, fin=False)
    assert read(begun, bytes.fromhex("80fe 0219")) == [(PING, b"p" * 125), (1009, "message is over 65536 bytes")]
    assert read(begun, bytes.fromhex("80fe 0218")) == [(PING, b"p" * 125)]
    full = frame(TEXT, b"x" * 65_536, fin=False)
    assert read(full, frame(CLOSE, b"bye"), frame(CONT)) == [(CLOSE, b"bye"), (TEXT, "x" * 65_536)]
    assert read(full, bytes.fromhex("0081")) == [(1009, "message is over 65536 bytes")]


@pytest.mark.parametrize(
    "sent",
    [
        bytes.fromhex("80fe"),  # 5.9
        bytes.fromhex("00fe"),  # 5.12
        fragments(TEXT, b"a", b"b") + bytes.fromhex("0081"),  # 5.15
        frame(TEXT) + frame(CONT),
        frame(BINARY, b"a", fin=False) + frame(TEXT, b"b"),  # 5.18
        frame(TEXT, b"a", fin=False) + bytes.fromhex("02ff"),
        frame(TEXT, b"", fin=False) + frame(TEXT, b"b", fin=False),
    ],
    ids=["last", "first", "after fragments", "after a message", "text", "binary", "empty"],
)
def test_fragments_out_of_order_are_refused_by_their_header(sent: bytes) -> None:
    assert read(sent)[-1] == (1002, "continuation without a start, or a start inside a fragmented message")


def test_text_in_utf8_is_read_however_it_is_fragmented() -> None:  # 6.2, 6.5 to 6.23
    for text in VALID_UTF8:
        assert read(frame(TEXT, text) + fragments(TEXT, *octets(text))) == [(TEXT, text.decode())] * 2


def test_text_that_is_not_utf8_is_refused_and_binary_may_be_anything() -> None:  # 6.3 to 6.21
    for data in INVALID_UTF8:
        assert read(frame(TEXT, data)) == [(1007, "text is not UTF-8")], data.hex()
        assert read(fragments(TEXT, *octets(data), b"")) == [(1007, "text is not UTF-8")], data.hex()
        assert read(fragments(BINARY, *octets(data), b"")) == [(BINARY, data)]


# What goes out


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, "8200"),
        (125, "827d"),
        (126, "827e007e"),
        (256, "827e0100"),
        (65_535, "827effff"),
        (65_536, "827f0000000000010000"),
    ],
)
def test_a_frame_has_the_shortest_header_and_no_mask(size: int, header: str) -> None:
    assert encode_frame(Opcode.BINARY, b"*" * size) == bytes.fromhex(header) + b"*" * size


def test_str_goes_out_as_text_and_bytes_as_binary() -> None:
    assert encode_message("grüß") == b"\x81\x06gr\xc3\xbc\xc3\x9f"
    assert encode_message(b"\xff\x00") == b"\x82\x02\xff\x00"
    assert encode_frame(Opcode.PONG, b"\xff") == b"\x8a\x01\xff"
    assert encode_frame(Opcode.PING, b"") == b"\x89\x00"


def test_a_close_frame_has_its_code_and_reason() -> None:
    assert encode_close() == b"\x88\x02\x03\xe8"
    assert encode_close(1001, b"bye") == b"\x88\x05\x03\xe9bye"
    assert encode_close(4999, "grüß") == b"\x88\x08\x13\x87gr\xc3\xbc\xc3\x9f"


def test_a_close_reason_has_at_most_123_bytes_of_utf8() -> None:
    assert (MAX_CONTROL, MAX_REASON) == (125, 123)
    assert encode_close(1000, "x" * 123) == b"\x88\x7d\x03\xe8" + b"x" * 123
    for reason in ("ü" * 62, b"x" * 124):
        with pytest.raises(ValueError, match=r"^close reason of 124 bytes: at most 123 are allowed$"):
            encode_close(1000, reason)


# Answers to a close frame

SENDABLE = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
UNSENDABLE = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535]


@pytest.mark.parametrize("code", SENDABLE)
def test_a_close_is_answered_with_its_code_and_no_reason(code: int) -> None:  # 7.3, 7.7
    for reason in (b"", b"*" * 123, "κόσμε".encode()):
        assert reply_to_close(code.to_bytes(2, "big") + reason) == b"\x88\x02" + code.to_bytes(2, "big")


def test_a_close_without_a_code_is_answered_without_one() -> None:  # 7.3.1
    assert reply_to_close(b"") == b"\x88\x00"


@pytest.mark.parametrize("payload", [b"a", *(code.to_bytes(2, "big") + b"why" for code in UNSENDABLE)])
def test_a_close_with_a_code_that_may_not_be_sent_is_refused(payload: bytes) -> None:  # 7.3.2, 7.9
    with pytest.raises(ProtocolError, match=r"^close frame without a code that may be sent$") as caught:
        reply_to_close(payload)
    assert caught.value.code == 1002


@pytest.mark.parametrize("reason", [b"\xce\xba\xed\xa0\x80edited", b"\xce", b"\xff"])
def test_a_close_reason_that_is_not_utf8_is_refused(reason: bytes) -> None:  # 7.5.1
    with pytest.raises(ProtocolError, match=r"^text is not UTF-8$") as caught:
        reply_to_close(b"\x03\xe8" + reason)
    assert caught.value.code == 1007
