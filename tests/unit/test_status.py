"""status: what /healthz and /metrics say of a server."""

import os
import re
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rigged import Clock

from coin_api import CAUSES
from price_server import status as status_module
from price_server.history import History
from price_server.prices import Price, Prices
from price_server.status import Status

ALL = ("BTC", "ETH", "SOL")
AT = "2026-11-22T07:44:05.1234567Z"
START = 1_800_000_000.25  # epoch seconds


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now = 0.0
    return clock


@pytest.fixture
def status(clock: Clock) -> Status:
    """Of a server without prices."""
    return make(version="2.0.0", age_clock=clock, wall_clock=lambda: START + clock.now)


def make(*assets: str, **options: Any) -> Status:
    return Status(Prices(assets or ALL), History(assets or ALL), **options)


def poll(status: Status, **prices: float) -> None:
    status.prices.remember({asset: Price(price, AT, "") for asset, price in prices.items()})
    status.note_success()


# /healthz


def test_health_has_exactly_these_fields(status: Status, clock: Clock) -> None:
    status.note_failure("CoinAPI answered 503", "server_error")
    expected = {
        "status": "starting",
        "time": 1_800_000_000.25,
        "age_seconds": None,
        "stale_after_seconds": 60.0,
        "interval_seconds": 5.0,
        "pause_when_idle": False,
        "clients": 0,
        "max_clients": 10_000,
        "source": "coinapi",
        "quote": "USD",
        "assets": ALL,
        "without_price": ["BTC", "ETH", "SOL"],
        "ranges": status.history.describe(),
        "last_error": "CoinAPI answered 503",
        "version": "2.0.0",
        "history": None,
    }
    assert list(status.health().items()) == list(expected.items())
    poll(status, ETH=2.0)
    clock.now, status.clients["websocket"], status.clients["event_stream"] = 1.23456, 2, 1
    status.archive = SimpleNamespace(state="failing", write_errors=1, last_write=0.0)
    assert status.health() == expected | {
        "status": "ok",
        "time": 1_800_000_001.485,
        "age_seconds": 1.235,
        "clients": 3,
        "without_price": ["BTC", "SOL"],
        "last_error": None,
        "history": "failing",
    }


def test_health_tells_how_the_server_was_started() -> None:
    options = {"quote": "EUR", "source": "demo", "max_clients": 7, "pause_when_idle": True}
    health = make("ADA", interval=30.0, **options).health()
    expected = options | {"assets": ("ADA",), "interval_seconds": 30.0, "stale_after_seconds": 90.0, "last_error": None}
    assert {name: health[name] for name in expected} == expected


def test_prices_are_stale_a_minute_after_the_last_success(status: Status, clock: Clock) -> None:
    assert status.state() == "starting"
    poll(status, BTC=1.0)
    clock.now = 60.0
    status.note_failure("x")
    assert status.state() == "ok"
    clock.now = 60.001
    assert status.state() == "stale"
    poll(status, BTC=1.0)
    assert status.state() == "ok"


def test_a_server_is_paused_until_the_next_poll_has_ended(status: Status, clock: Clock) -> None:
    poll(status, BTC=1.0)
    status.paused = True
    clock.now = 1_000.0
    assert status.state() == "paused"
    status.note_poll(0.1, None, None)
    assert status.state() == "stale"


def test_prices_are_stale_after_3_intervals_but_not_within_a_minute() -> None:
    assert [make(interval=interval).stale_after for interval in (0.1, 20, 21, 300)] == [60, 60, 63, 900]


def test_a_machine_that_slept_finds_its_prices_as_old_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr("price_server.clocks.time.clock_gettime", lambda clock: now[0], raising=False)
    monkeypatch.setattr("price_server.clocks.time.CLOCK_BOOTTIME", 7, raising=False)
    status = make()
    poll(status, BTC=1.0)
    now[0] += 8 * 3600  # while time.monotonic stood still
    assert (status.state(), status.age()) == ("stale", 28_800.0)


# /metrics


def samples(status: Status) -> Iterator[tuple[str, float]]:
    """Every sample, as Prometheus' own parser reads it."""
    for family in text_string_to_metric_families(status.metrics()):
        assert re.fullmatch(r"[A-Z1].*[a-z].*\.", family.documentation), "is a sentence"
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            labels = "".join(f" {label}={value}" for label, value in sample.labels.items())
            yield sample.name + labels, sample.value


