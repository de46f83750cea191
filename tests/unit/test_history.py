"""The past in memory: what it keeps, what it shows and when, and what it hands to the archive. The clock is given."""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from price_server.history import RANGES, History, Poll, Range, Snapshot, encode_point

NOON = 1_800_000_000.0  # a whole number of every step but the day's
DAY = 86_400
NAMES = ("1h", "24h", "7d", "30d", "1y")


class Past(History):
    """A History of BTC and ETH with a clock that stands still."""

    def __init__(self, *assets: str, now: float = NOON, ranges: Sequence[Range] = RANGES):
        self.now = now
        super().__init__(assets or ("BTC", "ETH"), lambda: self.now, ranges)

    def poll(self, price: str, *assets: str, at: float | None = None) -> Poll:
        if at is not None:
            self.now = at
        return self.add(dict.fromkeys(assets or ("BTC", "ETH"), price), self.now)

    def text(self, name: str = "1h", *assets: str) -> str:
        return b"".join(self.json_pieces(name, assets or ("BTC", "ETH"))).decode()

    def points(self, name: str = "1h", asset: str = "BTC") -> list[list[float]]:
        return json.loads(self.text(name, asset))[asset]

    def since(self, name: str) -> float | None:
        return next(shown["since"] for shown in self.describe() if shown["name"] == name)


def loaded(*points: tuple[float, str]) -> dict[str, bytes]:
    """What a file has of BTC."""
    return {"BTC": b",".join(encode_point(at, price) for at, price in points)}


def year() -> Past:
    """A past that is full: the price of a point is how many steps old it was."""
    past = Past("BTC")
    for span in RANGES:
        numbers = range(span.max_points - 1, -1, -1)
        past.load(span.step, loaded(*((NOON - number * span.step, str(number)) for number in numbers)))
    return past


# What is kept


