"""tracker: the poll loop by a fake clock, and the command line."""

import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from running import ASSETS, ROOT, Tracker
from stand_in import KEY, RATES, StandIn
from websockets.sync.client import connect

import tracker
from coin_api import CoinApiError, PriceUpdate
from tracker import Poller, main


class FakeServer:
    """What the poller needs of a PriceServer."""

    def __init__(self) -> None:
        self.assets = ("BTC", "ETH")
        self.clients: list[object] = []
        self.paused = False
        self.credits_used: int | None = None
        self.credits_left: int | None = None
        self.published: list[list[PriceUpdate]] = []
        self.failures: list[str] = []
        self.publish: Callable[[list[PriceUpdate]], None] = self.published.append
        self.report_failure = self.failures.append


class FakeTime:
    """A clock, and the event that the poller waits on: waiting is what makes the time pass."""

    def __init__(self, until: float):
        self.now = 1000.0
        self.until = 1000.0 + until
        self.poller: Poller | None = None

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.until and self.poller:
            self.poller.stop()

    def clear(self) -> None: ...

    def set(self) -> None: ...


Outcome = float | Exception | list[PriceUpdate]
GOOD = [PriceUpdate("BTC", 1.0, "t"), PriceUpdate("ETH", 2.0, "t")]


class FakeSource:
    """Answers each poll with the next outcome: prices, an exception, or seconds that good prices take."""

    credits_used = 17
    credits_left = -4

    def __init__(self, time: FakeTime, outcomes: list[Outcome]):
        self.time = time
        self.outcomes = outcomes
        self.polls: list[float] = []  # seconds after the start

    def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
        self.polls.append(round(self.time.now - 1000, 3))
        outcome = self.outcomes.pop(0) if self.outcomes else GOOD
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, float):
            self.time.now += outcome
            return GOOD
        return outcome


def run(outcomes: list[Outcome], until: float, interval: float = 5.0) -> tuple[FakeSource, FakeServer, Poller]:
    time = FakeTime(until)
    source, server = FakeSource(time, outcomes), FakeServer()
    poller = time.poller = Poller(source, server, interval, clock=time, wake=time)  # type: ignore[arg-type]
    poller.run()
    return source, server, poller


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker.random, "uniform", lambda low, high: (low + high) / 2)


def test_polls_start_one_interval_apart_however_long_they_take() -> None:
    source, server, _ = run([0.0, 1.5, 4.9], until=21)
    assert source.polls == [0, 5, 10, 15, 20]
    assert len(server.published) == 5


def test_a_late_poll_is_not_made_up_for() -> None:
    assert run([7.0, 0.1, 12.0], until=40)[0].polls == [0, 10, 15, 30, 35, 40]


def test_a_machine_that_slept_for_an_hour_polls_once() -> None:
    assert run([0.0, 3600.0], until=3611)[0].polls == [0, 5, 3605, 3610]


def test_a_failure_is_tried_again_after_1_2_4_intervals_and_at_most_a_minute() -> None:
    failures: list[Outcome] = [CoinApiError("timed out") for _ in range(7)]
    source, server, _ = run(failures, until=224)
    assert source.polls == [0, 5, 15, 35, 75, 135, 195]
    assert server.failures == ["timed out"] * 7
    assert server.published == []


def test_ten_thousand_failures_do_not_overflow_the_backoff() -> None:
    assert len(run([CoinApiError("x") for _ in range(10_000)], until=599_000)[0].polls) > 9_900


def test_the_backoff_is_spread_by_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker.random, "uniform", lambda low, high: high if (low, high) == (0.9, 1.1) else 0.0)
    assert run([CoinApiError("x"), CoinApiError("x")], until=17)[0].polls == [0, 5.5, 16.5]


def test_after_a_failure_polls_go_on_one_interval_apart() -> None:
    assert run([GOOD, CoinApiError("x"), CoinApiError("x")], until=31)[0].polls == [0, 5, 10, 20, 25, 30]


