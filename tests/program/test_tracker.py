"""tracker: the poll loop by a fake clock, the command line, and what main hands on."""

import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ASSETS, ROOT
from stand_in import KEY, RATES, StandIn

import service
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
        self.poll_seconds: float | None = None
        self.published: list[list[PriceUpdate]] = []
        self.failures: list[str] = []
        self.publish: Callable[[list[PriceUpdate]], None] = self.published.append
        self.report_failure = self.failures.append


class FakeTime:
    """A clock, and the event that the poller waits on: waiting is what makes the time pass.

    clients_at: seconds after the start at which a client comes, which sets the event.
    """

    def __init__(self, until: float, clients_at: tuple[float, ...] = ()):
        self.now = 1000.0
        self.until = 1000.0 + until
        self.clients_at = [1000 + at for at in clients_at]
        self.poller: Poller | None = None
        self.was_set = False
        self.waits = 0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits += 1
        assert self.waits < 100_000, "it spins"
        if self.was_set:
            return
        assert seconds > 0
        end = self.now + seconds
        if self.clients_at and self.clients_at[0] <= end:
            self.now = max(self.now, self.clients_at.pop(0))
            self.set()
        else:
            self.now = end
        if self.now > self.until and self.poller:
            self.poller.stop()

    def clear(self) -> None:
        self.was_set = False

    def set(self) -> None:
        self.was_set = True


Outcome = float | BaseException | list[PriceUpdate]
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
        if isinstance(outcome, BaseException):
            raise outcome
        if isinstance(outcome, float):
            self.time.now += outcome
            return GOOD
        return outcome


def poller_of(time: FakeTime, source: object, server: FakeServer, interval: float = 5.0, **options: Any) -> Poller:
    time.poller = Poller(source, server, interval, clock=time, wake=time, **options)  # type: ignore[arg-type]
    return time.poller


def run(outcomes: list[Outcome], until: float, interval: float = 5.0) -> tuple[FakeSource, FakeServer, Poller]:
    time = FakeTime(until)
    source, server = FakeSource(time, outcomes), FakeServer()
    poller = poller_of(time, source, server, interval)
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


@pytest.mark.parametrize(
    ("interval", "polls"),
    [
        (1.0, [0, 1, 3, 7, 15, 30, 45]),
        (5.0, [0, 5, 15, 30, 45, 60]),
        (60.0, [0, 60, 120, 180]),  # longer than 15 s: once an interval
    ],
)
def test_a_failure_is_tried_again_after_1_2_4_intervals_and_at_most_15_s(interval: float, polls: list[float]) -> None:
    failures: list[Outcome] = [CoinApiError("timed out") for _ in range(7)]
    source, server, _ = run(failures, until=polls[-1], interval=interval)
    assert source.polls == polls
    assert server.failures == ["timed out"] * len(polls)
    assert server.published == []


def test_ten_thousand_failures_do_not_overflow_the_backoff() -> None:
    assert len(run([CoinApiError("x") for _ in range(10_000)], until=149_000)[0].polls) > 9_900


def test_the_backoff_is_spread_by_a_tenth_also_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker.random, "uniform", lambda low, high: high if (low, high) == (0.9, 1.1) else 0.0)
    assert run([CoinApiError("x")] * 3, until=33)[0].polls == [0, 5.5, 16.5, 33]


def test_after_a_failure_polls_go_on_one_interval_apart() -> None:
    assert run([GOOD, CoinApiError("x"), CoinApiError("x")], until=31)[0].polls == [0, 5, 10, 20, 25, 30]


def test_the_next_trouble_begins_with_the_shortest_backoff_and_prices_are_told_once_to_be_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    failure = CoinApiError("x")
    assert run([failure, failure, GOOD, GOOD, failure], until=35)[0].polls == [0, 5, 15, 20, 25, 30, 35]
    assert [message for message in caplog.messages if message.startswith("prices again")] == [
        "prices again after 15 s, failed polls: 2",
        "prices again after 5 s, failed polls: 1",
    ]


