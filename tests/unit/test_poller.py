"""Poller: when it polls, what the server and the log are told, by a fake clock."""

import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import tracker
from coin_api import CoinApiError, PriceUpdate
from price_server import clocks
from price_server.prices import split_valid
from system import NOTICE
from tracker import Poller


class FakeServer:
    """What the poller needs of a PriceServer."""

    def __init__(self) -> None:
        self.assets = ("BTC", "ETH")
        self.client_count = 0
        self.paused = False
        self.noted: list[tuple[float, int | None, int | None]] = []  # seconds, credits used and left of each poll
        self.published: list[list[PriceUpdate]] = []
        self.failures: list[tuple[str, str]] = []  # reason, cause

    def publish(self, updates: Iterable[PriceUpdate], expect_all: bool) -> list[str]:
        updates = list(updates)
        valid = list(split_valid(updates, self.assets, expect_all)[0])
        if valid:
            self.published.append(updates)
        return valid

    def report_failure(self, reason: str, cause: str) -> None:
        self.failures.append((reason, cause))

    def note_poll(self, seconds: float, credits_used: int | None, credits_left: int | None) -> None:
        self.noted.append((seconds, credits_used, credits_left))
        self.paused = False

    def pause(self) -> None:
        self.paused = True


class FakeTime:
    """A clock, and the event that the poller waits on: waiting is what makes the time pass.

    clients_at: seconds after the start at which a client comes, which sets the event.
    late: seconds by which each wait that ends by itself is late. asleep: (from, to), seconds after the start between
    which the machine sleeps, while a wait stands still.
    """

    late = 0.0
    asleep = (1e9, 1e9)

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
            falls_asleep, wakes = (1000 + at for at in self.asleep)
            if self.now < falls_asleep < end:
                end += wakes - falls_asleep
            self.now = end + self.late
        if self.now > self.until and self.poller:
            self.poller.stop()

    def clear(self) -> None:
        self.was_set = False

    def set(self) -> None:
        self.was_set = True


Outcome = float | BaseException | list[PriceUpdate] | tuple[float, BaseException]
GOOD = [PriceUpdate("BTC", 1.0, "t"), PriceUpdate("ETH", 2.0, "t")]


class FakeSource:
    """Each poll has the next outcome: prices, an exception, seconds that good prices take, or (seconds, exception)."""

    credits_used = 17
    credits_left = -4

    def __init__(self, time: FakeTime, outcomes: list[Outcome]):
        self.time = time
        self.outcomes = outcomes
        self.polls: list[float] = []  # seconds after the start

    def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
        self.polls.append(round(self.time.now - 1000, 3))
        outcome = self.outcomes.pop(0) if self.outcomes else GOOD
        if isinstance(outcome, tuple):
            self.time.now += outcome[0]
            raise outcome[1]
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
def no_jitter_and_every_notice(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(NOTICE)
    monkeypatch.setattr(tracker.random, "uniform", lambda low, high: min(high, 1.0))


def test_polls_start_one_interval_apart_however_long_they_take() -> None:
    source, server, _ = run([0.0, 1.5, 4.9], until=21)
    assert source.polls == [0, 5, 10, 15, 20]
    assert len(server.published) == 5


def test_a_late_poll_is_not_made_up_for() -> None:
    assert run([7.0, 0.1, 12.0], until=40)[0].polls == [0, 10, 15, 30, 35, 40]


def test_waits_that_end_late_do_not_shift_the_fixed_times() -> None:
    time = FakeTime(41)
    time.late = 0.4
    source = FakeSource(time, [])
    poller_of(time, source, FakeServer()).run()
    assert source.polls == [0, *(at + 0.4 for at in (5, 10, 15, 20, 25, 30, 35, 40))]


@pytest.mark.parametrize("interval", [5, 60, 3600, 86_400])
def test_after_a_sleep_of_8_hours_the_poll_that_is_due_comes_within_15_s_and_no_burst(interval: int) -> None:
    slept = 8 * 3600.0 if interval < 8 * 3600 else 86_400.0
    time = FakeTime(slept + 4 * interval)
    time.asleep = (interval + 1.0, interval + 1 + slept)
    source = FakeSource(time, [])
    poller_of(time, source, FakeServer(), interval).run()
    assert source.polls[:2] == [0, interval]
    late = [at for at in source.polls[2:] if at < interval + 1 + slept + 15.001]
    assert late[0] >= interval + 1 + slept, "in its sleep"
    assert len(late) <= 1 + 15 / interval
    assert all(at % interval == pytest.approx(0) for at in source.polls[3:]), "at the fixed times again"


def test_by_default_its_clock_goes_on_while_the_machine_sleeps() -> None:
    assert Poller(FakeSource(FakeTime(1), []), FakeServer()).clock is clocks.boottime  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("interval", "polls"),
    [
        (1.0, [0, 1, 3, 7, 15, 30, 45]),
        (5.0, [0, 5, 15, 30, 45, 60]),
        (60.0, [0, 15, 30, 45]),
        (86_400.0, [0, 15, 30, 45]),
    ],
)
def test_a_failure_is_tried_again_after_1_2_4_intervals_and_at_most_15_s(interval: float, polls: list[float]) -> None:
    failures: list[Outcome] = [CoinApiError("timed out", cause="timeout") for _ in range(7)]
    source, server, _ = run(failures, until=polls[-1], interval=interval)
    assert source.polls == polls
    assert server.failures == [("timed out", "timeout")] * len(polls)
    assert server.published == []


