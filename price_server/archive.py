"""A copy of the history in a SQLite file, written by a thread of its own. It exists only with a file.

The server thread hands over what `History` says is to be written, and goes on. While a disk is full, gone or locked,
only the file lacks something; that is written as soon as the disk takes it.
"""

import logging
import os
import sqlite3
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from .history import RANGES, Poll, Snapshot, encode_point

MAX_WAITING = 50_000  # prices that wait for the disk; more are dropped, and the file is then completed from memory
BUSY_TIMEOUT = 0.1  # seconds of waiting for another program's lock, before that is a failure to be tried again
MAX_WAL = 4 << 20  # bytes of FILE-wal; it grows beyond them while another program reads for long
NOTICE = 25  # the log level, between INFO and WARNING, for a line that says that a problem is over
APPLICATION_ID = 0x50525448  # "PRTH" in the head of the file: this program made it
VERSION = 1  # of the table

# The time comes first in the key, because then the points of one poll are neighbours: a poll of ten assets writes 30 kB
# instead of 220.
TABLE = """CREATE TABLE IF NOT EXISTS points (
    step INTEGER, slot INTEGER, source TEXT, quote TEXT, asset TEXT, time REAL, price TEXT,
    PRIMARY KEY (step, slot, source, quote, asset)) WITHOUT ROWID"""
CREATE = (
    *("BEGIN IMMEDIATE", TABLE),
    *(f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {VERSION}", "COMMIT"),
)
CONFIGURE = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # a program that is killed loses the current poll at most
    f"PRAGMA journal_size_limit = {MAX_WAL}",
)
EMPTY_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
WRITE = "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)"
DELETE = "DELETE FROM points WHERE step = ? AND slot = ? AND source = ? AND quote = ? AND asset = ?"
READ = "SELECT slot, asset, time, price FROM points WHERE step = ? AND source = ? AND quote = ? ORDER BY slot"

logger = logging.getLogger(__name__)


class ArchiveError(ValueError):
    """The file cannot be used; the text is one line that names it and the way out."""


