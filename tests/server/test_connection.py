"""One connection over a real socket: RFC 6455 by the book, sending and being behind, deadlines, ends, memory.

Time passes by a clock that the tests own (`timed`, `pass_time`), and where the bytes fall matters, a
connection's socket is replaced by one that takes just so many (`narrow`).
"""

import contextlib
import itertools
import json
import random
import socket
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from raw import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Clock,
    Narrow,
    RawClient,
    ask,
    connections,
    count,
    fragments,
    frame,
    get,
    gone,
    honest,
    in_thread,
    last_connection,
    narrow,
    octets,
    one_after_the_other,
    parse,
    pass_time,
    preceded,
    prices,
    read_all,
    read_head,
    request,
    visit,
    wait_for_value,
    widen,
)
from running import ASSETS, wait_for
from texts import INVALID_UTF8, VALID_UTF8

from coin_api import PriceUpdate
from price_server import PriceServer
from price_server.connection import Connection
from price_server.frames import MAX_MESSAGE, encode_frame
from price_server.loop import Loop

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., PriceServer]
Updates = Callable[[float], list[PriceUpdate]]


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


def test_a_request_cut_off_before_its_end_is_closed_without_an_answer(echo: PriceServer) -> None:
    for cut_off in (request()[:-2], b"GET /prices HTTP/1.1\r\n", b"G", b""):
        with visit(echo.port, cut_off) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b""


@pytest.mark.parametrize("size", [10, 8_000, 60_000])
def test_frames_in_the_segment_of_the_upgrade_request_are_answered(echo: PriceServer, size: int) -> None:
    behind = frame(PING, b"early") + frame(TEXT, b"x" * size) + frame(CLOSE, b"\x03\xe8")
    with RawClient(echo.port, behind=behind) as client:
        assert client.read() == (PONG, b"early")
        assert client.read() == (TEXT, b"x" * size)
        assert client.read_close() == 1000


def test_a_dribbled_request_is_served(echo: PriceServer) -> None:
    with visit(echo.port) as sock, sock.makefile("rb") as file:
        for octet in octets(request() + frame(PING, b"one by one")):
            sock.sendall(octet)
        assert read_head(file).startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert file.read(12) == b"\x8a\x0aone by one"


def test_a_request_of_over_32_kib_is_refused_before_its_end_comes(echo: PriceServer) -> None:
    whole = request(more=f"X-Long: {'x' * (32_768 - len(request()) - 10)}\r\n")
    assert len(whole) == 32_768
    assert ask(echo.port, whole)[0] == 101
    assert ask(echo.port, whole.replace(b"X-Long", b"X-Longer"))[0] == 431
    assert ask(echo.port, b"GET /" + b"x" * 32_764)[0] == 431


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
def test_messages_of_any_size_come_back_behind_the_shortest_header(client: RawClient, size: int, header: str) -> None:
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


