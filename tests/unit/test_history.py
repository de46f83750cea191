"""The room of the past alone: what it keeps, what it answers, and what a file may do to it. The clock is given."""

import json
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from running import wait_for

from price_server import history as history_module
from price_server.history import RANGES, History, HistoryError

NOON = 1_800_000_000.0  # a whole number of every step but the day's
NAMES = ("1h", "24h", "7d", "30d", "1y")
connect = sqlite3.connect  # some tests replace it


class Clock:
    def __init__(self, now: float = NOON):
        self.now = now
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


class Past(History):
    """A History with a clock of its own, that can be asked and waited for."""

    retry_interval = 0.05
    locked_interval = 0.02

    def __init__(
        self,
        file: Path | None = None,
        assets: tuple[str, ...] = ("BTC", "ETH"),
        quote: str = "USD",
        source: str = "coinapi",
        now: float = NOON,
    ):
        self.clock = Clock(now)
        super().__init__(assets, quote, source, None if file is None else str(file), self.clock)

    def poll(self, price: str, *assets: str, at: float | None = None) -> None:
        if at is not None:
            self.clock.now = at
        self.add(dict.fromkeys(assets or self._assets, price), self.clock.now)

    def parts(self, name: str = "1h", *assets: str) -> list[bytes] | None:
        """The answer; what was polled before is in it, and in the file if that can be written."""
        answers: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        assert self.ask(name, assets or self._assets, answers.put)
        return answers.get(timeout=5)

    def text(self, name: str = "1h", *assets: str) -> str:
        return b"".join(self.parts(name, *assets) or []).decode()

    def points(self, name: str = "1h", asset: str = "BTC") -> list[list[float]]:
        return json.loads(self.text(name))[asset]

    def since(self, name: str) -> float | None:
        self.parts()
        return next(shown["since"] for shown in self.ranges if shown["name"] == name)

    def hold(self) -> threading.Event:
        """Keep its thread busy until the event that is returned is set."""
        held, go_on = threading.Event(), threading.Event()

        def answer(_: object) -> None:
            held.set()
            go_on.wait(5)

        self.ask("1h", ("BTC",), answer)
        assert held.wait(5)
        return go_on

    def tell_disk(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute it on the connection to the file, in the thread that owns it."""
        answers: queue.SimpleQueue[list[tuple[Any, ...]]] = queue.SimpleQueue()

        def answer(_: object) -> None:
            assert self._disk
            answers.put(self._disk.execute(statement).fetchall())

        self.ask("1h", (), answer)
        return answers.get(timeout=5)


@pytest.fixture
def past() -> Iterator[Callable[..., Past]]:
    """Starts Pasts; they are stopped behind the test."""
    started = []

    def start(*arguments: Any, wait: float = 5.0, **options: Any) -> Past:
        history = Past(*arguments, **options)
        started.append(history)
        history.start(wait)
        return history

    yield start
    for history in started:
        history.stop(5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "past.db"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="price_server.history")
    return caplog


@pytest.fixture
def filled(file: Path, past: Callable[..., Past]) -> Path:
    """A file with a day of prices in it, of a program that has ended."""
    history = past(file)
    for minute in range(0, 1441, 15):
        history.poll(f"{minute}.5", at=NOON + minute * 60)
    history.stop(5)
    return file


def rows(file: Path, select: str = "SELECT * FROM points") -> list[tuple[Any, ...]]:
    with closing(connect(file)) as table:
        return table.execute(select).fetchall()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# What is kept


@pytest.mark.parametrize(
    ("name", "seconds", "step"),
    [
        ("1h", 3600, 10),
        ("24h", 86400, 300),
        ("7d", 604800, 1800),
        ("30d", 2592000, 7200),
        ("1y", 31536000, 86400),
    ],
)
def test_a_range_has_the_last_point_of_each_step_and_none_that_is_too_old(
    past: Callable[..., Past], name: str, seconds: int, step: int
) -> None:
    history = past()
    start = NOON - NOON % step
    polls = int(seconds / step * 2.2)
    for number in range(polls):  # twice in each step
        history.poll(f"{number}", "BTC", at=start + number * step / 2)
        if number % 100 == 0:
            history.parts()
    points = history.points(name)
    newest = start + (polls - 1) * step / 2
    assert points[-1] == [newest, polls - 1]
    assert points[0][0] > newest - seconds
    assert points[0][0] <= newest - seconds + step
    assert len(points) <= 367
    assert [point[0] // step for point in points] == list(range(int(points[0][0] // step), int(newest // step) + 1))
    assert all(point[0] % step == step / 2 for point in points[:-1])
    assert history.since(name) == points[0][0]


def test_ranges_say_what_they_are_and_since_when_there_is_something(past: Callable[..., Past]) -> None:
    history = past()
    history.parts()
    before = history.ranges
    assert (
        Past().ranges
        == before
        == (  # before the start too
            {"name": "1h", "seconds": 3600, "step": 10, "since": None},
            {"name": "24h", "seconds": 86400, "step": 300, "since": None},
            {"name": "7d", "seconds": 604800, "step": 1800, "since": None},
            {"name": "30d", "seconds": 2592000, "step": 7200, "since": None},
            {"name": "1y", "seconds": 31536000, "step": 86400, "since": None},
        )
    )
    history.poll("1", "ETH", at=NOON + 0.1234567)
    history.poll("1", "BTC", at=NOON + 1)
    assert [history.since(name) for name in NAMES] == [NOON + 0.123] * 5
    assert before[0]["since"] is None  # replaced, not changed


def test_an_answer_is_json_with_the_prices_as_the_feed_sends_them(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("45000.10", "BTC", at=NOON + 0.12345)
    history.poll("0.12345678901234567", "BTC", at=NOON + 10)
    history.poll("1e-07", "ETH", at=NOON + 10)
    assert history.text() == (
        '{"BTC":[[1800000000.123,45000.10],[1800000010.000,0.12345678901234567]],"ETH":[[1800000010.000,1e-07]]}'
    )


def test_an_answer_has_the_assets_that_were_asked_for_in_that_order(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1", "BTC")
    assert history.text("1h", "ETH", "BTC") == '{"ETH":[],"BTC":[[1800000000.000,1]]}'
    assert history.text("1h", "ETH") == '{"ETH":[]}'


def test_answers_share_one_piece_per_asset_until_the_next_poll(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1")
    first, again = history.parts(), history.parts("1h", "ETH")
    assert first
    assert again
    assert again[1] is first[3]
    history.poll("2")
    assert history.points() == [[NOON, 2]]


def test_without_polls_an_answer_is_made_anew_after_ten_seconds(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1", at=NOON - 100)
    history.clock.now = NOON + 3495
    first = history.parts()
    assert history.points() == [[NOON - 100, 1]]
    history.clock.now += 9.9
    again = history.parts()
    assert first
    assert again
    assert again[1] is first[1]
    history.clock.now += 0.1
    assert history.text() == '{"BTC":[],"ETH":[]}'


def test_ranges_grow_old_without_polls_and_questions(
    past: Callable[..., Past], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "FRESH", 0.02)
    history = past()
    history.poll("1")
    assert history.since("1h") == NOON
    history.clock.now = NOON + 3600
    wait_for(lambda: history.ranges[0]["since"] is None)
    assert history.ranges[1]["since"] == NOON


# The clock


def test_an_answer_is_made_anew_when_the_clock_is_set_back_without_a_poll(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1")
    assert history.points() == [[NOON, 1]]
    history.clock.now = NOON - 1
    assert history.points() == []


def test_points_ahead_of_a_clock_that_was_set_back_are_hidden_and_then_replaced(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1", at=NOON)
    history.poll("2", at=NOON + 20)
    history.poll("3", at=NOON - 3000)
    assert history.points() == [[NOON - 3000, 3]]
    assert history.since("1h") == NOON - 3000
    history.poll("4", at=NOON + 5)
    assert history.points() == [[NOON - 3000, 3], [NOON + 5, 4]]
    history.clock.now = NOON + 20
    assert history.points() == [[NOON - 3000, 3], [NOON + 5, 4], [NOON + 20, 2]]


def test_a_clock_that_was_set_forward_leaves_what_is_within_its_range(past: Callable[..., Past]) -> None:
    history = past()
    history.poll("1", at=NOON)
    history.poll("2", at=NOON + 2 * 86400)
    assert history.points("1h") == history.points("24h") == [[NOON + 2 * 86400, 2]]
    for name in ("7d", "30d", "1y"):
        assert history.points(name) == [[NOON, 1], [NOON + 2 * 86400, 2]]


# The thread


def test_its_thread_has_a_name_and_keeps_no_program_from_ending(past: Callable[..., Past]) -> None:
    history = past()
    thread = next(thread for thread in threading.enumerate() if thread.name == "history")
    assert thread.daemon
    history.stop()
    history.stop()
    assert not thread.is_alive()
    assert not history.ask("1h", ("BTC",), lambda _: None)


def test_it_rests_while_nothing_comes(past: Callable[..., Past], file: Path) -> None:
    for history in (past(), past(file)):
        history.poll("1")
        history.parts()
        asked = history.clock.asked
        time.sleep(0.1)
        assert history.clock.asked == asked


def test_it_can_be_stopped_without_having_been_started() -> None:
    Past().stop()


def test_polls_go_before_questions(past: Callable[..., Past]) -> None:
    history = past()
    go_on = history.hold()
    answers: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
    history.ask("1h", ("BTC",), answers.put)
    history.ask("1h", ("BTC",), answers.put)
    history.poll("7", "BTC")
    go_on.set()
    for _ in range(2):
        assert b"".join(answers.get(timeout=5) or []) == b'{"BTC":[[1800000000.000,7]]}'


def test_a_hundred_questions_may_wait_and_no_more(past: Callable[..., Past]) -> None:
    history = past()
    go_on = history.hold()
    answered: list[object] = []
    assert all(history.ask("1h", ("BTC",), answered.append) for _ in range(100))
    assert not history.ask("1h", ("BTC",), answered.append)
    go_on.set()
    wait_for(lambda: len(answered) == 100)
    assert history.text() == '{"BTC":[],"ETH":[]}'


def test_a_question_that_nobody_waits_for_is_dropped(past: Callable[..., Past]) -> None:
    history = past()
    answered: list[object] = []
    history.ask("1h", ("BTC",), answered.append, wanted=lambda: False)
    history.parts()
    assert answered == []


def test_nothing_that_an_answer_raises_ends_the_thread(
    past: Callable[..., Past], log: pytest.LogCaptureFixture
) -> None:
    history = past()

    def answer(_: object) -> None:
        raise SystemExit("an answer's own error")

    go_on = history.hold()
    history.ask("1h", ("BTC",), answer)
    history.poll("1")
    threading.Timer(0.05, go_on.set).start()
    assert history.points() == [[NOON, 1]]  # asked in the same moment
    assert [record.getMessage() for record in log.records] == ["an answer of history had an error"]
    assert "an answer's own error" in log.text


def test_a_poll_that_cannot_be_kept_does_not_end_the_thread(
    past: Callable[..., Past], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = past()
    with monkeypatch.context() as broken:
        broken.setattr(history_module, "WRITE", "no SQL")
        history.poll("1")
        history.parts()
    history.poll("2", at=NOON + 10)
    assert history.points() == [[NOON + 10, 2]]
    assert [record.getMessage() for record in log.records] == ["history had an error, and goes on"]


def test_a_question_that_fails_is_answered_with_none(past: Callable[..., Past], log: pytest.LogCaptureFixture) -> None:
    history = past()
    assert history.parts("1h", "DOGE") is None
    assert [record.getMessage() for record in log.records] == ["a question to history failed"]
    assert "KeyError: 'DOGE'" in log.text
    assert history.text() == '{"BTC":[],"ETH":[]}'


def test_an_unknown_range_is_refused_at_once(past: Callable[..., Past]) -> None:
    with pytest.raises(ValueError, match="unpack"):
        past().ask("2h", ("BTC",), lambda _: None)


def test_what_waits_for_a_busy_thread_is_merged_and_does_not_grow(past: Callable[..., Past]) -> None:
    history = past()
    go_on = history.hold()
    for number in range(3000):
        history.poll(str(number), "BTC", at=NOON + number * 5)
    per_step = [sum(point[0] == span.step for point in history._waiting) for span in RANGES]
    assert per_step == [361, 50, 9, 3, 1]  # of 15,000 s
    go_on.set()
    assert history.points("1h")[-1] == [NOON + 2999 * 5, 2999]
    assert len(history.points("1h")) == 360
    assert len(history.points("24h")) == 50


def test_an_hour_of_polls_costs_a_bounded_number_of_steps_in_every_range() -> None:
    points = history_module.Points()
    for span in RANGES:
        for slot in range(1000):
            points.add(span.step, slot, "BTC", slot, "1")
            points.add(span.step, slot, "BTC", slot + 0.5, "2")
    kept = [[point for point in points if point[0] == span.step] for span in RANGES]
    assert [len(slots) for slots in kept] == [361, 289, 337, 361, 366]
    assert all(slots[-1][1:] == (999, "BTC", 999.5, "2") for slots in kept)
    assert all(later[1] == earlier[1] + 1 for slots in kept for earlier, later in pairwise(slots))


# The file


def test_the_past_outlives_the_program_and_is_there_before_the_first_poll(
    past: Callable[..., Past], file: Path
) -> None:
    history = past(file)
    history.poll("0.12345678901234567", at=NOON)
    history.poll("2.50", at=NOON + 86000)
    expected = {name: history.text(name) for name in NAMES}
    shown = history.ranges
    history.stop(5)
    assert os.listdir(file.parent) == ["past.db"]

    again = past(file, now=NOON + 86000)
    assert again.ranges == shown
    assert {name: again.text(name) for name in NAMES} == expected
    assert "0.12345678901234567" in expected["24h"]


def test_each_poll_is_in_the_file_at_once(past: Callable[..., Past], file: Path, tmp_path: Path) -> None:
    """What a program that is killed leaves: the file, and the latest changes beside it."""
    history = past(file)
    history.poll("1", "BTC")
    history.parts()
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in os.listdir(tmp_path):
        if name.startswith("past.db"):
            shutil.copy(tmp_path / name, killed / name)
    assert len(rows(killed / "past.db")) == 5
    assert past(killed / "past.db").points() == [[NOON, 1]]


def test_an_empty_file_is_a_new_one(past: Callable[..., Past], file: Path) -> None:
    file.touch()
    past(file).poll("1")
    assert past(file.with_name("other.db")).points() == []


def test_other_sources_and_quotes_share_the_file_and_never_mix(past: Callable[..., Past], file: Path) -> None:
    for number, options in enumerate([{}, {"source": "demo"}, {"quote": "EUR"}]):
        history = past(file, **options)
        assert history.text("1y") == '{"BTC":[],"ETH":[]}'
        assert history.since("1y") is None
        history.poll(str(number), "BTC")
        history.stop(5)
    for number, options in enumerate([{}, {"source": "demo"}, {"quote": "EUR"}]):
        history = past(file, **options)
        assert history.text("1y", "BTC") == f'{{"BTC":[[1800000000.000,{number}]]}}'
        history.stop(5)


def test_an_asset_that_comes_back_finds_its_past(past: Callable[..., Past], filled: Path) -> None:
    other = past(filled, assets=("BTC", "SOL"), now=NOON + 86400)
    other.poll("1")
    assert json.loads(other.text("24h"))["SOL"] == [[NOON + 86400, 1]]
    other.stop(5)
    assert len(past(filled, now=NOON + 86400).points("24h", "ETH")) == 96


def test_what_is_too_old_leaves_the_file_whosever_it_is(past: Callable[..., Past], file: Path) -> None:
    for options in ({}, {"source": "demo"}, {"quote": "EUR"}, {"assets": ("DOGE",)}):
        history = past(file, **options)
        history.poll("1")
        history.stop(5)
    history = past(file)
    history.poll("2", "BTC", at=NOON + 3 * 86400)
    history.parts()
    history.stop(5)
    kept = sorted(rows(file, "SELECT step, count(*) FROM points GROUP BY step"))
    assert kept == [(10, 1), (300, 1), (1800, 8), (7200, 8), (86400, 8)]


def test_the_file_says_whose_it_is_and_how_it_is_kept(past: Callable[..., Past], filled: Path) -> None:
    assert rows(filled, "PRAGMA application_id") == [(0x50525448,)]
    assert rows(filled, "PRAGMA user_version") == [(1,)]
    assert rows(filled, "PRAGMA journal_mode") == [("wal",)]
    history = past(filled)
    history.poll("1")
    history.parts()
    assert (filled.parent / "past.db-wal").stat().st_size > 0
    assert history.tell_disk("PRAGMA synchronous") == [(1,)]  # NORMAL: a loss of power leaves no damaged file


def test_a_link_to_a_file_is_followed(past: Callable[..., Past], file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file.symlink_to(tmp_path / "elsewhere" / "real.db")
    history = past(file)
    history.poll("1")
    history.parts()
    history.stop(5)
    assert len(rows(tmp_path / "elsewhere" / "real.db")) == 10


def test_a_link_may_stand_where_nothing_may_be_written(
    past: Callable[..., Past], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, real = tmp_path / "links", tmp_path / "real"
    links.mkdir()
    real.mkdir()
    (links / "past.db").symlink_to(real / "past.db")
    monkeypatch.setattr(os, "access", lambda asked, mode: str(asked) != os.path.realpath(links))
    past(links / "past.db").poll("1")
    wait_for(lambda: len(rows(real / "past.db")) == 10)
    assert os.listdir(links) == ["past.db"]


def test_a_name_with_signs_that_mean_something_in_an_address(past: Callable[..., Past], tmp_path: Path) -> None:
    for _ in range(2):
        history = past(tmp_path / "50%20 ?mode=memory#ä.db")
        history.poll("1")
        history.stop(5)
    assert os.listdir(tmp_path) == ["50%20 ?mode=memory#ä.db"]


# Files that are refused


def _stranger(path: Path, *statements: str) -> None:
    with closing(connect(path)) as database:
        for statement in ("CREATE TABLE theirs (x)", "INSERT INTO theirs VALUES (1)", *statements):
            database.execute(statement)
        database.commit()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (lambda path: path.mkdir(), "is a directory: name a file in it"),
    "a pipe": (lambda path: os.mkfifo(path), "is no regular file: remove it"),
    "a text": (lambda path: path.write_text("BTC,45000\n" * 1000), "is no SQLite database: move it away"),
    "one byte": (lambda path: path.write_text("x"), "is no SQLite database: move it away"),
    "a stranger's": (_stranger, "is a database of another program: move it away"),
    "a stranger's in WAL mode": (
        lambda path: _stranger(path, "PRAGMA journal_mode = WAL"),
        "is a database of another program: move it away",
    ),
    "another id": (
        lambda path: _stranger(path, "PRAGMA application_id = 1346524231", "PRAGMA user_version = 1"),
        "is a database of another program: move it away",
    ),
    "a newer one": (
        lambda path: _stranger(path, "PRAGMA application_id = 1347572808", "PRAGMA user_version = 2"),
        "was made by a newer version of this program: use that one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_refused_stays_as_it_was(kind: str, file: Path) -> None:
    make, complaint = REFUSED[kind]
    make(file)
    before = snapshot(file.parent)
    with pytest.raises(HistoryError) as refusal:
        Past(file).start(5)
    assert str(refusal.value) == f"history file '{file}' {complaint}, or name another file"
    assert "\n" not in str(refusal.value)
    assert snapshot(file.parent) == before
    wait_for(lambda: not any(thread.name == "history" for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("kept", "how"),
    [
        (17, ""),
        (99, ""),
        (100, " (cut off)"),
        (8192, " (database disk image is malformed)"),
        (-4096, " (database disk image is malformed)"),
        (-1, " (cut off)"),
    ],
)
def test_a_file_that_was_cut_is_refused_and_stays_as_it_was(filled: Path, kept: int, how: str) -> None:
    filled.write_bytes(filled.read_bytes()[:kept])
    before = snapshot(filled.parent)
    with pytest.raises(HistoryError) as refusal:
        Past(filled).start(5)
    assert str(refusal.value) == (
        f"history file '{filled}' is damaged{how}: put a copy in its place, or name another file"
    )
    assert snapshot(filled.parent) == before


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])  # with files beside it while it is looked at, and without
def test_a_file_whose_content_was_changed_is_refused_and_stays_as_it_was(filled: Path, mode: str) -> None:
    rows(filled, f"PRAGMA journal_mode = {mode}")
    content = bytearray(filled.read_bytes())
    content[8192:8292] = b"x" * 100
    filled.write_bytes(content)
    before = snapshot(filled.parent)
    with pytest.raises(HistoryError, match=r"^history file '\S+past.db' is damaged \(.*[Pp]age 3: .*\): put a copy"):
        Past(filled).start(5)
    assert snapshot(filled.parent) == before


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoryError) as refusal:
        Past(tmp_path / "no" / "past.db").start(5)
    assert str(refusal.value) == (
        f"history file '{tmp_path}/no/past.db' is in a directory that does not exist: make '{tmp_path}/no', "
        "or name another file"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "denied", "complaint"),
    [
        ("past.db", os.R_OK, "must be readable and writable: change its permissions"),
        ("past.db", os.W_OK, "must be readable and writable: change its permissions"),
        ("", os.W_OK, "gets files beside it: make '{}' writable"),
        ("", os.X_OK, "gets files beside it: make '{}' writable"),
    ],
)
def test_what_may_not_be_written_is_refused(
    filled: Path, monkeypatch: pytest.MonkeyPatch, name: str, denied: int, complaint: str
) -> None:
    path = os.path.join(os.path.realpath(filled.parent), name).rstrip("/")
    monkeypatch.setattr(os, "access", lambda asked, mode: str(asked) != path or not mode & denied)
    before = snapshot(filled.parent)
    with pytest.raises(HistoryError) as refusal:
        Past(filled).start(5)
    assert str(refusal.value) == f"history file '{filled}' {complaint.format(path)}, or name another file"
    assert snapshot(filled.parent) == before


def test_a_first_start_that_was_cut_short_is_finished(past: Callable[..., Past], filled: Path, tmp_path: Path) -> None:
    """A journal lies beside the file: what of it is undone needs writing, and is no damage."""
    cut = tmp_path / "cut"
    cut.mkdir()
    with closing(connect(filled, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA cache_size = 1")
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE points SET price = price || ' and more, to be undone'")
        for name in ("past.db", "past.db-journal"):
            shutil.copy(tmp_path / name, cut / name)
    assert len(past(cut / "past.db", now=NOON + 86400).points("24h")) == 96
    assert "undone" not in str(rows(cut / "past.db"))


# A disk that makes trouble later


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def warning(file: Path, reason: str) -> list[str]:
    return [f"the past is kept in memory alone until the file can be used: history file '{file}'{reason}"]


def recovered(caplog: pytest.LogCaptureFixture, file: Path) -> bool:
    return f"history file '{file}' is up to date again" in [
        record.getMessage() for record in caplog.records if record.levelname == "INFO"
    ]


class Disk(sqlite3.Connection):
    """A connection whose file can be made to hang, to be full or to fail."""

    gate = threading.Event()
    error: str | None = None
    fails_at = ""  # how the statement begins

    def __init__(self, name: str, **options: Any):
        self.is_file = name != ":memory:"
        if self.is_file:
            assert self.gate.wait(10)
        super().__init__(name, **options)

    def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if self.is_file:
            assert self.gate.wait(10)
            if self.error and statement.startswith(self.fails_at):
                raise sqlite3.OperationalError(self.error)
        return super().executemany(statement, *arguments)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Disk]]:
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: connect(name, factory=Disk, **options))
    monkeypatch.setattr(Disk, "gate", threading.Event())
    Disk.gate.set()
    yield Disk
    Disk.gate.set()


def test_a_lock_of_another_program_costs_one_warning_and_no_point(
    past: Callable[..., Past], file: Path, log: pytest.LogCaptureFixture
) -> None:
    history = past(file)
    history.retry_interval = 60.0  # that is for other trouble
    opened = history._disk
    with closing(connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for number in range(5):
            history.poll(str(number), at=NOON + number * 10)
            assert history.points()[-1] == [NOON + number * 10, number]  # answered all the same
        wait_for(lambda: warnings(log))
        time.sleep(0.2)  # it is tried again in vain
        assert warnings(log) == warning(file, ": database is locked")
        other.execute("COMMIT")
    wait_for(lambda: recovered(log, file))
    assert history._disk is opened
    assert len(rows(file, "SELECT * FROM points WHERE step = 10")) == 10
    assert len(warnings(log)) == 1


def test_a_file_that_another_program_writes_to_is_read_at_the_start(past: Callable[..., Past], filled: Path) -> None:
    with closing(connect(filled, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(past(filled, now=NOON + 86400).points("24h")) == 96


def test_a_locked_file_is_waited_for_at_the_start(past: Callable[..., Past], filled: Path) -> None:
    other = connect(filled, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.3, other.close).start()
    assert len(past(filled, now=NOON + 86400).points("24h")) == 96


def test_a_file_that_stays_locked_is_opened_when_it_can_be(
    past: Callable[..., Past], filled: Path, log: pytest.LogCaptureFixture
) -> None:
    with closing(connect(filled, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        history = past(filled, now=NOON + 86400 + 300, wait=0.8)
        assert warnings(log) == warning(filled, ": database is locked")
        history.poll("7")
        assert history.points("24h") == [[NOON + 86400 + 300, 7]]
    wait_for(lambda: recovered(log, filled))
    assert len(history.points("24h")) == 97
    assert history.since("24h") == NOON + 900
    assert len(warnings(log)) == 1
    assert len(rows(filled, "SELECT * FROM points WHERE price = '7'")) == 10


def test_a_full_disk_costs_one_warning_and_no_point(
    past: Callable[..., Past], file: Path, log: pytest.LogCaptureFixture
) -> None:
    history = past(file)
    opened = history._disk
    history.tell_disk(f"PRAGMA max_page_count = {os.path.getsize(file) // 4096}")
    for number in range(100):
        history.poll(str(number), at=NOON + number * 10)
        assert history.points()[-1] == [NOON + number * 10, number]
    assert warnings(log) == warning(file, ": database or disk is full")
    assert not recovered(log, file)
    assert history._disk is opened
    history.tell_disk("PRAGMA max_page_count = 10000")
    wait_for(lambda: recovered(log, file))
    assert len(rows(file, "SELECT * FROM points WHERE step = 10")) == 200


def test_a_disk_that_fails_costs_one_warning_and_no_point(
    past: Callable[..., Past],
    file: Path,
    disk: type[Disk],
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = past(file)
    history.locked_interval = 60.0  # that is for a lock
    history.poll("1", at=NOON)
    monkeypatch.setattr(disk, "error", "disk I/O error")
    history.poll("2", at=NOON + 10)
    history.parts()
    assert warnings(log) == warning(file, ": disk I/O error")
    time.sleep(0.2)
    history.poll("3", at=NOON + 20)
    assert history.points() == [[NOON, 1], [NOON + 10, 2], [NOON + 20, 3]]
    monkeypatch.setattr(disk, "error", None)
    wait_for(lambda: recovered(log, file))
    assert len(warnings(log)) == 1
    assert rows(file, "SELECT price FROM points WHERE step = 10 AND asset = 'BTC'") == [("1",), ("2",), ("3",)]


def test_a_poll_is_written_whole_or_not_at_all(
    past: Callable[..., Past], file: Path, disk: type[Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    history = past(file)
    history.retry_interval = 60.0
    monkeypatch.setattr(disk, "error", "disk I/O error")
    monkeypatch.setattr(disk, "fails_at", "DELETE")  # behind the poll's points
    history.poll("1")
    history.parts()
    assert rows(file) == []


def test_a_file_that_was_deleted_is_made_anew_with_what_is_known(
    past: Callable[..., Past], filled: Path, log: pytest.LogCaptureFixture
) -> None:
    history = past(filled, now=NOON + 86400)
    known = len(rows(filled))
    filled.unlink()
    history.poll("7", at=NOON + 86401)
    history.parts()
    assert warnings(log) == warning(filled, ": No such file or directory")
    wait_for(lambda: recovered(log, filled))
    history.stop(5)
    assert len(rows(filled)) == known
    assert len(rows(filled, "SELECT * FROM points WHERE price = '7'")) == 10


def test_a_file_that_was_replaced_is_gone_on_with_and_keeps_what_is_in_it(
    past: Callable[..., Past], filled: Path, log: pytest.LogCaptureFixture
) -> None:
    other = past(filled.with_name("other.db"), source="other")
    for number in range(500):
        other.poll(f"{number}", at=NOON + number * 10)
    other.stop(5)
    history = past(filled, now=NOON + 86400)
    for number in range(50):  # they stand in FILE-wal, which must not be taken for changes of the other file
        history.poll(str(number), at=NOON + 86400 + number * 10)
        history.parts()
    expected = history.text("24h")
    filled.with_name("other.db").rename(filled)
    history.poll("49", at=history.clock.now)
    wait_for(lambda: recovered(log, filled))
    assert warnings(log) == warning(filled, " was replaced")
    history.stop(5)
    assert rows(filled, "PRAGMA integrity_check") == [("ok",)]
    assert past(filled, now=history.clock.now).text("24h") == expected
    assert len(past(filled, now=history.clock.now, source="other").points("24h")) == 16


def test_a_file_that_was_replaced_takes_no_newer_price_back(
    past: Callable[..., Past], file: Path, log: pytest.LogCaptureFixture
) -> None:
    history = past(file)
    history.poll("1")
    history.stop(5)
    copy = shutil.copy(file, file.with_name("copy.db"))
    history = past(file)
    history.poll("2", at=NOON + 5)  # in the same step as the one in the copy
    history.parts()
    os.replace(copy, file)
    history.poll("3", at=NOON + 10)
    wait_for(lambda: recovered(log, file))
    assert history.points() == [[NOON + 5, 2], [NOON + 10, 3]]
    history.stop(5)
    assert past(file, now=NOON + 10).points() == [[NOON + 5, 2], [NOON + 10, 3]]


def test_a_file_that_was_replaced_by_a_stranger_is_left_alone_and_the_past_stays(
    past: Callable[..., Past], file: Path, log: pytest.LogCaptureFixture
) -> None:
    history = past(file)
    history.poll("1")
    history.parts()
    file.unlink()
    file.write_text("a stranger's text")
    history.poll("2", at=NOON + 10)
    history.parts()
    time.sleep(0.2)
    assert len(warnings(log)) == 1
    assert file.read_text() == "a stranger's text"
    assert history.points() == [[NOON, 1], [NOON + 10, 2]]
    file.unlink()
    wait_for(lambda: recovered(log, file))
    assert rows(file, "SELECT price FROM points WHERE step = 10 AND asset = 'BTC'") == [("1",), ("2",)]


def test_a_disk_that_hangs_keeps_nobody_waiting(
    past: Callable[..., Past], file: Path, disk: type[Disk], log: pytest.LogCaptureFixture
) -> None:
    history = past(file)
    disk.gate.clear()
    begin = time.monotonic()
    for number in range(1000):
        history.poll(str(number), at=NOON + number * 10)
    assert time.monotonic() - begin < 1
    assert sum(1 for _ in history._waiting) < 2 * (361 + 2 * 34)
    begin = time.monotonic()
    history.stop()
    assert 0.5 <= time.monotonic() - begin < 1.4
    disk.gate.set()
    history.stop(5)
    assert max(rows(file, "SELECT time FROM points")) == (NOON + 9990,)


def test_a_disk_that_hangs_at_the_start_is_gone_on_without(
    past: Callable[..., Past], filled: Path, disk: type[Disk], log: pytest.LogCaptureFixture
) -> None:
    disk.gate.clear()
    begin = time.monotonic()
    history = past(filled, now=NOON + 86401, wait=0.1)
    assert 0.1 <= time.monotonic() - begin < 1
    assert warnings(log) == warning(filled, " does not answer")
    history.poll("7")
    disk.gate.set()
    wait_for(lambda: recovered(log, filled))
    assert len(history.points("24h")) == 96
    assert history.points("24h")[-1] == [NOON + 86401, 7]
    assert len(rows(filled, "SELECT * FROM points WHERE price = '7'")) == 10


def test_a_refusal_that_comes_late_is_a_warning(
    past: Callable[..., Past], file: Path, disk: type[Disk], log: pytest.LogCaptureFixture
) -> None:
    disk.gate.clear()
    history = past(file, wait=0.1)
    file.write_text("a stranger's text")
    disk.gate.set()
    history.poll("1")
    assert history.points() == [[NOON, 1]]
    assert len(warnings(log)) == 1
    assert file.read_text() == "a stranger's text"


def test_a_stop_writes_what_is_left_even_in_trouble(
    past: Callable[..., Past],
    file: Path,
    disk: type[Disk],
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = past(file)
    history.retry_interval = 60.0
    monkeypatch.setattr(disk, "error", "disk I/O error")
    history.poll("1")
    history.parts()
    monkeypatch.setattr(disk, "error", None)
    history.poll("2", at=NOON + 10)
    history.parts()
    assert rows(file) == []  # it is not time yet to try again
    history.stop(5)
    assert rows(file, "SELECT price FROM points WHERE step = 10 AND asset = 'BTC'") == [("1",), ("2",)]