def test_ten_thousand_failures_do_not_overflow_the_backoff() -> None:
    assert len(run([CoinApiError("x") for _ in range(10_000)], until=149_000)[0].polls) > 9_900


@pytest.mark.parametrize(("end", "polls"), [(1, [0, 5.5, 16.5, 31.5]), (0, [0, 4.5, 13.5, 27.0])])
def test_the_backoff_is_spread_by_a_tenth_and_never_longer_than_15_s(
    monkeypatch: pytest.MonkeyPatch, end: int, polls: list[float]
) -> None:
    monkeypatch.setattr(tracker.random, "uniform", lambda *ends: ends[end])
    assert run([CoinApiError("x")] * 3, until=31.5)[0].polls[:4] == polls


def test_a_retry_that_succeeds_starts_new_fixed_times() -> None:
    assert run([GOOD, CoinApiError("x"), GOOD], until=260, interval=60)[0].polls == [0, 60, 75, 135, 195, 255]


def test_the_next_trouble_begins_with_the_shortest_backoff_and_prices_are_told_once_to_be_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = CoinApiError("x")
    assert run([failure, failure, GOOD, GOOD, failure], until=35)[0].polls == [0, 5, 15, 20, 25, 30, 35]
    assert [message for message in caplog.messages if message.startswith("prices again")] == [
        "prices again after 15 s, failed polls: 2",
        "prices again after 5 s, failed polls: 1",
    ]


def test_a_failed_poll_that_took_long_is_not_followed_by_a_storm() -> None:
    source, server, _ = run([(13.0, CoinApiError("timed out"))] * 3, until=31)
    assert source.polls == [0, 13, 26]
    assert server.noted[0][0] == 13


def test_the_new_fixed_times_start_at_the_retry_and_not_when_it_was_due() -> None:
    assert run([(12.0, CoinApiError("timed out"))], until=27)[0].polls == [0, 12, 17, 22, 27]


@pytest.mark.parametrize(
    ("asked", "interval", "waited"),
    [
        (30.0, 5, 30),
        (0.0, 5, 5),
        (2.0, 3600, 15),
        (30.0, 3600, 30),
        # Of your own source.
        (1e9, 5, 900),
        (float("inf"), 5, 900),
        (float("nan"), 5, 5),
        (-1.0, 5, 5),
    ],
)
def test_retry_after_is_waited_for_from_an_interval_or_15_s_to_15_minutes(
    asked: float, interval: int, waited: float
) -> None:
    assert run([CoinApiError("429", retry_after=asked)], until=waited, interval=interval)[0].polls == [0, waited]