def metrics(status: Status) -> dict[str, float]:
    """The samples of the tracker's own metrics but the version of Python."""
    found = list(samples(status))
    assert len(dict(found)) == len(found), "a sample comes twice"
    own = [(name, value) for name, value in found if name.startswith("price_tracker_")]
    return {name.removeprefix("price_tracker_"): value for name, value in own if "python=" not in name}


def by(label: str, values: str) -> dict[str, float]:
    """Samples that are 0, for each value of a label."""
    return {f"{label}={value}": 0 for value in values.split()}


AT_THE_START = {
    "clients": 0,
    **by("clients_by_format format", "websocket event_stream"),
    "max_clients": 10_000,
    "clients_accepted_total": 0,
    **by("clients_refused_total reason", "asset denied full handshake origin"),
    **by("clients_dropped_total reason", "behind disconnected failed memory no_close no_pong queue_full unfinished"),
    "messages_sent_total": 0,
    "held_bytes": 0,
    **by("polls_total result", "success failure"),
    **by("poll_failures_total cause", " ".join(CAUSES)),
    **by("poll_duration_seconds_bucket le", "0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 +Inf"),
    "poll_duration_seconds_sum": 0,
    "poll_duration_seconds_count": 0,
    "last_success_timestamp_seconds": 0,
    "interval_seconds": 5,
    "stale_after_seconds": 60,
    "paused": 0,
    "assets_without_price": 3,
    **by("http_responses_total status", "200 204 304 400 403 404 405 426 503"),
    "visitors": 0,
    "batch_seconds_max": 0,
    "start_timestamp_seconds": START,
}


def test_what_is_known_at_the_start_starts_at_0_and_the_rest_is_left_out(status: Status, clock: Clock) -> None:
    clock.now = 99.0
    assert metrics(status) == AT_THE_START
    assert "HELP price_tracker_credits" not in status.metrics()


def test_metrics_are_exactly_these(status: Status, clock: Clock) -> None:
    clock.now = 1.5
    poll(status, BTC=45000.0, SOL=1e-7)
    poll(status, BTC=45000.25)
    status.note_poll(0.25, 0, -66_181)
    status.note_poll(11.0, None, None)
    for cause in ("timeout", "other", "timeout"):
        status.note_failure("x", cause)
    status.note_failure("x")
    for reason in ("full", "origin", "full"):
        status.refused[reason] += 1
    status.dropped["behind"] += 2
    status.http_responses[404] += 3
    status.messages_sent, status.clients_accepted, status.paused = 123_456_789, 8, True
    status.clients.update(websocket=5, event_stream=2)
    status.archive = SimpleNamespace(state="ok", write_errors=4, last_write=1_799_999_999.5)
    assert metrics(status) == AT_THE_START | {
        "clients": 7,
        "clients_by_format format=websocket": 5,
        "clients_by_format format=event_stream": 2,
        "clients_accepted_total": 8,
        "clients_refused_total reason=full": 2,
        "clients_refused_total reason=origin": 1,
        "clients_dropped_total reason=behind": 2,
        "messages_sent_total": 123_456_789,
        "polls_total result=success": 2,
        "polls_total result=failure": 4,
        "poll_failures_total cause=timeout": 2,
        "poll_failures_total cause=other": 2,
        **{f"poll_duration_seconds_bucket le={each}": 1 for each in ("0.25", "0.5", "1.0", "2.5", "5.0", "10.0")},
        "poll_duration_seconds_bucket le=+Inf": 2,
        "poll_duration_seconds_sum": 11.25,
        "poll_duration_seconds_count": 2,
        "last_success_timestamp_seconds": START + 1.5,
        "paused": 1,
        "price asset_id=BTC quote=USD": 45000.25,
        "price asset_id=SOL quote=USD": 1e-7,
        "price_timestamp_seconds asset_id=BTC quote=USD": 1_795_333_445.123456,
        "price_timestamp_seconds asset_id=SOL quote=USD": 1_795_333_445.123456,
        "assets_without_price": 1,
        "credits_used": 0,
        "credits_left": -66_181,
        "http_responses_total status=404": 3,
        "history_write_errors_total": 4,
        "history_last_write_timestamp_seconds": 1_799_999_999.5,
    }