def test_a_failed_poll_that_took_long_is_not_followed_by_a_storm() -> None:
    time = FakeTime(31)
    source, server = FakeSource(time, []), FakeServer()

    def fetch(asset_ids: object) -> list[PriceUpdate]:
        source.polls.append(time.now - 1000)
        time.now += 13
        raise CoinApiError("timed out")

    source.fetch_prices = fetch  # type: ignore[method-assign]
    time.poller = Poller(source, server, 5.0, clock=time, wake=time)  # type: ignore[arg-type]
    time.poller.run()
    assert source.polls == [0, 15, 30]


@pytest.mark.parametrize(("asked", "waited"), [(30.0, 30), (900.0, 900), (0.0, 5), (2.0, 5)])
def test_retry_after_is_waited_for_but_never_less_than_an_interval(asked: float, waited: float) -> None:
    assert run([CoinApiError("429", retry_after=asked)], until=waited)[0].polls == [0, waited]


def test_an_outage_is_one_warning_and_one_info_with_its_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run([GOOD, *[CoinApiError("CoinAPI answered 503: busy") for _ in range(3)]], until=50)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no prices: CoinAPI answered 503: busy; next try in 5 s"),
        ("INFO", "prices again after 35 s, failed polls: 3"),
    ]


def test_another_cause_is_another_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run([CoinApiError("timed out"), CoinApiError("CoinAPI answered 403: no credits")], until=14)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "no prices: timed out",
        "no prices: CoinAPI answered 403: no credits",
    ]


def test_a_key_refused_on_the_first_poll_ends_the_loop() -> None:
    source, _, poller = run([CoinApiError("CoinAPI refused the key (401)", key_refused=True)], until=60)
    assert source.polls == [0]
    assert poller.key_refused


def test_a_key_refused_later_is_tried_again() -> None:
    source, server, poller = run([GOOD, CoinApiError("CoinAPI refused the key (401)", key_refused=True)], until=11)
    assert source.polls == [0, 5, 10]
    assert len(server.published) == 2
    assert not poller.key_refused


