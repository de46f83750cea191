"""The whole program as users run it: CoinAPI's stand-in on one side, independent clients on the other."""

import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from running import ASSETS, ROOT, Tracker, wait_for
from stand_in import KEY, OUT_OF_CREDITS, RATES, StandIn, rates_body
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from coin_api import DemoApi, PriceUpdate
from price_server import PriceServer
from tracker import Poller

AT = "2021-10-20T21:34:13.0000000Z"


def tracking(coin_api: StandIn, *arguments: str) -> Tracker:
    return Tracker(*arguments, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)


def changed(folder: Path, *lines: str) -> str:
    """A program: tracker.py with these lines of Python before it starts."""
    program = folder / "changed.py"
    start = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    program.write_text("\n".join([*start, *lines, "import tracker", "sys.exit(tracker.main())"]))
    return str(program)


def feed(tracker: Tracker, query: str = "") -> ClientConnection:
    # No limit for what waits to be received: with one, this client does not even read a close behind it.
    return connect(tracker.ws + query, max_queue=None)


def poll_of(client: ClientConnection, seconds: float = 20.0, count: int = 10) -> list[dict[str, Any]]:
    """The next ten messages."""
    return [json.loads(client.recv(seconds)) for _ in range(count)]


def test_one_batched_request_a_second_reaches_coinapi_and_every_client_gets_its_prices(coin_api: StandIn) -> None:
    started = time.monotonic()
    with tracking(coin_api, "--interval", "1") as tracker:
        wait_for(lambda: coin_api.requests)
        with feed(tracker) as first, feed(tracker) as second:
            for client in (first, second):
                poll_of(client)  # the snapshot
            for poll in range(4):
                coin_api.rates["BTC"] = 70_000.5 + poll
                for client in (first, second):
                    expected = [{"asset_id": asset, "price": coin_api.rates[asset], "time": AT} for asset in ASSETS]
                    assert poll_of(client) == expected
        assert tracker.stop() == 0
    assert len(coin_api.requests) >= 5
    for number, request in enumerate(coin_api.requests):  # late on a busy machine, but never early
        assert request.at - started > number * 1.0
    for request in coin_api.requests:
        assert request.path == "/v1/exchangerate/USD"
        assert request.query == {"filter_asset_id": [",".join(ASSETS)], "invert": ["true"]}
        assert request.headers["X-CoinAPI-Key"] == KEY
        assert KEY not in request.path
    assert KEY not in tracker.text


def test_a_client_that_comes_between_two_polls_has_all_ten_at_once(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "60") as tracker:
        wait_for(lambda: requests.get(tracker.http + "/healthz", timeout=5).status_code == 200)
        started = time.monotonic()
        with feed(tracker) as client:
            assert [update["asset_id"] for update in poll_of(client)] == list(ASSETS)
        assert time.monotonic() - started < 0.3


def test_the_port_is_bound_before_the_first_poll_whatever_coinapi_does(coin_api: StandIn) -> None:
    coin_api.answer = lambda handler: time.sleep(3)
    with tracking(coin_api) as tracker, feed(tracker):
        health = requests.get(tracker.http + "/healthz", timeout=5)
        assert (health.status_code, health.json()["status"]) == (503, "starting")


def wrong_gzip(stand_in: StandIn) -> None:
    stand_in.say(rates_body(RATES), Content_Encoding="gzip")


def cut_off(stand_in: StandIn) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + rates_body(RATES)[:300])
        handler.close_connection = True

    stand_in.answer = answer


def endless(stand_in: StandIn) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for _ in range(1600):  # 100 MiB, if somebody takes them
            handler.wfile.write(b"[" * 65536)

    stand_in.answer = answer


def body(content: bytes, status: int = 200, **headers: str) -> Callable[[StandIn], None]:
    return lambda stand_in: stand_in.say(content, status, **headers)


