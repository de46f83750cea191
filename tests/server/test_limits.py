"""How many may come, what is refused and counted, and what the server does twice a second."""

import contextlib
import errno
import logging
import selectors
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from raw import CLOSE, PING, PONG, RawClient, ask, frame, get, honest, read_all, request, visit
from rigged import Blocked, RiggedServer, Socket, call, connections, gone, pass_time, sample, wait_for_value
from running import ASSETS, run_script, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., RiggedServer]
Updates = Callable[[float], list[PriceUpdate]]
ALL_AT = {price: [(asset, float(price)) for asset in ASSETS] for price in range(10)}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Housekeeping


def test_housekeeping_is_done_twice_a_second_by_the_clock(timed: RiggedServer) -> None:
    pass_time(timed, 1.0)  # the first one is past
    steps: list[int] = []
    done: list[int] = []
    timed.on_housekeeping = lambda: done.append(len(steps))
    for step in range(20):
        steps.append(step)
        pass_time(timed, 0.125)
    assert done == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_housekeeping_that_raises_is_one_line_and_goes_on(
    timed: RiggedServer, updates: Updates, errors: list[str], error: type[BaseException]
) -> None:
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise error

    pass_time(timed, 1.0)
    timed.on_housekeeping = fail
    with RawClient(timed.port) as client:
        for number in range(1, 5):
            pass_time(timed, 0.5)
            timed.publish(updates(number))
            assert client.prices(10) == ALL_AT[number]
            assert len(done) == number
    assert errors == ["housekeeping failed, and goes on"]
    errors.clear()


