"""The server thread: its queue, the callbacks, the library's interface, housekeeping and limits, start and stop."""

import contextlib
import errno
import logging
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import psutil
import pytest
from raw import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Blocked,
    Clock,
    Narrow,
    RawClient,
    ask,
    connections,
    count,
    frame,
    get,
    gone,
    honest,
    in_thread,
    last_connection,
    narrow,
    one_after_the_other,
    parse,
    pass_time,
    preceded,
    prices,
    read_all,
    request,
    took,
    visit,
    wait_for_value,
    widen,
)
from running import ASSETS, ROOT, wait_for
from websockets.exceptions import ConnectionClosed, ConnectionClosedError

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., PriceServer]
Updates = Callable[[float], list[PriceUpdate]]
ALL_AT = {price: [(asset, float(price)) for asset in ASSETS] for price in range(10)}


def wait_for_queue(server: PriceServer, publishes: int = 0, calls: int = 0) -> None:
    wait_for(lambda: (len(server._urgent), len(server._calls)) == (publishes, calls), what="these in the queue")


# The queue


def test_a_call_returns_what_it_returned_and_raises_what_it_raised_in_the_server_thread(server: PriceServer) -> None:
    assert server.call(threading.current_thread) is server.thread
    assert server.thread.name == "server"
    with pytest.raises(ZeroDivisionError):
        server.call(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        server.call(sys.exit)
    assert server.call(lambda: server.call(lambda: 5)) == 5


def test_a_publish_goes_before_the_other_calls_and_a_stop_too(
    server: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(server, "remember", preceded(server.remember, lambda: order.append("publish")))
    monkeypatch.setattr(server, "begin_stop", preceded(server.begin_stop, lambda: order.append("stop")))
    with Blocked(server):
        threads = []
        for number in range(3):
            threads.append(in_thread(lambda: server.call(lambda: order.append("call"))))
            wait_for_queue(server, calls=number + 1)
        threads.append(in_thread(lambda: server.publish(updates(1.0))))
        wait_for_queue(server, publishes=1, calls=3)
        threads.append(in_thread(server.shutdown_gracefully))
        wait_for(lambda: server._stop_asked)
    for thread in threads:
        thread.join(10)
    assert sorted(order[:2]) == ["publish", "stop"]
    assert order[2:] == ["call", "call", "call"]


def test_calls_that_bring_further_calls_keep_nobody_else_waiting(server: PriceServer) -> None:
    calls = [0]
    ended = threading.Event()

    def again() -> None:
        calls[0] += 1
        if not ended.is_set():
            server.hand_over(again)

    with RawClient(server.port) as client:
        server.hand_over(again)
        for _ in range(3):
            client.send(frame(PING, b"alive"))
            assert client.read() == (PONG, b"alive")
        ended.set()
    assert calls[0] > 3


def test_what_is_handed_over_wakes_the_loop_and_then_it_sleeps_again(
    start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PriceServer, "housekeeping_interval", 60.0)
    server, ran = start_server(), threading.Event()
    server.hand_over(ran.set)
    assert ran.wait(10)
    server.call(lambda: None)
    wait_for(lambda: not select.select([server._wake_receiver], [], [], 0)[0], what="nothing left that wakes it")


class Hooked:
    """In the place of a connection's socket: it runs something before each send and recv."""

    def __init__(self, sock: Any, before: Callable[[], object]):
        self.socket, self.before = sock, before

    def send(self, data: bytes, flags: int = 0) -> int:
        self.before()
        return int(self.socket.send(data, flags))

    def recv(self, size: int) -> bytes:
        self.before()
        return bytes(self.socket.recv(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


def hook(server: PriceServer, client: dict[str, Any], before: Callable[[], object]) -> None:
    handler = client["handler"]
    server.call(lambda: setattr(handler, "socket", Hooked(handler.socket, before)))


def test_between_two_clients_of_a_publish_other_calls_have_their_turn_and_another_publish_waits(
    server: PriceServer, updates: Updates
) -> None:
    order: list[str] = []
    threads: list[threading.Thread] = []

    def queue_both() -> None:  # while the first client's frames go out
        if not threads:
            threads.append(in_thread(lambda: server.call(lambda: order.append("call"))))
            threads.append(in_thread(lambda: server.publish(updates(2.0))))
            wait_for_queue(server, publishes=1, calls=1)

    with RawClient(server.port) as first, RawClient(server.port) as second:
        hook(server, server.clients[0], queue_both)
        hook(server, server.clients[1], lambda: order.append("second client"))
        server.publish(updates(1.0))
        for thread in threads:
            thread.join(10)
        assert order == ["call", "second client", "second client"]
        assert first.prices(20) == second.prices(20) == ALL_AT[1] + ALL_AT[2]


def test_between_two_connections_of_a_batch_a_call_has_its_turn(server: PriceServer) -> None:
    order: list[str] = []

    def serve() -> None:
        if not order:
            in_thread(lambda: server.call(lambda: order.append("call")))
            wait_for_queue(server, calls=1)
        order.append("client")

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(5)]
        for each in server.clients:
            hook(server, each, serve)
        with Blocked(server):
            for client in clients:
                client.send(frame(PONG))
        wait_for(lambda: len(order) == 6)
    assert order[:3] == ["client", "call", "client"]


def test_what_is_sent_between_two_clients_of_a_publish_is_counted_too(server: PriceServer, updates: Updates) -> None:
    threads: list[threading.Thread] = []

    def queue_message() -> None:
        if not threads:
            threads.append(in_thread(lambda: server.send_message_to_all("x")))
            wait_for_queue(server, calls=1)

    with RawClient(server.port), RawClient(server.port):
        hook(server, server.clients[0], queue_message)
        server.publish(updates(1.0))
        threads[0].join(10)
        assert count(server, "messages_sent_total") == 2 * 10 + 2


def test_a_publish_from_a_call_between_two_clients_takes_no_price_back_in_time(
    server: PriceServer, updates: Updates
) -> None:
    threads: list[threading.Thread] = []

    def queue_call() -> None:
        if not threads:
            threads.append(in_thread(lambda: server.call(lambda: server.publish(updates(2.0)))))
            wait_for_queue(server, calls=1)

    with RawClient(server.port) as first, RawClient(server.port) as second:
        hook(server, server.clients[0], queue_call)
        server.publish(updates(1.0))
        threads[0].join(10)
        assert first.prices(20) == second.prices(20) == ALL_AT[1] + ALL_AT[2]


@pytest.mark.parametrize("act", ["send_message_to_all", "housekeeping", "ping"])
def test_a_publish_waits_for_one_step_of_what_concerns_all_clients(
    timed: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    order: list[str] = []
    threads: list[threading.Thread] = []

    def publish_once(*_: object) -> None:
        order.append("step")
        if not threads:
            threads.append(in_thread(lambda: timed.publish(updates(1.0))))
            wait_for_queue(timed, publishes=1)

    monkeypatch.setattr(timed, "remember", preceded(timed.remember, lambda: order.append("publish")))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(RawClient(timed.port))
            if act == "housekeeping":
                client.send(frame(CLOSE))
                assert client.read() == (CLOSE, b"")
            else:
                hook(timed, timed.clients[-1], publish_once)
        if act == "housekeeping":
            monkeypatch.setattr(timed, "leave", preceded(timed.leave, publish_once))
        if act == "send_message_to_all":
            timed.send_message_to_all("x")
        else:
            pass_time(timed, 20.0)
        threads[0].join(10)
    assert order[:3] == ["step", "publish", "step"]


def test_a_callback_that_blocks_for_ever_holds_up_no_publisher_and_no_stop_for_long(
    server: PriceServer, updates: Updates
) -> None:
    server.call_timeout = 0.2
    blocking, release = threading.Event(), threading.Event()
    server.set_fn_message_received(lambda *_: one_after_the_other(blocking.set, lambda: release.wait(30))())
    with RawClient(server.port) as client:
        client.send(frame(TEXT, b"block"))
        assert blocking.wait(10)
        for function in (lambda: server.publish(updates(1.0)), lambda: server.send_message_to_all("x")):
            with pytest.raises(TimeoutError, match=r"the server thread is busy for 0\.2 s: does a callback block it"):
                function()
        began = time.monotonic()
        server.shutdown_gracefully(1001, b"as told")
        assert took(began) < 2.0
        release.set()
        assert client.read() == (CLOSE, b"\x03\xe9as told"), "what was given up is not sent later"
    wait_for(lambda: server.state == "ended")


def test_a_call_that_has_begun_is_waited_for(server: PriceServer) -> None:
    server.call_timeout = 0.3
    assert server.call(lambda: threading.Event().wait(0.4)) is False


def test_what_is_published_before_the_start_is_known_to_the_first_client(updates: Updates) -> None:
    server = PriceServer(ASSETS)
    server.publish(updates(1.0))
    server.report_failure("no answer")
    assert server.last_error == "no answer"
    server.run_forever(threaded=True)
    with honest(server) as client:
        assert prices(client, 10) == ALL_AT[1]
    server.shutdown_gracefully()


def test_after_the_stop_all_calls_return_at_once(server: PriceServer, updates: Updates) -> None:
    with honest(server):
        (client,) = server.clients
        server.shutdown_gracefully()
    server.publish(updates(1.0))
    server.report_failure("no answer")
    server.send_message(client, "x")
    client["handler"].send_close()
    server.send_message_to_all("x")
    server.disconnect_clients_gracefully()
    server.disconnect_clients_abruptly()
    server.shutdown_gracefully()
    server.shutdown_abruptly()
    server.server_close()
    assert server.clients == []


def test_a_call_made_in_the_very_moment_of_the_end_is_lost_by_nobody(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def queue_behind_the_end(*call: Any) -> Any:
        server.state = "ended"  # the loop has had its last look at the queue
        return queue(*call)

    queue, ran = server._queue, threading.Event()
    server.shutdown_gracefully()
    monkeypatch.setattr(server, "_queue", queue_behind_the_end)
    server.state = "running"
    assert server.call(lambda: "ran") == "ran"
    server.state = "running"
    server.hand_over(ran.set)
    assert ran.is_set()


def test_publishes_of_two_threads_after_the_stop_leave_nothing_in_the_queue(
    server: PriceServer, updates: Updates
) -> None:
    inside, release = threading.Event(), threading.Event()

    def wall_clock() -> float:
        if not inside.is_set():
            inside.set()
            release.wait(10)
        return time.time()

    server.shutdown_gracefully()
    server.thread.join(10)
    server.wall_clock = wall_clock
    thread = in_thread(lambda: server.publish(updates(1.0)))
    assert inside.wait(10)
    server.publish(updates(2.0))
    assert not server._urgent, "who releases the queue would go on for ever"
    release.set()
    thread.join(10)


def test_ten_threads_that_send_and_publish_across_a_stop_return_and_tear_nothing(
    server: PriceServer, updates: Updates
) -> None:
    stopped = threading.Event()
    streams: list[bytes] = []
    failures: list[BaseException] = []

    def until_stopped(function: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                while not stopped.is_set():
                    function()
                function()  # and once behind the stop
            except BaseException as error:
                failures.append(error)

        return in_thread(run)

    def come_and_go() -> None:
        try:
            with RawClient(server.port) as client:
                client.prices(25)
                client.send(frame(CLOSE, b"\x03\xe8"))
                client.file.read()
        except (OSError, EOFError):
            pass  # the server has stopped

    def stay() -> None:
        with RawClient(server.port) as client:
            streams.append(client.file.read())

    def send() -> None:
        for client in server.clients:
            server.send_message(client, "note")

    server.stop_timeout = 10.0  # nobody is cut off: all hang up by themselves
    server.publish(updates(1.0))
    readers = [in_thread(stay) for _ in range(5)]
    wait_for(lambda: len(server.clients) == 5)
    threads = [until_stopped(lambda: server.publish(updates(2.0))) for _ in range(5)]
    threads += [until_stopped(send) for _ in range(5)]
    threads += [until_stopped(come_and_go) for _ in range(2)]
    wait_for(lambda: server.id_counter > 8, 60, "clients that come and go")
    server.shutdown_gracefully(1001, b"server is stopping")
    assert server.state == "ended"
    stopped.set()
    for thread in threads + readers:
        thread.join(10)
        assert not thread.is_alive()
    assert failures == []
    assert len(streams) == 5
    for stream in streams:
        assert list(parse(stream))[-1] == (CLOSE, b"\x03\xe9server is stopping")


# What goes wrong in one connection


class Broken:
    """A socket that fails at everything."""

    def __init__(self, sock: Any):
        self.socket = sock

    def fileno(self) -> int:
        return int(self.socket.fileno())

    def close(self) -> None:
        self.socket.close()
        raise OSError(errno.EIO, "not even that")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("this socket fails")


@pytest.mark.parametrize("step", ["receive", "publish", "send_message", "send_message_to_all", "ping", "close"])
def test_a_connection_whose_every_step_fails_is_ended_and_no_other(
    timed: PriceServer, updates: Updates, errors: list[str], step: str
) -> None:
    left: list[int] = []
    timed.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with RawClient(timed.port) as first, RawClient(timed.port) as broken, RawClient(timed.port) as last:
        (client,) = [each for each in timed.clients if each["id"] == 2]
        timed.call(lambda: setattr(client["handler"], "socket", Broken(client["handler"].socket)))
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
        wait_for(lambda: left == [2], what="the callback")
        assert timed.dropped['{reason="failed"}'] == 1
    assert errors == ["a connection failed, and is ended: RuntimeError('this socket fails')"]
    errors.clear()


def test_a_visitor_whose_every_step_fails_is_ended(server: PriceServer, errors: list[str]) -> None:
    with visit(server.port, b"GET ") as sock:
        wait_for(lambda: connections(server) == 1)
        (connection,) = server.call(lambda: list(server._visitors))
        connection.socket = Broken(connection.socket)
        sock.sendall(b"/")
        wait_for(lambda: connections(server) == 0)
    assert len(errors) == 1
    errors.clear()
    assert ask(server.port, request())[0] == 101


@pytest.mark.parametrize("name", ["register", "modify"])
def test_a_connection_that_the_selector_does_not_take_is_ended_and_no_other(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(sock: Any, *_: object) -> None:
        if name == "modify":
            server.selector.unregister(sock)  # as it does
        raise OSError(errno.ENOSPC, "No space left on device")

    with RawClient(server.port) as other, RawClient(server.port) as client:
        last = server.clients[1]
        server.call(lambda: monkeypatch.setattr(server.selector, name, fail))
        if name == "register":
            with visit(server.port) as visitor:
                assert visitor.recv(1) == b""
        else:
            narrow(server)
            server.send_message(last, "x")
            assert client.file.read() == b""
        other.send(frame(PING, b"served"))
        assert other.read() == (PONG, b"served")


def test_an_event_of_a_connection_that_ended_in_the_same_batch_reaches_no_other(server: PriceServer) -> None:
    left: list[int] = []
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with RawClient(server.port) as first, RawClient(server.port) as second, socket.socket() as visitor:
        clients = server.clients
        numbers: list[int] = []
        ended: list[int] = []

        def end(index: int) -> None:  # and the visitor gets its file number
            if not ended:
                ended.append(index)
                numbers.append(clients[index]["handler"].socket.fileno())
                server.leave(clients[index]["handler"])
                visitor.connect(("127.0.0.1", server.port))
                visitor.sendall(request()[:-2])
                server._accept()
                numbers.append(next(iter(server._visitors)).socket.fileno())

        for index in (0, 1):  # whichever is served first ends the other
            hook(server, clients[1 - index], partial(end, index))
        with Blocked(server):
            first.send(frame(PING))
            second.send(frame(PING))
        wait_for(lambda: ended)
        gone_one, other = (first, second) if ended == [0] else (second, first)
        assert other.read() == (PONG, b"")
        with pytest.raises(ConnectionResetError):  # its ping was not read
            gone_one.file.read()
        assert numbers[0] == numbers[1]
        visitor.sendall(b"\r\n")
        assert visitor.recv(12) == b"HTTP/1.1 101"
        visitor.close()
        wait_for(lambda: left == [ended[0] + 1, 3])


# One batch of events


def test_after_256_events_of_a_batch_the_loop_looks_around(server: PriceServer) -> None:
    seen: list[tuple[int, int]] = []

    def look(client: dict[str, Any], server: PriceServer, message: str) -> None:
        unheard = sum(each["handler"].busy for each in server.clients)
        seen.append((unheard, len(server._visitors)))

    server.set_fn_message_received(look)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(400)]
        with Blocked(server):
            for client in clients:
                client.send(frame(TEXT, b"x"))
            stack.enter_context(visit(server.port, b"GET "))
        wait_for(lambda: len(seen) == 400)
    assert seen[0][0] <= 256, "the callback had to wait for more"
    assert seen[0][1] == 1, "the newcomer had to wait for more"


def test_after_50_ms_of_a_batch_the_loop_looks_around(server: PriceServer) -> None:
    unheard: list[int] = []
    server.set_fn_message_received(lambda *_: unheard.append(sum(each["handler"].busy for each in server.clients)))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(20)]
        for each in server.clients:  # whichever is served first
            hook(server, each, lambda: unheard or threading.Event().wait(0.06))
        with Blocked(server):
            for client in clients:
                client.send(frame(TEXT, b"x"))
        wait_for(lambda: len(unheard) == 20)
    assert unheard[0] == 1


def test_a_flood_of_pings_takes_no_turn_from_another_client(server: PriceServer) -> None:
    order: list[str] = []
    with RawClient(server.port) as flooding, RawClient(server.port) as client:
        for each, name in zip(server.clients, ("flood", "client"), strict=True):
            hook(server, each, partial(order.append, name))
        with Blocked(server):
            flooding.send(frame(PING) * 2_000)
            client.send(frame(PING))
        assert [flooding.read() for _ in range(2_000)] == [(PONG, b"")] * 2_000
        assert client.read() == (PONG, b"")
    assert order[:4].count("client") == 2, "its recv and its send"
    assert order.count("flood") >= 6, "three turns of 4 KiB"


def test_a_flood_of_messages_takes_no_turn_from_another_client(server: PriceServer) -> None:
    order: list[int] = []
    server.set_fn_message_received(lambda client, *_: order.append(client["id"]))
    with RawClient(server.port) as flooding, RawClient(server.port) as client:
        with Blocked(server):
            flooding.send(frame(TEXT, b"x") * 1_500)
            client.send(frame(TEXT, b"x"))
        wait_for(lambda: len(order) == 1_501)
    assert order.index(2) <= 2


# Callbacks


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
            client.send(b"garbage" * 100)
        with RawClient(server.port, behind=frame(CLOSE, b"\x03\xe8")):
            pass
        with RawClient(server.port):
            server.disconnect_clients_abruptly()
        ask(server.port, request(Upgrade=None))
    gone(server)
    server.call(lambda: None)
    wait_for(lambda: len(left) == 50)
    assert sorted(came) == sorted(left) == list(range(1, 51))


def leave(*_: object) -> None:
    sys.exit(3)


def fail(*_: object) -> None:
    raise RuntimeError


def lose(*_: object) -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("bad", [leave, fail])
def test_a_callback_that_raises_reaches_no_client_and_nobody_is_forgotten(
    server: PriceServer, errors: list[str], bad: Callable[..., None]
) -> None:
    calls: list[str] = []

    def callback(name: str) -> Callable[..., None]:
        return preceded(bad, lambda: calls.append(name))

    server.set_fn_new_client(callback("came"))
    server.set_fn_client_left(callback("left"))
    server.set_fn_message_received(callback("message"))
    with honest(server) as client:
        client.send("one")
        client.send("two")
        assert client.ping().wait(5)
    wait_for(lambda: len(errors) == 3)
    assert calls == ["came", "message", "message", "left"]
    assert errors == [f"the callback {name} failed" for name in ("new_client", "message_received", "client_left")]
    errors.clear()


def test_a_callback_may_send_to_another_publish_and_disconnect_everybody(server: PriceServer, updates: Updates) -> None:
    def obey(client: dict[str, Any], server: PriceServer, message: str) -> None:
        if message == "tell":
            server.send_message(next(each for each in server.clients if each is not client), "told")
        elif message == "publish":
            server.publish(updates(1.0))
        elif message == "all":
            server.send_message_to_all("to all")
        else:
            server.disconnect_clients_gracefully(4000, b"everybody")

    server.set_fn_message_received(obey)
    with honest(server) as first, honest(server) as second:
        first.send("tell")
        assert second.recv(10) == "told"
        first.send("publish")
        assert prices(first, 10) == prices(second, 10) == ALL_AT[1]
        second.send("all")
        assert first.recv(10) == second.recv(10) == "to all"
        first.send("go")
        for client in (first, second):
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=10)
            assert closed.value.rcvd
            assert closed.value.rcvd.code == 4000
    gone(server)
    with honest(server) as client:
        assert prices(client, 10) == ALL_AT[1]


def test_a_shutdown_from_a_callback_marks_the_stop_and_returns(server: PriceServer) -> None:
    returned: list[str] = []

    def stop(client: dict[str, Any], server: PriceServer, message: str) -> None:
        server.shutdown_gracefully(1001, b"as told")
        returned.append(server.state)

    server.stop_timeout = 30.0  # not waited for: the client hangs up
    server.set_fn_message_received(stop)
    with honest(server) as client:
        client.send("stop")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "as told")
    server.thread.join(10)
    assert (server.state, returned) == ("ended", ["running"])


def test_a_waiting_thread_of_the_modifiers_own_delays_nobody(server: PriceServer, updates: Updates) -> None:
    release = threading.Event()

    def answer(client: dict[str, Any]) -> None:
        release.wait(10)
        server.send_message(client, "answer")

    server.set_fn_message_received(lambda client, *_: in_thread(lambda: answer(client)))
    with honest(server) as client, honest(server) as other:
        client.send("question")
        assert client.ping().wait(5)
        server.publish(updates(1.0))
        assert prices(other, 10) == prices(client, 10) == ALL_AT[1]
        release.set()
        assert client.recv(10) == "answer"


def test_no_callback_runs_inside_a_send_a_publish_or_another_callback(
    server: PriceServer, updates: Updates, errors: list[str]
) -> None:
    left: list[int] = []
    inside: list[list[int]] = []
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))

    def disconnect_the_others(client: dict[str, Any], server: PriceServer, message: str) -> None:
        for each in server.clients:
            if each is not client:
                server.drop(each["handler"], "disconnected")
        inside.append(list(left))

    def send_to_broken(client: dict[str, Any]) -> None:
        client["handler"].socket = Hooked(client["handler"].socket, fail)
        server.send_message(client, "x")
        inside.append(list(left))

    def publish_to_broken(client: dict[str, Any]) -> None:
        client["handler"].socket = Hooked(client["handler"].socket, lose)
        server.publish(updates(1.0))
        inside.append(list(left))

    server.set_fn_message_received(disconnect_the_others)
    with RawClient(server.port) as client:
        for number, act in enumerate((send_to_broken, publish_to_broken), 2):
            with RawClient(server.port):
                (each,) = [each for each in server.clients if each["id"] == number]
                server.call(partial(act, each))
                wait_for_value(lambda: left[-1:], [number])
        with RawClient(server.port), RawClient(server.port):
            client.send(frame(TEXT, b"x"))
            wait_for(lambda: len(left) == 4)
    assert inside == [[], [2], [2, 3]]
    assert len(errors) == 1
    errors.clear()


def test_no_callback_runs_inside_housekeeping(timed: PriceServer) -> None:
    order: list[str] = []
    timed.set_fn_client_left(lambda client, server: order.append("left"))
    with RawClient(timed.port) as client:
        client.send(frame(TEXT, b"x", fin=False) + frame(PING))
        assert client.read() == (PONG, b"")
        pass_time(timed, 1.0)
        timed.service_actions = lambda: order.append(f"clients: {len(timed.clients)}")  # type: ignore[method-assign]
        timed.clock.now += 31.0  # type: ignore[attr-defined]
        timed.call(lambda: None)
        wait_for(lambda: len(order) == 2)
    assert order == ["clients: 0", "left"]


# The library's interface


def test_a_client_is_known_by_its_number_handler_and_address(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        (known,) = server.clients
        assert known == {"id": 1, "handler": known["handler"], "address": client.socket.getsockname()}
        assert server.handler_to_client(known["handler"]) is known
    gone(server)
    assert server.handler_to_client(known["handler"]) is None


def test_clients_are_a_snapshot_that_any_thread_may_walk_while_they_come_and_go(server: PriceServer) -> None:
    with RawClient(server.port):
        before = server.clients
        with RawClient(server.port):
            wait_for(lambda: len(server.clients) == 2)
            assert len(before) == 1
        walked, ended = [0], threading.Event()

        def walk() -> None:
            while not ended.is_set():
                walked[0] += sum(each["id"] > 0 for each in server.clients)

        thread = in_thread(walk)
        for _ in range(200):
            RawClient(server.port).reset()
        ended.set()
        thread.join(10)
        assert walked[0] >= 200
        assert not thread.is_alive()


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


def test_what_cannot_be_sent_is_raised_where_it_was_asked_and_nothing_is_sent(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        handler = last_connection(server)
        for wrong in (
            lambda: server.send_message(server.clients[0], 5),
            lambda: server.send_message_to_all(None),
            lambda: server.send_message_to_all("\ud800"),
        ):
            with pytest.raises((TypeError, UnicodeError)):
                wrong()
        for too_long in (
            lambda: handler.send_close(1000, "é" * 62),
            lambda: server.disconnect_clients_gracefully(1000, b"x" * 124),
            lambda: server.shutdown_gracefully(1000, "x" * 124),
            lambda: server.deny_new_connections(1000, b"x" * 124),
        ):
            with pytest.raises(ValueError, match="close reason of 124 bytes: 123 are the most"):
                too_long()
        assert client.hears_nothing()
        with RawClient(server.port) as other:
            assert other.hears_nothing()
        handler.send_close(1000, b"x" * 123)
        assert client.read() == (CLOSE, b"\x03\xe8" + b"x" * 123)


def test_a_dead_client_does_not_keep_the_message_from_the_others(server: PriceServer) -> None:
    dead = [RawClient(server.port) for _ in range(5)]
    with honest(server) as client:
        with Blocked(server):
            thread = in_thread(lambda: server.send_message_to_all("number 0"))
            wait_for_queue(server, calls=1)
            for each in dead:
                each.reset()
        thread.join(10)
        assert client.recv(5) == "number 0"
        wait_for(lambda: len(server.clients) == 1)


def test_a_message_for_a_client_that_just_died_is_no_error_of_the_sender(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        handler = last_connection(server)
        hook(server, server.clients[0], lose)
        server.send_message(server.clients[0], "x")
        assert server.clients == []
        handler.send_message("x")
        handler.send_close()
        assert client.file.read() == b""


def test_what_a_callback_notes_in_its_client_is_there_in_the_next(server: PriceServer) -> None:
    found: list[object] = []
    server.set_fn_new_client(lambda client, server: client.update(note="mine"))
    server.set_fn_message_received(lambda client, server, message: found.append(client.get("note")))
    server.set_fn_client_left(lambda client, server: found.append(client.get("note")))
    with honest(server) as client:
        client.send("one")
        wait_for(lambda: found == ["mine"])
        assert [each.get("note") for each in server.clients] == ["mine"]
    wait_for(lambda: found == ["mine", "mine"])


def test_a_greeting_sent_from_new_client_comes_behind_the_known_prices(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1.0))
    server.set_fn_new_client(lambda client, server: server.send_message(client, "welcome"))
    with honest(server) as client:
        assert prices(client, 10) == ALL_AT[1]
        assert client.recv(5) == "welcome"


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


@pytest.mark.parametrize("code", [4002, None])
def test_clients_are_disconnected_gracefully_or_abruptly_and_the_server_goes_on(
    server: PriceServer, code: int | None
) -> None:
    with honest(server) as client:
        if code:
            server.disconnect_clients_gracefully(code, b"come again")
        else:
            server.disconnect_clients_abruptly()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert (closed.value.rcvd and (closed.value.rcvd.code, closed.value.rcvd.reason)) == (
            (code, "come again") if code else None
        )
    gone(server)
    with honest(server) as client:
        assert client.ping().wait(5)


def test_a_new_client_wakes_a_poller_that_pauses(server: PriceServer) -> None:
    assert not server.client_came.is_set()
    ask(server.port, get("/healthz"))
    assert not server.client_came.is_set()
    with RawClient(server.port):
        assert server.client_came.wait(5)


# Housekeeping


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_house_is_kept_twice_a_second_and_by_the_clock(timed: PriceServer) -> None:
    pass_time(timed, 1.0)  # the first one is behind us
    kept: list[float] = []
    timed.service_actions = lambda: kept.append(timed.clock())  # type: ignore[method-assign]
    for _ in range(20):
        timed.clock.now += 0.125  # type: ignore[attr-defined]
        for _ in range(3):
            timed.call(lambda: None)
    assert len(kept) == 5
    assert {later - earlier for earlier, later in pairwise(kept)} == {0.5}


def test_housekeeping_that_raises_is_one_line_and_goes_on(
    timed: PriceServer, updates: Updates, errors: list[str]
) -> None:
    kept: list[float] = []

    def keep() -> None:
        kept.append(timed.clock())
        raise RuntimeError

    pass_time(timed, 1.0)
    timed.service_actions = keep  # type: ignore[method-assign]
    with RawClient(timed.port) as client:
        for number in range(1, 5):
            timed.clock.now += 0.5  # type: ignore[attr-defined]
            timed.publish(updates(number))
            assert client.prices(10) == ALL_AT[number]
            wait_for_value(lambda: len(kept), number)
    assert errors == ["housekeeping failed, and goes on"]
    errors.clear()


def test_what_clients_and_callbacks_cause_is_logged_again_only_after_a_minute_without_it(
    timed: PriceServer, errors: list[str]
) -> None:
    timed.set_fn_message_received(fail)
    with RawClient(timed.port) as client:

        def fails() -> int:
            client.send(frame(TEXT, b"x") + frame(PING) + frame(PONG))
            while client.read()[0] != PONG:
                pass
            return len(errors)

        assert fails() == fails() == 1
        for seconds in (6.0, 59.0, 59.5, 55.0):
            pass_time(timed, seconds)
            assert fails() == 1
        pass_time(timed, 60.0)
        assert fails() == fails() == 2
    errors.clear()


def test_stale_prices_are_one_line_until_a_poll_succeeds(
    timed: PriceServer, updates: Updates, caplog: pytest.LogCaptureFixture
) -> None:
    pass_time(timed, 100.0)
    assert warnings(caplog) == [], "it has not begun"
    for number in (1, 2):
        timed.publish(updates(1.0))
        pass_time(timed, 60.0)
        assert len(warnings(caplog)) == number - 1
        pass_time(timed, 1.0)
        pass_time(timed, 100.0)
        assert warnings(caplog) == ["prices are stale: no successful poll for 61 s"] * number


# Coming: descriptors, addresses, crowds


class Listener:
    """In the place of the listening socket: `accept` fails while `error` is set, and tells another address."""

    def __init__(self, server: PriceServer):
        self.server, self.socket, self.error, self.failed, self.address = server, server.socket, 0, 0, ""
        server.call(self._take_over)
        server.call(lambda: None)  # an `accept` that was under way is behind us

    def _take_over(self) -> None:
        self.server._stop_listening()
        self.server.socket = self
        self.server.begin()

    def accept(self) -> Any:
        if self.error:
            self.failed += 1
            raise OSError(self.error, "Too many open files")
        sock, address = self.socket.accept()
        return sock, (self.address or address[0], *address[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_a_descriptor_the_listener_rests_until_the_next_housekeeping(
    timed: PriceServer, updates: Updates, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    pass_time(timed, 1.0)
    with RawClient(timed.port) as client:
        listener = Listener(timed)
        listener.error = number
        with visit(timed.port, request()) as sock:
            for tries in range(1, 5):
                wait_for_value(lambda: listener.failed, tries)
                timed.publish(updates(tries))
                assert client.prices(10) == ALL_AT[tries], "clients are served meanwhile"
                timed.call(lambda: None)
                assert listener.failed == tries, "it spins"
                pass_time(timed, 0.5)
            listener.error = 0
            pass_time(timed, 0.5)
            assert sock.recv(12) == b"HTTP/1.1 101", "served as soon as there is one"
    assert warnings(caplog) == ["cannot accept clients for now: Too many open files"]


def test_a_connection_that_is_gone_before_it_is_accepted_is_nothing(
    timed: PriceServer, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener(timed)
    listener.error = errno.ECONNABORTED
    with visit(timed.port, request()) as sock:
        wait_for(lambda: listener.failed)
        listener.error = 0
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
        monkeypatch.setattr("price_server.server.resource", None)
    else:
        monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    server = PriceServer(ASSETS, max_clients=asked)
    server.server_close()
    assert server.max_clients == clients
    warning = f"--max-clients lowered from {asked} to {clients}: {why}"
    assert caplog.messages == ([warning] if why else [])


def test_visitors_leave_20_files_for_what_is_no_connection(
    monkeypatch: pytest.MonkeyPatch, start_server: Start
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (23, 23))
    server = start_server()
    with contextlib.ExitStack() as stack:
        visitors = []
        for number in range(1, 4):
            visitors.append(stack.enter_context(visit(server.port, request()[:-2])))
            wait_for_value(lambda: connections(server), number)
        stack.enter_context(visit(server.port, request()[:-2]))
        assert visitors[0].recv(1) == b"", "the fourth takes the place of the first"
        assert connections(server) == 3


def test_when_all_descriptors_are_taken_the_visitor_that_waited_longest_makes_room(timed: PriceServer) -> None:
    server = timed
    server._room = 6
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(RawClient(server.port))
        answered = stack.enter_context(visit(server.port, get("/prices")))
        assert read_all(answered)
        waiting = []
        for number in range(4):
            waiting.append(stack.enter_context(visit(server.port, request()[:-2])))
            wait_for_value(lambda: connections(server), 3 + number)
        for oldest in waiting[:4]:
            newest = stack.enter_context(visit(server.port, request()[:-2]))
            assert oldest.recv(1) == b""
            waiting.append(newest)
            server.call(lambda: None)
            assert connections(server) == 6
        for sock in waiting[4:]:
            sock.sendall(b"\r\n")
            assert sock.recv(12) == b"HTTP/1.1 101"
        assert connections(server) == 6
        assert ask(server.port, get("/healthz"))[0] == 503, "the answered one made room; no price is known yet"
        wait_for_value(lambda: connections(server), 5)
        client.send(frame(PING))
        assert client.read() == (PONG, b"")


def test_500_clients_that_come_together_and_send_their_request_later_are_all_served(server: PriceServer) -> None:
    threads = threading.active_count()
    server.publish([PriceUpdate("BTC", 1.0, "t")])
    with contextlib.ExitStack() as stack:
        with Blocked(server):  # they wait in the kernel's queue
            clients = [stack.enter_context(visit(server.port)) for _ in range(500)]
        wait_for(lambda: connections(server) == 500)
        assert threading.active_count() == threads, "no thread for any of them"
        for client in clients:
            client.sendall(request())
        for client in clients:
            answer = b""
            while b'"asset_id":"BTC"' not in answer:
                part = client.recv(4096)
                assert part, "hung up on"
                answer += part
        assert len(server.clients) == 500
        assert threading.active_count() == threads
    gone(server)


def test_clients_leave_no_file_behind(server: PriceServer) -> None:
    process = psutil.Process()
    before = process.num_fds()
    for number in range(200):
        with RawClient(server.port) as client:
            if number % 2:
                client.reset()
        ask(server.port, get("/prices"))
    gone(server)
    wait_for(lambda: process.num_fds() <= before, what="files closed")


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_is_listened_on(start_server: Start, host: str) -> None:
    server = start_server(host=host)
    with socket.create_connection(("::1", server.port), timeout=10) as sock:
        sock.sendall(get("/prices"))
        assert read_all(sock).endswith(b"[]")


@pytest.mark.parametrize(
    ("address", "forwarded", "told"),
    [
        ("", "", "127.0.0.1"),
        ("", "203.0.113.7, 10.0.0.1", "203.0.113.7, 10.0.0.1"),
        ("::1", "203.0.113.7", "203.0.113.7"),
        ("", "203.0.113.7\x9b31m", "203.0.113.731m"),
        ("", "1" * 200, "1" * 100),
        ("192.0.2.9", "203.0.113.7", "192.0.2.9"),  # anybody may say so: only a proxy on this machine is believed
    ],
)
def test_the_debug_log_tells_who_came_and_left(
    server: PriceServer, caplog: pytest.LogCaptureFixture, address: str, forwarded: str, told: str
) -> None:
    caplog.set_level(logging.DEBUG, "price_server")
    Listener(server).address = address
    with RawClient(server.port, request(X_Forwarded_For=forwarded)):
        pass
    gone(server)
    server.call(lambda: None)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("client")]
    assert said == [f"client {told} came, clients connected: 1", "client left, clients connected: 0"]


def test_the_one_over_max_clients_gets_503_and_is_let_in_when_one_leaves(
    start_server: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(max_clients=2)
    with honest(server), honest(server):
        for _ in range(3):
            status, headers, body = ask(server.port, request())
            assert (status, headers["Retry-After"]) == (503, "10")
            assert body == b'{"error": "full, clients connected: 2"}'
        assert ask(server.port, get("/healthz"))[0] == 503  # no price is known yet
    gone(server)
    assert ask(server.port, request())[0] == 101
    assert warnings(caplog) == ["full, clients connected: 2; the next ones get 503"]


# What is counted


def test_messages_are_counted_exactly_also_those_that_had_to_wait(server: PriceServer, updates: Updates) -> None:
    def sent() -> float:
        return count(server, "messages_sent_total")

    server.publish(updates(1.0))
    assert sent() == 0
    with RawClient(server.port) as client, RawClient(server.port, request("/ws?assets=BTC,ETH")) as other:
        wait_for(lambda: sent() == 12)  # the known prices
        server.publish(updates(2.0))
        assert sent() == 24
        server.publish([PriceUpdate("ETH", 3.0, "t"), PriceUpdate("XRP", 3.0, "t")])
        assert sent() == 27
        server.send_message(server.clients[1], "x")
        server.send_message_to_all("x")
        assert sent() == 30
        client.send(frame(PING))
        assert client.prices(22)[-1] == ("XRP", 3.0)
        assert other.prices(5)[-1] == ("ETH", 3.0)
        narrowed = narrow(server, 100)  # the other: one and a half frames
        server.publish(updates(4.0))
        server.publish(updates(5.0))
        assert sent() == 30 + 10 + 10 + 2
        widen(server, narrowed)
        wait_for(lambda: sent() == 30 + 10 + 10 + 2 + 2)
        assert other.prices(4) == [("BTC", 4.0), ("ETH", 4.0), ("BTC", 5.0), ("ETH", 5.0)]
    server.report_failure("no answer")
    server.call(lambda: None)
    assert count(server, 'polls_total{result="success"}') == 5
    assert count(server, 'polls_total{result="failure"}') == 1


def test_refusals_and_drops_are_counted_by_reason(start_server: Start) -> None:
    server = start_server(max_clients=1, allow_origins=["https://example.org"])
    ask(server.port, request(Upgrade=None))
    ask(server.port, request(Sec_WebSocket_Version="8"))
    ask(server.port, request(Sec_WebSocket_Key="x"))
    ask(server.port, request("/ws?assets=DOGE"))
    ask(server.port, request(Origin="https://example.com"))
    ask(server.port, request("/nothing"))  # no request for the feed
    with RawClient(server.port):
        assert count(server, "clients") == 1
        ask(server.port, request())
        server.disconnect_clients_abruptly()
    server.deny_new_connections()
    with RawClient(server.port) as client:
        assert client.read_close() == 1000
    expected = {"handshake": 3, "asset": 1, "origin": 1, "full": 1, "denied": 1}
    assert server.refused == {f'{{reason="{reason}"}}': number for reason, number in expected.items()}
    for reason, number in expected.items():
        assert count(server, f'clients_refused_total{{reason="{reason}"}}') == number
    for labels, number in server.dropped.items():
        assert count(server, f"clients_dropped_total{labels}") == number == ("disconnected" in labels)
    assert count(server, "clients") == 0
    assert count(server, "max_clients") == 1


# Start and stop


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda server: server.shutdown_gracefully(), 1000),
        (lambda server: server.shutdown_gracefully(1001, b"server is stopping"), 1001),
        (lambda server: server.shutdown(), 1001),
        (lambda server: server.server_close(), 1001),
        (lambda server: server.shutdown_abruptly(), None),
    ],
    ids=["gracefully", "with a reason", "shutdown", "server_close", "abruptly"],
)
def test_a_shutdown_ends_clients_port_threads_and_files(
    start_server: Start, stop: Callable[[PriceServer], None], code: int | None
) -> None:
    process = psutil.Process()
    files, threads = process.num_fds(), threading.active_count()
    server = start_server()
    left: list[int] = []
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with honest(server) as client, RawClient(server.port):
        stop(server)
        server.thread.join(10)  # on a slow machine
        assert server.state == "ended"
        assert server.clients == []
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert (closed.value.rcvd.code if closed.value.rcvd else None) == code
    assert sorted(left) == [1, 2]
    with pytest.raises(ConnectionRefusedError):
        visit(server.port)
    wait_for(lambda: threading.active_count() <= threads, what="threads ended")
    wait_for(lambda: process.num_fds() <= files, what="files closed")
    with pytest.raises(RuntimeError, match="has run already"):
        server.run_forever()


@pytest.mark.parametrize("answer_first", [True, False])
def test_a_stop_waits_for_the_closes_and_for_answers_under_way_and_for_nothing_else(
    timed: PriceServer, answer_first: bool
) -> None:
    timed.stop_timeout = 20.0
    received: list[str] = []
    timed.set_fn_new_client(lambda client, server: received.append("came"))
    with RawClient(timed.port) as client, contextlib.ExitStack() as stack:
        half = stack.enter_context(visit(timed.port, request()[:-2]))
        taking = stack.enter_context(visit(timed.port, get("/prices")[:-2]))
        wait_for(lambda: connections(timed) == 3)
        connection = timed.call(lambda: list(timed._visitors)[-1])
        narrowed = connection.socket = Narrow(connection.socket)
        taking.sendall(b"\r\n")
        wait_for(lambda: connection.kept)
        thread = in_thread(lambda: timed.shutdown_gracefully(1001, b"server is stopping"))
        assert client.read() == (CLOSE, b"\x03\xe9server is stopping")
        assert half.recv(1) == b"", "half a request is not waited for"
        with pytest.raises(ConnectionRefusedError):
            visit(timed.port)
        timed.publish([PriceUpdate("BTC", 1.0, "t")])
        timed.send_message_to_all("late")
        if answer_first:
            narrowed.room = 1 << 20
            assert read_all(taking).endswith(b"\r\n\r\n[]")
            taking.close()
            wait_for_value(lambda: connections(timed), 1)
        client.send(frame(CLOSE, b"\x03\xe9"))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.file.read() == b""
        if not answer_first:
            gone(timed)
            narrowed.room = 1 << 20
            assert read_all(taking).endswith(b"\r\n\r\n[]")
            taking.close()
        thread.join(10)
        assert not thread.is_alive()
    assert received == ["came"]


def test_a_stop_goes_before_the_callbacks_that_wait(server: PriceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def leave(*_: object) -> None:
        order.append("left")
        server.shutdown_gracefully()

    monkeypatch.setattr(server, "begin_stop", preceded(server.begin_stop, lambda: order.append("stop")))
    server.set_fn_client_left(leave)
    with RawClient(server.port), RawClient(server.port):
        server.disconnect_clients_abruptly()
        server.thread.join(10)
    assert order == ["left", "stop", "left"]


def test_a_stop_waits_only_so_long_for_a_client_that_does_not_hang_up(server: PriceServer) -> None:
    assert PriceServer.stop_timeout < 1.0  # 1.0 s in truth
    with RawClient(server.port) as silent, RawClient(server.port) as stuck:
        narrow(server)
        began = time.monotonic()
        server.shutdown_gracefully()
        assert 0.3 <= took(began) < 2.0
        server.thread.join(10)  # on a slow machine
        assert server.state == "ended"
        assert silent.read() == (CLOSE, b"\x03\xe8")
        assert silent.file.read() == b""
        assert stuck.file.read() == b""


def test_a_stop_ends_in_time_also_where_housekeeping_is_not_due(start_server: Start) -> None:
    server = start_server(clock=Clock())  # which stands still
    server.housekeeping_interval = 20.0
    server.call(lambda: setattr(server, "_next_check", server.clock() + 20.0))
    with RawClient(server.port):
        began = time.monotonic()
        server.shutdown_gracefully()
        server.thread.join(30)
        assert took(began) < 5.0


def test_a_server_whose_thread_ends_unasked_says_so_and_releases_all_who_wait(
    server: PriceServer, updates: Updates, errors: list[str]
) -> None:
    released: list[str] = []

    def break_down() -> None:
        raise RuntimeError("the loop is broken")

    with RawClient(server.port) as client:
        with Blocked(server):
            threads = [
                in_thread(
                    one_after_the_other(lambda: server.publish(updates(1.0)), lambda: released.append("publish"))
                ),
                in_thread(
                    one_after_the_other(lambda: server.send_message_to_all("x"), lambda: released.append("send"))
                ),
            ]
            wait_for_queue(server, publishes=1, calls=1)
            server.look_around = break_down  # type: ignore[method-assign]
        for thread in threads:
            thread.join(10)
        server.thread.join(10)
        assert sorted(released) == ["publish", "send"]
        assert server.state == "ended"
        list(parse(client.file.read()))
        assert client.socket.recv(1) == b""
    server.publish(updates(2.0))
    assert server.clients == []
    assert errors == ["the server thread failed"]
    errors.clear()


def test_a_server_that_never_ran_lets_go_of_its_port_and_thread(updates: Updates) -> None:
    threads = threading.active_count()
    for stop in (PriceServer.shutdown_gracefully, PriceServer.shutdown_abruptly, PriceServer.server_close):
        server = PriceServer(ASSETS)
        stop(server)
        assert server.state == "ended"
        server.publish(updates(1.0))
        with pytest.raises(ConnectionRefusedError):
            visit(server.port)
    wait_for(lambda: threading.active_count() == threads)


def test_a_server_that_was_stopped_does_not_start_and_is_stopped_again_at_once(server: PriceServer) -> None:
    never_ran = PriceServer(ASSETS)
    for each in (never_ran, server):
        each.shutdown_gracefully()
        began = time.monotonic()
        each.server_close()
        assert took(began) < 2 * each.stop_timeout
        with pytest.raises(RuntimeError, match="make another"):
            each.run_forever(threaded=True)


def test_a_port_that_is_taken_is_an_oserror_and_leaves_nothing_behind(server: PriceServer) -> None:
    process = psutil.Process()
    files, threads = process.num_fds(), threading.active_count()
    with pytest.raises(OSError, match="in use"):
        PriceServer(ASSETS, port=server.port)
    wait_for(lambda: (process.num_fds(), threading.active_count()) == (files, threads))


def test_a_server_for_which_there_is_no_selector_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(selectors, "DefaultSelector", none_left)
    with pytest.raises(OSError, match="Too many"):  # not in the thread, where run_forever would wait for it for ever
        PriceServer(ASSETS)


# In a process of its own


@contextlib.contextmanager
def run_script(script: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs this; it is killed at the end, and after half a minute in any case."""
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job of a shell ignores it
    command = [sys.executable, "-u", "-c", heard + script]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        alarm = threading.Timer(30, process.kill)
        alarm.start()
        stack.callback(process.kill)
        stack.callback(alarm.cancel)
        yield process


FOREGROUND = """
import time
from price_server import PriceServer
server = PriceServer(("BTC",))
server.set_fn_message_received(lambda client, server, message: print("blocking") or time.sleep(30))
print(server.port)
server.run_forever()
print(server.state)
"""


def test_control_c_in_a_foreground_run_forever_is_a_stop() -> None:
    with run_script(FOREGROUND) as process:
        assert process.stdout
        with RawClient(int(process.stdout.readline())) as client:
            process.send_signal(signal.SIGINT)
            assert client.read() == (CLOSE, b"\x03\xe9server is stopping")
        assert process.communicate(timeout=10) == ("ended\n", "")
        assert process.returncode == 0


def test_a_second_control_c_ends_what_blocks() -> None:
    with run_script(FOREGROUND) as process:
        assert process.stdout
        with RawClient(int(process.stdout.readline())) as client:
            client.send(frame(TEXT, b"x"))
            assert process.stdout.readline() == "blocking\n"
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 10
            while process.poll() is None and time.monotonic() < deadline:
                process.send_signal(signal.SIGINT)  # the first may not have been met yet
                time.sleep(0.05)
            assert process.poll() is not None
            process.communicate()


def test_a_program_that_forgets_to_stop_its_server_still_ends() -> None:
    script = "from price_server import PriceServer\nPriceServer(('BTC',)).run_forever(threaded=True)\nprint('end')"
    with run_script(script) as process:
        assert process.communicate(timeout=10) == ("end\n", "")


SELECT = """
import selectors
selectors.DefaultSelector = selectors.SelectSelector
from price_server import PriceServer
server = PriceServer(("BTC",))
print(server.port, server.max_clients)
server.run_forever()
"""


def test_with_windows_select_512_sockets_are_served_and_the_next_are_told(updates: Updates) -> None:
    with run_script(SELECT) as process, contextlib.ExitStack() as stack:
        assert process.stdout
        port, most = map(int, process.stdout.readline().split())
        assert most == 462
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
        lowered = "WARNING:price_server.server:--max-clients lowered from 10000 to 462: select takes 512 sockets here\n"
        assert said == f"{lowered}WARNING:price_server.loop:full, clients connected: 462; the next ones get 503\n"
