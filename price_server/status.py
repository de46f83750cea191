"""Counters and gauges of one server, and what /healthz and /metrics say.

Counters are keyed by the reason that was counted, and labels are made when /metrics is written, so that a new reason
needs no change here. The known ones start at 0, because otherwise the first event would not be an increase.
"""

import mmap
import os
import platform
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from itertools import accumulate
from typing import Any, Protocol

from . import clocks
from .formats import FORMATS
from .history import History
from .prices import Prices

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

REFUSED = ("asset", "denied", "full", "handshake", "origin")
DROPPED = ("behind", "disconnected", "failed", "memory", "no_close", "no_pong", "queue_full", "unfinished")
# As in coin_api.py.
CAUSES = ("refused_key", "forbidden", "rate_limited", "server_error", "timeout", "connection", "bad_answer", "other")
STATUSES = (200, 204, 304, 400, 403, 404, 405, 426, 503)
POLL_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
MAX_LISTED = 200  # connections up to which the open files are listed: with 10,000 that takes 19 ms
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in the value of a label
OPEN_FILES = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"

Samples = Mapping[str, float | None] | float | None  # what is None is not known


class ArchiveState(Protocol):
    state: str  # "ok" or "failing"
    write_errors: int
    last_write: float  # epoch seconds


@dataclass(eq=False)
class Status:
    """Counters and gauges of one server. Only the server thread changes them; some may be read in any thread."""

    prices: Prices
    history: History
    _: KW_ONLY
    quote: str = "USD"
    source: str = "coinapi"
    interval: float = 5.0  # seconds between two polls
    max_clients: int = 10_000
    pause_when_idle: bool = False
    version: str = ""
    age_clock: Callable[[], float] = clocks.boottime  # seconds that go on while the machine sleeps
    wall_clock: Callable[[], float] = time.time

    stale_floor = 60.0  # seconds; at a short interval, a few failed polls do not make prices stale

    def __post_init__(self) -> None:
        self.started_at = self.wall_clock()  # epoch seconds
        self.clients = _start_at_0(each.name for each in FORMATS)  # connected clients, by the name of their format
        self.clients_accepted = 0
        self.refused = _start_at_0(REFUSED)
        self.dropped = _start_at_0(DROPPED)
        self.messages_sent = 0
        self.http_responses = _start_at_0(STATUSES)

        self.measure: Callable[[], None] = lambda: None  # sets the next three before /metrics is written
        self.visitors = 0  # connections that are not clients
        self.held_bytes = 0
        self.batch_seconds_max = 0.0
        self._other_files = 12  # open files that are not connections, until they are counted

        self.paused = False  # while there are no polls because no client is connected
        self.last_error: str | None = None
        self.polls = _start_at_0(("success", "failure"))
        self.poll_failures = _start_at_0(CAUSES)
        self._polls_within = [0] * (len(POLL_BUCKETS) + 1)  # by bucket, not cumulative; the last has no bound
        self._poll_seconds = 0.0  # of all polls
        self._credits_used: int | None = None
        self._credits_left: int | None = None
        self._last_success: float | None = None  # by the age clock
        self._last_success_time = 0.0  # epoch seconds

        self.archive: ArchiveState | None = None  # with a history file

    # What changes it

    def note_success(self) -> None:
        """A poll brought prices."""
        self._last_success, self._last_success_time = self.age_clock(), self.wall_clock()
        self.last_error = None
        self.polls["success"] += 1

    def note_failure(self, reason: str, cause: str = "other") -> None:
        """A poll brought no prices. reason: one line for people; cause: one word that is counted."""
        self.last_error = reason
        self.polls["failure"] += 1
        self.poll_failures[cause] += 1

    def note_poll(self, seconds: float, credits_used: int | None, credits_left: int | None) -> None:
        """A poll has ended after `seconds`. Credits: None keeps the number that CoinAPI last said."""
        self.paused = False
        self._polls_within[bisect_left(POLL_BUCKETS, seconds)] += 1
        self._poll_seconds += seconds
        self._credits_used = self._credits_used if credits_used is None else credits_used
        self._credits_left = self._credits_left if credits_left is None else credits_left

    # What it reports

    @property
    def client_count(self) -> int:
        """Connected clients of all formats."""
        return self.clients.total()

    @property
    def stale_after(self) -> float:
        """Seconds after which prices are no longer current."""
        return max(3 * self.interval, self.stale_floor)

    def age(self) -> float | None:
        """Seconds since the last successful poll, or None."""
        return None if self._last_success is None else self.age_clock() - self._last_success

    def state(self) -> str:
        """One of: ok; starting, before the first success; stale; paused, while there are no polls."""
        age = self.age()
        if self.paused:
            return "paused"
        if age is None:
            return "starting"
        return "ok" if age <= self.stale_after else "stale"

    def health(self) -> dict[str, Any]:
        """The fields of /healthz."""
        age = self.age()
        return {
            "status": self.state(),
            "time": round(self.wall_clock(), 3),
            "age_seconds": None if age is None else round(age, 3),
            "stale_after_seconds": self.stale_after,
            "interval_seconds": self.interval,
            "pause_when_idle": self.pause_when_idle,
            "clients": self.client_count,
            "max_clients": self.max_clients,
            "source": self.source,
            "quote": self.quote,
            "assets": self.prices.assets,
            "without_price": self._without_price(),
            "ranges": self.history.describe(),
            "last_error": self.last_error,
            "version": self.version,
            "history": self.archive.state if self.archive else None,
        }

    def metrics(self) -> str:
        """The counters and gauges in Prometheus' text format; what is not known is left out."""
        self.measure()
        latest = self.prices.latest.items()
        prices = by("asset_id", {asset: update.price for asset, update in latest}, quote=self.quote)
        times = by("asset_id", {asset: _epoch(update.time) for asset, update in latest}, quote=self.quote)
        build = by("version", {self.version: 1}, python=platform.python_version())
        archive = self.archive
        write_errors, last_write = (archive.write_errors, archive.last_write) if archive else (None, None)
        metrics = [
            metric("clients", "Connected clients.", self.client_count),
            metric("clients_by_format", "Connected clients, by the format of their feed.", by("format", self.clients)),
            metric("max_clients", "Clients allowed; the next one is refused.", self.max_clients),
            metric("clients_accepted_total", "Clients that were accepted.", self.clients_accepted),
            metric("clients_refused_total", "Requests for the feed that were refused.", by("reason", self.refused)),
            metric("clients_dropped_total", "Clients that the server dropped.", by("reason", self.dropped)),
            metric("messages_sent_total", "Messages handed to the network.", self.messages_sent),
            metric("held_bytes", "Bytes held for connections, received or to be sent.", self.held_bytes),
            metric("polls_total", "Polls of the price source.", by("result", self.polls)),
            metric("poll_failures_total", "Failed polls, by what went wrong.", by("cause", self.poll_failures)),
            metric("poll_duration_seconds", "How long polls take.", self._poll_durations(), kind="histogram"),
            metric("last_success_timestamp_seconds", "Last successful poll; 0 for none.", self._last_success_time),
            metric("interval_seconds", "From one poll to the next.", self.interval),
            metric("stale_after_seconds", "Age from which on prices count as stale.", self.stale_after),
            metric("paused", "1 while the server does not poll because no client is connected.", int(self.paused)),
            metric("credits_used", "Credits used, as CoinAPI last said.", self._credits_used),
            metric("credits_left", "Credits left, as CoinAPI last said; billed below 0.", self._credits_left),
            metric("price", "Last price of one asset, in the quote currency.", prices),
            metric("price_timestamp_seconds", "The source's own time of that price.", times),
            metric("assets_without_price", "Tracked assets that never had a price.", len(self._without_price())),
            metric("http_responses_total", "HTTP responses, by their status.", by("status", self.http_responses)),
            metric("visitors", "Connections that are not clients.", self.visitors),
            metric("batch_seconds_max", "The longest batch of events of the last 60 s.", self.batch_seconds_max),
            metric("history_write_errors_total", "Failed writes of the history file.", write_errors),
            metric("history_last_write_timestamp_seconds", "Last write of the file; 0 for none.", last_write),
            metric("start_timestamp_seconds", "When the server was made.", self.started_at),
            metric("build_info", "Always 1; its labels say what runs.", build),
        ]
        return "".join(metrics + _describe_process(self.started_at, self._count_open_files()))

    def _poll_durations(self) -> dict[str, float]:
        buckets = zip((*POLL_BUCKETS, "+Inf"), accumulate(self._polls_within), strict=True)
        samples: dict[str, float] = {f'_bucket{{le="{bound}"}}': polls for bound, polls in buckets}
        return samples | {"_sum": self._poll_seconds, "_count": sum(self._polls_within)}

    def _count_open_files(self) -> int:
        """As the system lists them; with many connections, these and the other files of the last listing."""
        connections = self.client_count + self.visitors
        if connections <= MAX_LISTED:
            try:
                self._other_files = len(os.listdir(OPEN_FILES)) - 1 - connections  # 1: the listing itself
            except OSError:
                pass  # hidden by a container, or there is no such directory
        return self._other_files + connections

    def _without_price(self) -> list[str]:
        return [asset for asset in self.prices.assets if asset not in self.prices.latest]