def test_stale_prices_are_one_line_until_a_poll_succeeds(
    timed: RiggedServer, updates: Updates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("NOTICE")
    pass_time(timed, 100.0)
    assert warnings(caplog) == [], "it has not begun"
    for number in (1, 2):
        timed.publish(updates(1.0))
        pass_time(timed, 60.0)
        assert len(warnings(caplog)) == caplog.messages.count("prices are no longer stale") == number - 1
        pass_time(timed, 1.0)
        timed.pause()  # nobody polls, which makes no price current
        pass_time(timed, 100.0)
        timed.note_poll(0.1, None, None)
        pass_time(timed, 1.0)
        assert warnings(caplog) == ["prices are stale: no successful poll for 61 s"] * number


# Descriptors


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_a_descriptor_the_listener_rests_until_the_next_housekeeping(
    timed: RiggedServer, updates: Updates, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    pass_time(timed, 1.0)
    listener = timed.listener
    with RawClient(timed.port) as client:
        call(timed, lambda: setattr(listener, "error", number))
        with visit(timed.port, request()) as sock:
            for tries in range(1, 5):
                wait_for_value(lambda: listener.failed, tries)
                timed.publish(updates(tries))
                assert client.prices(10) == ALL_AT[tries], "clients are served meanwhile"
                call(timed, lambda: None)
                assert listener.failed == tries, "it spins"
                pass_time(timed, 0.5)
            listener.error = 0
            pass_time(timed, 0.5)
            assert sock.recv(12) == b"HTTP/1.1 101", "served as soon as there is one"
    assert warnings(caplog) == ["cannot accept clients for now: Too many open files"]


def test_a_connection_that_is_gone_before_it_is_accepted_is_ignored(
    timed: RiggedServer, caplog: pytest.LogCaptureFixture
) -> None:
    timed.listener.error = errno.ECONNABORTED
    with visit(timed.port, request()) as sock:
        wait_for(lambda: timed.listener.failed)
        timed.listener.error = 0
        assert sock.recv(12) == b"HTTP/1.1 101", "without a housekeeping"
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("files", "selector", "asked", "clients", "why"),
    [
        (120, selectors.DefaultSelector, 10_000, 70, "only 120 files may be open (ulimit -n)"),
        (10_049, selectors.DefaultSelector, 10_000, 9_999, "only 10049 files may be open (ulimit -n)"),
        (10_050, selectors.DefaultSelector, 10_000, 10_000, ""),
        (30, selectors.DefaultSelector, 10, 1, "only 30 files may be open (ulimit -n)"),
        (-1, selectors.DefaultSelector, 10_000, 10_000, ""),  # no limit
        (None, selectors.DefaultSelector, 10_000, 10_000, ""),  # no such thing as one
        (None, selectors.SelectSelector, 10_000, 462, "select takes 512 sockets here"),  # Windows
        (-1, selectors.SelectSelector, 463, 462, "select takes 512 sockets here"),
        (-1, selectors.SelectSelector, 462, 462, ""),
        (120, selectors.SelectSelector, 10_000, 70, "only 120 files may be open (ulimit -n)"),
    ],
)
def test_the_number_of_clients_is_lowered_to_the_room_that_there_is(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: int | None,
    selector: type[selectors.BaseSelector],
    asked: int,
    clients: int,
    why: str,
) -> None:
    if files is None:
        monkeypatch.setattr("price_server.transport.resource", None)
    else:
        monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    server = PriceServer(ASSETS, max_clients=asked)
    assert sample(server, "max_clients") == clients
    server.server_close()
    warning = f"--max-clients lowered from {asked} to {clients}: {why}"
    assert caplog.messages == ([warning] if why else [])


def test_the_files_needed_are_those_of_the_clients_and_50() -> None:
    assert PriceServer.files_needed(10_000) == 10_050


def test_without_room_the_request_incomplete_longest_makes_room_and_then_a_download(
    monkeypatch: pytest.MonkeyPatch, start_server: Start
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (26, 26))  # room for 6
    server = start_server()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(RawClient(server.port))
        answered = stack.enter_context(visit(server.port, get("/prices")))
        assert read_all(answered)
        waiting = []
        for number in range(4):
            waiting.append(stack.enter_context(visit(server.port, request()[:-2])))
            wait_for_value(lambda: connections(server), 3 + number)
        for _ in range(4):
            waiting.append(stack.enter_context(visit(server.port, request()[:-2])))
            assert waiting.pop(0).recv(1) == b""
            assert connections(server) == 6
        assert sample(server, "max_clients") == 1
        for sock in waiting:
            sock.sendall(b"\r\n")
            assert sock.recv(12) == b"HTTP/1.1 503"
        assert connections(server) == 6
        answered.setblocking(True)
        assert ask(server.port, get("/healthz"))[0] == 503, "the first download made room; no price is known yet"
        client.send(frame(PING))
        assert client.read() == (PONG, b"")


def test_new_connections_displace_no_visitor_whose_request_has_arrived(
    monkeypatch: pytest.MonkeyPatch, start_server: Start
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (23, 23))  # room for 3
    server = start_server(kind=RiggedServer)
    accept, accepting, go_on = server.listener.accept, threading.Event(), threading.Event()

    def accept_later() -> tuple[Socket, Any]:
        if not go_on.is_set():
            accepting.set()
            go_on.wait(10)
            raise BlockingIOError  # so all of it is met in the next round
        return accept()

    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(visit(server.port, get("/prices")[:-2])) for _ in range(3)]
        wait_for_value(lambda: connections(server), 3)
        call(server, lambda: setattr(server.listener, "accept", accept_later))
        for _ in range(3):
            stack.enter_context(visit(server.port, request()[:-2]))
        assert accepting.wait(10)
        for visitor in visitors:
            visitor.sendall(b"\r\n")
        go_on.set()
        assert [read_all(visitor)[-2:] for visitor in visitors] == [b"[]"] * 3


def test_500_clients_that_come_together_and_send_their_request_later_are_all_served(server: PriceServer) -> None:
    threads = threading.active_count()
    server.publish([PriceUpdate("BTC", 1.0, "t")])
    with contextlib.ExitStack() as stack:
        with Blocked(server):  # they wait in the kernel's queue
            clients = [stack.enter_context(visit(server.port)) for _ in range(500)]
        wait_for_value(lambda: connections(server), 500)
        for client in clients:
            client.sendall(request())
        for client in clients:
            received = b""
            while b'"asset_id":"BTC"' not in received:
                part = client.recv(4096)
                assert part, "hung up on"
                received += part
        assert len(server.clients) == 500
        assert threading.active_count() == threads, "no thread for any of them"
    gone(server)


