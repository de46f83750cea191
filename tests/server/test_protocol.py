"""RFC 6455 by the book, over real sockets: the cases of Autobahn|Testsuite."""

import itertools
import random
import struct
from collections.abc import Iterator

import pytest
from raw import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    RawClient,
    ask,
    fragments,
    frame,
    honest,
    octets,
    read_head,
    request,
    visit,
)
from rigged import RiggedServer
from running import ASSETS
from texts import INVALID_UTF8, VALID_UTF8

from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")


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


# The opening handshake (RFC 6455, 4.2); what is a proper one is asked of bytes alone, in test_web.py


def test_the_handshake_is_answered_as_in_the_rfc(server: PriceServer) -> None:
    status, headers, _ = ask(server.port, request())
    assert (status, headers["Upgrade"], headers["Connection"]) == (101, "websocket", "Upgrade")
    assert headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


@pytest.mark.parametrize("size", [10, 8_000, 60_000])
def test_frames_in_the_segment_of_the_upgrade_request_are_answered(echo: PriceServer, size: int) -> None:
    after = frame(PING, b"early") + frame(TEXT, b"x" * size) + frame(CLOSE, b"\x03\xe8")
    with RawClient(echo.port, after=after) as client:
        assert client.read() == (PONG, b"early")
        assert client.read() == (TEXT, b"x" * size)
        assert client.read_close() == 1000


def test_a_dribbled_request_is_served(echo: PriceServer) -> None:
    with visit(echo.port) as sock, sock.makefile("rb") as file:
        for octet in octets(request() + frame(PING, b"one by one")):
            sock.sendall(octet)
        assert read_head(file).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert file.read(12) == b"\x8a\x0aone by one"


# Autobahn|Testsuite's groups 1 to 7 and 10: what they send, and what has to come back

HELLO = b"Hello, world!"
PARTS = b"fragment1", b"fragment2"


@pytest.mark.parametrize(
    ("size", "header"),
    [
        (0, "8100"),
        (125, "817d"),
        (126, "817e007e"),
        (127, "817e007f"),
        (128, "817e0080"),
        (65_535, "817effff"),
        (65_536, "817f0000000000010000"),
    ],
)
def test_messages_of_any_size_come_back_after_the_shortest_header(client: RawClient, size: int, header: str) -> None:
    for chop in (0, 997):  # 1.1
        client.send(frame(TEXT, b"*" * size), chop)
        assert client.file.read(len(header) // 2 + size) == bytes.fromhex(header) + b"*" * size
    payload = b"\x00\xfe" * (size // 2) + b"\xff" * (size % 2)
    for chop in (0, 997):  # 1.2
        client.send(frame(BINARY, payload), chop)
        assert client.read() == (BINARY, payload)


def test_a_pong_has_the_exact_bytes_of_the_ping(client: RawClient) -> None:  # 2.1 to 2.6
    for payload in (b"", HELLO, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125):
        for chop in (0, 1):
            client.send(frame(PING, payload), chop)
            assert client.read() == (PONG, payload)


def test_an_unsolicited_pong_is_ignored(client: RawClient) -> None:  # 2.7 to 2.9
    client.send(frame(PONG) + frame(PONG, b"unsolicited pong payload") + frame(PING, b"ping payload"))
    assert client.read() == (PONG, b"ping payload")


def test_one_send_answers_all_the_pings_of_a_turn(rigged: RiggedServer) -> None:
    with RawClient(rigged.port) as client:
        sizes = rigged.listener.accepted[-1].sizes
        sizes.clear()
        client.send(b"".join([frame(PING, b"%d" % number) for number in range(50)]))
        assert [client.read() for _ in range(50)] == [(PONG, b"%d" % number) for number in range(50)]
    assert sizes == [10 * 3 + 40 * 4]


@pytest.mark.parametrize("chop", [0, 1])
def test_twenty_pings_are_answered_in_order(client: RawClient, chop: int) -> None:  # 2.10, 2.11
    client.send(b"".join([frame(PING, b"payload-%d" % number) for number in range(20)]), chop)
    assert [client.read() for _ in range(20)] == [(PONG, b"payload-%d" % number) for number in range(20)]


# Each: what is sent, the frames that come back first, the close code. Sent whole, and octet by octet.
VIOLATIONS: dict[str, tuple[bytes, list[tuple[int, bytes]], int]] = {
    "2.5 ping of 126 bytes": (frame(PING, b"\xfe" * 126), [], 1002),
    "3.1 RSV 1": (frame(TEXT, HELLO, rsv=1), [], 1002),
    "3.2 RSV 2": (frame(TEXT, HELLO) + frame(TEXT, HELLO, rsv=2) + frame(PING), [(TEXT, HELLO)], 1002),
    "3.4 RSV 4": (frame(TEXT, HELLO) + frame(TEXT, HELLO, rsv=4) + frame(PING), [(TEXT, HELLO)], 1002),
    "3.6 RSV 6 ping": (frame(PING, HELLO, rsv=6), [], 1002),
    "3.7 RSV 7 close": (frame(CLOSE, b"\x03\xe8", rsv=7), [], 1002),
    **{
        f"4 opcode {opcode}": (frame(TEXT, HELLO) + frame(opcode, HELLO) + frame(PING), [(TEXT, HELLO)], 1002)
        for opcode in (3, 7, 11, 15)
    },
    "5.1 fragmented ping": (fragments(PING, *PARTS), [], 1002),
    "5.2 fragmented pong": (fragments(PONG, *PARTS), [], 1002),
    "5.9 stray last continuation": (frame(CONT, b"stray") + frame(TEXT, HELLO), [], 1002),
    "5.12 stray first continuation": (frame(CONT, b"stray", fin=False) + frame(TEXT, HELLO), [], 1002),
    "5.15 stray continuation after a message": (
        fragments(TEXT, *PARTS) + frame(CONT, b"stray", fin=False) + frame(TEXT, HELLO),
        [(TEXT, b"fragment1fragment2")],
        1002,
    ),
    "5.18 a new message inside fragments": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), [], 1002),
    "unmasked text": (frame(TEXT, HELLO, masked=False), [], 1002),
    "16-bit length for 125 bytes": (frame(TEXT, b"x" * 125, length=struct.pack("!BH", 126, 125)), [], 1002),
    "64-bit length with the highest bit": (frame(TEXT, b"", length=struct.pack("!BQ", 127, 1 << 63)), [], 1002),
    "65,537 bytes, header only": (frame(BINARY, b"", length=struct.pack("!BQ", 127, 65_537)), [], 1009),
    "fragments of 65,537 bytes": (
        frame(BINARY, b"x" * 40_000, fin=False) + frame(CONT, b"", length=struct.pack("!BH", 126, 25_537)),
        [],
        1009,
    ),
    "7.3.2 close body of one byte": (frame(CLOSE, b"a"), [], 1002),
    "7.3.6 close reason of 124 bytes": (frame(CLOSE, b"\x03\xe8" + b"*" * 124), [], 1002),
    "7.5.1 close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xce\xba\xed\xa0\x80edited"), [], 1007),
}


