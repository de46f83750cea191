"""Hostile clients beside an honest one, against a server as users run it.

Run as a program, this file is the hostile side (`python test_clients.py FUNCTION PORT`): a process of
its own, so that its work does not delay what the tests measure. Where a promise is a number of seconds,
the test allows for the time by which the machine itself was late meanwhile (`Lateness`).
"""

import json
import os
import random
import selectors
import signal
import socket
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from child import Clients
from feed import Feed, Lateness
from raw import BINARY, PING, TEXT, frame, request, reset, visit
from running import Tracker, wait_for

UPGRADE = request()
GOODBYE = b"\x88\x14\x03\xe9server is stopping"  # close frame, 1001


# The hostile side. Each function is a kind of client; all of them end by themselves.


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    """A client that has asked for the upgrade and has not read the answer."""
    return visit(port, UPGRADE, receive_buffer)


def never_read(port: int) -> None:
    clients = [connect(port, 2048) for _ in range(300)]
    time.sleep(1.2)
    del clients


def ping_and_never_read(port: int) -> None:
    flood([connect(port) for _ in range(20)], frame(PING, b"x" * 125) * 100)


def send_long_messages(port: int) -> None:
    flood([connect(port) for _ in range(4)], frame(BINARY, b"x" * 60_000))


def flood(clients: list[socket.socket], data: bytes, seconds: float = 1.2) -> None:
    """Send the same frames to each for as long as it takes them."""
    rest = dict.fromkeys(clients, b"")
    with selectors.DefaultSelector() as selector:
        for sock in clients:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_WRITE, sock)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for key, _ in selector.select(0.1):
                rest[key.data] = rest[key.data] or data
                rest[key.data] = rest[key.data][key.data.send(rest[key.data]) :]


def reset_at_once(port: int) -> None:
    def run(kind: int) -> None:
        while time.monotonic() < deadline:
            if kind == 0:
                reset(socket.create_connection(("127.0.0.1", port), 5))
            else:
                sock = connect(port)
                if kind == 2:
                    sock.recv(16)
                elif kind == 3:
                    sock.sendall(frame(PING, b"x") * 100)
                reset(sock)

    deadline = time.monotonic() + 1.2
    in_threads(run)


def dribble(port: int, number: int = 500, seconds: float = 1.5) -> None:
    """Half handshakes, a byte at a time."""
    open_ = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(number)]
    began = time.monotonic()
    octet = iter(UPGRADE[:-2] + b"X: x\r\n" * 1_000)
    while open_ and time.monotonic() < began + seconds:
        data = bytes([next(octet)])
        for sock in list(open_):
            try:
                sock.send(data)
            except OSError:
                open_.remove(sock)
        time.sleep(0.02)