def test_a_failed_poll_that_took_long_is_not_followed_by_a_storm() -> None:
    time = FakeTime(31)
    source, server = FakeSource(time, []), FakeServer()

    def fetch(asset_ids: object) -> list[PriceUpdate]:
        source.polls.append(time.now - 1000)
        time.now += 13
        raise CoinApiError("timed out")

    source.fetch_prices = fetch  # type: ignore[method-assign]
    poller_of(time, source, server).run()
    assert source.polls == [0, 15, 30]
    assert server.poll_seconds == 13


@pytest.mark.parametrize(
    ("asked", "interval", "waited"),
    [
        (30.0, 5, 30),
        (900.0, 5, 900),
        (0.0, 5, 5),
        (2.0, 5, 5),
        (30.0, 3600, 3600),
        # Of a source of one's own.
        (1e9, 5, 900),
        (float("inf"), 5, 900),
        (float("nan"), 5, 5),
        (-1.0, 5, 5),
    ],
)
def test_retry_after_is_waited_for_from_an_interval_to_15_minutes(asked: float, interval: int, waited: float) -> None:
    assert run([CoinApiError("429", retry_after=asked)], until=waited, interval=interval)[0].polls == [0, waited]


def test_an_outage_is_one_warning_and_one_info_with_its_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run([GOOD, *[CoinApiError("CoinAPI answered 503: busy") for _ in range(3)]], until=36)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no prices: CoinAPI answered 503: busy; next try in 5 s"),
        ("INFO", "prices again after 30 s, failed polls: 3"),
    ]


def test_the_same_cause_is_a_warning_again_in_the_next_outage(caplog: pytest.LogCaptureFixture) -> None:
    run([CoinApiError("timed out"), GOOD, CoinApiError("timed out")], until=14)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_the_same_cause_with_other_words_behind_its_colon_is_no_other_warning(caplog: pytest.LogCaptureFixture) -> None:
    run([CoinApiError(f"CoinAPI answered 503: request {number}") for number in range(3)], until=14)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


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


