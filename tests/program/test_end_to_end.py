"""The whole program as users run it: CoinAPI's stand-in on one side, independent clients on the other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from raw import request, visit
from running import ASSETS, ROOT, Tracker, wait_for
from stand_in import KEY, RATES, StandIn, rates_body
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

AT = "2021-10-20T21:34:13.0000000Z"


def tracking(coin_api: StandIn, *arguments: str) -> Tracker:
    return Tracker(*arguments, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)


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
    for number, asked in enumerate(coin_api.requests):  # late on a busy machine, but never early
        assert asked.at - started > number * 1.0
        assert asked.path == "/v1/exchangerate/USD"
        assert asked.query == {"filter_asset_id": [",".join(ASSETS)], "invert": ["true"]}
        assert asked.headers["X-CoinAPI-Key"] == KEY
    assert KEY not in tracker.text


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + rates_body(RATES)[:300])
    handler.close_connection = True


def test_the_feed_goes_on_as_soon_as_a_trouble_is_over(coin_api: StandIn) -> None:
    troubles: list[tuple[Callable[[BaseHTTPRequestHandler], None], str]] = [
        (lambda handler: coin_api.send(handler, b'{"error":"Invalid API key"}', 401), "refused the key"),
        (lambda handler: coin_api.send(handler, b"<h1>Bad\ngateway</h1>", 502), "answered 502: <h1>Bad gateway</h1>"),
        (cut_off, "no response from CoinAPI"),
    ]
    with tracking(coin_api, "--interval", "0.2") as tracker, feed(tracker) as client:
        poll_of(client)
        for trouble, said in troubles:
            lines = len(tracker.log)
            coin_api.answer = trouble
            tracker.wait_for_log(said)
            coin_api.rates["BTC"] += 1.0
            coin_api.recover()
            while json.loads(client.recv(5)) != {"asset_id": "BTC", "price": coin_api.rates["BTC"], "time": AT}:
                pass
            wait_for(partial(lambda lines: any("prices again" in line for line in tracker.log[lines:]), lines))
            assert [line.split()[1] for line in tracker.log[lines:]] == ["WARNING", "NOTICE"], tracker.log[lines:]
        assert "Traceback" not in tracker.text


def test_pause_when_idle_polls_only_while_somebody_listens(coin_api: StandIn) -> None:
    with tracking(coin_api, "--interval", "0.2", "--pause-when-idle") as tracker:
        health = requests.get(tracker.http + "/healthz", timeout=5)
        assert (health.status_code, health.json()["status"]) == (200, "paused")
        for _ in range(2):
            coin_api.requests.clear()
            with feed(tracker) as client:
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
        assert time.monotonic() - started < 5
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
    assert time.monotonic() - started < 3.9
    assert [line.split(" ", 1)[1] for line in tracker.log] == ["INFO stopping, clients connected: 0", "INFO stopped"]


def test_a_second_signal_ends_the_program_at_once(coin_api: StandIn) -> None:
    with tracking(coin_api) as tracker, visit(tracker.port, request()) as silent:
        assert silent.recv(100).startswith(b"HTTP/1.1 101")
        tracker.process.send_signal(signal.SIGTERM)  # it waits a second for the close that never comes
        tracker.wait_for_log("stopping")
        assert tracker.stop(signal.SIGINT) == -signal.SIGINT


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


# Signals


def test_control_c_while_the_program_loads_prints_no_traceback(tmp_path: Path) -> None:
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
