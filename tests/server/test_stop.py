"""Start and stop of a server."""

import contextlib
import errno
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from raw import CLOSE, TEXT, RawClient, frame, get, honest, read_all, request, visit
from rigged import RiggedServer, call, connections, in_thread, narrow, sample, wait_for_value
from running import ASSETS, run_script, wait_for
from websockets.exceptions import ConnectionClosed

from coin_api import PriceUpdate
from price_server import PriceServer
from price_server.loop import STOP_TIMEOUT

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., PriceServer]
Updates = Callable[[float], list[PriceUpdate]]


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
    with honest(server) as client, RawClient(server.port), visit(server.port, get("/stream")):
        wait_for(lambda: len(server.clients) == 3)
        stop(server)
        server.thread.join(10)  # on a slow machine
        assert server.has_ended
        assert server.clients == []
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert (closed.value.rcvd.code if closed.value.rcvd else None) == code
    assert sorted(left) == [1, 2, 3]
    with pytest.raises(ConnectionRefusedError):
        visit(server.port)
    wait_for(lambda: threading.active_count() <= threads, what="threads ended")
    wait_for(lambda: process.num_fds() <= files, what="files closed")
    with pytest.raises(RuntimeError, match="has run already"):
        server.run_forever()


@pytest.mark.parametrize("response_first", [True, False])
def test_a_stop_waits_for_the_closes_and_for_responses_under_way_and_for_nothing_else(
    timed: RiggedServer, monkeypatch: pytest.MonkeyPatch, response_first: bool
) -> None:
    monkeypatch.setattr("price_server.loop.STOP_TIMEOUT", 20.0)
    came: list[str] = []
    timed.set_fn_new_client(lambda client, server: came.append("came"))
    with RawClient(timed.port) as client, contextlib.ExitStack() as stack:
        half = stack.enter_context(visit(timed.port, request()[:-2]))
        wait_for_value(lambda: connections(timed), 2)
        timed.listener.room = 0
        taking = stack.enter_context(visit(timed.port, get("/prices")))
        wait_for_value(lambda: sample(timed, 'http_responses_total{status="200"}'), 1)
        thread = in_thread(lambda: timed.shutdown_gracefully(1001, b"server is stopping"))
        assert client.read() == (CLOSE, b"\x03\xe9server is stopping")
        assert half.recv(1) == b"", "half a request is not waited for"
        with pytest.raises(ConnectionRefusedError):
            visit(timed.port)
        timed.publish([PriceUpdate("BTC", 1.0, "t")])
        timed.send_message_to_all("late")

        def take_response() -> None:
            timed.listener.accepted[-1].room = 1 << 20
            assert read_all(taking).endswith(b"\r\n\r\n[]")
            taking.close()

        if response_first:
            take_response()
            wait_for_value(lambda: connections(timed), 1)
        client.send(frame(CLOSE, b"\x03\xe9"))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.file.read() == b""
        if not response_first:
            wait_for(lambda: not timed.clients)
            take_response()
        thread.join(10)
        assert not thread.is_alive()
    assert came == ["came"]


def test_a_stop_waits_one_second_for_those_that_do_not_hang_up_whatever_the_clock_says(timed: RiggedServer) -> None:
    assert STOP_TIMEOUT == 1.0  # shorter in these tests
    with RawClient(timed.port) as silent, RawClient(timed.port) as stuck:
        narrow(timed)
        timed.shutdown_gracefully()
        timed.thread.join(10)  # on a slow machine
        assert timed.has_ended
        assert silent.read() == (CLOSE, b"\x03\xe8")
        assert silent.file.read() == b""
        assert stuck.file.read() == b""