def _start_at_0(keys: Iterable[Any]) -> Counter[Any]:
    return Counter(dict.fromkeys(keys, 0))


def metric(name: str, text: str, samples: Samples, kind: str = "gauge") -> str:
    """One metric, its samples keyed by what follows its name; "" while none is known."""
    if not name.startswith("process_"):
        name = f"price_tracker_{name}"
    if name.endswith("_total"):
        kind = "counter"
    if not isinstance(samples, Mapping):
        samples = {"": samples}
    lines = [f"{name}{labels} {number}\n" for labels, number in samples.items() if number is not None]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def by(label: str, numbers: Mapping[Any, float | None], **more: str) -> Samples:
    """Samples that differ in one label, whose values `numbers` is keyed by; `more` labels are the same for all."""
    rest = "".join([f',{name}="{value.translate(ESCAPES)}"' for name, value in more.items()])
    return {f'{{{label}="{str(key).translate(ESCAPES)}"{rest}}}': number for key, number in numbers.items()}


def _epoch(time_text: str) -> float | None:
    """Epoch seconds of a time like CoinAPI's, or None for any other text."""
    try:
        moment = datetime.fromisoformat(time_text)
        return moment.timestamp() if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _describe_process(started_at: float, open_files: int) -> list[str]:
    """The process metrics of the official client libraries, under their names, as far as this system has them."""
    virtual = resident = None
    try:
        with open("/proc/self/statm", "rb") as file:  # Linux
            virtual, resident = [int(pages) * mmap.PAGESIZE for pages in file.read().split()[:2]]
    except (OSError, ValueError):
        pass
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return [
        metric("process_cpu_seconds_total", "CPU time used, user and system.", time.process_time()),
        metric("process_virtual_memory_bytes", "Virtual memory.", virtual),
        metric("process_resident_memory_bytes", "Resident memory.", resident),
        metric("process_open_fds", "Open files and sockets.", open_files if resource else None),
        metric("process_max_fds", "Files and sockets that may be open.", most if most >= 0 else None),
        metric("process_start_time_seconds", "When the program was started.", started_at),
    ]