def send_garbage_requests(port: int) -> None:
    def run(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < deadline:
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                sock.sendall(chance.choice(kinds)(chance))
                sock.shutdown(socket.SHUT_WR)
                try:
                    while sock.recv(4096):
                        pass
                except OSError:
                    pass  # reset: the server did not read all of it

    kinds: list[Callable[[random.Random], bytes]] = [
        lambda chance: chance.randbytes(chance.randrange(1, 3_000)),
        lambda chance: b"GET /ws HTTP/1.1\r\n" + chance.randbytes(500) + b"\r\n\r\n",
        lambda chance: b"GET " + chance.randbytes(20) + b" HTTP/1.1\r\n\r\n",
        lambda chance: chance.randbytes(3) + b" / HTTP/" + chance.randbytes(3) + b"\r\n\r\n",
        lambda chance: UPGRADE.replace(b"dGhl", chance.randbytes(4)),
        lambda chance: UPGRADE[: chance.randrange(len(UPGRADE))],
        lambda chance: b"GET /" + b"x" * 100_000,
        lambda chance: b"\r\n" * chance.randrange(1_000),
        lambda chance: b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * 500 + b"\r\n",
    ]
    deadline = time.monotonic() + 1.2
    in_threads(run)


def send_random_frames(port: int) -> None:
    def run(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < deadline:
            with connect(port) as sock:
                try:
                    for _ in range(chance.randrange(1, 20)):
                        sock.sendall(
                            chance.choice((chance.randbytes(50), frame(TEXT, b"\xff"), b"\x81\xff", b"\x89\x80"))
                        )
                    if chance.random() < 0.5:
                        sock.recv(4096)
                except OSError:
                    pass  # the server hung up on it

    deadline = time.monotonic() + 1.2
    in_threads(run)


def in_threads(run: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def leave_together(port: int) -> None:
    hold(port, 2_000)


def storm(port: int) -> None:
    """Connect as fast as it goes, with some half handshakes, until there is no server any more."""
    half = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(100)]
    say("ready")

    def run(_: int) -> None:
        clients = []
        try:
            while time.monotonic() < deadline:
                clients.append(connect(port))
        except OSError:
            pass  # the server has stopped

    deadline = time.monotonic() + 5
    in_threads(run)
    del half


def be_stuck_and_silent(port: int) -> None:
    """100 full sockets and 100 that never say anything, not even a close."""
    silent, stuck = [[connect(port, 4096) for _ in range(100)] for _ in range(2)]
    flood(stuck, frame(PING, b"x" * 125) * 100, 0.6)
    say("ready")
    sys.stdin.read()
    del silent


def hold(port: int, number: int) -> None:
    """Honest clients: say "ready" when all are served, read to the end, say the number of each kind of end.

    They leave in the same moment when the standard input ends.
    """
    tails: dict[socket.socket, bytes] = {}
    ends: Counter[str] = Counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(number):
            sock = connect(port)
            tails[sock] = sock.recv(1)
            selector.register(sock, selectors.EVENT_READ)
        say("ready")
        selector.register(sys.stdin, selectors.EVENT_READ)
        while tails:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    os._exit(0)
                sock = key.fileobj  # type: ignore[assignment]
                try:
                    data = sock.recv(65_536)
                except ConnectionResetError:
                    data = b""
                if data:
                    tails[sock] = (tails[sock] + data)[-len(GOODBYE) :]
                else:
                    ends["close 1001" if tails.pop(sock) == GOODBYE else "other"] += 1
                    selector.unregister(sock)
                    sock.close()
    say(ends)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


# Hostile clients beside an honest one


def clients_at(tracker: Tracker) -> int:
    with urllib.request.urlopen(f"{tracker.http}/healthz", timeout=5) as answer:
        return int(json.load(answer)["clients"])


def longest_wait_beside(feed: Feed, kind: Callable[..., None]) -> float:
    """The longest time between two polls at the honest client, in seconds; the bad ones have left then."""
    began = time.monotonic()
    with Clients(__file__, kind.__name__, feed.tracker.port) as clients:
        if kind is leave_together:
            assert clients.receive() == "ready"
            clients.end()
        else:
            assert clients.process.wait(30) == 0
    wait_for(lambda: clients_at(feed.tracker) == 1, what="no bad client left over")
    wait_for(feed.is_as_before, what="threads and files back")
    feed.wait_for_polls(1)
    return feed.longest_wait(began)


@pytest.fixture(scope="module")
def feed() -> Iterator[Feed]:
    with ExitStack() as stack:
        feed = Feed(stack)
        yield feed
        assert feed.tracker.stop() == 0
        feed.thread.join(5)
        assert feed.client.close_code == 1001


@pytest.mark.parametrize(
    "kind",
    [
        never_read,
        ping_and_never_read,
        send_long_messages,
        reset_at_once,
        dribble,
        send_garbage_requests,
        send_random_frames,
        leave_together,
    ],
)
def test_misbehaving_clients_neither_delay_a_normal_client_nor_cost_it_a_price(
    feed: Feed, kind: Callable[..., None]
) -> None:
    with Lateness() as lateness:
        waited = longest_wait_beside(feed, kind)
    assert lateness.allows(waited, 2 * Feed.INTERVAL + 0.2)
    assert feed.missed_nothing()


def test_bad_clients_leave_no_traceback_and_no_flood_in_the_log(feed: Feed) -> None:
    """Runs after the test of each of them."""
    assert "Traceback" not in feed.tracker.text
    assert len(feed.tracker.log) <= 5, feed.tracker.text


# Limits


def wait_for_prices(tracker: Tracker) -> None:
    def known() -> bool:
        with urllib.request.urlopen(f"{tracker.http}/prices", timeout=5) as answer:
            return b'"SOL"' in answer.read()

    wait_for(known, what="the first prices")


def answers(clients: list[socket.socket]) -> Counter[bytes]:
    """How many of these have which HTTP status by now; b"" for none yet."""
    found: Counter[bytes] = Counter()
    for client in clients:
        client.setblocking(False)
        try:
            found[client.recv(12, socket.MSG_PEEK)[9:]] += 1
        except BlockingIOError:
            found[b""] += 1
    return found


def test_without_a_free_file_the_clients_are_served_the_others_wait_and_nothing_spins() -> None:
    with Tracker("--demo", "--interval", "0.25") as tracker, ExitStack() as stack:
        psutil.Process(tracker.process.pid).rlimit(psutil.RLIMIT_NOFILE, (120, 120))
        clients = [stack.enter_context(connect(tracker.port)) for _ in range(200)]
        tracker.wait_for_log("cannot accept clients for now: Too many open files")
        wait_for(lambda: answers(clients)[b"101"] > 100, what="as many clients as there are files")
        clients[0].recv(65_536)
        before = tracker.usage()[3]
        time.sleep(1)
        share = tracker.usage()[3] - before
        print(f"no file left: {share:.1%} of a core")
        assert share < 0.2
        assert clients[0].recv(65_536)  # prices: still served
        served = answers(clients[1:])[b"101"]
        for client in clients[1:51]:
            client.close()
        wait_for(lambda: answers(clients[51:])[b"101"] == served, what="another for each that left")
        assert tracker.text.count("cannot accept") == 1
        assert "Traceback" not in tracker.text


# Stop


def seconds_queued(tracker: Tracker) -> dict[str, float]:
    """How long each thread was ready to run so far and had no processor, because this machine is busy (on Linux)."""
    queued = {}
    for file in Path(f"/proc/{tracker.process.pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            queued[file.parent.name] = int(file.read_text().split()[1]) / 1e9
    return queued


@contextmanager
def stopping() -> Iterator[Callable[[Tracker], float]]:
    """Gives the function that stops a tracker, within the 2 s that are promised; it returns how long that took."""
    with Lateness() as lateness:

        def stop(tracker: Tracker) -> float:
            before = seconds_queued(tracker)
            queued = dict(before)
            began = time.monotonic()
            tracker.process.send_signal(signal.SIGTERM)
            while tracker.process.poll() is None:
                assert time.monotonic() < began + 30
                queued |= seconds_queued(tracker)
                time.sleep(0.005)
            took = time.monotonic() - began
            waited = sum(queued.values()) - sum(before.values())
            assert lateness.allows(took - waited, 2.0), f"{took:.3f} s, {waited:.3f} s of them without a processor"
            assert tracker.wait() == 0
            assert "Traceback" not in tracker.text
            return took

        yield stop


def test_8000_clients_get_close_1001_within_two_seconds_of_a_signal() -> None:
    with Tracker("--demo") as tracker, Clients(__file__, "hold", tracker.port, 8_000) as clients, stopping() as stop:
        wait_for_prices(tracker)
        threads = tracker.usage()[0]
        assert clients.receive() == "ready"
        assert tracker.usage()[0] <= threads, "a thread per client"
        took, ends = stop(tracker), clients.receive()
        # After 2 s it exits, even if this machine was too busy for it to reach all of them.
        assert ends == {"close 1001": 8_000} or (took > 2.0 and sum(ends.values()) == 8_000)


def test_clients_that_are_frozen_stuck_or_silent_do_not_hold_up_a_stop() -> None:
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker("--demo"))
        bad = stack.enter_context(Clients(__file__, "be_stuck_and_silent", tracker.port))
        good = stack.enter_context(Clients(__file__, "hold", tracker.port, 1_000))
        stop = stack.enter_context(stopping())
        wait_for_prices(tracker)
        assert bad.receive() == "ready"
        assert good.receive() == "ready"
        bad.process.send_signal(signal.SIGSTOP)
        stop(tracker)
        assert good.receive() == {"close 1001": 1_000}


def test_a_stop_during_a_handshake_storm_takes_no_longer() -> None:
    with Tracker("--demo") as tracker, Clients(__file__, "storm", tracker.port) as clients, stopping() as stop:
        wait_for_prices(tracker)
        assert clients.receive() == "ready"
        wait_for(lambda: tracker.usage()[1] > 300, what="the storm")
        stop(tracker)


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
