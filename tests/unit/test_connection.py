"""connection: one connection from its request to its end, by bytes, times and states."""

import random
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from price_server.connection import Connection, Message, RequestHead, State, held_bytes, largest_holders
from price_server.formats import EventStreamFormat, WebSocketFormat
from price_server.prices import Feed

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
HEAD = b"GET /ws HTTP/1.1\r\nHost: localhost\r\n\r\n"
OLD = {"BTC": b"[btc1]", "ETH": b"[eth--1]", "XRP": b"[x1]"}
NEW = {"BTC": b"[btc2]", "ETH": b"[eth--2]", "XRP": b"[x2]"}
ALL = ("BTC", "ETH", "XRP")


def frame(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    """One short frame as a client sends it, with a mask that leaves the payload as it is."""
    return bytes([fin << 7 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


def make_feed(messages: dict[str, bytes] = OLD, two_way: bool = True) -> Feed:
    feed = Feed(WebSocketFormat() if two_way else EventStreamFormat())
    feed.messages = messages
    return feed


def make_client(feed: Feed | None = None, assets: tuple[str, ...] = ALL) -> Connection:
    """A client that has taken the response and the snapshot."""
    connection = Connection(now=0)
    assert list(connection.receive_data(HEAD, 0)) == [RequestHead(HEAD)]
    connection.become_client(feed or make_feed(), assets, b"101")
    take(connection)
    return connection


def take(connection: Connection, size: int = 1 << 20, now: float = 0) -> bytes:
    """What the socket takes when it has room for so many bytes."""
    out = b""
    while len(out) < size and (data := bytes(connection.data_to_send()[: size - len(out)])):
        connection.advance(len(data), now)
        out += data
    if not out:
        connection.advance(0, now)
    return out


def send(connection: Connection, data: bytes, now: float = 0) -> list[str | bytes]:
    """The messages in what a client sends."""
    return [event.data for event in connection.receive_data(data, now) if isinstance(event, Message)]


# States


def in_state(state: State) -> Connection:
    connection = Connection(now=0) if state is State.VISITOR else make_client()
    if state in (State.CLOSING, State.LINGERING):
        connection.finish_with([b"bye"], 30)
    if state is State.LINGERING:
        take(connection)
    if state is State.ENDED:
        connection.end()
    assert connection.state is state
    return connection


STEPS: dict[str, Callable[[Connection], object]] = {
    "become_client": lambda connection: connection.become_client(make_feed(), ALL, b"101"),
    "finish_with": lambda connection: connection.finish_with([b"last"], 30),
    "advance": lambda connection: take(connection),
    "end": lambda connection: connection.end(),
}
FORBIDDEN = None


@pytest.mark.parametrize(
    ("before", "after"),  # each step
    [
        (State.VISITOR, (State.CLIENT, State.CLOSING, State.VISITOR, State.ENDED)),
        (State.CLIENT, (FORBIDDEN, State.CLOSING, State.CLIENT, State.ENDED)),
        (State.CLOSING, (FORBIDDEN, FORBIDDEN, State.LINGERING, State.ENDED)),
        (State.LINGERING, (FORBIDDEN, FORBIDDEN, State.LINGERING, State.ENDED)),
        (State.ENDED, (FORBIDDEN, FORBIDDEN, State.ENDED, State.ENDED)),
    ],
)
def test_each_step_leads_to_its_state_or_is_forbidden(before: State, after: tuple[State | None, ...]) -> None:
    for (name, step), state in zip(STEPS.items(), after, strict=True):
        connection = in_state(before)
        if state is FORBIDDEN:
            to = "CLIENT" if name == "become_client" else "CLOSING"
            with pytest.raises(RuntimeError, match=f"^a connection cannot go from {before.name} to {to}$"):
                step(connection)
        else:
            step(connection)
        assert connection.state is (state or before), name


def test_nothing_is_known_or_pending_at_first() -> None:
    visitor = Connection(now=0)
    assert (visitor.feed.messages, visitor.assets, visitor.unanswered, visitor.outbox) == ({}, (), 0, None)
    assert (visitor.data_to_send(), visitor.advance(0, 0), visitor.unfinished_bytes()) == (b"", 0, 0)


@pytest.mark.parametrize("state", [State.VISITOR, State.CLOSING, State.LINGERING, State.ENDED])
def test_only_a_client_gets_prices_and_messages(state: State) -> None:
    connection = in_state(state)
    connection.enqueue(b"message")
    connection.follow(ALL)
    assert connection.keep_unsent(ALL, 0, 0) == 0
    assert take(connection) == (b"bye" if state is State.CLOSING else b"")


def test_the_end_releases_everything() -> None:
    behind, visitor, talking = make_client(), Connection(now=0), make_client()
    behind.keep_unsent(ALL, 1, 0)
    assert list(visitor.receive_data(HEAD[:-1], 0)) == []
    assert send(talking, frame(TEXT, b"x")[:-1]) == []
    for connection in (behind, visitor, talking):
        connection.end()
        assert (connection.outbox, connection.unfinished_bytes(), connection.find_overdue(1e9)) == (None, 0, "")


# The request


@pytest.mark.parametrize(
    "head", [HEAD, b"GET / HTTP/1.1\n\n", b"GET / HTTP/1.1\r\nA: b\n\r\n", b"\r\n", b"\n", b"x" * 32_764 + b"\r\n\r\n"]
)
def test_a_request_is_taken_whole_and_dribbled(head: bytes) -> None:
    for size in (len(head), 1 if len(head) < 100 else 1_021):
        connection = Connection(now=0)
        for start in range(0, len(head) - 1, size):
            part = head[start : min(start + size, len(head) - 1)]
            assert list(connection.receive_data(part, 0)) == []
        assert connection.unfinished_bytes() == len(head) - 1
        assert list(connection.receive_data(head[-1:], 0)) == [RequestHead(head)]
        assert connection.unfinished_bytes() == 0


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n", b"\r\n\r\nmore"])
def test_a_request_over_32_kib_is_handed_over_and_released(end: bytes) -> None:
    connection, begin, end = Connection(now=0), b"x" * 32_768, end or b"x"
    assert list(connection.receive_data(begin, 0)) == []
    assert list(connection.receive_data(end, 0)) == [RequestHead((begin + end).removesuffix(b"more"))]
    assert connection.unfinished_bytes() == 0


def test_what_follows_a_complete_request_does_not_count_as_part_of_it() -> None:
    connection = Connection(now=0)
    assert list(connection.receive_data(HEAD + b"x" * 40_000, 0)) == [RequestHead(HEAD)]


def test_frames_in_the_segment_of_the_request_are_read() -> None:
    connection, events = Connection(now=0), []
    for event in connection.receive_data(HEAD + frame(TEXT, b"one") + frame(PING) + frame(BINARY, b"two")[:4], 0):
        events.append(event)
        if isinstance(event, RequestHead):
            connection.become_client(make_feed(), ALL, b"101")
    assert events == [RequestHead(HEAD), Message("one")]
    assert take(connection) == b"101\x8a\x00[btc1][eth--1][x1]"
    assert send(connection, frame(BINARY, b"two")[4:]) == [b"two"]


def test_an_answered_visitor_and_an_event_stream_are_not_listened_to() -> None:
    for step in (STEPS["finish_with"], lambda connection: connection.become_client(make_feed(two_way=False), ALL, b"")):
        connection = Connection(now=0)
        for event in connection.receive_data(HEAD + frame(TEXT, b"one"), 0):
            assert event == RequestHead(HEAD)
            step(connection)
        assert send(connection, frame(TEXT, b"two") + b"any") == []
        assert connection.unfinished_bytes() == 0


# Messages


def test_messages_are_given_as_they_came_and_pings_get_their_pongs_in_one_send() -> None:
    client = make_client()
    sent = frame(PING, b"a") + frame(TEXT, "grüß".encode()) + frame(PING, b"b") + frame(BINARY, b"\xff") + frame(PONG)
    assert send(client, sent) == ["grüß", b"\xff"]
    assert client.data_to_send() == b"\x8a\x01a\x8a\x01b"
    assert take(client) == b"\x8a\x01a\x8a\x01b"
    assert (client.outbox, client.state) == (None, State.CLIENT)


def test_only_a_pong_answers_a_heartbeat() -> None:
    client = make_client()
    client.unanswered = 2
    send(client, frame(TEXT, b"ping") + frame(PING) + frame(PONG)[:-1])
    assert client.unanswered == 2
    send(client, frame(PONG)[-1:])
    assert client.unanswered == 0


@pytest.mark.parametrize(
    ("sent", "last"),
    [
        (frame(CLOSE), b"\x88\x00"),
        (frame(CLOSE, b"\x03\xe8bye"), b"\x88\x02\x03\xe8"),
        (frame(CLOSE, b"\x03\xed"), b"\x88\x2d\x03\xeaclose frame without a code that may be sent"),
        (frame(CLOSE, b"\x03\xe8\xff"), b"\x88\x13\x03\xeftext is not UTF-8"),
        (frame(TEXT, b"\xff"), b"\x88\x13\x03\xeftext is not UTF-8"),
        (b"\x81\x00", b"\x88\x15\x03\xeaframe is not masked"),
        (b"\x82\xff\0\0\0\0\0\1\0\1", b"\x88\x1d\x03\xf1message is over 65536 bytes"),
    ],
)
def test_a_close_or_an_error_is_answered_with_a_close_and_ends_it(
    sent: bytes, last: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    client = make_client()
    client.keep_unsent(ALL, 1, 0)
    assert send(client, frame(TEXT, b"one") + frame(PING) + sent + frame(PING) + frame(TEXT, b"two"), 7) == ["one"]
    assert client.state is State.CLOSING
    assert take(client, now=8) == b"btc1]\x8a\x00" + last
    assert client.state is State.LINGERING
    assert send(client, frame(TEXT, b"three")) == []
    assert client.unfinished_bytes() == 0
    assert (client.find_overdue(12.0), client.find_overdue(12.1)) == ("", "no_close")
    assert caplog.messages == ([f"a client broke the protocol: {last[4:].decode()}"] if len(last) > 4 else [])


def test_nothing_is_read_after_a_message_whose_receiver_ends_the_connection() -> None:
    for name, last in (("finish_with", b"last"), ("end", b"")):
        client, messages = make_client(), []
        for event in client.receive_data(frame(TEXT, b"one") + frame(TEXT, b"two") + frame(PING) + b"\x81", 0):
            messages.append(event)
            STEPS[name](client)
        assert messages == [Message("one")]
        assert take(client) == last
        assert client.unfinished_bytes() == 0


FRAMES = [
    *(frame(TEXT, b"text"), frame(TEXT), frame(BINARY, bytes(range(100))), frame(PING, b"p"), frame(PONG)),
    *(frame(TEXT, b"a", fin=False), frame(CONT, b"b", fin=False), frame(CONT, b"c"), frame(PING)[:3], b"\x82"),
    *(b"\x82\xfe\x00\x7e" + bytes(130), frame(CLOSE, b"\x03\xe8"), frame(TEXT, "é".encode()[:1]), frame(3)),
]


def talk(parts: Iterable[bytes]) -> tuple[object, ...]:
    """Everything that comes of these bytes, for a client whose socket takes what it is given."""
    connection, events, out = Connection(now=0), [], b""
    for part in parts:
        for event in connection.receive_data(part, 0):
            events.append(event)
            if isinstance(event, RequestHead):
                connection.become_client(make_feed(), ALL, b"101")
                out += take(connection)
        out += take(connection)
    return events, out, connection.state, connection.unfinished_bytes(), connection.find_overdue(30.1)


def test_bytes_cut_anywhere_have_the_same_effect() -> None:
    chance = random.Random(1)
    for _ in range(1_000):
        stream = HEAD + b"".join(chance.choices(FRAMES, k=chance.randrange(12)))
        edges = [0, *sorted(chance.choices(range(len(stream)), k=chance.randrange(1, 12))), len(stream)]
        parts = [stream[start:end] for start, end in pairwise(edges)]
        assert talk(parts) == talk([stream]), parts


# Prices


@pytest.mark.parametrize("sent", range(3 + 18 + 1))
@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_whole_messages_go_out_and_current_prices_last_whatever_the_socket_takes(sent: int, at_once: int) -> None:
    """Of the response's head and the snapshot it takes `sent` bytes, then a poll comes."""
    feed = make_feed()
    client = Connection(now=0)
    client.become_client(feed, ALL, b"101")
    poll = b"[btc2][eth--2][x2]"
    out = bytes(client.data_to_send()[:sent])
    begun = client.advance(len(out), 0)
    feed.messages = NEW
    if client.outbox:
        begun += client.keep_unsent(ALL, 0, 0)
    else:
        out += poll
        begun += client.keep_unsent(ALL, len(poll), 0)
    while data := bytes(client.data_to_send()[:at_once]):
        out += data
        begun += client.advance(len(data), 0)
    assert out.startswith(b"101[")
    messages = [b"[" + each for each in out[3:].split(b"[")[1:]]
    assert set(messages) <= {*OLD.values(), *NEW.values()}
    assert begun == len(messages)
    for asset in ALL:
        assert [each for each in messages if each in (OLD[asset], NEW[asset])][-1] == NEW[asset]
    assert len(messages) <= 6
    assert client.outbox is None


def test_a_client_gets_the_prices_of_a_poll_that_lacks_some() -> None:
    client = make_client()
    client.keep_unsent(("BTC",), 0, 0)
    client.keep_unsent(("XRP", "ETH"), 0, 0)
    assert take(client) == b"[btc1][x1][eth--1]"


def test_following_sends_the_current_price_of_what_is_new() -> None:
    client = make_client(make_feed({"BTC": b"[btc1]", "XRP": b"[x1]"}), assets=("BTC",))
    client.follow(ALL)
    assert client.assets == ALL
    assert take(client) == b"[x1]"  # ETH has had no price
    client.follow(ALL)
    assert take(client) == b""
    client.follow(())
    assert (client.assets, take(client), client.outbox) == ((), b"", None)


def test_following_while_behind_splits_no_message_and_sends_nothing_that_is_not_followed() -> None:
    client = make_client(assets=("BTC", "ETH"))
    client.keep_unsent(("BTC", "ETH"), 1, 0)
    client.follow(("XRP",))
    assert client.keep_unsent(("XRP",), 0, 0) == 0
    client.follow(("BTC", "XRP"))
    assert take(client) == b"btc1][x1][btc1]"


# How long it takes


def test_a_request_has_10_seconds_however_it_is_dribbled() -> None:
    visitor = Connection(now=100)
    for second in range(9):
        assert list(visitor.receive_data(b"x", 100 + second)) == []
    assert (visitor.find_overdue(110.0), visitor.find_overdue(110.1)) == ("", "no_close")


def test_a_client_may_be_behind_for_30_seconds_until_it_has_caught_up() -> None:
    client = make_client()
    assert client.find_overdue(1e9) == ""
    client.keep_unsent(ALL, 1, 100)
    assert take(client, 16, now=129) == b"btc1][eth--1][x1"
    client.keep_unsent(ALL, 0, 129)
    client.enqueue(b"<one>")
    client.follow(())
    assert (client.find_overdue(130.0), client.find_overdue(130.1)) == ("", "behind")
    take(client, now=130)
    assert client.find_overdue(1e9) == ""
    client.enqueue(b"<two>")
    client.advance(0, 200)
    assert (client.find_overdue(230.0), client.find_overdue(230.1)) == ("", "behind")


def test_a_client_is_behind_from_its_start_when_it_does_not_take_the_head() -> None:
    client = Connection(now=0)
    client.become_client(make_feed(), ALL, b"101")
    assert client.find_overdue(1e9) == ""
    assert client.advance(2, 100) == 0
    assert (client.find_overdue(130.0), client.find_overdue(130.1)) == ("", "behind")
    assert take(client) == b"1[btc1][eth--1][x1]"


def test_a_message_has_30_seconds_and_the_next_one_too() -> None:
    client = make_client()
    assert send(client, frame(TEXT, b"one")[:3], 100) == []
    assert send(client, frame(TEXT, b"one")[3:-1], 120) == []
    assert (client.find_overdue(130.0), client.find_overdue(130.1)) == ("", "unfinished")
    assert send(client, b"e" + frame(TEXT, b"two")[:1], 130) == ["one"]
    assert (client.find_overdue(160.0), client.find_overdue(160.1)) == ("", "unfinished")
    assert send(client, frame(TEXT, b"two")[1:], 160) == ["two"]
    assert client.find_overdue(1e9) == ""
    assert send(client, b"\x81", 200) == []
    assert (client.find_overdue(230.0), client.find_overdue(230.1)) == ("", "unfinished")


def test_a_ping_between_fragments_gives_these_no_more_time() -> None:
    client = make_client()
    send(client, frame(PING) + frame(TEXT, b"a", fin=False), 100)
    take(client)
    send(client, frame(PING) + frame(CONT, b"b", fin=False), 120)
    take(client)
    assert (client.find_overdue(130.0), client.find_overdue(130.1)) == ("", "unfinished")
    assert send(client, frame(CONT, b"c") + frame(TEXT, b"d", fin=False), 130) == ["abc"]
    assert (client.find_overdue(160.0), client.find_overdue(160.1)) == ("", "unfinished")


def test_a_message_of_a_client_that_is_behind_is_not_read_so_being_behind_is_the_reason() -> None:
    client = make_client()
    send(client, b"\x81", 100)
    client.keep_unsent(ALL, 1, 110)
    assert (client.find_overdue(140.0), client.find_overdue(140.1)) == ("", "behind")
    while data := client.data_to_send():
        client.advance(len(data), 135)
    assert (client.find_overdue(165.0), client.find_overdue(165.1)) == ("", "unfinished"), "it has its time again"


def test_a_response_has_30_seconds_and_one_more_for_each_8_kib_of_it() -> None:
    whole, visitor = Connection(now=0), Connection(now=0)
    whole.finish_with([b"x" * 40_960, b"x" * 40_960], 130)
    assert (whole.find_overdue(140.0), whole.find_overdue(140.1)) == ("", "no_close")
    visitor.finish_with(iter([b"x" * 40_960, b"x" * 40_960]), 130)
    assert (visitor.find_overdue(135.0), visitor.find_overdue(135.1)) == ("", "no_close")
    take(visitor, 40_960)  # the second piece is made when the first is taken
    assert (visitor.find_overdue(140.0), visitor.find_overdue(140.1)) == ("", "no_close")
    take(visitor, 40_959, now=139)
    assert (visitor.state, visitor.find_overdue(140.0), visitor.find_overdue(140.1)) == (State.CLOSING, "", "no_close")


def test_after_a_response_the_peer_has_2_seconds_to_hang_up() -> None:
    visitor = Connection(now=0)
    visitor.finish_with([b"200"], 130)
    assert take(visitor, now=100) == b"200"
    assert (visitor.state, visitor.outbox) == (State.LINGERING, None)
    take(visitor, now=101)
    assert (visitor.find_overdue(102.0), visitor.find_overdue(102.1)) == ("", "no_close")


def test_the_last_bytes_for_a_client_get_no_more_time_however_many_wait() -> None:
    client = make_client()
    client.keep_unsent(ALL, 1, 0)
    send(client, b"\x81", 0)
    client.enqueue(b"x" * 81_920)
    client.finish_with([b"bye"], 105)
    assert (client.find_overdue(105.0), client.find_overdue(105.1)) == ("", "no_close")
    take(client, now=104)
    assert (client.state, client.find_overdue(105.0), client.find_overdue(105.1)) == (State.LINGERING, "", "no_close")


# What is held


def test_what_is_held_counts_a_large_piece_that_several_hold_once() -> None:
    body, small = b"x" * 4_096, b"x" * 4_095
    first, second, third = make_client(), make_client(), Connection(now=0)
    assert held_bytes([first, second, third]) == held_bytes([]) == 0
    assert list(third.receive_data(b"GET", 0)) == []
    send(first, frame(TEXT, b"x" * 100)[:50], 0)
    assert held_bytes([first, second, third]) == 3 + 50
    for client in (first, second):
        client.enqueue(body)
        client.enqueue(small)
    assert (held_bytes([first]), held_bytes([second])) == (4_096 + 4_095 + 50, 4_096 + 4_095)
    assert held_bytes([first, second, third]) == 4_096 + 2 * 4_095 + 50 + 3
    third.finish_with(iter([body, b"not made yet"]), 30)
    assert held_bytes([first, second, third]) == 4_096 + 2 * 4_095 + 50
    second.enqueue(bytes(bytearray(body)))  # another one
    assert held_bytes([first, second, third]) == 2 * 4_096 + 2 * 4_095 + 50


def test_the_largest_holders_are_those_without_which_the_others_fit() -> None:
    small, shared, other, large = make_client(), make_client(), make_client(), make_client()
    body = b"x" * 5_000
    small.enqueue(b"x" * 100)
    shared.enqueue(body)
    other.enqueue(body)
    large.enqueue(b"x" * 6_000)
    everyone = [large, shared, small, other]
    assert largest_holders(everyone, 11_100) == []
    assert largest_holders(everyone, 11_099) == [large]
    assert largest_holders(everyone, 5_100) == [large]
    assert set(largest_holders(everyone, 5_099)) == {large, shared, other}
    assert len(largest_holders(everyone, 0)) == 4