@pytest.mark.parametrize(
    "error", [ValueError("surprise"), MemoryError(), RecursionError("deep"), KeyError("rates"), SystemExit("bye")]
)
def test_no_exception_ends_the_poll_loop(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, _, _ = run([error], until=6)
    assert source.polls == [0, 5]
    assert caplog.messages[0].startswith(f"no prices: unexpected {type(error).__name__}")
    assert not any(record.exc_info for record in caplog.records)


def test_an_error_of_ones_own_source_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    _, server, _ = run([CoinApiError("no\nluck\x1b[31m " + "x" * 1_000_000), OSError("a\nb")], until=6)
    assert server.failures[0].startswith("no luck [31m xxx")
    assert len(server.failures[0]) < 300
    assert server.failures[1] == "unexpected OSError: a b"
    assert [len(message.splitlines()) for message in caplog.messages] == [1, 1]


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


def test_a_source_of_ones_own_may_yield_its_prices() -> None:
    time, server = FakeTime(6), FakeServer()

    class Own:
        def fetch_prices(self, asset_ids: object) -> Iterator[PriceUpdate]:
            yield from GOOD

    poller_of(time, Own(), server).run()
    assert server.published == [GOOD, GOOD]


def test_a_source_of_ones_own_needs_fetch_prices_only() -> None:
    time, server = FakeTime(6), FakeServer()

    class Own:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            return GOOD

    poller_of(time, Own(), server).run()
    assert server.published == [GOOD, GOOD]


@pytest.mark.parametrize(("outcome", "seconds"), [(1.5, 1.5), (CoinApiError("x"), 0.0)])
def test_the_server_learns_how_long_the_last_poll_took(outcome: Outcome, seconds: float) -> None:
    assert run([outcome], until=1)[1].poll_seconds == seconds


def test_clients_that_come_bring_no_poll_forward_and_nothing_spins() -> None:
    time = FakeTime(16, clients_at=(1, 2, 2, 2, 7, 14))
    source = FakeSource(time, [])
    poller_of(time, source, FakeServer()).run()
    assert source.polls == [0, 5, 10, 15]
    assert time.waits < 20


def test_there_is_no_poll_behind_the_stop() -> None:
    class StoppedTime(FakeTime):
        def wait(self, seconds: float) -> None:
            self.now += 3  # before the next poll
            assert self.poller
            self.poller.stop()

    time = StoppedTime(100)
    source = FakeSource(time, [])
    poller = poller_of(time, source, FakeServer())
    poller.run()
    assert (source.polls, time.now) == ([0], 1003)
    poller.run()
    assert source.polls == [0]


@pytest.mark.parametrize(
    ("outcome", "said"), [(0.0, 1), (CoinApiError("x"), 1), (CoinApiError("x", key_refused=True), 0)]
)
def test_it_is_ready_once_behind_the_first_poll_unless_the_key_is_refused(outcome: Outcome, said: int) -> None:
    time, ready = FakeTime(21), list[float]()
    poller_of(time, FakeSource(time, [outcome]), FakeServer(), ready=lambda: ready.append(time.now)).run()
    assert ready == [1000.0] * said


# Pausing


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
    source, ready = FakeSource(time, []), list[float]()
    poller_of(time, source, server, pause_when_idle=True, ready=lambda: ready.append(time.now)).run()
    assert source.polls == [100, 105]
    assert time.paused == [True]
    assert server.paused is False
    assert ready[0] == 1000


def test_a_pause_does_not_shorten_a_backoff() -> None:
    server = FakeServer()
    server.clients.append(object())
    time = IdleTime(1100, server)
    source = FakeSource(time, [CoinApiError("429", retry_after=900.0)])
    server.report_failure = lambda reason: server.clients.clear()  # type: ignore[assignment]
    poller_of(time, source, server, pause_when_idle=True).run()
    assert source.polls[:2] == [0, 1000]


def test_a_pause_ends_with_the_stop() -> None:
    server = FakeServer()
    poller = Poller(FakeSource(FakeTime(1), []), server, 5.0, True, wake=threading.Event())  # type: ignore[arg-type]
    thread = threading.Thread(target=poller.run, daemon=True)
    thread.start()
    poller.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert server.published == []


# The command line. Each kind of wrong use: its exit status, and one plain line.

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d "  # how a line of the log begins


class Done:
    """What came of main: its status, and what it wrote."""

    def __init__(self, status: int, out: str, err: str):
        self.status = status
        self.out = out.splitlines()
        lines = [re.fullmatch(rf"{LINE}(.*)", line) for line in err.splitlines()]
        assert all(lines), err
        self.log = [line[1] for line in lines if line]


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Done]]:
    """Calls main in this process; keywords are its environment."""
    handlers = {number: signal.getsignal(number) for number in service.SIGNALS}
    monkeypatch.setattr(service, "FLUSH_TIMEOUT", 10.0)  # whatever else this machine does
    for name in ("COIN_API_KEY", "COIN_API_URL", "NOTIFY_SOCKET", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)

    def run_it(*arguments: str, source: Any = None, **environment: str) -> Done:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        try:
            status = main(arguments, source)
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Done(status, *capfd.readouterr())

    yield run_it
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[
            (("--interval", bad), f"{bad!r} is not a number of seconds from 0.1 to 86,400")
            for bad in ("0", "-1", "NaN", "soon", "1e9", "", "0.05")
        ],
        *[
            (("--assets", bad), "is not an asset id like BTC")
            for bad in ("", "BTC,,ETH", "B C", "BTC;ETH", "ß", "A" * 33, "..", "BTC/USD", "BTC?x=1", "BTC\nETH", "бтц")
        ],
        *[(("--quote", bad), "is not an asset id like BTC") for bad in ("", "US D", "../x", "USD,EUR")],
        *[(("--port", bad), "is not a port from 0 to 65,535") for bad in ("-1", "65536", "http", "1.5")],
        *[(("--max-clients", bad), "is not a number of clients from 1 to 1,000,000") for bad in ("0", "1000001", "x")],
        *[(("--allow-origin", bad), "is not an origin like") for bad in ("example.org", "https://a/b", "*", "")],
        *[(("--host", bad), f"{bad!r} is no address") for bad in ("", " ", "ö" * 70, "x" * 70, "a..b", "\udcff")],
        (("--history", ""), "'' is no file name"),
        (("--history", "prices.db", "--once"), "--history: --once keeps no prices"),
        (("--log-level", "loud"), "invalid choice: 'loud'"),
        (("--wat\nline",), "unrecognized arguments: --wat line"),
        (("--int", "5"), "unrecognized arguments"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    run_main: Callable[..., Done], arguments: tuple[str, ...], said: str
) -> None:
    done = run_main("--demo", *arguments)
    assert done.status == 2
    assert len(done.log) == 1
    assert done.log[0].startswith("ERROR ")
    assert said in done.log[0]
    assert done.log[0].endswith("(see --help)")