def test_retry_after_counts_from_the_answer() -> None:
    assert run([(9.0, CoinApiError("429", retry_after=20))], until=40)[0].polls == [0, 29, 34, 39]


def test_an_outage_is_one_warning_and_one_notice_with_its_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    failure = CoinApiError("CoinAPI answered 503: busy")
    run([GOOD, (2.0, failure), failure, failure], until=36)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no prices: CoinAPI answered 503: busy; next try in 3 s"),
        ("NOTICE", "prices again after 30 s, failed polls: 3"),
    ]


@pytest.mark.parametrize(
    ("outcomes", "levels"),
    [
        ([CoinApiError("timed out"), GOOD, CoinApiError("timed out")], ["WARNING", "NOTICE", "WARNING"]),
        ([CoinApiError(f"CoinAPI answered 503: request {number}") for number in range(3)], ["WARNING"]),
        ([CoinApiError("timed out"), CoinApiError("CoinAPI answered 403: no credits")], ["WARNING", "WARNING"]),
    ],
    ids=["the next outage", "other words after its colon", "another cause"],
)
def test_each_cause_is_one_warning_in_each_outage(
    caplog: pytest.LogCaptureFixture, outcomes: list[Outcome], levels: list[str]
) -> None:
    run(outcomes, until=14)
    assert [record.levelname for record in caplog.records] == levels


def test_a_key_refused_on_the_first_poll_ends_the_loop() -> None:
    source, _, poller = run([CoinApiError("CoinAPI refused the key (401)", cause="refused_key")], until=60)
    assert source.polls == [0]
    assert poller.key_refused


def test_a_key_refused_later_is_tried_again() -> None:
    source, server, poller = run([GOOD, CoinApiError("CoinAPI refused the key (401)", cause="refused_key")], until=11)
    assert source.polls == [0, 5, 10]
    assert len(server.published) == 2
    assert not poller.key_refused


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("surprise"), MemoryError(), RecursionError("deep"), KeyError("rates"), SystemExit("bye")),
        *(KeyboardInterrupt(), GeneratorExit()),
    ],
)
def test_no_exception_ends_the_poll_loop(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, server, _ = run([error], until=6)
    assert source.polls == [0, 5]
    assert caplog.messages[0].startswith(f"no prices: unexpected {type(error).__name__}")
    assert server.failures[0][1] == "other"
    assert not any(record.exc_info for record in caplog.records)


def test_a_server_that_raises_does_not_end_the_poll_loop(caplog: pytest.LogCaptureFixture) -> None:
    time, server = FakeTime(16), FakeServer()
    source = FakeSource(time, [])
    server.note_poll = None  # type: ignore[assignment]
    poller_of(time, source, server, interval=60).run()
    assert source.polls == [0, 15]
    assert "the poll loop failed, and goes on" in caplog.messages


def test_an_error_of_your_own_source_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    _, server, _ = run([CoinApiError("no\nluck\x1b[31m " + "x" * 1_000_000), OSError("a\nb")], until=6)
    assert server.failures[0][0].startswith("no luck [31m xxx")
    assert len(server.failures[0][0]) < 300
    assert server.failures[1] == ("unexpected OSError: a b", "other")
    assert [len(message.splitlines()) for message in caplog.messages] == [1, 1]


@pytest.mark.parametrize(
    ("prices", "reason", "cause"),
    [
        (None, "unexpected TypeError: 'NoneType' object is not iterable", "other"),
        ([], "no valid price for any asset", "bad_answer"),
        ([PriceUpdate("BTC", -1.0, "t"), None], "no valid price for any asset", "bad_answer"),
    ],
)
def test_a_poll_without_any_valid_price_has_failed(prices: Any, reason: str, cause: str) -> None:
    source, server, _ = run([prices], until=6)
    assert source.polls == [0, 5]
    assert server.failures == [(reason, cause)]
    assert server.published == [GOOD]


@pytest.mark.parametrize("bad", [None, 7, {}, PriceUpdate("ETH", 0.0, "t"), PriceUpdate("ETH", 1.0, None)])  # type: ignore[arg-type]
def test_a_half_broken_item_drops_only_its_asset(bad: Any) -> None:
    _, server, _ = run([[bad, GOOD[0]]], until=1)
    assert (len(server.published), server.failures) == (1, [])


def test_the_server_learns_of_the_credits() -> None:
    _, server, _ = run([CoinApiError("x")], until=1)
    assert server.noted[0][1:] == (17, -4)


def test_your_own_source_needs_fetch_prices_only_and_may_yield_its_prices() -> None:
    time, server = FakeTime(6), FakeServer()

    class Own:
        def fetch_prices(self, asset_ids: object) -> Iterator[PriceUpdate]:
            yield from GOOD

    poller_of(time, Own(), server).run()
    assert server.published == [GOOD, GOOD]
    assert server.noted == [(0.0, None, None)] * 2, "it knows of no credits"


@pytest.mark.parametrize(("outcome", "seconds"), [(1.5, 1.5), (CoinApiError("x"), 0.0)])
def test_the_server_learns_how_long_the_last_poll_took(outcome: Outcome, seconds: float) -> None:
    assert run([outcome], until=1)[1].noted[0][0] == seconds


def test_clients_that_come_bring_no_poll_forward_and_nothing_spins() -> None:
    time = FakeTime(16, clients_at=(1, 2, 2, 2, 7, 14))
    source = FakeSource(time, [])
    poller_of(time, source, FakeServer()).run()
    assert source.polls == [0, 5, 10, 15]
    assert time.waits < 20


def test_there_is_no_poll_after_the_stop() -> None:
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
    ("outcome", "said"), [(0.0, 1), (CoinApiError("x"), 1), (CoinApiError("x", cause="refused_key"), 0)]
)
def test_it_is_ready_once_after_the_first_poll_unless_the_key_is_refused(outcome: Outcome, said: int) -> None:
    time, ready = FakeTime(21), list[float]()
    poller_of(time, FakeSource(time, [outcome]), FakeServer(), ready=lambda: ready.append(time.now)).run()
    assert ready == [1000.0] * said


