"""The copy of the past in a file, and what may happen to the file. The clock is given."""

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from history_files import NOON, fill, rows
from running import wait_for

from price_server.archive import Archive
from price_server.history import History

NAMES = ("1h", "24h", "7d", "30d", "1y")
connect = sqlite3.connect  # some tests replace it
Start = Callable[..., "Past"]  # the fixture `past`
Log = pytest.LogCaptureFixture


class Past(Archive):
    """An Archive with its History, and a clock that stands still."""

    retry_interval = 0.05

    def __init__(
        self,
        file: Path,
        assets: tuple[str, ...] = ("BTC", "ETH"),
        quote: str = "USD",
        source: str = "coinapi",
        now: float = NOON,
    ):
        self.assets, self.now, self.file = assets, now, file
        self.owner = threading.RLock()  # stands for the thread that owns the history
        self.history = History(assets, lambda: self.now)
        self.loads = 0
        super().__init__(str(file), source, quote, assets, loaded=self.load, wall_clock=lambda: self.now)

    def load(self, step: int, texts: dict[str, bytes]) -> None:
        with self.owner:
            self.loads += 1
            self.write(self.history.load(step, texts))

    def poll(self, price: str, *assets: str, at: float | None = None) -> None:
        with self.owner:
            self.now = self.now if at is None else at
            self.write(self.history.add(dict.fromkeys(assets or self.assets, price), self.now))

    def saved(self) -> None:
        """Wait until the poll of this time is in the file."""
        wait_for(lambda: rows(self.file, f"SELECT * FROM points WHERE time = {self.now}"), what="the poll in the file")

    def text(self, name: str = "1h") -> str:
        with self.owner:
            return b"".join(self.history.json_pieces(name, self.assets)).decode()

    def points(self, name: str = "1h", asset: str = "BTC") -> list[list[float]]:
        return json.loads(self.text(name))[asset]


@pytest.fixture
def past() -> Iterator[Callable[..., Past]]:
    """Starts Pasts; they are stopped after the test."""
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
    caplog.set_level("INFO", logger="price_server.archive")
    return caplog


@pytest.fixture
def filled(file: Path) -> Path:
    return fill(file, ("BTC", "ETH"))


# The thread


def test_its_thread_has_a_name_and_keeps_no_program_from_ending(past: Start, file: Path) -> None:
    history = past(file)
    thread = next(thread for thread in threading.enumerate() if thread.name == "archive")
    assert thread.daemon
    history.stop()
    assert not thread.is_alive()
    Past(file).stop()  # without having been started


# The file


def test_the_past_outlives_the_program_and_is_there_before_the_first_poll(past: Start, file: Path) -> None:
    history = past(file)
    history.poll("0.12345678901234567", at=NOON)
    history.poll("2.50", at=NOON + 86000)
    expected = {name: history.text(name) for name in NAMES}
    shown = history.history.describe()
    history.stop(5)
    assert os.listdir(file.parent) == ["past.db"]

    again = past(file, now=NOON + 86000)
    assert again.history.describe() == shown
    assert again.loads == 5
    assert {name: again.text(name) for name in NAMES} == expected
    assert "0.12345678901234567" in expected["24h"]


def test_an_empty_file_is_a_new_one(past: Start, file: Path) -> None:
    file.touch()
    past(file).poll("1")
    assert past(file.with_name("other.db")).points() == []


def test_a_time_of_an_older_file_is_rounded_within_its_step(past: Start, filled: Path) -> None:
    with closing(connect(filled)) as table, table:
        table.execute("UPDATE points SET time = 1800000009.9998 WHERE step = 10 AND slot = 180000000")
    assert past(filled).text() == '{"BTC":[],"ETH":[]}'
    assert past(filled, now=NOON + 10).points() == [[NOON + 9.999, 0.5]]


def test_other_sources_and_quotes_share_the_file_and_never_mix(past: Start, file: Path) -> None:
    for number, options in enumerate([{}, {"source": "demo"}, {"quote": "EUR"}]):
        history = past(file, **options)
        assert history.text("1y") == '{"BTC":[],"ETH":[]}'
        history.poll(str(number), "BTC")
        history.stop(5)
    for number, options in enumerate([{}, {"source": "demo"}, {"quote": "EUR"}]):
        history = past(file, **options)
        assert history.points("1y") == [[NOON, number]]
        history.stop(5)