def test_one_send_answers_all_the_pings_of_a_turn(server: PriceServer) -> None:
    sends: list[int] = []
    with RawClient(server.port) as client:
        connection = last_connection(server)
        counted = Narrow(connection.socket)
        server.call(partial(setattr, connection, "socket", counted))
        counted.send = lambda data, flags=0: sends.append(len(data)) or counted.socket.send(data, flags)  # type: ignore
        client.send(b"".join([frame(PING, b"%d" % number) for number in range(100, 200)]))
        assert [client.read() for _ in range(100)] == [(PONG, b"%d" % number) for number in range(100, 200)]
    assert sends == [500]


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
    "5.15 stray continuation behind a message": (
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


def test_the_close_frame_behind_a_violation_says_in_words_what_is_wrong(client: RawClient) -> None:
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


def test_messages_that_come_together_are_heard_one_by_one_in_their_order(client: RawClient) -> None:
    for chop in (0, 5):
        client.send(b"".join([frame(TEXT, b"%d" % number) + frame(PING, b"%d" % number) for number in range(50)]), chop)
        both = [(opcode, b"%d" % number) for number in range(50) for opcode in (TEXT, PONG)]
        assert [client.read() for _ in range(100)] == both


# Prices


def test_a_new_client_gets_all_known_prices_in_the_order_tracked(server: PriceServer, updates: Updates) -> None:
    server.publish(reversed(updates(7.0)))
    with honest(server) as client:
        assert client.recv() == '{"asset_id":"BTC","price":7.0,"time":"2026-11-22T07:44:05.1234567Z"}'
        assert prices(client, 9) == [(asset, 7.0) for asset in ASSETS[1:]]


def test_a_poll_reaches_every_client_at_once_in_the_order_tracked(server: PriceServer, updates: Updates) -> None:
    with honest(server) as first, honest(server) as second:
        server.publish(reversed(updates(1.0)))
        for client in (first, second):
            assert prices(client, 10) == [(asset, 1.0) for asset in ASSETS]


def test_a_partial_publish_sends_only_what_is_new(server: PriceServer) -> None:
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


def test_an_untracked_asset_is_not_published_and_nothing_else_of_its_poll(server: PriceServer) -> None:
    with honest(server) as client:
        with pytest.raises(ValueError, match="unknown asset 'DOGE': this server tracks BTC, ETH"):
            server.publish([PriceUpdate("BTC", 1.0, ""), PriceUpdate("DOGE", 1.0, "")])
        server.publish([PriceUpdate("ETH", 2.0, "")])
        assert prices(client, 1) == [("ETH", 2.0)]


def test_a_client_that_comes_during_publishes_misses_nothing(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1))
    with RawClient(server.port) as early:
        came = [early]
        for price in range(2, 50):
            thread = in_thread(lambda: came.append(RawClient(server.port)))
            server.publish(updates(price))
            thread.join(10)
        server.disconnect_clients_gracefully()
        for each in came:
            messages = [json.loads(data) for opcode, data in parse(each.file.read()) if opcode == TEXT]
            each.__exit__()
            assert [message["asset_id"] for message in messages[:10]] == list(ASSETS)
            for asset in ASSETS:
                seen = [message["price"] for message in messages if message["asset_id"] == asset]
                assert seen == list(range(seen[0], 50)), "skipped, twice or back in time"
    assert len(came) == 49


# Being behind: a full socket


THREE = ("BTC", "ETH", "XRP")
SIZE = len(encode_frame(TEXT, b'{"asset_id":"BTC","price":1.0,"time":"t"}'))  # of a frame of these


def poll(price: float, *assets: str) -> list[PriceUpdate]:
    return [PriceUpdate(asset, price, "t") for asset in assets or THREE]