TROUBLE: dict[str, tuple[Callable[[StandIn], None], str]] = {
    "refused key": (body(b'{"error":"Invalid API key"}', 401), "refused the key"),
    "out of credits": (body(json.dumps(OUT_OF_CREDITS).encode(), 403), "Quota exceeded: Insufficient Usage Credits"),
    "rate limit": (body(b"", 429), "answered 429"),
    "server error": (body(b"<html>\n<h1>Bad gateway</h1>", 502), "answered 502: <html> <h1>Bad gateway"),
    "no data": (body(b'{"error":"none"}', 550), "answered 550: none"),
    "redirect": (body(b"", 302, Location="http://127.0.0.1:9/"), "a redirect, which is not followed"),
    "empty": (body(b""), r"not JSON: \(empty\)"),
    "null": (body(b"null"), "no list of rates"),
    "a list": (body(b"[]"), "no list of rates"),
    "no rates": (body(b'{"asset_id_base":"USD"}'), "no list of rates"),
    "rates null": (body(b'{"rates":null}'), "no list of rates"),
    "junk": (body(b'{"rates":[7,null,[],{"rate":{}}]}'), "no price for"),
    "not UTF-8": (body(b'{"rates":"\xff\xfe"}'), "not JSON"),
    "nested": (body(b"[" * 200_000), "not JSON"),
    "cut off": (cut_off, "no answer from CoinAPI"),
    "wrong gzip": (wrong_gzip, "no answer from CoinAPI"),
    "endless": (endless, "larger than 1048576 bytes"),
}


