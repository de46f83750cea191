"""What the program needs from the operating system: a log that never blocks, signals, systemd, open files.

Uses the standard library only, and knows nothing of prices.
"""

import logging
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STDERR = 2  # written to with os.write: sys.stderr has a lock, for which Python's exit would wait
MAX_WAITING = 10_000  # log lines that are not yet written; more are dropped and counted
FLUSH_TIMEOUT = 0.5  # seconds that the program's end waits for room in the queue, and then for stderr
NOTICE = 25  # as in price_server/archive.py, the level for a line that says that a problem is over
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, NOTICE: 5}
PRIORITIES |= {logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows
SIGNALS = [each for each in (signal.SIGINT, signal.SIGTERM, HANGUP) if each]
# The command in README.md.
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python tracker.py"

logging.addLevelName(NOTICE, "NOTICE")
logger = logging.getLogger("system")


class Log(logging.Handler):
    """Hands each line to a thread that writes it: a stderr that nobody reads blocks that thread and no other.

    logging's QueueListener would wait for that thread without a timeout, and fail when its queue is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_JournalFormatter() if _is_journal() else _TimeFormatter())
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._dropped = 0
        self._ended = False
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Wait at most a second for what is not yet written. Python calls it at its exit too."""
        super().close()
        logging.getLogger().removeHandler(self)
        if self._ended:
            return
        self._ended = True
        try:
            self._lines.put(None, timeout=FLUSH_TIMEOUT)
        except queue.Full:
            return
        self._thread.join(FLUSH_TIMEOUT)

    def _write_lines(self) -> None:
        reported = 0
        while (line := self._lines.get()) is not None:
            _write(line)
            if self._dropped > reported and self._lines.empty():
                lost, reported = self._dropped - reported, self._dropped
                warning = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": f"log lines lost: {lost}"}
                _write(self.format(logging.makeLogRecord(warning)))


def start_log(level: str = "info") -> Log:
    """Log to stderr from now on, in a separate thread. Raises RuntimeError when no thread can be started."""
    if sys.stderr is None:  # closed: without this, the next socket would become descriptor 2 and receive the log
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    log = Log()
    # websocket-server called basicConfig when it was imported: without force this would do nothing.
    logging.basicConfig(level=level.upper(), handlers=[log], force=True)
    return log


class _TimeFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class _JournalFormatter(logging.Formatter):
    """journald adds the time itself, and reads each line's priority from a prefix like <6>."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return priority + super().format(record).replace("\n", f"\n{priority}")


def _is_journal() -> bool:
    try:
        stderr = os.fstat(STDERR)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def _write(line: str) -> None:
    rest = f"{line}\n".encode(errors="backslashreplace")
    try:
        while rest:
            rest = rest[os.write(STDERR, rest) :]
    except OSError:
        pass  # closed, or its disk is full: there is nowhere to report that


class Systemd:
    """Notifies systemd of the state of the program, over the socket named in NOTIFY_SOCKET; without it, does nothing.

    Source: sd_notify(3), sd_watchdog_enabled(3). Never blocks, raises nothing. Any thread.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic):
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket address
            self._address = "\0" + self._address[1:]
        self._clock = clock
        self._watchdog_interval = _watchdog_seconds(environment) / 3  # so that a late message does no harm
        self._notified = -self._watchdog_interval
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def notify(self, state: str) -> None:
        """READY=1 or another line of sd_notify(3)."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(state.encode(), self._address)
        except OSError as error:
            logger.warning("systemd does not receive %s: %s", state, error.strerror)

    def notify_watchdog(self) -> None:
        """Tell systemd that the caller still runs; messages go out three times per watchdog timeout at most."""
        now = self._clock()
        if self._watchdog_interval and now - self._notified >= self._watchdog_interval:
            self._notified = now
            self.notify("WATCHDOG=1")


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """How long systemd waits for a message of this process; 0 when it does not."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 1_000_000 if text.isdecimal() else 0.0


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` when the first signal comes; a second one ends the program immediately."""

    def on_signal(number: int, frame: object) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        stop()

    # A SIGHUP that is ignored at the start, as with nohup, stays ignored.
    taken = [each for each in SIGNALS if each != HANGUP or signal.getsignal(each) != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, on_signal)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started in this block receive no signals: one delivered to them would not interrupt the main thread."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def raise_file_limit(needed: int) -> None:
    """Raise the soft limit of open files to the hard one, or to what is needed, as far as allowed."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, needed):  # macOS calls the hard one unlimited, and then refuses that
        if soft == resource.RLIM_INFINITY or (limit != resource.RLIM_INFINITY and limit <= soft):
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
        except (ValueError, OSError):
            pass  # not allowed: it stays as it is


def explain_missing(module: str) -> str:
    """What to do about a module that could not be imported, in one line."""
    name = module.partition(".")[0]
    if name.removeprefix("_") == "sqlite3":
        return "this Python was built without sqlite3: use another one, or your system's package that adds it"
    if name in ("options", "coin_api", "price_server"):
        return f"{name} is missing beside tracker.py: copy all files of the program"
    return f"the package {name} is missing: {_install_command()}"


def _install_command() -> str:
    """The command that adds the packages to this Python; outside a virtual environment it makes one first."""
    is_windows = sys.platform == "win32"
    if sys.prefix == sys.base_prefix:
        command = INSTALL.replace("python3", "python").replace("/bin/", "\\Scripts\\") if is_windows else INSTALL
        return f"start with {command}"
    join = subprocess.list2cmdline if is_windows else shlex.join
    requirements = str(Path(__file__).with_name("requirements.txt"))
    return f"add it with {join([sys.executable, '-m', 'pip', 'install', '-r', requirements])}"