@pytest.mark.parametrize("error", [ValueError("surprise"), MemoryError(), RecursionError("deep"), KeyError("rates")])
def test_no_exception_ends_the_poll_loop(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, _, _ = run([error], until=6)
    assert source.polls == [0, 5]
    assert caplog.messages[0].startswith(f"no prices: unexpected {type(error).__name__}")
    assert not any(record.exc_info for record in caplog.records)


def test_an_asset_without_a_price_is_named_once_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    _, server, _ = run([GOOD, GOOD[:1], GOOD[:1], GOOD, GOOD[1:]], until=20)
    assert caplog.messages == [
        "no sound price for ETH in the answer: clients keep the last one",
        "ETH has a price again",
        "no sound price for BTC in the answer: clients keep the last one",
    ]
    assert server.published == [GOOD, GOOD[:1], GOOD[:1], GOOD, GOOD[1:]]


def test_the_server_learns_of_the_credits() -> None:
    _, server, _ = run([CoinApiError("x")], until=1)
    assert (server.credits_used, server.credits_left) == (17, -4)


def test_a_source_of_ones_own_needs_fetch_prices_only() -> None:
    time, server = FakeTime(6), FakeServer()

    class Own:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            return GOOD

    time.poller = Poller(Own(), server, 5.0, clock=time, wake=time)  # type: ignore[arg-type]
    time.poller.run()
    assert server.published == [GOOD, GOOD]


class IdleTime(FakeTime):
    """A wait without a timeout is the pause: a client comes 100 s later."""

    def __init__(self, until: float, server: FakeServer):
        super().__init__(until)
        self.server = server
        self.paused: list[bool] = []

    def wait(self, seconds: float | None = None) -> None:
        if seconds is None:
            self.paused.append(self.server.paused)
            seconds = 100.0
            self.server.clients.append(object())
        super().wait(seconds)


def test_an_idle_poller_pauses_and_polls_at_once_when_a_client_comes() -> None:
    server = FakeServer()
    time = IdleTime(108, server)
    source = FakeSource(time, [])
    time.poller = Poller(source, server, 5.0, pause_when_idle=True, clock=time, wake=time)  # type: ignore[arg-type]
    time.poller.run()
    assert source.polls == [100, 105]
    assert time.paused == [True]
    assert server.paused is False


def test_a_pause_does_not_shorten_a_backoff() -> None:
    server = FakeServer()
    server.clients.append(object())
    time = IdleTime(1100, server)
    source = FakeSource(time, [CoinApiError("429", retry_after=900.0)])
    time.poller = Poller(source, server, 5.0, pause_when_idle=True, clock=time, wake=time)  # type: ignore[arg-type]
    server.report_failure = lambda reason: server.clients.clear()  # type: ignore[assignment]
    time.poller.run()
    assert source.polls[:2] == [0, 1000]


# The command line. Each kind of wrong use: its exit status, and one plain line.


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        status = main(("--once", *arguments))  # so that what is accepted ends all the same
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[
            (("--interval", bad), f"{bad!r} is not a number of seconds from 0.1 to 86,400")
            for bad in ("0", "-1", "NaN", "soon")
        ],
        *[(("--interval", bad), "is not a number of seconds") for bad in ("inf", "1e9", "", "0.05")],
        *[
            (("--assets", bad), "is not an asset id like BTC")
            for bad in ("", ",", "BTC,,ETH", "B C", "BTC;ETH", "ß", "A" * 33)
        ],
        *[
            (("--assets", bad), "is not an asset id like BTC")
            for bad in ("..", "BTC/USD", "BTC?x=1", "BTC\nETH", "бтц")
        ],
        *[(("--quote", bad), "is not an asset id like BTC") for bad in ("", "US D", "../x", "USD,EUR")],
        *[(("--port", bad), "is not a port from 0 to 65,535") for bad in ("-1", "65536", "http", "1.5")],
        *[(("--max-clients", bad), "is not a number of clients") for bad in ("0", "-5", "many")],
        *[(("--allow-origin", bad), "is not an origin like") for bad in ("example.org", "https://a/b", "*", "")],
        (("--log-level", "loud"), "invalid choice: 'loud'"),
        (("--host", ""), "--host"),
        (("--wat",), "unrecognized arguments: --wat"),
        (("--int", "5"), "unrecognized arguments"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert said in usage_error(capsys, "--demo", *arguments)


def test_no_key_says_what_to_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "  "):
        monkeypatch.setenv("COIN_API_KEY", value)
        line = usage_error(capsys)
        assert "COIN_API_KEY" in line
        assert "--demo" in line


def test_http_to_another_machine_is_wrong_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COIN_API_KEY", KEY)
    monkeypatch.setenv("COIN_API_URL", "http://example.org")
    line = usage_error(capsys)
    assert "'http://example.org'" in line
    assert "https" in line
    assert KEY not in line


def test_a_key_that_no_header_can_carry_is_wrong_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COIN_API_KEY", "my secret")
    assert "secret" not in usage_error(capsys)


def test_asset_ids_are_upper_cased_and_taken_once() -> None:
    options = tracker.parse_arguments(["--assets", "btc, Eth,BTC,usdt_x", "--quote", "eur"])
    assert options.assets == ("BTC", "ETH", "USDT_X")
    assert options.quote == "EUR"


def test_the_defaults_are_ten_assets_in_usd_every_5_s_on_port_3030() -> None:
    options = tracker.parse_arguments([])
    assert options.assets == ASSETS
    assert (options.quote, options.interval, options.host, options.port) == ("USD", 5.0, "127.0.0.1", 3030)
    assert (options.max_clients, options.log_level, options.demo) == (10_000, "info", False)


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, which must come by itself."""
    command = [sys.executable, str(ROOT / "tracker.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


def test_a_port_that_is_taken_is_exit_1_and_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start("--demo", "--port", str(port))
    assert done.returncode == 1
    assert (
        done.stderr
        == f"tracker.py: cannot listen on 127.0.0.1 port {port}: Address already in use; choose with --host, --port\n"
    )


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1", "x" * 70])
def test_a_host_that_cannot_be_had_is_exit_1_and_one_line(host: str) -> None:
    done = start("--demo", "--host", host)
    assert done.returncode == 1
    assert re.fullmatch(rf"tracker.py: cannot listen on {host} port 3030: .+\n", done.stderr)


def test_a_key_refused_on_the_first_poll_is_exit_1(coin_api: StandIn) -> None:
    coin_api.say(b'{"error":"Invalid API key"}', status=401)
    done = start("--port", "0", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "tracker.py: CoinAPI refused the key (401): Invalid API key: check COIN_API_KEY"
    )
    assert "Traceback" not in done.stderr
    assert len(coin_api.requests) == 1


def test_once_prints_one_json_message_a_line(coin_api: StandIn) -> None:
    done = start("--once", "--assets", "xlm,btc", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"asset_id": "XLM", "price": 0.0934, "time": "2021-10-20T21:34:13.0000000Z"},
        {"asset_id": "BTC", "price": 65980.1, "time": "2021-10-20T21:34:13.0000000Z"},
    ]
    assert len(coin_api.requests) == 1


def test_once_without_an_answer_is_exit_1_with_the_reason(coin_api: StandIn) -> None:
    coin_api.say(b"", status=503)
    done = start("--once", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "tracker.py: CoinAPI answered 503\n")


def test_once_with_an_error_of_the_source_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            raise KeyError("rates")

    assert tracker.poll_once(Broken(), ("BTC",)) == 1
    assert capsys.readouterr().err == "tracker.py: unexpected KeyError: 'rates'\n"


def test_all_addresses_are_said_to_be_open() -> None:
    with Tracker("--demo", "--host", "0.0.0.0") as running:
        assert running.find(rf"ws://127.0.0.1:{running.port}/ws, on all addresses of this machine")


def test_once_names_an_asset_that_has_no_price(coin_api: StandIn) -> None:
    done = start("--once", "--assets", "BTC,NOPE", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert "NOPE" in done.stderr


def test_once_into_a_pipe_that_is_closed_is_no_traceback() -> None:
    command = f'"{sys.executable}" "{ROOT / "tracker.py"}" --demo --once | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert done.stderr == ""


def test_the_start_up_lines_name_the_addresses_and_what_the_interval_costs(coin_api: StandIn) -> None:
    with Tracker("--assets", "BTC,ETH", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as running:
        first = running.wait_for_log("dashboard")
        assert first.string.endswith(
            f"dashboard http://127.0.0.1:{running.port}/ and WebSocket ws://127.0.0.1:{running.port}/ws"
        )
        assert running.wait_for_log("tracking BTC, ETH in USD: 1 request every 5 s, 17,280 a day")


def test_demo_prices_are_labelled_and_never_a_silent_fallback() -> None:
    with Tracker("--demo", COIN_API_KEY=KEY) as running:
        running.wait_for_log("DEMO, simulated prices")
        with connect(running.ws) as client:
            assert json.loads(client.recv(5))["asset_id"] == "BTC"


def test_ipv6_addresses_are_bound_and_written_in_brackets() -> None:
    with Tracker("--demo", "--host", "::1") as running:
        assert running.find(rf"ws://\[::1\]:{running.port}/ws")
        with connect(f"ws://[::1]:{running.port}/ws") as client:
            assert json.loads(client.recv(5))["asset_id"] == "BTC"


def test_the_number_of_clients_is_lowered_to_the_files_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    resource: Any = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    raised: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: raised.append(limits))
    assert tracker._fit_file_limit(10_000) == 4046
    assert tracker._fit_file_limit(4_000) == 4_000
    assert raised == [(4096, 4096)] * 2


def test_all_rates_of_the_stand_in_are_the_default_assets() -> None:
    assert set(RATES) == set(ASSETS)