@pytest.mark.parametrize(
    ("name", "seconds", "step"),
    [("1h", 3600, 10), ("24h", 86400, 300), ("7d", 604800, 1800), ("30d", 2592000, 7200), ("1y", 31536000, 86400)],
)
def test_a_range_has_the_last_point_of_each_step_and_none_that_is_too_old(name: str, seconds: int, step: int) -> None:
    past = Past("BTC")
    start = NOON - NOON % step
    polls = int(seconds / step * 2.2)
    for number in range(polls):  # twice in each step
        past.poll(f"{number}", "BTC", at=start + number * step / 2)
    points = past.points(name)
    newest = start + (polls - 1) * step / 2
    assert points[-1] == [newest, polls - 1]
    assert newest - seconds < points[0][0] <= newest - seconds + step
    assert [point[0] // step for point in points] == list(range(int(points[0][0] // step), int(newest // step) + 1))
    assert all(point[0] % step == step / 2 for point in points[:-1])
    assert past.since(name) == points[0][0]


def test_ranges_say_what_they_are_and_since_when_there_is_something() -> None:
    past = Past()
    assert past.describe() == [
        {"name": "1h", "seconds": 3600, "step": 10, "since": None},
        {"name": "24h", "seconds": 86400, "step": 300, "since": None},
        {"name": "7d", "seconds": 604800, "step": 1800, "since": None},
        {"name": "30d", "seconds": 2592000, "step": 7200, "since": None},
        {"name": "1y", "seconds": 31536000, "step": 86400, "since": None},
    ]
    past.poll("1", "ETH", at=NOON + 0.1234567)
    past.poll("1", "BTC", at=NOON + 1)
    assert [past.since(name) for name in NAMES] == [NOON + 0.123] * 5
    past.now = NOON + 3600.2
    assert past.since("1h") == NOON + 1
    past.now = NOON + 3601
    assert past.since("1h") is None
    past.now = NOON
    assert past.since("1h") is None, "all is ahead of the clock"


def test_ranges_are_looked_through_once_a_poll_however_often_they_are_asked_for() -> None:
    past = Past(*(f"A{number:03}" for number in range(400)))
    past.poll("1", *(f"A{number:03}" for number in range(400)))
    calls: list[str] = []

    def count() -> int:
        calls.clear()
        sys.setprofile(lambda _, event, __: calls.append(event) if event == "call" else None)
        past.describe()
        sys.setprofile(None)
        return len(calls)

    assert count() > 2000
    assert count() < 400
    past.now += 3600
    assert [past.since(name) for name in NAMES] == [None, *[NOON] * 4]
    past.now = NOON
    assert past.since("1h") == NOON
    past.poll("1", "A000", at=NOON - 100)
    assert past.since("1h") == NOON - 100
    past.load(10, {"A001": b"[1799999000.000,1]"})
    assert past.since("1h") == NOON - 1000


def test_a_point_of_this_moment_is_shown_and_one_a_millisecond_ahead_is_not() -> None:
    past = Past("BTC")
    past.load(10, loaded((NOON - 10, "1"), (NOON, "2")))
    assert past.points() == [[NOON - 10, 1], [NOON, 2]]
    past.now = NOON - 0.001
    assert past.points() == [[NOON - 10, 1]]


def test_a_response_is_json_with_the_prices_as_the_feed_sends_them() -> None:
    past = Past()
    past.poll("45000.10", "BTC", at=NOON + 0.12345)
    past.poll("0.12345678901234567", "BTC", at=NOON + 10)
    past.poll("1e-07", "ETH", at=NOON + 10)
    assert past.text() == (
        '{"BTC":[[1800000000.123,45000.10],[1800000010.000,0.12345678901234567]],"ETH":[[1800000010.000,1e-07]]}'
    )


def test_a_time_is_shown_at_once_however_it_is_rounded() -> None:
    past = Past()
    past.poll("1", at=NOON + 9.9999)
    assert past.text("1h", "BTC") == '{"BTC":[[1800000010.000,1]]}'
    past.poll("2", at=NOON + 12)
    assert past.text("1h", "BTC") == '{"BTC":[[1800000012.000,2]]}', "the same step as the rounded time"


def test_a_response_has_the_assets_that_were_asked_for_in_that_order() -> None:
    past = Past()
    past.poll("1", "BTC")
    assert past.text("1h", "ETH", "BTC") == '{"ETH":[],"BTC":[[1800000000.000,1]]}'
    assert past.text("1h", "ETH") == '{"ETH":[]}'
    assert b"".join(past.json_pieces("1h", ())) == b"{}"
    with pytest.raises(KeyError):
        past.json_pieces("2h", ("BTC",))
    with pytest.raises(KeyError):
        past.json_pieces("1h", ("DOGE",))


def test_responses_share_their_pieces_until_a_point_comes_or_grows_too_old() -> None:
    past = Past()
    past.poll("1", at=NOON)
    past.poll("2", at=NOON + 10)
    (whole,), (_, member, _) = past.json_pieces("1h", ("BTC", "ETH")), past.json_pieces("1h", ("ETH",))
    for past.now in (NOON + 10, NOON + 3599.9):
        assert past.json_pieces("1h", ("BTC", "ETH"))[0] is whole
        assert past.json_pieces("1h", ("ETH",))[1] is past.json_pieces("1h", ("ETH", "BTC"))[1] is member
    past.now = NOON + 3600
    assert past.points() == [[NOON + 10, 2]]
    past.now = NOON + 10
    past.poll("3")
    assert past.points() == [[NOON, 1], [NOON + 10, 3]]
    past.now = NOON + 5
    assert past.points() == [[NOON, 1]]
    for past.now, points in ((NOON + 9.999, 1), (NOON + 10, 2), (NOON + 9.999, 1)):
        assert len(past.points()) == points


def test_two_ranges_with_the_same_step_or_name_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"^RANGES: '1h' every 10 s and '2h' every 10 s: each range needs a name and"):
        Past(ranges=[Range("1h", 3600, 10), Range("1y", 31536000, 86400), Range("2h", 7200, 10)])
    with pytest.raises(ValueError, match=r"'1h' every 10 s and '1h' every 20 s"):
        Past(ranges=[Range("1h", 3600, 10), Range("1h", 7200, 20)])
    Past(ranges=[Range("1h", 3600, 10), Range("2h", 7200, 20)])


# Clocks that are wrong


def all_texts(past: Past) -> dict[str, str]:
    return {name: past.text(name, "BTC") for name in NAMES}


