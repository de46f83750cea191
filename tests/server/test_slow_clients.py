"""Clients that read slowly, stop in the middle, or say nothing: how long they have, and what they may hold.

Time passes by a clock that the tests own (`timed`, `pass_time`).
"""

import contextlib
import random
import socket
import sys
import tracemalloc
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from raw import CLOSE, PING, PONG, TEXT, RawClient, ask, frame, get, read_all, request, visit
from rigged import (
    Clock,
    RiggedServer,
    call,
    call_soon,
    connections,
    dropped,
    gone,
    held,
    narrow,
    pass_time,
    sample,
    wait_for_value,
    with_an_hour,
)
from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer, connection, hub, loop, transport
from price_server.frames import MAX_MESSAGE

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., RiggedServer]
Updates = Callable[[float], list[PriceUpdate]]


def fill(server: PriceServer, client: RawClient) -> None:
    """Ping without reading until the client's socket is full, and the server's towards it."""
    client.socket.settimeout(0.05)
    unsent = b""
    full = False
    while not (full and held(server)):
        unsent = unsent or frame(PING, b"x" * 125) * 100
        try:
            unsent = unsent[client.socket.send(unsent) :]
        except TimeoutError:
            full = True
    client.socket.settimeout(10)


def is_behind(client: dict[str, object]) -> bool:
    return bool(client["handler"].connection.outbox)  # type: ignore[attr-defined]


def test_a_client_that_catches_up_gets_the_current_prices_and_no_backlog(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096) as client:
        fill(server, client)
        for price in range(1, 1_001):
            server.publish(updates(price))
        assert held(server) < 10_000, "nothing is read meanwhile, so no pongs pile up, and prices never queue"
        assert client.prices(10) == [(asset, 1000) for asset in ASSETS]
        server.publish(updates(1_001))
        assert client.prices(1) == [("BTC", 1_001)]


def test_a_client_that_never_reads_absorbs_under_a_fifth_of_a_megabyte(server: PriceServer, updates: Updates) -> None:
    with RawClient(server.port, receive_buffer=4096):
        (client,) = server.clients
        published = 0
        while not is_behind(client) and published < 10_000:
            server.publish(updates(1.0))
            published += 1
        assert published * 690 < 200_000


def test_the_buffers_of_an_accepted_socket_are_small_and_nothing_waits_in_them(rigged: RiggedServer) -> None:
    with RawClient(rigged.port):
        (sock,) = rigged.listener.accepted
        doubled = 2 if sys.platform == "linux" else 1  # it tells twice what was set
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == (32 << 10) * doubled
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == (16 << 10) * doubled
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_messages_queue_up_to_a_mebibyte_and_past_it_the_client_is_dropped(rigged: RiggedServer) -> None:
    with RawClient(rigged.port) as client:
        client.send(frame(TEXT, b"x" * 50_000, fin=False) + frame(PING))  # what it sends itself does not count
        assert client.read() == (PONG, b"")
        narrowed = narrow(rigged)
        message = "x" * (65_536 - 4)  # and a header of 4
        for _ in range(16):
            rigged.send_message(rigged.clients[0], message)
        assert held(rigged) == (1 << 20) + 50_000
        narrowed.room = 2 << 20
        assert [client.read() for _ in range(16)] == [(TEXT, message.encode())] * 16
        narrow(rigged, 10)
        for text in (*[message] * 16, "x" * 8):  # and a header of 2
            rigged.send_message(rigged.clients[0], text)
        assert len(rigged.clients) == 1
        rigged.send_message(rigged.clients[0], "")
        assert rigged.clients == []
        assert held(rigged) == 0
    assert dropped(rigged) == {"queue_full": 1}


# Deadlines; those of a request, a message and a full socket are in tests/unit/test_connection.py