def test_the_feed_goes_on_within_two_intervals_of_any_trouble(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.2") as tracker, feed(tracker) as client:
        poll_of(client)
        memory = tracker.usage()[2]
        for trouble, said in TROUBLE.values():
            lines, asked = len(tracker.log), len(coin_api.requests)
            trouble(coin_api)
            wait_for(partial(lambda asked: len(coin_api.requests) > asked, asked))
            coin_api.rates["BTC"] += 1.0
            coin_api.recover()
            recovered = time.monotonic()
            while json.loads(client.recv(5)) != {"asset_id": "BTC", "price": coin_api.rates["BTC"], "time": AT}:
                pass
            assert time.monotonic() - recovered < 2 * 0.2 + 0.2
            wait_for(partial(lambda lines: any("prices again" in line for line in tracker.log[lines:]), lines))
            new = tracker.log[lines:]
            assert [line.split()[1] for line in new] == ["WARNING", "NOTICE"], new
            assert re.search(said, new[0]), new
        assert tracker.usage()[2] - memory < 20 << 20
        assert "Traceback" not in tracker.text


def test_a_long_outage_is_two_lines_and_the_last_prices_stay(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.1") as tracker:
        wait_for(lambda: coin_api.requests)
        coin_api.say(b"", 503)
        asked = len(coin_api.requests)
        wait_for(lambda: len(coin_api.requests) >= asked + 4)
        with feed(tracker) as client:
            assert [update["price"] for update in poll_of(client)] == [RATES[asset] for asset in ASSETS]
        health = requests.get(tracker.http + "/healthz", timeout=5).json()
        assert health["last_error"] == "CoinAPI answered 503"
        assert health["age_seconds"] > 0.5
        coin_api.recover()
        tracker.wait_for_log(r"prices again after \d+ s, failed polls: \d+")
        assert len(tracker.log) == 4, tracker.log  # two at start, one WARNING, one INFO


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    drip(handler, b"HTTP/1.1 200 OK\r\nX-Slow: ")


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")


def drip(handler: BaseHTTPRequestHandler, start: bytes) -> None:
    handler.wfile.write(start)
    for _ in range(60):  # 15 s
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.25)


def test_a_server_that_drips_is_given_up_and_the_feed_goes_on(tmp_path: Path) -> None:
    program = changed(tmp_path, "import coin_api", "coin_api.ANSWER_TIMEOUT = 1.0")
    with ExitStack() as stack:
        runs = []
        for answer in (drip_headers, drip_body):
            stand_in = stack.enter_context(StandIn())
            stand_in.answer = answer
            tracker = Tracker("--interval", "0.5", program=program, COIN_API_KEY=KEY, COIN_API_URL=stand_in.url)
            wait_for(partial(getattr, stand_in, "requests"))
            stand_in.recover()
            runs.append((stand_in, stack.enter_context(tracker)))
        for stand_in, tracker in runs:
            with feed(tracker) as client:
                assert len(poll_of(client)) == 10
            first, second = stand_in.requests[:2]
            assert 0.9 < second.at - first.at < 2.5
            tracker.wait_for_log("WARNING no prices: no answer from CoinAPI: not whole within 1 s")


@pytest.mark.parametrize("rate", [None, math.nan, math.inf, -1, 0, "65980.1", True, [65980.1], "1e999"])
def test_nothing_false_is_ever_sent_and_the_other_assets_go_out(coin_api: StandIn, rate: object) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = rates_body(coin_api.rates | {"ETH": rate})
        coin_api.send(handler, content.replace(b'"1e999"', b"1e999"))

    coin_api.answer = answer
    with tracking(coin_api, "--interval", "0.2") as tracker, feed(tracker) as client:
        others = [asset for asset in ASSETS if asset != "ETH"]
        for _ in range(3):
            assert [update["asset_id"] for update in poll_of(client, count=9)] == others
        coin_api.recover()
        wait_for(lambda: json.loads(client.recv(5))["asset_id"] == "ETH")
        tracker.wait_for_log("NOTICE a sound price again for ETH")
        assert tracker.text.count("WARNING") == tracker.text.count("no sound price for ETH") == 1


def test_a_client_that_follows_two_assets_gets_these_two(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.3") as tracker, feed(tracker, "?assets=sol,BTC") as client:
        assert [update["asset_id"] for update in poll_of(client, count=6)] == ["BTC", "SOL"] * 3


def test_pause_when_idle_polls_only_while_somebody_listens(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.2", "--pause-when-idle") as tracker:
        health = requests.get(tracker.http + "/healthz", timeout=5)
        assert (health.status_code, health.json()["status"]) == (200, "paused")
        for _ in range(2):
            coin_api.requests.clear()
            arrived = time.monotonic()
            with feed(tracker) as client:
                wait_for(lambda: coin_api.requests)
                assert coin_api.requests[0].at - arrived < 0.2
                wait_for(lambda: len(coin_api.requests) == 4)
                assert poll_of(client)
            wait_for(lambda: requests.get(tracker.http + "/healthz", timeout=5).json()["status"] == "paused")
        paused = len(coin_api.requests)
        with pytest.raises(AssertionError, match="not within"):
            wait_for(lambda: len(coin_api.requests) > paused, seconds=1.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_closes_every_client_with_1001_and_exits_0(coin_api: StandIn, number: int) -> None:
    with tracking(coin_api) as tracker, feed(tracker) as client:
        poll_of(client)
        started = time.monotonic()
        assert tracker.stop(number) == 0
        assert time.monotonic() - started < 2
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(5)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "server is stopping")
        assert [line.split(" ", 1)[1] for line in tracker.log[2:]] == [
            "INFO stopping, clients connected: 1",
            "INFO stopped",
        ]


def test_a_stop_does_not_wait_for_a_request_that_hangs(coin_api: StandIn) -> None:
    coin_api.answer = lambda handler: time.sleep(4)
    tracker = tracking(coin_api)
    wait_for(lambda: coin_api.requests)
    started = time.monotonic()
    assert tracker.stop() == 0
    assert time.monotonic() - started < 2
    assert [line.split(" ", 1)[1] for line in tracker.log] == ["INFO stopping, clients connected: 0", "INFO stopped"]


def raw_client(port: int) -> socket.socket:
    """An upgraded connection that says nothing, not even a close."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    return client


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_the_program_at_once(coin_api: StandIn, first: int) -> None:
    with tracking(coin_api) as tracker, raw_client(tracker.port) as silent:
        assert silent.recv(100).startswith(b"HTTP/1.1 101")
        tracker.process.send_signal(first)  # it waits a second for the close that never comes
        tracker.wait_for_log("stopping")
        started = time.monotonic()
        assert tracker.stop(signal.SIGINT) == -signal.SIGINT
        assert time.monotonic() - started < 0.5


def test_there_are_four_threads_at_any_number_of_clients() -> None:
    with Tracker("--demo", "--interval", "0.2") as tracker, ExitStack() as stack:
        assert tracker.usage()[0] == 4
        clients = [stack.enter_context(raw_client(tracker.port)) for _ in range(100)]
        assert all(client.recv(10) for client in clients)
        assert tracker.usage()[0] == 4


def test_no_thread_but_main_takes_the_signals_that_it_waits_for() -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("asks /proc")
    wanted = sum(1 << (number - 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    with Tracker("--demo") as tracker:
        blocked = {}
        for task in Path(f"/proc/{tracker.process.pid}/task").iterdir():
            mask = re.search(r"^SigBlk:\s*([0-9a-f]+)$", (task / "status").read_text(), re.MULTILINE)
            assert mask
            blocked[int(task.name)] = int(mask[1], 16) & wanted
        assert blocked.pop(tracker.process.pid) == 0
        assert list(blocked.values()) == [wanted] * 3


def test_a_server_thread_that_ends_unasked_ends_the_program_with_status_1(tmp_path: Path) -> None:
    program = changed(
        tmp_path,
        "import selectors",
        "class Broken(selectors.SelectSelector):",
        "    def select(self, timeout=None): raise OSError('broken')",
        "selectors.DefaultSelector = Broken",
    )
    tracker = Tracker("--demo", program=program)
    assert tracker.wait(10) == 1
    assert tracker.find("ERROR the server's thread has ended")


def test_where_select_takes_512_sockets_it_serves_at_the_limit_and_refuses_the_next(tmp_path: Path) -> None:
    program = changed(tmp_path, "import selectors", "selectors.DefaultSelector = selectors.SelectSelector")
    with Tracker("--demo", "--interval", "0.5", program=program) as tracker, ExitStack() as stack:
        tracker.wait_for_log("WARNING --max-clients lowered from 10000 to 462: select takes 512 sockets here")
        clients = [stack.enter_context(raw_client(tracker.port)) for _ in range(462)]
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 101"
        refused = stack.enter_context(raw_client(tracker.port))
        assert refused.recv(12) == b"HTTP/1.1 503"
        assert requests.get(tracker.http + "/healthz", timeout=5).json()["clients"] == 462
        with ThreadPoolExecutor(8) as threads:  # each is served to the last
            assert all(threads.map(gets_prices, clients))


def gets_prices(client: socket.socket) -> bool:
    """Whether two more polls come."""
    got = b""
    while got.count(b'"SOL"') < 3:
        data = client.recv(65536)
        if not data:
            return False
        got += data
    return True


# Left running


def test_killed_and_started_again_at_once_it_binds_and_clients_are_back(coin_api: StandIn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    options = ("--port", port, "--interval", "0.3")
    came = [threading.Event() for _ in range(20)]
    over = threading.Event()

    def follow(event: threading.Event) -> None:
        while not over.is_set():
            try:
                with connect(f"ws://127.0.0.1:{port}/ws") as client:
                    for _ in client:
                        event.set()
            except (OSError, WebSocketException):
                time.sleep(0.1)

    followers = [threading.Thread(target=follow, args=(event,), daemon=True) for event in came]
    with tracking(coin_api, *options) as first:
        for follower in followers:
            follower.start()
        wait_for(lambda: all(event.is_set() for event in came), what="prices for all")
        first.process.kill()
        first.process.wait()
    for event in came:
        event.clear()
    with tracking(coin_api, *options) as second:
        wait_for(lambda: all(event.is_set() for event in came), what="all are back")
        assert requests.get(second.http + "/healthz", timeout=5).json()["clients"] == 20
        over.set()
    for follower in followers:
        follower.join(10)


class CountingApi(DemoApi):
    polls = 0

    def fetch_prices(self, asset_ids: Sequence[str]) -> list[PriceUpdate]:
        self.polls += 1
        return super().fetch_prices(asset_ids)


@pytest.mark.parametrize("shift", [3600.0, -3600.0])
def test_polls_and_deadlines_go_on_when_the_clock_is_set(
    start_server: Callable[..., PriceServer], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    ahead = [0.0]
    monkeypatch.setattr("price_server.connection.REQUEST_TIMEOUT", 1.0)
    server = start_server(interval=0.1, wall_clock=lambda: time.time() + ahead[0])
    source = CountingApi()
    poller = Poller(source, server, 0.1)
    thread = threading.Thread(target=poller.run, daemon=True)
    thread.start()
    try:
        with connect(f"ws://127.0.0.1:{server.port}/ws", max_queue=None) as client, socket.socket() as late:
            wait_for(lambda: source.polls > 3)
            late.connect(("127.0.0.1", server.port))
            late.sendall(b"GET /ws HTTP/1.1\r\n")
            ahead[0] = shift
            before, start = source.polls, time.monotonic()
            late.settimeout(5)
            assert late.recv(1) == b""
            assert 0.5 < time.monotonic() - start < 3, "the request's deadline"
            polled = (source.polls - before) / (time.monotonic() - start)
            assert 5 < polled < 12, "polls a second"
            health = requests.get(f"http://127.0.0.1:{server.port}/healthz", timeout=5).json()
            assert health["status"] == "ok"
            assert 0 <= health["age_seconds"] < 1
            assert abs(health["time"] - time.time() - shift) < 1
            assert client.recv(timeout=1)
    finally:
        poller.stop()
        thread.join()


def test_machine_that_slept_polls_once_late_and_goes_on(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.5") as tracker:
        with feed(tracker) as client:
            wait_for(lambda: len(coin_api.requests) >= 3)
            poll_of(client)
            wait_for(lambda: time.monotonic() - coin_api.requests[-1].at > 0.1)  # it waits for the next now
            tracker.process.send_signal(signal.SIGSTOP)
            time.sleep(2.2)
            before = len(coin_api.requests)
            tracker.process.send_signal(signal.SIGCONT)
            woken = time.monotonic()
            wait_for(lambda: len(coin_api.requests) >= before + 4)
            at = [request.at for request in coin_api.requests[before - 1 : before + 4]]
            assert at[1] - woken < 0.3, "the late poll"
            # At the fixed times again; the first of them may be near the late one.
            assert at[2] - at[1] < 0.7
            assert all(0.3 < later - earlier < 0.7 for earlier, later in itertools.pairwise(at[2:]))
            while json.loads(client.recv(timeout=2)) != requests.get(tracker.http + "/prices/SOL", timeout=5).json():
                pass
        assert client.close_code == 1000


def test_control_c_while_the_program_loads_is_no_traceback(tmp_path: Path) -> None:
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    (tmp_path / "requests.py").write_text(slow)
    tracker = Tracker("--demo", PYTHONPATH=str(tmp_path))
    assert tracker.wait() == -signal.SIGINT
    assert tracker.log == []
    tracker.__exit__()


def test_control_c_ends_once_without_a_traceback(coin_api: StandIn) -> None:
    coin_api.answer = lambda handler: time.sleep(4)
    program = "import sys, tracker; sys.exit(tracker.main(['--once']))"  # as your own source starts it
    environment = os.environ | {"COIN_API_KEY": KEY, "COIN_API_URL": coin_api.url, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: coin_api.requests)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == -signal.SIGINT