@pytest.mark.parametrize("wrong", [NOON + 400 * DAY, 63_072_000.0])
def test_a_clock_400_days_ahead_or_in_1972_for_eight_seconds_costs_eight_seconds(wrong: float) -> None:
    past = year()
    before = all_texts(past)
    for second in range(8):
        past.poll("7", "BTC", at=wrong + second)
    assert past.points("1y") == [[wrong + 7, 7]], "the rest is too old for this clock, or ahead of it"
    past.now = NOON
    assert all_texts(past) == before
    past.poll("8", "BTC", at=NOON + 5)
    for name in NAMES:
        *older, last = past.points(name)
        assert last == [NOON + 5, 8]
        assert older == json.loads(before[name])["BTC"][:-1]


def test_a_clock_40_days_ahead_for_an_hour_costs_what_that_hour_brought_and_nothing_else() -> None:
    right, wrong = year(), year()
    for at in range(0, 3600, 10):
        right.poll("7", "BTC", at=NOON + at)
        wrong.poll("7", "BTC", at=NOON + 40 * DAY + at)
    for past in (right, wrong):
        past.poll("8", "BTC", at=NOON + 3600)
    for name in NAMES:
        older = [point for point in right.points(name) if point[0] < NOON]
        assert len(older) == {"1h": 0, "24h": 275, "7d": 333, "30d": 359, "1y": 364}[name]
        assert [point for point in wrong.points(name) if point[0] < NOON] == older