def test_the_limits_have_their_documented_values() -> None:
    assert connection.REQUEST_TIMEOUT == 10.0
    assert (connection.DOWNLOAD_TIMEOUT, connection.DOWNLOAD_RATE) == (30.0, 8_192)
    assert (connection.LINGER_TIMEOUT, connection.CLOSE_TIMEOUT) == (2.0, 5.0)
    assert (connection.SLOW_CLIENT_TIMEOUT, connection.MESSAGE_TIMEOUT) == (30.0, 30.0)
    assert (hub.MAX_QUEUE, hub.MAX_HELD, hub.RECOUNT_AFTER) == (1 << 20, 64 << 20, 16 << 20)
    assert (hub.HEARTBEAT_INTERVAL, hub.MAX_UNANSWERED, hub.HOUSEKEEPING_INTERVAL) == (20.0, 3, 0.5)
    assert (loop.BATCH_EVENTS, loop.BATCH_SECONDS, loop.CALL_TIMEOUT) == (256, 0.05, 10.0)
    assert (transport.CLIENT_TURN, transport.VISITOR_TURN) == (512, 4_096)
    assert PriceServer.request_queue_size == 1_024
    assert MAX_MESSAGE == 65_536


def a_response_after_which_nobody_hangs_up(server: RiggedServer) -> Callable[[], object]:
    sock = visit(server.port, get("/prices"))
    assert read_all(sock).endswith(b"[]"), "ended with FIN"
    return lambda: sock.sendall(b"X")


def a_close_after_which_the_client_does_not_hang_up(server: RiggedServer) -> Callable[[], object]:
    client = RawClient(server.port)
    client.send(frame(CLOSE, b"\x03\xe8"))
    assert client.read() == (CLOSE, b"\x03\xe8")
    assert client.file.read() == b"", "the server hangs up first"
    return lambda: client.send(frame(TEXT, b"X"))


def a_denied_client_that_does_not_hang_up(server: RiggedServer) -> Callable[[], object]:
    server.deny_new_connections()
    client = RawClient(server.port)
    assert client.read()[0] == CLOSE
    return lambda: client.send(frame(TEXT, b"X"))