def test_a_new_reason_just_works(status: Status) -> None:
    status.refused['no "tea"\\\n'] += 1
    status.dropped["bored"] += 1
    status.http_responses[418] += 1
    status.clients["carrier_pigeon"] += 1
    status.note_failure("x", "flood")
    got = metrics(status)
    assert got['clients_refused_total reason=no "tea"\\\n'] == 1
    assert (got["clients_dropped_total reason=bored"], got["http_responses_total status=418"]) == (1, 1)
    assert (got["clients_by_format format=carrier_pigeon"], got["clients"]) == (1, 1)
    assert got["poll_failures_total cause=flood"] == 1


def test_what_only_the_hub_can_count_is_counted_just_before(status: Status) -> None:
    measured = {"visitors": 3, "held_bytes": 4_096, "batch_seconds_max": 0.0625}
    status.measure = lambda: vars(status).update(measured)
    assert metrics(status) == AT_THE_START | measured


def test_each_metric_says_once_what_it_is(status: Status) -> None:
    text = status.metrics()
    assert text.startswith("# HELP price_tracker_clients Connected clients.\n# TYPE price_tracker_clients gauge\n")
    assert "\n# TYPE price_tracker_poll_duration_seconds histogram\n" in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(names) == len(set(names)) == text.count("# TYPE")
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("2026-11-22T07:44:05.1234567Z", 1_795_333_445.123456),
        ("2026-11-22T08:44:05+01:00", 1_795_333_445.0),
        ("9999-12-31T23:59:59Z", 253_402_300_799.0),  # ahead of the others: an alert must see it
        ("0001-01-01T00:00:00Z", -62_135_596_800.0),
        ("2026-11-22T07:44:05", None),  # of which zone?
        ("\ud800", None),
    ],
)
def test_a_price_has_the_time_that_its_source_says_or_none(status: Status, time: str, seconds: float | None) -> None:
    status.prices.remember({"BTC": Price(1.0, time, ""), "ETH": Price(1.0, AT, "")})
    got = metrics(status)
    assert got.get("price_timestamp_seconds asset_id=BTC quote=USD") == seconds
    assert got["price_timestamp_seconds asset_id=ETH quote=USD"] == 1_795_333_445.123456
    assert got["price asset_id=BTC quote=USD"] == 1.0


def test_build_info_tells_the_versions(status: Status) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    (labels,) = [name for name, value in samples(status) if name.startswith("price_tracker_build_info") and value == 1]
    assert labels.startswith(f"price_tracker_build_info version=2.0.0 python={python}")


# The process


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere less is known")
def test_the_process_is_described_as_the_official_client_libraries_do(status: Status) -> None:
    before = time.process_time()
    got = {name: value for name, value in samples(status) if name.startswith("process_")}
    assert before <= got["process_cpu_seconds_total"] <= time.process_time()
    assert 5e6 < got["process_resident_memory_bytes"] < got["process_virtual_memory_bytes"]
    assert got["process_open_fds"] == len(os.listdir("/proc/self/fd")) - 1
    assert got["process_max_fds"] >= got["process_open_fds"]
    assert got["process_start_time_seconds"] == START


def test_the_limit_of_open_files_is_the_soft_one_if_there_is_one(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    for soft, told in ((0, 0), (100, 100), (-1, None)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, 200))
        assert dict(samples(status)).get("process_max_fds") == told


def test_many_connections_are_counted_without_listing_them(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [str(number) for number in range(160)]
    monkeypatch.setattr(status_module.os, "listdir", lambda path: listed)
    status.clients["websocket"], status.visitors = 8_000, 20
    assert dict(samples(status))["process_open_fds"] == 8_032  # 12 others, until they were listed
    status.clients["websocket"], status.visitors = 140, 9
    assert dict(samples(status))["process_open_fds"] == 159  # the listing itself was open too: 10 others
    listed = []
    status.clients["websocket"], status.visitors = 8_000, 20
    assert dict(samples(status))["process_open_fds"] == 8_030


def test_what_the_system_hides_is_left_out(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(status_module.os, "listdir", refuse)
    monkeypatch.setattr(status_module, "resource", None)
    got = [name for name, _ in samples(status) if name.startswith("process_")]
    assert got == ["process_cpu_seconds_total", "process_start_time_seconds"]
