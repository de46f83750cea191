"""The server thread: functions of other threads, batches of events, and what goes wrong in one connection."""

import contextlib
import errno
import selectors
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from raw import CLOSE, PING, PONG, TEXT, RawClient, frame, honest, parse, request, visit
from rigged import Blocked, RiggedServer, Socket, call, call_soon, dropped, in_thread, narrow, pass_time, wait_for_value
from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Updates = Callable[[float], list[PriceUpdate]]
ALL_AT = {price: [(asset, float(price)) for asset in ASSETS] for price in range(10)}


# Functions of other threads


def test_a_server_with_nothing_to_do_does_not_spin(server: PriceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    select, slept = selectors.DefaultSelector.select, threading.Event()

    def note(*arguments: Any) -> Any:
        events = select(*arguments)
        if not events:
            slept.set()
        return events

    server.publish([])
    monkeypatch.setattr(selectors.DefaultSelector, "select", note)
    assert slept.wait(10), "it spins"


def test_a_callback_that_blocks_holds_up_no_publisher_and_no_stop_for_long(
    server: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.loop.CALL_TIMEOUT", 0.2)
    blocking, release = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        blocking.set()
        release.wait(30)

    server.set_fn_message_received(block)
    with RawClient(server.port) as client:
        client.send(frame(TEXT, b"block"))
        assert blocking.wait(10)
        server.report_failure("a poller's notes do not wait")
        server.note_poll(0.1, None, None)
        server.pause()
        for function in (lambda: server.publish(updates(1.0)), lambda: server.send_message_to_all("x")):
            with pytest.raises(TimeoutError, match=r"the server thread has been busy for 0\.2 s: does a callback"):
                function()
        server.shutdown_gracefully(1001, b"as told")
        assert not server.has_ended
        release.set()
        assert client.read() == (CLOSE, b"\x03\xe9as told"), "what was given up is not sent later"
    wait_for(lambda: server.has_ended)


def test_after_the_stop_all_calls_return_at_once(server: PriceServer, updates: Updates) -> None:
    with honest(server):
        (client,) = server.clients
        server.shutdown_gracefully()
    server.publish(updates(1.0))
    server.report_failure("no answer")
    server.note_poll(0.1, 1, 99)
    server.pause()
    server.send_message(client, "x")
    server.follow(client, ["BTC"])
    client["handler"].send_close()
    server.send_message_to_all("x")
    server.deny_new_connections()
    server.allow_new_connections()
    server.disconnect_clients_gracefully()
    server.disconnect_clients_abruptly()
    server.shutdown_gracefully()
    server.shutdown_abruptly()
    server.server_close()
    assert server.clients == []


def test_threads_that_send_and_publish_across_a_stop_return_and_split_no_frame(
    server: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.loop.STOP_TIMEOUT", 10.0)  # nobody is cut off: all hang up by themselves
    stopped = threading.Event()
    streams: list[bytes] = []
    ended: list[str] = []

    def act() -> None:
        while True:
            is_last = stopped.is_set()  # once after the stop
            server.publish(updates(1.0))
            for client in server.clients:
                server.send_message(client, "note")
            if is_last:
                ended.append("returned")
                return

    def stay() -> None:
        with RawClient(server.port) as client:
            streams.append(client.file.read())

    readers = [in_thread(stay) for _ in range(5)]
    wait_for(lambda: len(server.clients) == 5)
    threads = [in_thread(act) for _ in range(5)]
    with RawClient(server.port) as client:
        assert client.prices(25)
    server.shutdown_gracefully(1001, b"server is stopping")
    assert server.has_ended
    stopped.set()
    for thread in threads + readers:
        thread.join(10)
    assert ended == ["returned"] * 5
    assert [list(parse(stream))[-1] for stream in streams] == [(CLOSE, b"\x03\xe9server is stopping")] * 5


# Batches of events


def test_a_publish_waits_for_at_most_50_ms_of_new_clients(server: PriceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("price_server.transport.ACCEPT_SECONDS", 0.0)
    order: list[str] = []

    def welcome(*_: object) -> None:
        if not order:
            call_soon(server, lambda: order.append("call"))
        order.append("client")

    server.set_fn_new_client(welcome)
    with contextlib.ExitStack() as stack:
        with Blocked(server):
            for _ in range(10):
                stack.enter_context(visit(server.port, request()))
        wait_for(lambda: len(order) == 11)
    assert order.index("call") == 1


def test_a_publish_waits_for_at_most_256_heartbeats(timed: RiggedServer) -> None:
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(RawClient(timed.port))
        timed.listener.accepted[0].before = lambda: call_soon(timed, lambda: order.append("call"))
        for sock in timed.listener.accepted[1:]:
            sock.before = lambda: order.append("client")
        pass_time(timed, 20.0)
        assert len(order) == 300
        assert order.index("call") < 256
        for sock in timed.listener.accepted:
            sock.before = lambda: None


def test_a_flood_of_pings_or_messages_takes_no_turn_from_another_client(rigged: RiggedServer) -> None:
    for opcode, least in ((PING, 20), (TEXT, 20)):
        order: list[str] = []
        received: list[int] = []
        rigged.set_fn_message_received(lambda client, *_: received.append(client["id"]))  # noqa: B023
        with RawClient(rigged.port) as flooding, RawClient(rigged.port) as client:
            for sock, name in zip(rigged.listener.accepted[-2:], ("flood", "client"), strict=True):
                sock.before = partial(order.append, name)
            with Blocked(rigged):
                flooding.send(frame(opcode, b"x") * 1_500)
                client.send(frame(opcode, b"x"))
            if opcode == PING:
                assert [flooding.read() for _ in range(1_500)] == [(PONG, b"x")] * 1_500
                assert client.read() == (PONG, b"x")
            else:
                wait_for(lambda: len(received) == 1_501)  # noqa: B023
                assert received.index(max(received)) <= 512 // 7, "all of one client's messages before the other's"
            assert "client" in order[:3]
            assert order.count("flood") >= least, "turns of 512 bytes"


# What goes wrong in one connection


class Broken(Socket):
    """A socket that fails at everything."""

    def __getattr__(self, name: str) -> Any:
        if name == "fileno":
            return self.socket.fileno
        raise RuntimeError("this socket fails")

    def close(self) -> None:
        self.socket.close()
        raise OSError(errno.EIO, "not even that")


def breaks(sock: Socket) -> None:
    sock.__class__ = Broken
    sock.before = lambda: sock.shutdown()


@pytest.mark.parametrize("step", ["receive", "publish", "send_message", "send_message_to_all", "ping", "close"])
def test_connections_whose_every_step_fails_are_one_line_and_end_and_no_other_does(
    timed: RiggedServer, updates: Updates, errors: list[str], step: str
) -> None:
    left: list[int] = []
    timed.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with contextlib.ExitStack() as stack:
        first, broken, _, last = (stack.enter_context(RawClient(timed.port)) for _ in range(4))
        client = timed.clients[1]
        for sock in timed.listener.accepted[1:3]:
            call(timed, partial(breaks, sock))
        {
            "receive": lambda: broken.send(frame(PING)),
            "publish": lambda: None,
            "send_message": lambda: timed.send_message(client, "x"),
            "send_message_to_all": lambda: timed.send_message_to_all("x"),
            "ping": lambda: pass_time(timed, 20.0),
            "close": lambda: client["handler"].send_close(),
        }[step]()
        timed.publish(updates(1.0))
        wait_for(lambda: len(timed.clients) == 2)
        for other in (first, last):
            if step in ("send_message_to_all", "ping"):
                assert other.read()[1] in (b"x", b"")
            assert other.prices(10) == ALL_AT[1]
        wait_for(lambda: sorted(left) == [2, 3], what="the callbacks")
        assert dropped(timed) == {"failed": 2}
    assert errors == ["a connection failed, and is closed: RuntimeError('this socket fails')"]
    errors.clear()


@pytest.mark.parametrize("name", ["register", "modify"])
def test_a_connection_that_cannot_be_watched_is_ended_and_no_other(
    start_server: Callable[..., RiggedServer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failing: list[int] = []  # file numbers, or none for the next one
    working = getattr(selectors.DefaultSelector, name)

    def fail(selector: Any, sock: Any, *arguments: Any) -> Any:
        if not failing or (failing[0] > 0 and sock.fileno() != failing[0]):
            return working(selector, sock, *arguments)
        if name == "modify":
            selector.unregister(sock)  # as it does
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(selectors.DefaultSelector, name, fail)
    server = start_server(kind=RiggedServer)
    with RawClient(server.port) as other, RawClient(server.port) as client:
        if name == "register":
            failing.append(0)
            with visit(server.port) as visitor:
                assert visitor.recv(1) == b""
        else:
            failing.append(narrow(server).fileno())
            server.send_message(server.clients[1], "x")
            assert client.file.read() == b""
        other.send(frame(PING, b"served"))
        assert other.read() == (PONG, b"served")


def test_nothing_is_read_of_a_client_that_was_disconnected_in_the_same_moment(rigged: RiggedServer) -> None:
    left: list[int] = []
    received: list[int] = []
    rigged.set_fn_client_left(lambda client, server: left.append(client["id"]))
    rigged.set_fn_message_received(lambda client, server, message: server.disconnect_clients_abruptly())
    with RawClient(rigged.port) as first, RawClient(rigged.port) as second:
        for number, sock in enumerate(rigged.listener.accepted):
            sock.before = partial(received.append, number)
        with Blocked(rigged):
            first.send(frame(TEXT, b"x"))
            second.send(frame(TEXT, b"x"))
        wait_for_value(lambda: sorted(left), [1, 2])
    assert len(received) == 1