SELECT = """
import selectors
selectors.DefaultSelector = selectors.SelectSelector
from price_server import PriceServer
server = PriceServer(("BTC",))
print(server.port)
server.run_forever()
"""


def test_with_windows_select_512_sockets_are_served_and_the_next_are_told() -> None:
    with run_script(SELECT) as process, contextlib.ExitStack() as stack:
        assert process.stdout
        port = int(process.stdout.readline())
        clients = [stack.enter_context(RawClient(port)) for _ in range(462)]
        waiting = [stack.enter_context(visit(port, request()[:-2])) for _ in range(60)]
        assert [ask(port, request())[0] for _ in range(3)] == [503] * 3
        clients[0].send(frame(CLOSE, b"\x03\xe8"))
        assert clients[0].read_close() == 1000
        clients[0].__exit__()
        wait_for(lambda: ask(port, request())[0] == 101, what="room for another")
        for client in clients[1:]:
            client.send(frame(PING, b"served"))
            assert client.read() == (PONG, b"served")
        assert read_all(waiting[0]) == b"", "it waited longest"
        process.send_signal(signal.SIGINT)
        assert clients[1].read()[0] == CLOSE
        said = process.communicate(timeout=10)[1]
        lowered = "WARNING:price_server.hub:--max-clients lowered from 10000 to 462: select takes 512 sockets here\n"
        assert said == f"{lowered}WARNING:price_server.loop:full, clients connected: 462; the next ones get 503\n"


# Addresses


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_is_listened_on(start_server: Start, host: str) -> None:
    server = start_server(host=host)
    with visit(server.port, get("/prices"), host="::1") as sock:
        assert read_all(sock).endswith(b"[]")


@pytest.mark.parametrize(
    ("address", "forwarded", "told"),
    [
        ("", "", "127.0.0.1"),
        ("", "203.0.113.7, 10.0.0.1", "203.0.113.7, 10.0.0.1"),
        ("::1", "203.0.113.7", "203.0.113.7"),
        ("::ffff:127.0.0.1", "203.0.113.7", "203.0.113.7"),  # listening on ::
        ("", "203.0.113.7\x9b31m", "203.0.113.731m"),
        ("", "1" * 200, "1" * 100),
        ("192.0.2.9", "203.0.113.7", "192.0.2.9"),  # anybody may say so: only a proxy on this machine is believed
    ],
)
def test_the_debug_log_tells_who_came_and_left(
    rigged: RiggedServer, caplog: pytest.LogCaptureFixture, address: str, forwarded: str, told: str
) -> None:
    caplog.set_level(logging.DEBUG, "price_server")
    rigged.listener.address = address
    with RawClient(rigged.port, request(X_Forwarded_For=forwarded)):
        pass
    gone(rigged)
    call(rigged, lambda: None)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("client")]
    assert said == [f"client {told} connected, clients connected: 1", "client disconnected, clients connected: 0"]


# What is refused and counted


def test_the_one_over_max_clients_gets_503_and_is_let_in_when_one_leaves(
    start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(max_clients=2)
    with honest(server), visit(server.port, get("/stream")):
        wait_for(lambda: server.client_count == 2)
        for data in (request(), get("/stream"), request()):
            status, headers, body = ask(server.port, data)
            assert (status, headers["Retry-After"]) == (503, "10")
            assert body == b'{"error": "full, clients connected: 2"}'
        assert ask(server.port, get("/healthz"))[0] == 503  # no price is known yet
    gone(server)
    assert ask(server.port, request())[0] == 101
    assert warnings(caplog) == ["full, clients connected: 2; the next ones get 503"]