# Pausing


class IdleTime(FakeTime):
    """A wait without a timeout is the pause: a client comes 100 s later; those of clients_at leave at once."""

    def __init__(self, until: float, server: FakeServer):
        super().__init__(until)
        self.server = server
        self.paused: list[bool] = []

    def wait(self, seconds: float | None = None) -> None:
        if seconds is None:
            self.paused.append(self.server.paused)
            seconds = 100.0
            self.server.client_count = 0 if self.clients_at else 1
        super().wait(seconds)


def test_an_idle_poller_pauses_and_polls_at_once_when_a_client_comes() -> None:
    server = FakeServer()
    time = IdleTime(148, server)
    time.clients_at = [1040.0]
    source, ready = FakeSource(time, []), list[float]()
    poller_of(time, source, server, pause_when_idle=True, ready=lambda: ready.append(time.now)).run()
    assert source.polls == [140, 145]
    assert time.paused == [True, True]
    assert server.paused is False
    assert ready[0] == 1000


def test_a_pause_does_not_shorten_a_backoff_and_is_no_part_of_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    server.client_count = 1
    time = IdleTime(1100, server)
    source = FakeSource(time, [CoinApiError("429", retry_after=900.0)])
    server.report_failure = lambda reason, cause: setattr(server, "client_count", 0)  # type: ignore[method-assign]
    poller_of(time, source, server, pause_when_idle=True).run()
    assert source.polls[:2] == [0, 1000]
    assert "prices again after 900 s, failed polls: 1" in caplog.messages


def test_a_pause_ends_with_the_stop() -> None:
    server = FakeServer()
    poller = Poller(FakeSource(FakeTime(1), []), server, 5.0, True, wake=threading.Event())  # type: ignore[arg-type]
    thread = threading.Thread(target=poller.run, daemon=True)
    thread.start()
    poller.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert server.published == []