def test_what_a_full_socket_did_not_take_follows_whole_and_then_the_current_prices(start_server: Start) -> None:
    server = start_server(THREE)
    for room in (0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 3 * SIZE - 1):
        with RawClient(server.port) as client:
            client.prices(3 if server.updates else 0)
            narrowed = narrow(server, room)
            server.publish(poll(1.0))
            server.publish(poll(2.0))
            widen(server, narrowed)
            begun = -(-room // SIZE)  # frames of the first poll of which a byte is out
            order = [*THREE[begun:], *THREE[:begun]]  # it goes on where it stopped
            assert client.prices(begun + 3) == [(each, 1.0) for each in THREE[:begun]] + [(each, 2.0) for each in order]
            server.publish(poll(3.0))
            assert client.prices(3) == [(each, 3.0) for each in THREE], "nothing else came between"


def test_a_partial_poll_adds_to_what_is_owed_and_replaces_nothing(start_server: Start) -> None:
    server = start_server(THREE)
    with RawClient(server.port) as client:
        narrowed = narrow(server, 1)
        server.publish(poll(1.0, "ETH", "XRP"))
        server.publish(poll(2.0, "ETH"))
        server.publish(poll(3.0, "BTC"))
        widen(server, narrowed)
        assert client.prices(4) == [("ETH", 1.0), ("XRP", 1.0), ("ETH", 2.0), ("BTC", 3.0)]


def test_a_slow_reader_of_400_assets_gets_every_one_in_turn(start_server: Start) -> None:
    assets = tuple(f"A{number:03}" for number in range(400))
    server = start_server(assets)
    with RawClient(server.port) as client:
        narrowed = narrow(server)
        for number in range(1, 11):
            server.publish([PriceUpdate(asset, float(number), "t") for asset in assets])
            widen(server, narrowed, room=50 * SIZE)
        seen = [asset for asset, _ in client.prices(450)]
        assert sorted(set(seen)) == list(assets)


def test_what_is_owed_of_400_assets_goes_out_in_few_sends(start_server: Start) -> None:
    assets = tuple(f"A{number:03}" for number in range(400))
    server = start_server(assets)
    with RawClient(server.port) as client:
        narrowed = narrow(server)
        server.publish([PriceUpdate(asset, 1.0, "t") for asset in assets])
        sends: list[int] = []

        def catch_up() -> None:
            narrowed.room = 1 << 30
            narrowed.send = preceded(narrowed.send, lambda: sends.append(1))  # type: ignore[method-assign]
            last_connection(server).flush()

        server.call(catch_up)
        assert client.prices(400) == [(asset, 1.0) for asset in assets]
        assert len(sends) <= 4


def test_an_upgrade_that_a_full_socket_did_not_take_is_followed_by_the_current_prices(start_server: Start) -> None:
    server = start_server(THREE)
    rooms = (0, 10, 128, 129, 130, 129 + SIZE, 140 + SIZE)
    for room, later in itertools.product(rooms, (poll(2.0), poll(2.0)[:2], [])):
        server.publish(poll(1.0))
        with visit(server.port, request()[:-2], timeout=3) as sock, sock.makefile("rb") as file:
            wait_for(lambda: connections(server) == 1)
            (connection,) = server.call(lambda: list(server._visitors))
            narrowed = connection.socket = Narrow(connection.socket)
            narrowed.room = room
            sock.sendall(b"\r\n")
            wait_for(lambda: server.clients)
            server.publish(later)
            widen(server, narrowed)
            head = read_head(file)
            assert head.startswith(b"HTTP/1.1 101 ")
            assert len(head) == 129
            server.disconnect_clients_gracefully()
            *frames, close = parse(file.read())
            assert close[0] == CLOSE
        begun = max(-(-(room - 129) // SIZE), 0)
        came = [(update["asset_id"], update["price"]) for update in (json.loads(data) for _, data in frames)]
        changed = [update.asset_id for update in later]
        rest = [(each, 2.0 if each in changed else 1.0) for each in THREE[begun:]]
        again = [(each, 2.0) for each in THREE[:begun] if each in changed]
        assert came == [(each, 1.0) for each in THREE[:begun]] + rest + again
        wait_for(lambda: connections(server) == 0)


class Ragged(Narrow):
    """A socket that takes any number of bytes at a time, and often none."""

    def __init__(self, sock: Any, seed: int):
        super().__init__(sock)
        self.chance = random.Random(seed)

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        self.room = self.chance.choice((0, 1, 50, 700, 5_000))
        if not self.room:
            raise BlockingIOError
        return super().send(data, flags)


def test_400_publishes_to_ragged_sockets_tear_no_frame_and_end_with_the_last_price(
    server: PriceServer, updates: Updates
) -> None:
    clients = [RawClient(server.port) for _ in range(6)]
    streams: dict[int, bytes] = {}
    readers = []

    def read(seed: int) -> None:
        streams[seed] = clients[seed].file.read()

    for seed, known in enumerate(server.clients):
        handler = known["handler"]
        server.call(partial(setattr, handler, "socket", Ragged(handler.socket, seed)))
        readers.append(in_thread(partial(read, seed)))
    for price in range(1, 401):
        server.publish(updates(float(price)))
        if price % 50 == 0:
            server.send_message_to_all(f"note {price} " + "x" * price)
            for client in clients:
                client.send(frame(PING, b"ping %d" % price))
    heard: list[int] = []  # what comes behind the last pings
    server.set_fn_message_received(lambda client, *_: heard.append(client["id"]))
    for client in clients:
        client.send(frame(TEXT, b"these were all the pings"))
    wait_for(lambda: len(heard) == 6, 20)
    handlers = [each["handler"] for each in server.clients]
    wait_for(lambda: not any(each.kept or each.owed for each in handlers), 20, "all sent")
    server.disconnect_clients_gracefully()
    for client, reader in zip(clients, readers, strict=True):
        reader.join(20)
        client.__exit__()
    gone(server)
    assert server.held == 0
    for seed in range(6):
        check_stream(streams[seed])


def check_stream(stream: bytes) -> None:
    last: dict[str, float] = {}
    others: dict[int, list[bytes]] = {TEXT: [], PONG: [], CLOSE: []}
    for opcode, payload in parse(stream):
        if opcode == TEXT and payload.startswith(b"{"):
            update = json.loads(payload)
            assert update["price"] > last.get(update["asset_id"], 0), "twice, or back in time"
            last[update["asset_id"]] = update["price"]
        else:
            others[opcode].append(payload)
    assert last == dict.fromkeys(ASSETS, 400.0)
    assert others[TEXT] == [b"note %d " % price + b"x" * price for price in range(50, 401, 50)]
    assert others[PONG] == [b"ping %d" % price for price in range(50, 401, 50)]
    assert others[CLOSE] == [b"\x03\xe8"]


def fill(server: PriceServer, client: RawClient) -> Connection:
    """Ping without reading until the client's socket is full, and the server's towards it; its connection."""
    connection = last_connection(server)
    client.socket.settimeout(0.05)
    full, until = False, time.monotonic() + 10
    while not (full and connection.deadline):
        assert time.monotonic() < until, "it never is behind"
        client.unsent = client.unsent or frame(PING, b"x" * 125) * 100
        try:
            client.unsent = client.unsent[client.socket.send(client.unsent) :]
        except TimeoutError:
            full = True
    client.socket.settimeout(10)
    return connection


def test_a_client_that_catches_up_gets_the_current_prices_and_no_backlog(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096) as client:
        connection = fill(server, client)
        for price in range(1, 1_001):
            server.publish(updates(price))
        assert connection.held < 10_000, "nothing is read meanwhile, so no pongs pile up, and prices never queue"
        assert client.prices(10) == [(asset, 1000) for asset in ASSETS]
        server.publish(updates(1_001))
        assert client.prices(1) == [("BTC", 1_001)]


def test_a_client_that_never_reads_absorbs_under_a_fifth_of_a_megabyte(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096):
        connection = last_connection(server)
        published = 0
        while not connection.kept and published < 10_000:
            server.publish(updates(1.0))
            published += 1
        assert published * 690 < 200_000


def test_the_buffers_of_an_accepted_socket_are_small_and_nothing_waits_in_them(server: PriceServer) -> None:
    with RawClient(server.port):
        sock = last_connection(server).socket
        doubled = 2 if sys.platform == "linux" else 1  # it tells twice what was set
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == (32 << 10) * doubled
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == (16 << 10) * doubled
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_messages_queue_up_to_a_mebibyte_and_past_it_the_client_is_dropped(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        client.send(frame(TEXT, b"x" * 50_000, fin=False) + frame(PING))  # what it sends itself does not count
        assert client.read() == (PONG, b"")
        narrowed = narrow(server)
        message = "x" * (65_536 - 4)  # and a header of 4
        for _ in range(16):
            server.send_message(server.clients[0], message)
        assert server.held == (1 << 20) + 50_000
        narrowed.room = 2 << 20
        assert [client.read() for _ in range(16)] == [(TEXT, message.encode())] * 16
        narrowed.room = 0
        for _ in range(16):
            server.send_message(server.clients[0], message)
        assert len(server.clients) == 1
        server.send_message(server.clients[0], "")
        assert server.clients == []
        assert server.held == 0
    assert count(server, 'clients_dropped_total{reason="queue_full"}') == 1


# Deadlines


def answer_history(server: PriceServer, *pieces: bytes) -> None:
    """Have /history answered with these pieces."""
    server.history.answer = lambda *_: list(pieces)  # type: ignore[method-assign]


def test_the_limits_are_those_of_the_design() -> None:
    assert PriceServer.request_timeout == 10.0
    assert PriceServer.take_timeout == 30.0
    assert PriceServer.take_rate == 8_192
    assert PriceServer.linger_timeout == 2.0
    assert PriceServer.close_timeout == 5.0
    assert PriceServer.behind_timeout == 30.0
    assert PriceServer.message_timeout == 30.0
    assert PriceServer.max_queue == 1_048_576
    assert PriceServer.max_held == 64 << 20
    assert PriceServer.ping_interval == 20.0
    assert PriceServer.max_unanswered == 3
    assert PriceServer.housekeeping_interval == 0.5
    assert PriceServer.call_timeout == 10.0
    assert Loop.stop_timeout == 1.0  # PriceServer's is shorter in these tests
    assert PriceServer.request_queue_size == 1_024
    assert MAX_MESSAGE == 65_536


def half_a_request(server: PriceServer) -> Callable[[], object]:
    sock = visit(server.port, request()[:-2])
    wait_for(lambda: connections(server) == 1)
    return lambda: sock.sendall(b"X")


def an_answer_behind_which_nobody_hangs_up(server: PriceServer) -> Callable[[], object]:
    sock = visit(server.port, get("/prices"))
    assert read_all(sock).endswith(b"[]"), "ended with FIN"
    return lambda: sock.sendall(b"X")


def an_answer_of_4_mebibytes_that_nobody_takes(server: PriceServer) -> Callable[[], object]:
    answer_history(server, b"x" * (4 << 20))
    sock = visit(server.port, get("/history"), receive_buffer=4096)
    wait_for(lambda: server.held, what="an answer that waits")
    return lambda: sock.recv(1_000)


def a_close_behind_which_the_client_does_not_hang_up(server: PriceServer) -> Callable[[], object]:
    client = RawClient(server.port)
    client.send(frame(CLOSE, b"\x03\xe8"))
    assert client.read() == (CLOSE, b"\x03\xe8")
    assert client.file.read() == b"", "the server hangs up first"
    return lambda: client.send(frame(TEXT, b"X"))


def a_denied_client_that_does_not_hang_up(server: PriceServer) -> Callable[[], object]:
    server.deny_new_connections()
    client = RawClient(server.port)
    assert client.read()[0] == CLOSE
    return lambda: client.send(frame(TEXT, b"X"))


def a_close_that_a_full_socket_does_not_take(server: PriceServer) -> Callable[[], object]:
    client = RawClient(server.port)
    narrowed = narrow(server)
    server.disconnect_clients_gracefully()
    return one_after_the_other(partial(setattr, narrowed, "room", 1), lambda: client.send(frame(TEXT, b"X")))


def a_full_socket(server: PriceServer) -> Callable[[], object]:
    client = RawClient(server.port)
    narrowed = narrow(server)
    server.publish(poll(1.0))
    return one_after_the_other(
        partial(setattr, narrowed, "room", 10),
        lambda: client.send(frame(PING)),
        lambda: server.publish(poll(2.0)),
    )


def an_unfinished_message(server: PriceServer) -> Callable[[], object]:
    client = RawClient(server.port)
    client.send(frame(TEXT, b"x", fin=False) + frame(PING))
    assert client.read() == (PONG, b"")
    return lambda: client.send(frame(CONT, b"y", fin=False) + frame(PING))


def an_unfinished_frame(server: PriceServer) -> Callable[[], object]:
    client = RawClient(server.port)
    client.send(frame(PING) + frame(TEXT, b"x" * 100)[:50])
    assert client.read() == (PONG, b"")
    return lambda: client.send(b"y")


@pytest.mark.parametrize("trickle", [False, True], ids=["", "trickle"])
@pytest.mark.parametrize(
    ("begin", "limit", "reason"),
    [
        (half_a_request, 10.0, ""),
        (an_answer_behind_which_nobody_hangs_up, 2.0, ""),
        (an_answer_of_4_mebibytes_that_nobody_takes, 30.0 + 512.0, ""),
        (a_close_behind_which_the_client_does_not_hang_up, 5.0, "no_close"),
        (a_denied_client_that_does_not_hang_up, 5.0, ""),
        (a_close_that_a_full_socket_does_not_take, 5.0, "no_close"),
        (a_full_socket, 30.0, "behind"),
        (an_unfinished_message, 30.0, "unfinished"),
        (an_unfinished_frame, 30.0, "unfinished"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_server_waits_so_long_for(
    timed: PriceServer, begin: Callable[[PriceServer], Callable[[], object]], limit: float, reason: str, trickle: bool
) -> None:
    step = begin(timed)  # which moves no deadline
    timed.call(lambda: None)  # what the server does behind its last send is done
    for _ in range(3):
        pass_time(timed, (limit - 0.5) / 3)
        assert connections(timed) == 1
        if trickle:
            step()
    pass_time(timed, 1.0)
    assert connections(timed) == 0
    dropped = {name: number for name, number in timed.dropped.items() if number}
    assert dropped == ({f'{{reason="{reason}"}}': 1} if reason else {})
    assert timed.held == 0


def test_a_client_behind_that_catches_up_in_time_may_fall_behind_again(timed: PriceServer, updates: Updates) -> None:
    with RawClient(timed.port) as client:
        for price in range(1, 4):
            narrowed = narrow(timed)
            timed.publish(updates(price))
            pass_time(timed, 19.0)
            widen(timed, narrowed)
            assert client.prices(10) == [(asset, price) for asset in ASSETS]
            client.send(frame(PONG))
            pass_time(timed, 19.0)
        assert len(timed.clients) == 1


def test_a_message_has_its_time_anew_behind_each_that_became_whole(timed: PriceServer) -> None:
    with RawClient(timed.port) as client:
        message = frame(TEXT, b"x" * 100)
        client.send(message[:50])
        for _ in range(4):
            pass_time(timed, 19.0)
            client.send(message[50:] + frame(PING) + message[:50])
            while client.read()[0] != PONG:
                pass
        client.send(message[50:])
        pass_time(timed, 35.0)
        assert len(timed.clients) == 1


# Pings


def pings(client: RawClient) -> int:
    """How many pings have come and nothing else."""
    number = 0
    while not client.hears_nothing():
        assert client.read() == (PING, b"")
        number += 1
    return number


def test_a_client_is_pinged_every_20_s_and_dropped_after_three_without_a_pong(timed: PriceServer) -> None:
    with RawClient(timed.port) as silent, RawClient(timed.port) as lively:
        for number in range(1, 4):
            for _ in range(4):
                pass_time(timed, 4.9)
                assert pings(silent) == pings(lively) == 0
            pass_time(timed, 0.5)
            assert pings(silent) == pings(lively) == 1
            lively.send(frame(PONG))
            silent.send(frame(TEXT, b"I am no pong"))
            assert len(timed.clients) == 2
            assert number <= 3
        pass_time(timed, 20.0)
        assert silent.file.read() == b"", "dropped without a fourth ping"
        assert pings(lively) == 1
        assert len(timed.clients) == 1
    assert timed.dropped['{reason="no_pong"}'] == 1
    assert timed.messages_sent == 0, "a ping is no message"


def test_300_clients_are_all_pinged_at_once_and_once_though_it_is_done_in_slices(timed: PriceServer) -> None:
    clients = [RawClient(timed.port) for _ in range(300)]
    pass_time(timed, 20.5)
    pass_time(timed, 1.0)
    for client in clients:
        assert pings(client) == 1
        client.reset()


def test_a_machine_that_slept_for_a_day_finds_its_clients_again(timed: PriceServer) -> None:
    with RawClient(timed.port) as client:
        pass_time(timed, 86_400.0)
        for _ in range(5):
            pass_time(timed, 1.0)
        assert pings(client) == 1, "what was slept through is not made up for"
        assert len(timed.clients) == 1


# Ends


def test_an_answer_of_any_size_is_whole_at_a_slow_reader(server: PriceServer) -> None:
    body = [random.Random(1).randbytes(size) for size in (10, 300_000, 4_096, 0, 5, 5, 40_000, 1)]

    answer_history(server, *body)
    for data in (get("/history"), get("/history") + b"what comes behind is thrown away" * 300):
        with visit(server.port, data, receive_buffer=4096) as sock:
            head, _, came = read_all(sock).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert came == b"".join(body)
    wait_for(lambda: connections(server) == 0)
    assert server.held == 0


def test_a_large_piece_of_an_answer_is_never_copied_to_be_joined_with_others(server: PriceServer) -> None:
    sizes: list[int] = []
    answer_history(server, b"a" * 10_000, b"b" * 10_000, b"c" * 100_000, b"d" * 10_000, b"e" * 100_000)
    with visit(server.port, get("/history")[:-2]) as sock:
        wait_for_value(lambda: connections(server), 1)
        connection = server.call(lambda: next(iter(server._visitors)))
        counted = connection.socket = Narrow(connection.socket)
        counted.send = lambda data, flags=0: sizes.append(len(data)) or counted.socket.send(data, flags)  # type: ignore
        sock.sendall(b"\r\n")
        assert len(read_all(sock).partition(b"\r\n\r\n")[2]) == 230_000
    assert 20_000 < sizes[0] < 21_000, "small ones are joined"
    assert max(sizes) == 100_000


def test_nothing_follows_a_close_frame_that_waits_behind_a_full_socket(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096) as client:
        connection = fill(server, client)
        server.publish(updates(1.0))
        connection.send_close(1001, "server is stopping")
        server.send_message_to_all("late")
        connection.send_close(1000, "twice")
        server.publish(updates(2.0))
        frames = list(parse(client.file.read()))
    assert {opcode for opcode, _ in frames[:-1]} == {PONG}
    assert frames[-1] == (CLOSE, b"\x03\xe9server is stopping")


def test_a_client_that_hangs_up_without_a_close_is_gone_at_once(timed: PriceServer) -> None:
    with RawClient(timed.port) as client:
        client.socket.shutdown(socket.SHUT_WR)
        assert client.file.read() == b""
        gone(timed)
    RawClient(timed.port).reset()
    gone(timed)


# The memory bound


def filled(start_server: Start, assets: tuple[str, ...], hours: float = 1.0) -> PriceServer:
    """A server whose history has a poll every 10 s."""
    clock = Clock()
    server = start_server(assets, wall_clock=clock)
    for number in range(int(hours * 360)):
        clock.now += 10.0
        server.publish([PriceUpdate(asset, 45_000.5 + number, "t") for asset in assets])
    return server


def ask_and_never_read(server: PriceServer, paths: list[str]) -> list[socket.socket]:
    """Visitors whose answers wait in the server; they come one by one."""
    visitors = []
    for number, path in enumerate(paths, 1):
        visitors.append(visit(server.port, get(path), receive_buffer=4096))
        wait_for_value(lambda: server.call(lambda: sum(each.held > 0 for each in server._answered)), number)
    return visitors


def test_200_visitors_that_ask_for_the_past_and_never_read_hold_it_once(start_server: Start) -> None:
    server = filled(start_server, ASSETS)
    _, _, body = ask(server.port, get("/history"))
    assert len(body) > 60_000
    visitors = ask_and_never_read(server, ["/history"] * 200)
    print(f"200 visitors hold {server.held} bytes; one answer has {len(body)}")
    assert server.held < len(body) + 200 * 1_000
    for visitor in visitors:
        visitor.close()
    wait_for(lambda: connections(server) == 0)
    assert server.held == 0
    assert not server._shared


def test_a_visitor_that_takes_the_past_slowly_does_not_hold_the_head_of_its_request(start_server: Start) -> None:
    server = filled(start_server, ASSETS)
    head = get("/history")[:-2] + b"".join([b"X-%d: %b\r\n" % (number, b"x" * 320) for number in range(90)]) + b"\r\n"
    tracemalloc.start()
    visitors = []
    for number in range(1, 31):
        visitors.append(visit(server.port, head, receive_buffer=4096))
        wait_for_value(lambda: server.call(lambda: sum(each.held > 0 for each in server._answered)), number)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 30 * len(head)
    for visitor in visitors:
        visitor.close()


def test_distinct_subsets_of_40_assets_that_nobody_reads_hold_each_asset_once(start_server: Start) -> None:
    assets = tuple(f"A{number:02}" for number in range(40))
    server = filled(start_server, assets)
    _, _, body = ask(server.port, get("/history"))
    chance = random.Random(2)
    subsets = [",".join(chance.sample(assets, 35)) for _ in range(100)]
    visitors = ask_and_never_read(server, [f"/history?assets={subset}" for subset in subsets])
    print(f"100 visitors hold {server.held} bytes; all assets have {len(body)}")
    assert server.held < 1.1 * len(body) + 100 * 1_000
    for visitor in visitors:
        visitor.close()


def test_past_the_bound_of_memory_the_largest_holder_goes_and_it_is_one_line(
    server: PriceServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.max_held = 300_000
    with RawClient(server.port) as small, RawClient(server.port) as large, RawClient(server.port) as quiet:
        message = frame(TEXT, b"x" * 60_000, fin=False)
        last = server.clients[1]["handler"]
        small.send(message)
        server.call(lambda: setattr(last, "socket", Narrow(last.socket)))
        wait_for(lambda: server.held > 50_000)
        for _ in range(3):
            server.send_message(server.clients[1], "x" * 70_000)
        assert len(server.clients) == 3
        with visit(server.port, request()[:-2]) as visitor:
            quiet.send(message)
            assert large.file.read() == b""
            wait_for(lambda: len(server.clients) == 2)
            assert server.held < 130_000
            visitor.sendall(b"\r\n")
            assert visitor.recv(12) == b"HTTP/1.1 101"
            assert small.hears_nothing()
            assert quiet.hears_nothing()
    assert server.dropped['{reason="memory"}'] == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "over 300000 bytes wait for connections: the largest ones are dropped"
    ]
    gone(server)
    wait_for(lambda: connections(server) == 0)
    assert server.held == 0


def test_what_visitors_and_clients_leave_unfinished_is_counted_and_given_back(server: PriceServer) -> None:
    visitor = visit(server.port, b"GET /" + b"x" * 20_000)
    wait_for(lambda: server.held == 20_005)
    client = RawClient(server.port)
    client.send(frame(TEXT, b"x" * 30_000, fin=False) + frame(CONT, b"x" * 30_000, fin=False))
    wait_for(lambda: server.held == 80_005)
    visitor.close()
    wait_for(lambda: server.held == 60_000)
    client.reset()
    wait_for(lambda: server.held == 0)


def test_clients_of_many_subsets_of_the_assets_hold_no_copy_of_the_prices_each(start_server: Start) -> None:
    assets = tuple(f"A{number:03}" for number in range(250))
    updates = [PriceUpdate(asset, 1.0, "2026-11-22T07:44:05.1234567Z") for asset in assets]
    server = start_server(assets)
    server.publish(updates)
    size = len(server.snapshot(assets))
    with contextlib.ExitStack() as stack:
        for number in range(250):
            subset = ",".join(assets[number:] + assets[: number // 2])[:1000].rpartition(",")[0]
            stack.enter_context(RawClient(server.port, request(f"/ws?assets={subset}")))
        assert sum(map(len, server._snapshots.values())) <= 100 * size
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        server.publish(updates)
        assert tracemalloc.get_traced_memory()[1] < 140 * size


def test_a_slow_reader_of_400_assets_does_not_have_each_compared_with_each_at_a_poll(start_server: Start) -> None:
    compared = [0]

    class Counted(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return str.__eq__(self, other)

    assets = tuple(Counted(f"A{number:03}") for number in range(400))
    server = start_server(assets)
    updates = [PriceUpdate(asset, 1.0, "t") for asset in assets]
    with RawClient(server.port):
        narrowed = narrow(server)
        server.publish(updates)
        widen(server, narrowed, room=10 * SIZE)
        connection = last_connection(server)
        compared[0] = 0
        server.call(lambda: connection.deliver(assets))
        assert compared[0] < 40 * 400