class Archive:
    """The file and its thread. `start`, `write` and `stop` are for other threads.

    source, quote: part of each point's key: simulated prices, or those in another currency, are never mixed in.
    loaded: called in the archive's thread, whenever the file was read, with the step and the texts of each range. It
        must pass them to `History.load` in the thread that owns the history, and the result to `write`.
    """

    retry_interval = 1.0  # seconds until a file that could not be opened or written is tried again

    def __init__(
        self,
        file: str,
        source: str,
        quote: str,
        assets: Iterable[str],
        *,
        loaded: Callable[[int, dict[str, bytes]], object],
        wall_clock: Callable[[], float] = time.time,
    ):
        self._file, self._key, self._assets = file, (source, quote), tuple(assets)
        self._loaded, self._wall_clock = loaded, wall_clock

        # For any thread to read.
        self.state = "opening"  # then "refused"; or "ok", or "failing" while the file lacks something
        self.write_errors = 0  # times that it could not be opened or written
        self.last_write = 0.0  # epoch seconds; 0.0 for none

        # Shared with other threads. `_changed` guards it and `state`, and is never held while waiting for a disk.
        self._changed = threading.Condition()
        self._waiting: deque[Poll | Snapshot] = deque(maxlen=max(MAX_WAITING // max(len(self._assets), 1), 100))
        self._must_read = True  # since it was opened, or because some of what waited was dropped
        self._stopping = False

        # The thread's own.
        self._disk: sqlite3.Connection | None = None
        self._identity: os.stat_result  # of the file that is open
        self._expected = 0  # results of `History.load` that are not yet written: until then the file lacks something
        self._pause: float | None = 0.0  # seconds until the next try; None: when something waits
        self._reason = f"history file {file!r} does not answer"  # for failing or being refused
        # A daemon: a disk that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="archive", daemon=True)

    # For other threads

    def start(self, wait: float = 2.0) -> None:
        """Start the thread, and wait at most that long for the file; after that it is opened when it can be.

        Raises ArchiveError when the file is refused meanwhile.
        """
        self._thread.start()
        with self._changed:
            in_time = self._changed.wait_for(lambda: self.state != "opening", wait)
            if not in_time:
                self.state = "failing"
        if self.state == "refused":
            raise ArchiveError(self._reason)
        if not in_time:
            self._warn()

    def write(self, change: Poll | Snapshot) -> None:
        """Have the thread write what `History.add` or `History.load` returned. Never blocks."""
        with self._changed:
            if len(self._waiting) == self._waiting.maxlen:
                self._must_read = True
            self._waiting.append(change)
            self._changed.notify_all()

    def stop(self, wait: float = 0.5) -> None:
        """Have the thread write what waits and end; `wait` is how long that may take on a disk that hangs."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(wait)

    # The thread

    def _run(self) -> None:
        """Wait, and write what waits, until `stop` or a refusal at the start."""
        stopping = False
        while not stopping and self.state != "refused":
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or (self._waiting and self._pause is None), self._pause)
                stopping = self._stopping
            try:
                self._disk = self._disk or self._open()
                self._write_waiting(self._disk)
                # After writing, so that a disk which only fails to write is not read each second.
                if self._must_read:
                    self._read_all(self._disk)
                self._limit_wal(self._disk)
            except Exception as error:
                self._note_failure(error)
            else:
                self._note_success()
        self._close()

    def _write_waiting(self, disk: sqlite3.Connection) -> None:
        while self._waiting:
            change = self._waiting[0]
            if change.dropped or any(change.rows()):  # an empty change must not wait for another program's lock
                self._check_identity(disk)
                self._write(disk, change)
                self.last_write = self._wall_clock()
            with self._changed:
                if self._waiting[0] is change:  # it was not dropped meanwhile
                    self._waiting.popleft()
            if isinstance(change, Snapshot):
                self._expected = max(self._expected - 1, 0)

    def _write(self, disk: sqlite3.Connection, change: Poll | Snapshot) -> None:
        """In one transaction, write these points and delete those that memory no longer holds."""
        with disk:
            disk.executemany(WRITE, ((step, number, *self._key, *point) for step, number, *point in change.rows()))
            gone = ((step, number, *self._key, asset) for step, number, asset in change.dropped)
            disk.executemany(DELETE, gone)

    def _read_all(self, disk: sqlite3.Connection) -> None:
        """Hand over what the file has, one range at a time: loading it in one step would delay the server."""
        self._must_read, self._expected = False, 0
        try:
            for span in RANGES:
                texts = self._read(disk, span.step)
                self._expected += 1
                self._loaded(span.step, texts)
        except BaseException:
            self._must_read = True
            raise

    def _read(self, disk: sqlite3.Connection, step: int) -> dict[str, bytes]:
        points: dict[str, list[bytes]] = {asset: [] for asset in self._assets}
        for number, asset, at, price in disk.execute(READ, (step, *self._key)):
            if asset in points:
                # Rounding to milliseconds must not move it into the next step.
                points[asset].append(encode_point(min(at, (number + 1) * step - 0.001), price))
        return {asset: b",".join(each) for asset, each in points.items() if each}

    def _limit_wal(self, disk: sqlite3.Connection) -> None:
        """Empty FILE-wal when it is too large: it grows while another program reads for long, and shrinks only so."""
        wal = os.path.realpath(self._file) + "-wal"
        if os.path.exists(wal) and os.path.getsize(wal) > MAX_WAL:
            disk.execute(EMPTY_WAL)

    def _check_identity(self, disk: sqlite3.Connection) -> None:
        """Raises ArchiveError when the file was replaced: SQLite would write into a deleted file without an error."""
        if not os.path.samestat(os.stat(self._file), self._identity):
            # Otherwise SQLite would take the content of FILE-wal for changes to the new file.
            disk.execute(EMPTY_WAL)
            raise ArchiveError(f"history file {self._file!r} was replaced")

    def _note_success(self) -> None:
        self._pause = None
        with self._changed:
            before = self.state
            if before == "opening" or not self._expected:
                self.state = "ok"
                self._changed.notify_all()
        if before == "failing" and self.state == "ok":
            logger.log(NOTICE, "history file %r is up to date again", self._file)

    def _note_failure(self, error: Exception) -> None:
        self._pause = self.retry_interval
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits are details
        if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL):
            self._close()
        what = getattr(error, "strerror", None) or str(error)
        reason = what if isinstance(error, ArchiveError) else f"history file {self._file!r}: {what}"
        if reason != self._reason and not isinstance(error, (ArchiveError, OSError, sqlite3.Error)):
            logger.exception("the history file had an error, and is tried again")  # once, not with each try
        self._reason = reason
        self.write_errors += 1
        with self._changed:
            before = self.state
            if before == "ok":
                self.state = "failing"
            elif before == "opening" and isinstance(error, ArchiveError):
                self.state = "refused"
                self._changed.notify_all()
        if before == "ok":
            self._warn()

    def _close(self) -> None:
        if self._disk is not None:
            self._disk.close()
        self._disk = None

    def _warn(self) -> None:
        logger.warning("the price history is kept in memory alone until the file can be used: %s", self._reason)

    def _open(self) -> sqlite3.Connection:
        """Open the file. Raises ArchiveError when it is refused; nothing has changed then."""
        path = os.path.realpath(self._file)
        complaint = _complaint(path) if os.path.basename(self._file) else "is a directory: name a file in it"
        if complaint:
            raise ArchiveError(f"history file {self._file!r} {complaint}, or name another file")
        disk = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level="IMMEDIATE")
        try:
            new = disk.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,)
            for statement in (*CREATE, *CONFIGURE) if new else CONFIGURE:
                disk.execute(statement)
            self._identity = os.stat(self._file)
        except BaseException:
            disk.close()
            raise
        self._must_read = True
        return disk


def _complaint(path: str) -> str | None:
    """Why this file cannot be used, and what to do, or None. Writes neither to it nor beside it."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        return f"is in a directory that does not exist: make {directory!r}"
    if os.path.isdir(path):
        return "is a directory: name a file in it"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"gets files beside it, like FILE-wal: make {directory!r} writable"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be opened ({error.strerror}): correct it"
    if not stat.S_ISREG(mode):  # opening a pipe would block
        return "is not a regular file: move it away"
    if not os.access(path, os.R_OK | os.W_OK):
        return "must be readable and writable: change its permissions"
    with open(path, "rb") as file:
        head = file.read(100)
    return (_complaint_about_head(head) or _complaint_about_content(path)) if head else None


def _complaint_about_head(head: bytes) -> str | None:
    """Read without SQLite, which would put files beside another program's database."""
    if not head.startswith(b"SQLite format 3\0"):
        return "is not a SQLite database: move it away"
    if len(head) < 100:
        return "is damaged: restore a backup"
    version, application = struct.unpack_from(">I4xI", head, 60)
    if application != APPLICATION_ID:
        return "is a database of another program: move it away"
    if version > VERSION:
        return "was made by a newer version of this program: use that one"
    return None


def _complaint_about_content(path: str) -> str | None:
    new = [beside for beside in (path + "-wal", path + "-shm") if not os.path.exists(beside)]
    if len(new) == 2 and os.path.getsize(path) % 512:
        return "is damaged (cut off): restore a backup"  # SQLite would ignore an incomplete last page
    disk = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=BUSY_TIMEOUT)
    try:
        (verdict,) = disk.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        code = error.sqlite_errorcode & 0xFF
        if code == sqlite3.SQLITE_READONLY:
            return None  # its first start was cut short; undoing what that began needs writing
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        verdict = str(error)
    finally:
        disk.close()
    if verdict == "ok":
        return None
    for beside in new:
        Path(beside).unlink(missing_ok=True)
    return f"is damaged ({verdict.splitlines()[-1]}): restore a backup"