@pytest.mark.parametrize(
    ("begin", "limit", "reason"),
    [
        (a_response_after_which_nobody_hangs_up, 2.0, ""),
        (a_close_after_which_the_client_does_not_hang_up, 5.0, "no_close"),
        (a_denied_client_that_does_not_hang_up, 5.0, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_deadline_closes_its_connection_and_no_earlier(
    timed: RiggedServer, begin: Callable[[RiggedServer], Callable[[], object]], limit: float, reason: str
) -> None:
    step = begin(timed)  # which moves no deadline
    call(timed, lambda: None)  # what the server does after its last send is done
    for _ in range(3):
        pass_time(timed, (limit - 0.5) / 3)
        assert connections(timed) == 1
        step()
    pass_time(timed, 1.0)
    assert connections(timed) == 0
    assert dropped(timed) == ({reason: 1} if reason else {})
    assert held(timed) == 0


def test_setting_the_machines_clock_moves_no_deadline_and_makes_no_price_old(start_server: Start) -> None:
    clock, wall_clock = Clock(), Clock()
    server = start_server(kind=RiggedServer, clock=clock, age_clock=clock, wall_clock=wall_clock)
    server.publish([PriceUpdate("BTC", 1.0, "t")])
    with RawClient(server.port), visit(server.port, request()[:-2]):
        wait_for(lambda: connections(server) == 2)
        for shift in (3_600.0, -7_200.0):
            wall_clock.now += shift
            pass_time(server, 4.0)
            assert connections(server) == 2
            assert ask(server.port, get("/healthz"))[0] == 200
        pass_time(server, 3.0)
        assert connections(server) == 1


# Heartbeats


def pings(client: RawClient) -> int:
    """How many pings have arrived and nothing else."""
    number = 0
    while not client.has_nothing_to_read():
        assert client.read() == (PING, b"")
        number += 1
    return number


def test_a_client_is_pinged_every_20_s_and_dropped_after_three_without_a_pong(timed: RiggedServer) -> None:
    with RawClient(timed.port) as silent, RawClient(timed.port) as lively:
        for _ in range(3):
            for _ in range(4):
                pass_time(timed, 4.9)
                assert pings(silent) == pings(lively) == 0
            pass_time(timed, 0.5)
            assert pings(silent) == pings(lively) == 1
            lively.send(frame(PONG))
            silent.send(frame(TEXT, b"I am no pong"))
            assert len(timed.clients) == 2
        pass_time(timed, 20.0)
        assert silent.file.read() == b"", "dropped without a fourth ping"
        assert pings(lively) == 1
        assert len(timed.clients) == 1
    assert dropped(timed) == {"no_pong": 1}
    assert sample(timed, "messages_sent_total") == 0, "a ping is not a message"


def test_a_machine_that_slept_for_a_day_finds_its_clients_again(timed: RiggedServer) -> None:
    with RawClient(timed.port) as client:
        pass_time(timed, 86_400.0)
        for _ in range(5):
            pass_time(timed, 1.0)
        assert pings(client) == 1, "what was slept through is not made up for"
        assert len(timed.clients) == 1


def test_a_client_that_hangs_up_without_a_close_is_gone_at_once(timed: RiggedServer) -> None:
    with RawClient(timed.port) as client:
        client.socket.shutdown(socket.SHUT_WR)
        assert client.file.read() == b""
        gone(timed)


# Memory


def test_past_the_bound_of_memory_the_largest_holder_goes_and_it_is_one_line(
    rigged: RiggedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("price_server.hub.MAX_HELD", 300_000)
    monkeypatch.setattr("price_server.hub.RECOUNT_AFTER", 1_000)
    with RawClient(rigged.port) as small, RawClient(rigged.port) as quiet, RawClient(rigged.port) as large:
        message = frame(TEXT, b"x" * 60_000, fin=False)
        last = rigged.clients[2]
        narrow(rigged)
        small.send(message)
        wait_for_value(lambda: held(rigged), 60_000)
        for _ in range(3):
            rigged.send_message(last, "x" * 70_000)
        assert len(rigged.clients) == 3
        with visit(rigged.port, request()[:-2]) as visitor:
            quiet.send(message)
            assert large.file.read() == b""
            wait_for_value(lambda: held(rigged), 120_000 + len(request()) - 2)
            visitor.sendall(b"\r\n")
            assert visitor.recv(12) == b"HTTP/1.1 101"
            assert small.has_nothing_to_read()
            assert quiet.has_nothing_to_read()
        with RawClient(rigged.port) as another:  # what is sent counts as what is received
            last = rigged.clients[-1]
            narrow(rigged)
            for _ in range(3):
                rigged.send_message(last, "x" * 70_000)
            assert another.file.read() == b""
    assert dropped(rigged) == {"memory": 2}
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "over 300000 bytes are held for connections: the largest holders are dropped"
    ]
    wait_for(lambda: connections(rigged) == 0)
    assert held(rigged) == 0


def test_to_drop_a_hundred_holders_each_connection_is_counted_a_few_times_only(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.hub.MAX_HELD", 100_000)
    monkeypatch.setattr("price_server.hub.RECOUNT_AFTER", 200_000)
    unfinished_bytes = connection.Connection.unfinished_bytes
    counted: list[object] = []

    def count(each: connection.Connection) -> int:
        counted.append(each)
        return unfinished_bytes(each)

    monkeypatch.setattr(connection.Connection, "unfinished_bytes", count)
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(visit(server.port, b"x" * 1_000)) for _ in range(200)]
        assert visitors[0].recv(1) == b""
        call(server, lambda: None)
        assert 200 < len(counted) < 2_000
        assert connections(server) == 101  # what the last one sent came after the count


def test_what_is_held_is_counted_only_after_much_was_added(
    rigged: RiggedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Mock(return_value=0)
    monkeypatch.setattr("price_server.hub.RECOUNT_AFTER", 10_000)
    monkeypatch.setattr("price_server.hub.held_bytes", counts)
    with RawClient(rigged.port) as client:
        client.send(frame(TEXT, b"x" * 1_000) * 35 + frame(PING))
        assert client.read() == (PONG, b"")
    assert counts.call_count == 3


def never_read(server: PriceServer, stack: contextlib.ExitStack, requests: list[bytes]) -> None:
    """Visitors that never read the response that waits for them."""
    before = sample(server, 'http_responses_total{status="200"}')
    for data in requests:
        stack.enter_context(visit(server.port, data, receive_buffer=4096))
    wait_for_value(lambda: sample(server, 'http_responses_total{status="200"}'), before + len(requests))


def test_distinct_subsets_of_40_assets_that_nobody_reads_hold_each_asset_once(start_server: Start) -> None:
    assets = tuple(f"A{number:02}" for number in range(40))
    server = with_an_hour(start_server, assets)
    _, _, body = ask(server.port, get("/history"))
    chance = random.Random(2)
    subsets = [",".join(chance.sample(assets, 35)) for _ in range(100)]
    with contextlib.ExitStack() as stack:
        never_read(server, stack, [get(f"/history?assets={subset}") for subset in subsets])
        assert 10_000 < held(server) < 1.1 * len(body) + 100 * 1_000
    wait_for(lambda: connections(server) == 0)
    assert held(server) == 0


@pytest.mark.parametrize(("target", "headers"), [("/history?format=csv", 0), ("/history", 90)], ids=["csv", "head"])
def test_visitors_that_take_the_past_slowly_hold_no_more_than_what_is_counted(
    start_server: Start, target: str, headers: int
) -> None:
    server = with_an_hour(start_server)
    head = get(target)[:-2] + b"".join([b"X-%d: %b\r\n" % (number, b"x" * 320) for number in range(headers)]) + b"\r\n"
    with contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        never_read(server, stack, [head] * 30)
        assert held(server) < 30 * 60_000, "what follows is made when it is taken"
        assert tracemalloc.get_traced_memory()[0] < held(server) + 30 * 10_000


def test_a_visitor_that_takes_a_csv_as_fast_as_it_is_made_has_its_turn_and_no_more(start_server: Start) -> None:
    server = with_an_hour(start_server, tuple(f"A{number:02}" for number in range(40)))
    with visit(server.port) as visitor:
        wait_for(lambda: server.listener.accepted)
        taken: list[int] = []
        at_call: list[int] = []

        def take(data: bytes, flags: int = 0) -> int:
            if not taken:
                call_soon(server, lambda: at_call.append(sum(taken)))
            taken.append(len(data))
            return len(data)

        server.listener.accepted[-1].send = take  # type: ignore[assignment, method-assign]
        visitor.sendall(get("/history?format=csv"))
        assert visitor.recv(1) == b"", "the end"
    assert 0 < at_call[0] < 200_000
    assert sum(taken) > 500_000


def test_clients_of_many_subsets_of_the_assets_hold_no_copy_of_the_prices_each(start_server: Start) -> None:
    assets = tuple(f"A{number:03}" for number in range(250))
    updates = [PriceUpdate(asset, 1.0, "2026-11-22T07:44:05.1234567Z") for asset in assets]
    server = start_server(assets)
    server.publish(updates)
    size = len(ask(server.port, get("/prices"))[2])
    with contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for number in range(250):
            subset = ",".join(assets[number:] + assets[: number // 2])[:1000].rpartition(",")[0]
            stack.enter_context(visit(server.port, request(f"/ws?assets={subset}")))
        wait_for(lambda: len(server.clients) == 250)
        assert tracemalloc.get_traced_memory()[0] < 180 * size, "snapshots"
        tracemalloc.reset_peak()
        server.publish(updates)
        assert tracemalloc.get_traced_memory()[1] < 180 * size, "what is joined in a fan-out"
