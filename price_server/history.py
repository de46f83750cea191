"""Keep the prices of the past: by the second for an hour, by the day for a year, in a file that outlives the program.

All of it belongs to one thread, the only one that may wait for a disk: the SQLite connections are made and used there.
Other threads leave polls (`add`) and questions (`ask`) and go on; polls go before questions.

Questions are answered from a table in memory. With a file there is the same table in it: read when it is opened, and
then written with each poll. So a disk that is full, gone or locked costs no answer, only what a restart would find,
and that is written as soon as the disk takes it.
"""

import json
import logging
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Range(NamedTuple):
    """How far back a chart goes, and how far apart its points are."""

    name: str
    seconds: int
    step: int  # seconds


RANGES = (  # about 360 points each, and no two with the same step
    Range("1h", 3600, 10),
    Range("24h", 86400, 300),
    Range("7d", 7 * 86400, 1800),
    Range("30d", 30 * 86400, 7200),
    Range("1y", 365 * 86400, 86400),
)
MAX_QUESTIONS = 100  # waiting
FRESH = 10.0  # seconds that answers and `ranges` are good for while no poll comes: the shortest step
BUSY_TIMEOUT = 0.1  # seconds: no question waits longer behind a lock that another program holds
APPLICATION_ID = 0x50525448  # "PRTH" in the head of the file: it is ours
VERSION = 1  # of the table

# The time stands first in the key: the points of one poll lie side by side, so that a poll of ten assets writes 30 kB
# and not 220, and what is too old is found at once, whosever it is.
TABLE = """CREATE TABLE IF NOT EXISTS points (
    step INTEGER, slot INTEGER, source TEXT, quote TEXT, asset TEXT, time REAL, price TEXT,
    PRIMARY KEY (step, slot, source, quote, asset)) WITHOUT ROWID"""