@pytest.mark.parametrize("key", ["", "  "])
def test_no_key_says_what_to_set(run_main: Callable[..., Done], key: str) -> None:
    done = run_main(COIN_API_KEY=key)
    assert done.status == 2
    assert done.log == [
        "ERROR COIN_API_KEY is not set: set it to your key from CoinAPI, or try --demo, which needs none"
    ]


def test_http_to_another_machine_is_wrong_use(run_main: Callable[..., Done]) -> None:
    done = run_main(COIN_API_KEY=KEY, COIN_API_URL="http://example.org")
    assert done.status == 2
    (line,) = done.log
    assert "'http://example.org'" in line
    assert "use https" in line
    assert KEY not in line


def test_a_key_that_no_header_can_carry_is_wrong_use(run_main: Callable[..., Done]) -> None:
    done = run_main(COIN_API_KEY="my secret")
    assert done.status == 2
    assert "secret" not in done.log[0]


def test_asset_ids_are_upper_cased_and_taken_once() -> None:
    options = tracker.parse_arguments(["--assets", "btc, Eth,BTC,usdt_x", "--quote", "eur"])
    assert options.assets == ("BTC", "ETH", "USDT_X")
    assert options.quote == "EUR"


def test_pages_that_have_no_origin_can_be_allowed_too() -> None:
    assert tracker.parse_arguments(["--allow-origin", "null"]).allow_origin == ["null"]


def test_the_defaults_are_ten_assets_in_usd_every_5_s_on_port_3030() -> None:
    options = tracker.parse_arguments([])
    assert options.assets == ASSETS
    assert (options.quote, options.interval, options.host, options.port) == ("USD", 5.0, "127.0.0.1", 3030)
    assert (options.max_clients, options.log_level, options.demo) == (10_000, "info", False)
    assert (options.history, options.once, options.pause_when_idle, options.allow_origin) == (None, False, False, [])