@pytest.mark.parametrize(("sent", "back", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_answered_with_a_close_frame_that_says_which(
    echo: PriceServer, sent: bytes, back: list[tuple[int, bytes]], code: int
) -> None:
    for chop in (0, 1) if len(sent) < 1_000 else (0,):
        with RawClient(echo.port) as client:
            client.send(sent, chop)
            assert [client.read() for _ in back] == back
            assert client.read_close() == code


def test_the_close_frame_after_a_violation_says_in_words_what_is_wrong(client: RawClient) -> None:
    client.send(frame(TEXT, HELLO, masked=False))
    assert client.read() == (CLOSE, b"\x03\xeaframe is not masked")


def test_65537_bytes_sent_whole_are_refused_without_a_reset(client: RawClient) -> None:
    client.send(frame(TEXT, b"x" * 65_537))
    assert client.read_close() == 1009


def test_fragments_of_65536_bytes_come_back(client: RawClient) -> None:
    client.send(fragments(BINARY, b"x" * 40_000, b"", b"y" * 25_536))
    assert client.read() == (BINARY, b"x" * 40_000 + b"y" * 25_536)


@pytest.mark.parametrize("chop", [0, 1, 15])
def test_fragments_come_back_as_one_message_and_a_ping_between_them_at_once(client: RawClient, chop: int) -> None:
    client.send(fragments(TEXT, *PARTS), chop)  # 5.3 to 5.5
    assert client.read() == (TEXT, b"fragment1fragment2")
    for number in (b"1", b"2", b"3"):  # 5.6 to 5.8, 5.19, 5.20
        client.send(frame(CONT if number > b"1" else TEXT, number, fin=False) + frame(PING, b"ping " + number), chop)
        assert client.read() == (PONG, b"ping " + number)
    client.send(frame(CONT, b"4"), chop)
    assert client.read() == (TEXT, b"1234")
    for parts in ((b"", b"", b""), (b"", b"middle frame payload", b"")):  # 6.1
        client.send(fragments(TEXT, *parts), chop)
        assert client.read() == (TEXT, b"".join(parts))


def test_text_in_utf8_comes_back_however_it_is_cut(client: RawClient) -> None:  # 6.2, 6.5 to 6.23
    for text in VALID_UTF8:
        client.send(frame(TEXT, text) + fragments(TEXT, *octets(text)))
        client.send(frame(TEXT, text), chop=1)
        assert [client.read() for _ in range(3)] == [(TEXT, text)] * 3


def test_text_that_is_not_utf8_is_answered_1007_and_binary_need_not_be(echo: PriceServer) -> None:  # 6.3 to 6.21
    for text in INVALID_UTF8:
        for sent in (frame(TEXT, text), fragments(TEXT, *octets(text))):
            with RawClient(echo.port) as client:
                client.send(fragments(BINARY, *octets(text)) + sent)
                assert client.read() == (BINARY, text)
                assert client.read_close() == 1007, text


@pytest.mark.parametrize(
    "after",
    [frame(CLOSE, b"\x03\xe8"), frame(PING), frame(TEXT, HELLO), frame(3), b"\xff" * 99],
    ids=["close", "ping", "text", "reserved", "garbage"],
)
def test_nothing_is_answered_after_a_close_frame(client: RawClient, after: bytes) -> None:  # 7.1.1 to 7.1.4
    client.send(frame(TEXT, HELLO) + frame(CLOSE, b"\x03\xe8") + after)
    assert client.read() == (TEXT, HELLO)
    assert client.read_close() == 1000


def test_a_close_inside_fragments_ends_the_message(client: RawClient) -> None:  # 7.1.5
    client.send(frame(TEXT, b"fragment1", fin=False) + frame(CLOSE, b"\x03\xe8") + frame(CONT, b"fragment2"))
    assert client.read_close() == 1000


def test_a_close_after_a_long_message_does_not_cut_it_off(client: RawClient) -> None:  # 7.1.6
    client.send(frame(TEXT, b"BAsd7&jh23" * 6_553) + frame(CLOSE, b"\x03\xe8") + frame(PING))
    assert client.read() == (TEXT, b"BAsd7&jh23" * 6_553)
    assert client.read_close() == 1000


def test_the_server_hangs_up_first_and_does_not_wait_for_the_client(echo: PriceServer) -> None:  # 7.1.1
    with RawClient(echo.port, timeout=3) as client:
        client.send(frame(CLOSE, b"\x03\xe8"))
        assert client.read() == (CLOSE, b"\x03\xe8")
        assert client.file.read() == b"", "ended with FIN"


def test_a_close_frame_without_a_code_is_echoed_without_one(client: RawClient) -> None:  # 7.3.1
    client.send(frame(CLOSE))
    assert client.read_close() is None


def test_a_close_frame_is_echoed_with_its_code(echo: PriceServer) -> None:  # 7.3.3 to 7.3.5
    for reason, chop in itertools.product((b"", HELLO, b"*" * 123, "κόσμε".encode()), (0, 1)):
        with RawClient(echo.port) as client:
            client.send(frame(CLOSE, b"\x03\xe8" + reason), chop)
            assert client.read_close() == 1000


def test_a_close_code_is_echoed_if_it_may_be_sent(echo: PriceServer) -> None:
    sendable = [*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999]  # 7.7
    unsendable = [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]  # 7.9, 7.13
    for sent in sendable + unsendable:
        with RawClient(echo.port) as client:
            client.send(frame(CLOSE, sent.to_bytes(2, "big") + b"reason"))
            assert client.read_close() == (sent if sent in sendable else 1002)


def test_a_message_in_fragments_of_1300_bytes_comes_back(client: RawClient) -> None:  # 10.1.1
    payload = b"*" * 65_536
    client.send(fragments(TEXT, *[payload[start : start + 1_300] for start in range(0, 65_536, 1_300)]))
    assert client.read() == (TEXT, payload)


def test_a_thousand_random_pings_are_answered_with_their_bytes(echo: PriceServer) -> None:
    chance = random.Random(3)
    with honest(echo) as client:
        for number in range(1_000):
            payload = chance.randbytes(chance.randrange(126) if number > 125 else number)
            assert client.ping(payload).wait(10), f"no pong for {payload!r}"
        client.send("still here")
        assert client.recv(timeout=10) == "still here"
        client.close(1000, "bye")
        assert client.close_code == 1000  # not 1006


def test_messages_that_come_together_are_received_one_by_one_in_their_order(client: RawClient) -> None:
    for chop in (0, 5):
        client.send(b"".join([frame(TEXT, b"%d" % number) + frame(PING, b"%d" % number) for number in range(50)]), chop)
        both = [(opcode, b"%d" % number) for number in range(50) for opcode in (TEXT, PONG)]
        assert [client.read() for _ in range(100)] == both