def test_what_memory_dropped_leaves_the_file_and_nothing_else(past: Start, file: Path) -> None:
    others = ({"source": "demo"}, {"quote": "EUR"}, {"assets": ("DOGE",)})
    for options in others:
        history = past(file, **options)
        history.poll("1", at=NOON - 400 * 86400)
        history.poll("1", at=NOON)
        history.stop(5)
    history = past(file, ("BTC",))
    for seconds in (*range(0, 3700, 10), -1000):  # at the end the clock is set back
        history.poll("2", at=NOON + seconds)
    history.stop(5)
    mine = "FROM points WHERE quote = 'USD' AND source = 'coinapi' AND asset = 'BTC'"
    assert rows(file, f"SELECT step, count(*) {mine} GROUP BY step ORDER BY step") == [
        *((10, 361), (300, 14), (1800, 4), (7200, 2), (86400, 1))
    ]
    assert rows(file, f"SELECT time {mine} AND step = 10 LIMIT 2") == [(NOON - 1000,), (NOON + 100,)]
    assert rows(file, "SELECT count(*) FROM points WHERE price = '1'") == [(2 * 5 * (2 + 2 + 1),)]


def test_a_wrong_clock_takes_nothing_out_of_the_file(past: Start, filled: Path) -> None:
    before = rows(filled)
    for now in (NOON + 400 * 86400, 63_072_000.0, NOON + 86400):
        history = past(filled, now=now)
        history.poll("7")
        history.stop(5)
    gone = set(before) - set(rows(filled))
    assert all(slot == (NOON + 86400) // step for step, slot, *_ in gone), "the last poll took their place"


def test_the_file_says_whose_it_is_and_how_it_is_kept(past: Start, filled: Path, disk: type["Disk"]) -> None:
    assert rows(filled, "PRAGMA application_id") == [(0x50525448,)]
    assert (rows(filled, "PRAGMA user_version"), rows(filled, "PRAGMA journal_mode")) == ([(1,)], [("wal",)])
    history = past(filled)
    history.poll("1")
    history.saved()
    assert (filled.parent / "past.db-wal").exists()
    assert "PRAGMA synchronous = NORMAL" in disk.executed  # a loss of power leaves no damaged file


def test_the_files_beside_it_are_small_again_once_another_program_has_read(
    past: Start, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.archive.MAX_WAL", 200_000)
    history = past(file)
    history.poll("1")
    history.saved()
    wal = file.with_name("past.db-wal")
    with closing(connect(file, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert len(reader.execute("SELECT * FROM points").fetchall()) == 10
        number = 0
        while wal.stat().st_size < 400_000:
            number += 1
            history.poll("2", at=NOON + number * 300)
            history.saved()
        assert wal.stat().st_size >= 400_000
        assert history.state == "ok"
    history.poll("2", at=history.now + 300)
    wait_for(lambda: wal.stat().st_size < 200_000)
    assert history.write_errors == 0


def test_a_link_may_be_where_none_may_write(past: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, real = tmp_path / "links" / "past.db", tmp_path / "real" / "50%20 ?mode=memory#ä.db"  # signs of an address
    for file in (link, real):
        file.parent.mkdir()
    link.symlink_to(real)
    monkeypatch.setattr(os, "access", lambda asked, mode: str(asked) != os.path.realpath(link.parent))
    for number in range(2):
        history = past(link, now=NOON + number)
        assert len(history.points()) == number
        history.poll("1")
        history.stop(5)
    assert (os.listdir(link.parent), os.listdir(real.parent)) == (["past.db"], [real.name])


def test_a_first_start_that_was_cut_short_is_finished(past: Start, filled: Path, tmp_path: Path) -> None:
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
    return [f"the price history is kept in memory alone until the file can be used: history file '{file}'{reason}"]


def recovered(caplog: pytest.LogCaptureFixture, file: Path) -> bool:
    return f"history file '{file}' is up to date again" in caplog.messages


ERROR_CODES = {
    "database is locked": sqlite3.SQLITE_BUSY,
    "database or disk is full": sqlite3.SQLITE_FULL,
    "disk I/O error": sqlite3.SQLITE_IOERR,
}


class Disk(sqlite3.Connection):
    """A connection whose file can be made to hang, to be full or to fail."""

    gate: threading.Event
    error: str | None
    fails_at: str  # how the statement begins
    executed: list[str]
    opened: int

    def __init__(self, name: str, **options: Any):
        assert self.gate.wait(10)
        type(self).opened += 1
        super().__init__(name, **options)

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        self.executed.append(statement)
        if self.fails_at:
            self.fail(statement)
        return super().execute(statement, *arguments)

    def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        assert self.gate.wait(10)
        self.fail(statement)
        return super().executemany(statement, *arguments)

    def fail(self, statement: str) -> None:
        if self.error == "unexpected":
            raise RuntimeError(self.error)
        if self.error and statement.startswith(self.fails_at):
            error = sqlite3.OperationalError(self.error)
            error.sqlite_errorcode = ERROR_CODES[self.error]
            raise error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Disk]]:
    Disk.gate, Disk.error, Disk.fails_at, Disk.executed, Disk.opened = threading.Event(), None, "", [], 0
    Disk.gate.set()
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: connect(name, factory=Disk, **options))
    yield Disk
    Disk.error = None
    Disk.gate.set()


def test_a_file_that_another_program_writes_to_is_read_at_the_start(past: Start, filled: Path) -> None:
    with closing(connect(filled, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(past(filled, now=NOON + 86400).points("24h")) == 96


def test_a_locked_file_is_waited_for_at_the_start(past: Start, filled: Path) -> None:
    other = connect(filled, isolation_level=None, check_same_thread=False)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.3, other.close).start()
    assert len(past(filled, now=NOON + 86400).points("24h")) == 96


def test_a_file_that_stays_locked_is_opened_when_it_can_be(past: Start, filled: Path, log: Log) -> None:
    with closing(connect(filled, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        history = past(filled, now=NOON + 86400 + 300, wait=0.8)
        assert warnings(log) == warning(filled, ": database is locked")
        history.poll("7")
        assert history.points("24h") == [[NOON + 86400 + 300, 7]]
    wait_for(lambda: recovered(log, filled))
    assert len(history.points("24h")) == 97
    assert history.history.describe()[1]["since"] == NOON + 900
    assert len(warnings(log)) == 1
    assert len(rows(filled, "SELECT * FROM points WHERE price = '7'")) == 10


def test_a_file_that_is_locked_while_it_is_read_is_read_later(
    past: Start, filled: Path, disk: type[Disk], log: Log
) -> None:
    disk.error, disk.fails_at = "database is locked", "SELECT"
    history = past(filled, now=NOON + 86400, wait=0.1)
    wait_for(lambda: history.write_errors)
    disk.error = None
    wait_for(lambda: recovered(log, filled))
    assert len(history.points("24h")) == 96


@pytest.mark.parametrize(
    ("error", "opened_again"),
    [
        ("database is locked", False),
        ("database or disk is full", False),
        ("disk I/O error", True),
        ("unexpected", True),
    ],
)
def test_a_full_disk_causes_one_warning_and_loses_no_point(
    past: Start, file: Path, disk: type[Disk], log: Log, error: str, opened_again: bool
) -> None:
    history = past(file)
    opened = disk.opened
    assert (history.state, history.write_errors, history.last_write) == ("ok", 0, 0.0)
    history.poll("0")
    history.saved()
    disk.error = error
    for number in range(1, 100):
        history.poll(str(number), at=NOON + number * 10)
        assert history.points()[-1] == [NOON + number * 10, number]
    wait_for(lambda: history.write_errors > 2, what="some tries")
    assert warnings(log) == warning(file, f": {error}")
    assert [record.levelname for record in log.records].count("ERROR") == (error == "unexpected")
    assert (history.state, history.last_write) == ("failing", NOON)
    assert history.loads == 5, "it is not read again with each try"
    disk.error = None
    wait_for(lambda: recovered(log, file))
    assert (history.state, history.last_write) == ("ok", NOON + 990)
    assert len(warnings(log)) == 1
    assert (disk.opened > opened) == opened_again
    assert len(rows(file, "SELECT * FROM points WHERE step = 10")) == 200


def test_after_a_disk_that_took_nothing_for_hours_the_file_has_what_memory_has(
    past: Start, file: Path, disk: type[Disk], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("price_server.archive.MAX_WAITING", 1)  # so that 100 polls wait, and no more
    history = past(file, ("BTC",))
    history.poll("0.5")
    history.saved()
    disk.error = "database or disk is full"
    for number in range(1, 400):
        history.poll(str(number), at=NOON + number * 10)
    disk.error = None
    wait_for(lambda: recovered(log, file))
    expected = {name: history.text(name) for name in NAMES}
    history.stop(5)
    again = past(file, ("BTC",), now=history.now)
    assert {name: again.text(name) for name in NAMES} == expected
    assert len(rows(file, "SELECT * FROM points WHERE step = 10")) == 361


def test_a_poll_is_written_whole_or_not_at_all(past: Start, file: Path, disk: type[Disk]) -> None:
    history = past(file, ("BTC",))
    for number in range(361):
        history.poll("1", at=NOON + number * 10)
    history.saved()
    before = rows(file)
    history.retry_interval = 60.0
    disk.error = "disk I/O error"
    disk.fails_at = "DELETE"  # after the poll's points
    history.poll("2", at=NOON + 3610)
    wait_for(lambda: history.write_errors)
    assert rows(file) == before


def test_a_file_that_was_deleted_is_made_again_when_it_may_be(
    past: Start, filled: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, may_access = past(filled, now=NOON + 86400), os.access
    monkeypatch.setattr(os, "access", lambda *_: False)
    history.poll("6", at=NOON + 86401)
    history.saved()
    assert warnings(log) == [], "what is open stays open"
    known = len(rows(filled))
    filled.unlink()
    history.poll("7", at=NOON + 86402)
    wait_for(lambda: history.write_errors > 2, what="some tries")
    assert warnings(log) == warning(filled, ": No such file or directory")
    assert not filled.exists()
    known_points: list[Any] = []
    monkeypatch.setattr(history, "write", known_points.append)
    monkeypatch.setattr(os, "access", may_access)
    wait_for(lambda: len(known_points) == 5)
    time.sleep(0.1)
    assert history.state == "failing", "until what memory has is in the new file"
    monkeypatch.undo()
    for points in known_points:
        history.write(points)
    wait_for(lambda: recovered(log, filled))
    assert len(rows(filled)) == known
    assert len(rows(filled, "SELECT * FROM points WHERE price = '7'")) == 10


def test_a_file_that_was_replaced_is_gone_on_with_and_what_memory_has_wins(past: Start, filled: Path, log: Log) -> None:
    replacement = shutil.copy(filled, filled.with_name("other.db"))
    other = past(replacement, source="other")
    for number in range(500):
        other.poll(f"{number}", at=NOON + number * 10)
    other.stop(5)
    history = past(filled, now=NOON + 86400)
    for number in range(50):  # they stand in FILE-wal, which must not be taken for changes of the other file
        history.poll(str(number), at=NOON + 86400 + number * 10)  # the first in the same steps as the last in the copy
    history.saved()
    expected = history.text("24h")
    os.replace(replacement, filled)
    history.poll("49", at=history.now)
    wait_for(lambda: recovered(log, filled))
    assert warnings(log) == warning(filled, " was replaced")
    assert history.text("24h") == expected
    history.stop(5)
    assert rows(filled, "PRAGMA integrity_check") == [("ok",)]
    assert past(filled, now=history.now).text("24h") == expected
    assert len(past(filled, now=history.now, source="other").points("24h")) == 16


def test_a_file_replaced_by_a_stranger_is_left_alone_and_the_past_stays(past: Start, file: Path, log: Log) -> None:
    history = past(file)
    history.poll("1")
    history.saved()
    file.unlink()
    file.write_text("a stranger's text")
    history.poll("2", at=NOON + 10)
    wait_for(lambda: history.write_errors > 2, what="some tries")
    assert len(warnings(log)) == 1
    assert file.read_text() == "a stranger's text"
    assert history.points() == [[NOON, 1], [NOON + 10, 2]]
    file.unlink()
    wait_for(lambda: recovered(log, file))
    assert rows(file, "SELECT price FROM points WHERE step = 10 AND asset = 'BTC'") == [("1",), ("2",)]


def test_a_disk_that_hangs_blocks_no_other_thread(file: Path, disk: type[Disk], log: Log) -> None:
    disk.gate.clear()
    begin = time.monotonic()
    history = Past(file)
    history.start()
    assert 2 <= time.monotonic() - begin < 8
    assert warnings(log) == warning(file, " does not answer")
    disk.gate.set()
    wait_for(lambda: recovered(log, file))
    disk.gate.clear()
    begin = time.monotonic()
    for number in range(1000):
        history.poll(str(number), at=NOON + number * 10)
    assert time.monotonic() - begin < 1
    begin = time.monotonic()
    history.stop()
    assert 0.5 <= time.monotonic() - begin < 1.4
    disk.gate.set()
    history.stop(5)
    assert max(rows(file, "SELECT time FROM points")) == (NOON + 9990,)


def test_a_refusal_that_comes_late_is_a_warning(past: Start, file: Path, disk: type[Disk], log: Log) -> None:
    disk.gate.clear()
    history = past(file, wait=0.1)
    file.write_text("a stranger's text")
    disk.gate.set()
    history.poll("1")
    assert history.points() == [[NOON, 1]]
    assert len(warnings(log)) == 1
    assert file.read_text() == "a stranger's text"


def test_a_stop_writes_what_is_left_even_in_trouble(past: Start, file: Path, disk: type[Disk], log: Log) -> None:
    history = past(file)
    history.retry_interval = 60.0
    disk.error = "disk I/O error"
    history.poll("1")
    wait_for(lambda: history.write_errors)
    disk.error = None
    history.poll("2", at=NOON + 10)
    time.sleep(0.1)
    assert rows(file) == []  # it is not time yet to try again
    history.stop(5)
    assert rows(file, "SELECT price FROM points WHERE step = 10 AND asset = 'BTC'") == [("1",), ("2",)]