IDENTIFY = "PRAGMA application_id"
SIGN = (f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {VERSION}")
MAKE = ("BEGIN IMMEDIATE", TABLE, *SIGN, "COMMIT")
SETTLE = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL")  # killed, a program loses the poll under way
CHECK = "PRAGMA quick_check(1)"
EMPTY_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
WRITE = "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)"
FILL = "INSERT OR IGNORE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM points WHERE step = ? AND slot < ?"
READ_ALL = "SELECT * FROM points WHERE source = ? AND quote = ?"
WITHIN = "FROM points WHERE step = ? AND slot BETWEEN ? AND ? AND source = ? AND quote = ? AND time > ? AND time <= ?"
READ = f"SELECT asset, time, price {WITHIN} ORDER BY slot"
READ_OLDEST = f"SELECT time {WITHIN} ORDER BY slot, time LIMIT 1"

Answer = Callable[[list[bytes] | None], None]  # takes the parts of a JSON object, or None when that failed
Clock = Callable[[], float]

logger = logging.getLogger(__name__)


class HistoryError(ValueError):
    """The file cannot be used; the text is one line that names it and the way out."""


class Points:
    """Points that are still to be written: the last in each step, and no more steps than their range has."""

    def __init__(self) -> None:
        self._most = {span.step: span.seconds // span.step + 1 for span in RANGES}
        self._slots: dict[int, dict[int, dict[str, tuple[float, str]]]] = {step: {} for step in self._most}

    def add(self, step: int, slot: int, asset: str, at: float, price: str) -> None:
        slots = self._slots[step]
        slots.setdefault(slot, {})[asset] = (at, price)
        if len(slots) > self._most[step]:
            del slots[next(iter(slots))]  # the one that came first

    def __bool__(self) -> bool:
        return any(self._slots.values())

    def __iter__(self) -> Iterator[tuple[int, int, str, float, str]]:
        for step, slots in self._slots.items():
            for slot, prices in slots.items():
                for asset, (at, price) in prices.items():
                    yield step, slot, asset, at, price


class History:
    """The prices of the past, and the thread that keeps them.

    source, quote: part of each point's key: simulated prices, or those in another currency, are never mixed in.
    file: None keeps the past in memory alone.
    ranges: as /healthz shows them; `since` is the time of the oldest point, or None. Replaced whole, never changed.
    """

    retry_interval = 1.0  # seconds until a file that could not be opened or written is tried again
    locked_interval = 0.1  # seconds, where it was locked: two first starts in the same moment collide

    def __init__(
        self, assets: tuple[str, ...], quote: str, source: str, file: str | None = None, wall_clock: Clock = time.time
    ) -> None:
        self._assets, self._key, self._file, self._wall_clock = assets, (source, quote), file, wall_clock
        self.ranges: tuple[dict[str, Any], ...] = tuple(span._asdict() | {"since": None} for span in RANGES)

        # What other threads leave or look at. `_changed` guards it, and nobody holds it while waiting for a disk.
        self._changed = threading.Condition()
        self._waiting = Points()
        self._questions: list[Callable[[], None]] = []
        self._stopping = False
        self._state = "opening" if file else "open"  # or "failing", when that was logged; "refused", for good
        self._reason = f"history file {file!r} does not answer"  # for failing or being refused

        # The thread's own.
        self._memory: sqlite3.Connection
        self._disk: sqlite3.Connection | None = None
        self._status: os.stat_result  # of the file that is open
        self._unsaved = Points()  # what the file lacks
        self._next_look = 0.0  # monotonic time
        self._answers: dict[Range, dict[str, bytes]] = {}  # by range and asset, as of the last poll
        self._answers_time = 0.0
        # A daemon: a disk that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    # For other threads

    def start(self, wait: float = 2.0) -> None:
        """Start the thread, and wait that long at the most for the file; after that it is opened when it can be.

        Raises HistoryError when the file is refused meanwhile.
        """
        self._thread.start()
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._state != "opening", wait)
            if not in_time:
                self._state = "failing"
        if self._state == "refused":
            raise HistoryError(self._reason)
        if not in_time:
            self._warn()

    def add(self, prices: dict[str, str], at: float) -> None:
        """Leave one poll, made `at` epoch seconds; the prices are the text that the feed sends. Never waits."""
        with self._changed:
            for span in RANGES:
                for asset, price in prices.items():
                    self._waiting.add(span.step, int(at // span.step), asset, at, price)
            self._changed.notify_all()

    def ask(
        self, range_name: str, assets: tuple[str, ...], answer: Answer, wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Leave a question; False when too many wait.

        answer: called in the history thread, with {"BTC":[[epoch_seconds,price],...],...} in parts that answers share.
        wanted: called when its turn has come: a question that nobody waits for is dropped.
        """
        (span,) = (span for span in RANGES if span.name == range_name)

        def run() -> None:
            if wanted():
                answer(self._parts(span, assets))

        with self._changed:
            if self._stopping or len(self._questions) >= MAX_QUESTIONS:
                return False
            self._questions.append(run)
            self._changed.notify_all()
        return True

    def stop(self, wait: float = 0.5) -> None:
        """Have what is left written, and the thread end; a disk that hangs is waited for that long at the most."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(wait)

    # The thread

    def _run(self) -> None:
        """Wait; keep what was polled, look after the file, answer what was asked. Only `stop` ends it."""
        self._memory = sqlite3.connect(":memory:")
        self._memory.execute(TABLE)
        stopping = False
        while not stopping and self._state != "refused":
            with self._changed:
                pause = self._next_look - time.monotonic()
                self._changed.wait_for(lambda: self._waiting or self._questions or self._stopping, pause)
                polls, self._waiting = self._waiting, Points()
                questions, self._questions = self._questions, []
                stopping = self._stopping
            try:
                if polls:
                    self._keep(polls)
                if stopping or time.monotonic() >= self._next_look:
                    self._look()
            except Exception:
                logger.exception("history had an error, and goes on")
            for question in questions:
                try:
                    question()
                except BaseException:  # SystemExit too, which who asked may raise
                    logger.exception("an answer of history had an error")
        self._close()
        self._memory.close()

    def _keep(self, polls: Points) -> None:
        self._write(self._memory, polls)
        self._answers = {}
        if self._file is not None:
            for point in polls:
                self._unsaved.add(*point)
        self._show_ranges()
        if self._state != "failing":
            self._save()

    def _look(self) -> None:
        """What is due without a poll too: points grow too old, and a file that failed may be usable again."""
        self._next_look = time.monotonic() + FRESH
        self._show_ranges()
        self._save()

    def _write(self, table: sqlite3.Connection, points: Points) -> None:
        """One transaction: these points, and away with what is too old for its range."""
        now = self._wall_clock()
        with table:
            table.executemany(WRITE, ((step, slot, *self._key, *point) for step, slot, *point in points))
            table.executemany(DELETE, [(span.step, (now - span.seconds) // span.step) for span in RANGES])

    def _within(self, span: Range, now: float) -> tuple[Any, ...]:
        """The values for WITHIN. Points ahead of a clock that was set back are hidden until it reaches them."""
        oldest = now - span.seconds
        return span.step, oldest // span.step, now // span.step, *self._key, oldest, now

    def _show_ranges(self) -> None:
        now = self._wall_clock()
        shown = []
        for span in RANGES:
            row = self._memory.execute(READ_OLDEST, self._within(span, now)).fetchone()
            shown.append(span._asdict() | {"since": round(row[0], 3) if row else None})
        self.ranges = tuple(shown)

    # Questions

    def _parts(self, span: Range, assets: tuple[str, ...]) -> list[bytes] | None:
        now = self._wall_clock()
        if not self._answers or not 0 <= now - self._answers_time < FRESH:
            self._answers, self._answers_time = {}, now
        try:
            if span not in self._answers:
                self._answers[span] = self._read(span, now)
            parts = [part for asset in assets for part in (b",", self._answers[span][asset])]
        except Exception:
            logger.exception("a question to history failed")
            return None
        return [b"{", *parts[1:], b"}"]

    def _read(self, span: Range, now: float) -> dict[str, bytes]:
        """The points of each asset in one range, as a member of the answer's JSON object."""
        texts: dict[str, list[str]] = {asset: [] for asset in self._assets}
        for asset, at, price in self._memory.execute(READ, self._within(span, now)):
            texts[asset].append(f"[{at:.3f},{price}]")
        return {asset: f"{json.dumps(asset)}:[{','.join(points)}]".encode() for asset, points in texts.items()}

    # The file

    def _save(self) -> None:
        """Open the file where it is not open, and write to it what it lacks; when that fails, try again later."""
        if self._file is None:
            return
        try:
            self._disk = self._disk or self._open(self._file)
            if self._unsaved:
                self._check_identity(self._file, self._disk)
                self._write(self._disk, self._unsaved)
                self._unsaved = Points()
        except (HistoryError, OSError, sqlite3.Error) as error:
            self._failed(error)
        else:
            with self._changed:
                before, self._state = self._state, "open"
                self._changed.notify_all()
            if before == "failing":
                logger.info("history file %r is up to date again", self._file)

    def _check_identity(self, file: str, disk: sqlite3.Connection) -> None:
        """SQLite writes into a file that was deleted without an error."""
        if not os.path.samestat(os.stat(file), self._status):
            # Or what stands in FILE-wal would be taken for changes of the file that is there now.
            disk.execute(EMPTY_WAL)
            raise HistoryError(f"history file {file!r} was replaced")

    def _failed(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details in the higher bits
        locked = code == sqlite3.SQLITE_BUSY
        self._next_look = time.monotonic() + (self.locked_interval if locked else self.retry_interval)
        if not locked and code != sqlite3.SQLITE_FULL:
            self._close()
        what = getattr(error, "strerror", None) or str(error)
        self._reason = what if isinstance(error, HistoryError) else f"history file {self._file!r}: {what}"
        with self._changed:
            before = self._state
            if before == "open":
                self._state = "failing"
            elif before == "opening" and isinstance(error, HistoryError):
                self._state = "refused"
                self._changed.notify_all()
        if before == "open":
            self._warn()

    def _close(self) -> None:
        if self._disk is not None:
            self._disk.close()
        self._disk = None

    def _warn(self) -> None:
        logger.warning("the past is kept in memory alone until the file can be used: %s", self._reason)

    def _open(self, file: str) -> sqlite3.Connection:
        """Open the file and learn what is in it. Raises HistoryError, with nothing changed, when it is refused."""
        path = os.path.realpath(file)
        complaint = _complaint(path)
        if complaint:
            raise HistoryError(f"history file {file!r} {complaint}, or name another file")
        disk = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level="IMMEDIATE")
        try:
            new = disk.execute(IDENTIFY).fetchone() != (APPLICATION_ID,)
            for statement in (*MAKE, *SETTLE) if new else SETTLE:
                disk.execute(statement)
            self._status = os.stat(file)
            known = self._memory.execute(READ_ALL, self._key).fetchall()
            with self._memory:
                rows = (row for row in disk.execute(READ_ALL, self._key) if row[4] in self._assets)
                self._memory.executemany(FILL, rows)
        except BaseException:
            disk.close()
            raise
        for step, slot, _, _, *point in known:  # a file that was deleted is made anew with what is known
            self._unsaved.add(step, slot, *point)
        self._answers = {}
        self._show_ranges()
        return disk


def _complaint(path: str) -> str | None:
    """Why this cannot be the file, and what to do; found out without writing to it or beside it."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return f"is in a directory that does not exist: make {directory!r}"
    if os.path.isdir(path):
        return "is a directory: name a file in it"
    if os.path.exists(path) and not os.path.isfile(path):
        return "is no regular file: remove it"  # a pipe would be waited for
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"gets files beside it: make {directory!r} writable"
    if not os.path.exists(path):
        return None
    if not os.access(path, os.R_OK | os.W_OK):
        return "must be readable and writable: change its permissions"
    with open(path, "rb") as file:
        head = file.read(100)
    return (_complaint_about_head(head) or _complaint_about_content(path)) if head else None


def _complaint_about_head(head: bytes) -> str | None:
    """All that is read of somebody else's database: SQLite itself would put files beside it."""
    if not head.startswith(b"SQLite format 3\0"):
        return "is no SQLite database: move it away"
    if len(head) < 100:
        return "is damaged: put a copy in its place"
    version, application = struct.unpack_from(">I4xI", head, 60)
    if application != APPLICATION_ID:
        return "is a database of another program: move it away"
    if version > VERSION:
        return "was made by a newer version of this program: use that one"
    return None


def _complaint_about_content(path: str) -> str | None:
    new = [beside for beside in (path + "-wal", path + "-shm") if not os.path.exists(beside)]
    if len(new) == 2 and os.path.getsize(path) % 512:
        return "is damaged (cut off): put a copy in its place"  # SQLite sees whole pages alone
    disk = sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)
    try:
        (verdict,) = disk.execute(CHECK).fetchone()
    except sqlite3.DatabaseError as error:
        code = error.sqlite_errorcode & 0xFF
        if code == sqlite3.SQLITE_READONLY:
            return None  # its first start was cut short: to undo the rest of that needs writing
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        verdict = str(error)
    finally:
        disk.close()
    if verdict == "ok":
        return None
    for beside in new:
        Path(beside).unlink(missing_ok=True)
    return f"is damaged ({verdict.splitlines()[-1]}): put a copy in its place"