def test_help_names_the_environment_every_range_and_every_exit_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        tracker.parse_arguments(["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("COIN_API_KEY", "COIN_API_URL", "0.1 to 86,400", "0 to 65,535", "1 to 1,000,000", "https://rest.coin"):
        assert part in said
    for status in ("0 stopped by a signal", "1 could not start", "2 needs somebody"):
        assert status in said


# What main hands on


class FakePriceServer(FakeServer):
    """Ends as soon as it has a poll's prices, so that main ends too; keeps what it was made with."""

    made: "list[FakePriceServer]" = []  # noqa: RUF012
    port = 4711
    last_error: str | None = None
    client_came = threading.Event()
    own_files, spare_visitors = 20, 30
    files_asked: "list[int]" = []  # noqa: RUF012

    def __init__(self, assets: tuple[str, ...], host: str, port: int, **options: object):
        super().__init__()
        self.assets = assets  # type: ignore[assignment]
        self.options = options | {"host": host, "port": port}
        self.state = "before"
        self.calls: list[object] = []
        self.publish = self.end
        self.report_failure = self.end  # type: ignore[assignment]
        self.made.append(self)

    def end(self, what: object) -> None:
        self.last_error = what if isinstance(what, str) else None
        self.state = "ended"

    def run_forever(self, threaded: bool) -> None:
        self.state = "running"
        self.calls.append(threaded)

    def shutdown_gracefully(self, status: int, reason: bytes) -> None:
        self.calls.append((status, reason))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakePriceServer]:
    """The servers that main made, in place of real ones."""
    FakePriceServer.made.clear()
    FakePriceServer.files_asked.clear()
    monkeypatch.setattr(tracker, "PriceServer", FakePriceServer)
    monkeypatch.setattr(service, "raise_file_limit", FakePriceServer.files_asked.append)
    return FakePriceServer.made


def test_every_flag_reaches_the_server(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    flags = "--demo --assets sol,btc --quote eur --interval 7.5 --host 127.0.0.2 --port 3031 --max-clients 99 "
    flags += "--allow-origin https://a.example --allow-origin https://b.example --history x.db --pause-when-idle"
    run_main(*flags.replace("--pause-when-idle", "").split())
    (server,) = made
    assert server.assets == ("SOL", "BTC")
    expected = {"host": "127.0.0.2", "port": 3031, "quote": "EUR", "source": "demo", "interval": 7.5, "max_clients": 99}
    expected |= {"allow_origins": ["https://a.example", "https://b.example"], "history_file": "x.db"}
    assert server.options == expected | {"pause_when_idle": False}
    assert server.calls == [True, (1001, b"server is stopping")]
    assert server.files_asked == [149], "before the server is made, which fits its clients into them"


def test_without_flags_the_server_gets_the_defaults(
    run_main: Callable[..., Done], made: list[FakePriceServer], coin_api: StandIn
) -> None:
    run_main(COIN_API_KEY=f" {KEY} ", COIN_API_URL=coin_api.url)
    expected = {"host": "127.0.0.1", "port": 3030, "quote": "USD", "source": "coinapi", "interval": 5.0}
    expected |= {"max_clients": 10_000, "allow_origins": [], "history_file": None, "pause_when_idle": False}
    assert made[0].options == expected
    assert coin_api.requests[0].headers["X-CoinAPI-Key"] == KEY


def test_a_source_of_ones_own_is_asked_and_named_in_place_of_coinapi(
    run_main: Callable[..., Done], made: list[FakePriceServer]
) -> None:
    class Own:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            return GOOD

    assert "tracking BTC" in run_main("--assets", "BTC", source=Own()).log[1]
    assert made[0].options["source"] == "Own"
    run_main("--demo", source=Own())
    assert made[1].options["source"] == "demo"


@pytest.mark.parametrize("pause", [True, False])
def test_quote_interval_and_pause_reach_the_poller_and_coinapi(
    run_main: Callable[..., Done], made: list[FakePriceServer], monkeypatch: pytest.MonkeyPatch, pause: bool
) -> None:
    asked: list[object] = []

    class FakeApi:
        name = "coinapi"

        def __init__(self, *arguments: object):
            asked.extend(arguments)

        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            return GOOD

    class WatchedPoller(Poller):
        def run(self) -> None:
            asked.extend([self.interval, self.pause_when_idle, self.server])
            self.pause_when_idle = False
            super().run()

    monkeypatch.setattr(tracker, "CoinApi", FakeApi)
    monkeypatch.setattr(tracker, "Poller", WatchedPoller)
    flags = ["--quote", "eur", "--interval", "9", *(["--pause-when-idle"] if pause else [])]
    run_main(*flags, COIN_API_KEY=KEY, COIN_API_URL="")  # an empty one is none
    assert asked == [KEY, "EUR", "https://rest.coinapi.io", 9.0, pause, made[0]]
    assert made[0].options["pause_when_idle"] is pause


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ("--assets", "BTC,ETH"),
            [
                "dashboard http://127.0.0.1:4711/ and WebSocket ws://127.0.0.1:4711/ws",
                "tracking BTC, ETH in USD: 1 request every 5 s, 17,280 a day",
            ],
        ),
        (
            ("--host", "::1", "--assets", "BTC", "--interval", "0.5", "--quote", "eur", "--pause-when-idle"),
            [
                "dashboard http://[::1]:4711/ and WebSocket ws://[::1]:4711/ws",
                "tracking BTC in EUR: 1 request every 0.5 s, 172,800 a day at the most",
            ],
        ),
        (
            ("--host", "0.0.0.0", "--demo", "--assets", "BTC"),
            [
                "dashboard http://127.0.0.1:4711/ and WebSocket ws://127.0.0.1:4711/ws, on all addresses of this "
                "machine",
                "DEMO, simulated prices: BTC in USD every 5 s",
            ],
        ),
        (
            ("--host", "::", "--demo", "--assets", "BTC"),
            [
                "dashboard http://[::1]:4711/ and WebSocket ws://[::1]:4711/ws, on all addresses of this machine",
                "DEMO, simulated prices: BTC in USD every 5 s",
            ],
        ),
    ],
)
def test_the_start_up_lines_name_the_addresses_and_what_the_interval_costs(
    run_main: Callable[..., Done],
    made: list[FakePriceServer],
    coin_api: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    lines: list[str],
) -> None:
    monkeypatch.setattr(FakePriceServer, "run_forever", lambda server, threaded: server.end(None))
    done = run_main(*flags, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.log[:2] == [f"INFO {line}" for line in lines]


def test_a_busy_thread_cannot_keep_the_interpreter_from_the_sending_one(
    run_main: Callable[..., Done], made: list[FakePriceServer]
) -> None:
    before = sys.getswitchinterval()
    try:
        run_main("--demo")
        assert sys.getswitchinterval() == pytest.approx(0.0002)
    finally:
        sys.setswitchinterval(before)


def test_the_log_level_is_the_least_that_is_logged(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    assert [line.split()[0] for line in run_main("--demo", "--log-level", "error").log] == ["ERROR"]
    assert "DEBUG polled: 10 prices" in run_main("--demo", "--log-level", "debug").log


def test_a_server_that_ends_unasked_is_exit_1(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    done = run_main("--demo")
    assert done.status == 1
    assert done.log[-1] == "ERROR the server's thread has ended"
    pollers = [thread for thread in threading.enumerate() if thread.name == "poller"]
    for poller in pollers:
        poller.join(2)  # its interval is 5 s
        assert not poller.is_alive()


def test_a_history_file_that_cannot_be_used_is_exit_2(
    run_main: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("x.db is no database: move it aside")

    monkeypatch.setattr(tracker.PriceServer, "__init__", refuse)
    done = run_main("--demo", "--history", "x.db")
    assert (done.status, done.log) == (2, ["ERROR x.db is no database: move it aside"])


def refuse_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("name", ["log", "poller"])
def test_a_thread_that_cannot_be_started_is_exit_1_and_one_line(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run_main: Callable[..., Done],
    made: list[FakePriceServer],
    name: str,
) -> None:
    refuse_thread(monkeypatch, name)
    if name == "log":
        assert main(["--demo"]) == 1
        assert capfd.readouterr().err == "tracker.py: can't start new thread\n"
        return
    done = run_main("--demo")
    assert done.status == 1
    assert "ERROR cannot start: can't start new thread" in done.log
    assert made[0].calls == [True, (1001, b"server is stopping")]


@pytest.mark.parametrize("name", ["archive", "server"])
def test_a_server_without_one_of_its_threads_is_exit_1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    refuse_thread(monkeypatch, name)
    done = run_main("--demo", "--port", "0", "--history", str(tmp_path / "past.db"))
    assert (done.status, done.log[0]) == (1, "ERROR cannot start: can't start new thread")


def test_a_refused_key_is_exit_2_without_the_start_up_lines(
    run_main: Callable[..., Done], made: list[FakePriceServer], coin_api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    coin_api.say(b'{"error":"Invalid API key"}', status=401)
    monkeypatch.setattr(FakePriceServer, "end", lambda server, what: setattr(server, "last_error", what))
    done = run_main(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.status == 2
    assert done.log == [
        "INFO stopping, clients connected: 0",
        "INFO stopped",
        "ERROR CoinAPI refused the key (401): Invalid API key: check COIN_API_KEY",
    ]
    assert len(coin_api.requests) == 1


def test_a_port_that_is_taken_is_exit_1_and_one_line(run_main: Callable[..., Done]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_main("--demo", "--port", str(port))
    assert done.status == 1
    assert done.log == [
        f"ERROR cannot listen on 127.0.0.1 port {port}: Address already in use; choose with --host, --port"
    ]


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1"])
def test_a_host_that_cannot_be_had_is_exit_1_and_one_line(run_main: Callable[..., Done], host: str) -> None:
    done = run_main("--demo", "--host", host)
    assert done.status == 1
    assert len(done.log) == 1
    assert re.fullmatch(rf"ERROR cannot listen on {host} port 3030: .+", done.log[0])


# --once


def test_once_prints_one_json_message_a_line(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    done = run_main("--once", "--assets", "xlm,btc", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.log) == (0, [])
    assert done.out == [
        '{"asset_id":"XLM","price":0.0934,"time":"2021-10-20T21:34:13.0000000Z"}',
        '{"asset_id":"BTC","price":65980.1,"time":"2021-10-20T21:34:13.0000000Z"}',
    ]
    assert len(coin_api.requests) == 1


def test_once_without_an_answer_is_exit_1_with_the_reason(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    coin_api.say(b"", status=503)
    done = run_main("--once", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.out, done.log) == (1, [], ["ERROR CoinAPI answered 503"])


def test_once_with_a_refused_key_is_exit_2(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    coin_api.say(b"", status=401)
    done = run_main("--once", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.log) == (2, ["ERROR CoinAPI refused the key (401): check COIN_API_KEY"])


def test_once_with_an_error_of_the_source_is_one_line(
    run_main: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            raise KeyError("rates\nand more")

    monkeypatch.setattr(tracker, "DemoApi", Broken)
    done = run_main("--once", "--demo")
    assert (done.status, done.log) == (1, [r"ERROR unexpected KeyError: 'rates\nand more'"])


def test_once_names_an_asset_that_has_no_price(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    done = run_main("--once", "--assets", "BTC,NOPE", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.status == 0
    assert len(done.out) == 1
    assert done.log == ["WARNING no sound price for NOPE in the answer"]


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("| (exec <&-; wait)", 0, None),
        ("> /dev/full", 1, "ERROR cannot write the prices: No space left on device"),
        (">&-", 1, "ERROR cannot write the prices: stdout is closed"),
    ],
)
def test_once_that_cannot_write_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, where: str, status: int, said: str | None
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, nothing is left for Python to write at its end
    command = f'("{sys.executable}" "{ROOT / "tracker.py"}" --demo --once; echo $? >&2) {where}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert re.fullmatch(rf"{LINE}{said}\n{status}\n" if said else f"{status}\n", done.stderr)


def test_demo_prices_are_never_a_silent_fallback(run_main: Callable[..., Done]) -> None:
    done = run_main("--once")
    assert (done.status, done.out) == (2, [])


def test_all_rates_of_the_stand_in_are_the_default_assets() -> None:
    assert set(RATES) == set(ASSETS)