@pytest.mark.parametrize("wrong", [NOON + 400 * DAY, 63_072_000.0])
def test_a_poll_after_one_with_a_wrong_clock_still_adds_a_few_bytes(
    monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    past, parsed = year(), list[Any]()
    past.poll("7", "BTC", at=wrong)
    past.poll("8", "BTC", at=NOON)
    monkeypatch.setattr("price_server.history._split", parsed.append)
    for second in range(10, 3000, 10):
        past.poll("8", "BTC", at=NOON + second)
    assert parsed == []


def test_points_ahead_of_a_clock_that_was_set_back_are_hidden_until_it_reaches_them() -> None:
    past = Past("BTC")
    past.poll("1", "BTC", at=NOON)
    past.poll("2", "BTC", at=NOON + 20)
    past.poll("3", "BTC", at=NOON - 3000)
    assert past.text("1h", "BTC") == '{"BTC":[[1799997000.000,3]]}'
    past.poll("4", "BTC", at=NOON + 5)
    assert past.text("1h", "BTC") == '{"BTC":[[1799997000.000,3],[1800000005.000,4]]}', "its step was polled again"
    past.now = NOON + 20
    assert past.text("1h", "BTC") == '{"BTC":[[1799997000.000,3],[1800000005.000,4],[1800000020.000,2]]}'
    assert past.since("1h") == NOON - 3000


class Model:
    """What a series is to be, as plainly as it can be said: by step, in the order of arrival."""

    def __init__(self, span: Range):
        self.span = span
        self.points: dict[int, tuple[float, str]] = {}
        self.dropped: list[int] = []

    def add(self, at: float, price: str) -> None:
        number = int(at // self.span.step)
        self.points.pop(number, None)
        self.points[number] = at, price
        self.trim()

    def load(self, points: list[tuple[float, str]]) -> None:
        loaded = {int(at // self.span.step): (at, price) for at, price in points}
        self.points = {number: point for number, point in loaded.items() if number not in self.points} | self.points
        self.trim()

    def trim(self) -> None:
        while len(self.points) > self.span.max_points:
            self.dropped.append(next(iter(self.points)))
            del self.points[self.dropped[-1]]

    def shown(self, now: float) -> list[list[float]]:
        return sorted([at, float(price)] for at, price in self.points.values() if now - self.span.seconds < at <= now)


TICKS = st.integers(0, 30)  # of 5 s
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("poll"), TICKS, st.sampled_from(["BTC", "ETH", "both"])),
        st.tuples(st.just("look"), TICKS, st.just("")),
        st.tuples(st.just("load"), st.sets(TICKS, max_size=12), st.just("BTC")),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_whatever_the_clock_does_each_series_is_what_the_plain_rule_says(steps: list[tuple[str, object, str]]) -> None:
    spans = [Range("short", 40, 10), Range("long", 100, 20)]
    past = Past(ranges=spans)
    models = {(span, asset): Model(span) for span in spans for asset in ("BTC", "ETH")}
    dropped = {key: list[int]() for key in models}
    for number, (what, value, who) in enumerate(steps):
        changes: list[Poll | Snapshot] = []
        if what == "load":
            for span in spans:
                last = {tick * 5 // span.step: tick for tick in sorted(value)}  # type: ignore[call-overload]
                points = [(NOON + tick * 5, f"{number}.5") for tick in last.values()]
                changes.append(past.load(span.step, loaded(*points)))
                models[span, "BTC"].load(points)
        else:
            past.now = NOON + value * 5  # type: ignore[operator]
        if what == "poll":
            assets = ("BTC", "ETH") if who == "both" else (who,)
            changes.append(past.poll(f"{number}", *assets))
            for (_, asset), model in models.items():
                if asset in assets:
                    model.add(past.now, str(number))
        for change in changes:
            for step, step_number, asset in change.dropped:
                span = next(span for span in spans if span.step == step)
                dropped[span, asset].append(step_number)
        for (span, asset), model in models.items():
            assert past.points(span.name, asset) == model.shown(past.now)
            assert dropped[span, asset] == model.dropped
        for span in spans:
            firsts = [model.shown(past.now)[:1] for (other, _), model in models.items() if other is span]
            assert past.since(span.name) == min((first[0][0] for first in firsts if first), default=None)


# What the archive gets


def test_a_poll_says_what_is_to_be_written_in_each_range() -> None:
    change = Past().poll("45000.10", at=NOON + 12.3456)
    assert list(change.rows()) == [
        (step, int((NOON + 12) // step), asset, NOON + 12.346, "45000.10")
        for step in (10, 300, 1800, 7200, 86400)
        for asset in ("BTC", "ETH")
    ]


def test_a_full_series_drops_one_point_for_each_new_step() -> None:
    past = year()
    assert past.poll("7", "BTC", at=NOON + 9).dropped == []
    assert past.poll("8", "BTC", at=NOON + 10).dropped == [(10, 179_999_640, "BTC")]
    assert past.poll("9", "BTC", at=NOON + 300).dropped == [(10, 179_999_641, "BTC"), (300, 5_999_712, "BTC")]


def test_what_is_loaded_comes_before_what_is_here_which_wins_on_the_same_step() -> None:
    past = Past()
    past.poll("1", at=NOON)
    past.poll("2", at=NOON + 10)
    known = past.load(10, loaded((NOON - 9.5, "7"), (NOON + 0.5, "8"), (NOON + 30.5, "9")))
    assert list(known.rows()) == [
        (10, 180000000, "BTC", NOON, "1"),
        (10, 180000001, "BTC", NOON + 10, "2"),
        (10, 180000000, "ETH", NOON, "1"),
        (10, 180000001, "ETH", NOON + 10, "2"),
    ]
    past.now = NOON + 40
    assert past.points() == [[NOON - 9.5, 7], [NOON, 1], [NOON + 10, 2], [NOON + 30.5, 9]]
    assert past.points(asset="ETH") == [[NOON, 1], [NOON + 10, 2]]
    assert past.points("24h") == [[NOON + 10, 2]]


# A table of it


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone of a process cannot be set here")
@pytest.mark.usefixtures("far_from_utc")
def test_csv_is_a_header_and_a_line_for_each_point_in_utc() -> None:
    past = Past()
    past.poll("45000.0", "BTC", at=NOON + 0.413)
    past.poll("1e-07", "ETH", at=NOON + 10)
    assert b"".join(past.csv("1h", ["BTC", "ETH"])) == (
        b"time,asset_id,price\n2027-01-15T08:00:00.413Z,BTC,45000.0\n2027-01-15T08:00:10.000Z,ETH,1e-07\n"
    )
    past.now = NOON + 3600.5
    assert list(past.csv("1h", ["BTC", "ETH"])) == [
        b"time,asset_id,price\n",
        b"2027-01-15T08:00:10.000Z,ETH,1e-07\n",
    ], "what is too old is not in it"


def test_csv_of_an_asset_is_made_when_it_is_taken() -> None:
    past = Past()
    past.poll("1")
    pieces = past.csv("1h", ["BTC", "ETH"])
    assert next(pieces) == b"time,asset_id,price\n"
    assert next(pieces) == b"2027-01-15T08:00:00.000Z,BTC,1\n"
    past.poll("2", at=NOON + 10)
    assert re.findall(rb",(\d)\n", next(pieces)) == [b"1", b"2"]
    assert next(pieces, None) is None