def test_an_abrupt_shutdown_waits_for_no_response(timed: RiggedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("price_server.loop.STOP_TIMEOUT", 20.0)
    with visit(timed.port, get("/prices")) as visitor:
        assert read_all(visitor).endswith(b"[]"), "it does not hang up"
        in_thread(timed.shutdown_abruptly)
        timed.thread.join(10)
        assert timed.has_ended


def test_a_start_returns_when_the_server_thread_owns_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_late() -> None:
        time.sleep(0.1)
        serve()

    server = PriceServer(ASSETS)
    serve = server.serve_forever
    monkeypatch.setattr(server, "serve_forever", begin_late)
    server.run_forever(threaded=True)
    assert call(server, threading.current_thread) is server.thread
    server.shutdown_gracefully()


def test_a_start_that_fails_does_not_hang(monkeypatch: pytest.MonkeyPatch, errors: list[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    server = PriceServer(ASSETS)
    monkeypatch.setattr(selectors.DefaultSelector, "select", fail)
    thread = in_thread(lambda: server.run_forever(threaded=True))
    thread.join(10)
    assert not thread.is_alive()
    server.thread.join(10)
    assert server.has_ended
    with pytest.raises(ConnectionRefusedError):
        visit(server.port)
    assert errors == ["the server thread failed"]
    errors.clear()


def test_a_server_that_never_ran_releases_its_port_and_files(updates: Updates) -> None:
    process = psutil.Process()
    files, threads = process.num_fds(), threading.active_count()
    for stop in (PriceServer.shutdown_gracefully, PriceServer.shutdown_abruptly, PriceServer.server_close):
        server = PriceServer(ASSETS)
        stop(server)
        assert server.has_ended
        server.publish(updates(1.0))
        with pytest.raises(ConnectionRefusedError):
            visit(server.port)
    assert (process.num_fds(), threading.active_count()) == (files, threads)


@pytest.mark.parametrize(("history", "error"), [("new.db", OSError), (".", ValueError)])
def test_a_taken_port_or_an_unusable_history_file_leaves_nothing_open(
    server: PriceServer, tmp_path: Path, history: str, error: type[Exception]
) -> None:
    assert PriceServer.allow_reuse_address == (os.name == "posix"), "Windows would let two servers share a port"
    process = psutil.Process()
    files, threads = process.num_fds(), threading.active_count()
    with pytest.raises(error, match=r"in use|is a directory"):
        PriceServer(ASSETS, port=server.port, history_file=str(tmp_path / history))
    wait_for(lambda: threading.active_count() <= threads, what="threads ended")
    assert process.num_fds() == files


def test_a_server_without_a_selector_raises_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(selectors, "DefaultSelector", none_left)
    with pytest.raises(OSError, match="Too many"):  # not in the thread, where run_forever would wait for it for ever
        PriceServer(ASSETS)


# In the foreground


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_foreground_run_handles_an_interrupt_if_nothing_else_does_and_puts_the_handler_back(before: Any) -> None:
    default = signal.signal(signal.SIGINT, before)
    during: list[object] = []

    def stop(client: dict[str, Any], server: PriceServer, message: str) -> None:
        during.append(signal.getsignal(signal.SIGINT))
        server.shutdown_gracefully()

    server = PriceServer(ASSETS)
    server.set_fn_message_received(stop)
    in_thread(lambda: RawClient(server.port, after=frame(TEXT, b"stop")))
    server.run_forever()
    assert (during == [before]) == (before is signal.SIG_IGN)
    assert signal.signal(signal.SIGINT, default) is before


FOREGROUND = """
import time
from price_server import PriceServer
server = PriceServer(("BTC",))
server.set_fn_message_received(lambda client, server, message: print("blocking") or time.sleep(30))
print(server.port)
server.run_forever()
print(server.has_ended, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_control_c_in_a_foreground_run_forever_is_a_stop() -> None:
    with run_script(FOREGROUND) as process:
        assert process.stdout
        with RawClient(int(process.stdout.readline())) as client:
            process.send_signal(signal.SIGINT)
            assert client.read() == (CLOSE, b"\x03\xe9server is stopping")
        assert process.communicate(timeout=10) == ("True True\n", "")
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
