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
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from itertools import accumulate, chain
from typing import Any, Protocol

from . import clocks
from .formats import FORMATS
from .prices import Prices

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

REFUSED = ("asset", "denied", "full", "handshake", "origin")
DROPPED = ("behind", "disconnected", "failed", "memory", "no_close", "no_pong", "queue_full", "unfinished")
CAUSES = ("refused_key", "forbidden", "rate_limited", "server_error", "timeout", "connection", "bad_answer", "other")
STATUSES = (200, 204, 304, 400, 403, 404, 405, 426, 503)
POLL_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
MAX_LISTED = 200  # connections up to which the open files are listed: with 10,000 that takes 19 ms
OTHER_FILES = 12  # open files that are not connections, until they are counted
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in the value of a label
OPEN_FILES = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"

Samples = Mapping[Any, float] | float


class History(Protocol):
    def describe(self) -> list[dict[str, Any]]: ...


class Status:
    """Counters and gauges of one server. Server thread only.

    interval: seconds between two polls. age_clock: seconds that go on while the machine sleeps.
    """

    stale_floor = 60.0  # seconds; CoinAPI's own times lag by about 30 s

    def __init__(
        self,
        prices: Prices,
        history: History,
        *,
        quote: str = "USD",
        source: str = "coinapi",
        interval: float = 5.0,
        max_clients: int = 10_000,
        pause_when_idle: bool = False,
        version: str = "",
        age_clock: Callable[[], float] = clocks.boottime,
        wall_clock: Callable[[], float] = time.time,
    ):
        self.prices = prices
        self.history = history
        self.quote = quote
        self.source = source
        self.interval = interval
        self.max_clients = max_clients
        self.pause_when_idle = pause_when_idle
        self.version = version
        self.started_at = wall_clock()  # epoch seconds
        self._age_clock = age_clock
        self._wall_clock = wall_clock
        self._start_counting()

    def _start_counting(self) -> None:
        self.clients = _start_at_0(each.name for each in FORMATS)  # open clients, by the name of their format
        self.clients_accepted = 0
        self.refused = _start_at_0(REFUSED)
        self.dropped = _start_at_0(DROPPED)
        self.messages_sent = 0
        self.http_responses = _start_at_0(STATUSES)

        self.measure: Callable[[], None] = lambda: None  # sets the next three before /metrics is written
        self.visitors = 0  # connections that are not clients
        self.held_bytes = 0
        self.batch_seconds_max = 0.0
        self._other_files = OTHER_FILES

        self.paused = False  # while polls are left out because nobody listens
        self.last_error: str | None = None
        self.polls = _start_at_0(("success", "failure"))
        self.poll_failures = _start_at_0(CAUSES)
        self._polls_within = [0] * (len(POLL_BUCKETS) + 1)  # by bucket, not cumulative; the last has no bound
        self._poll_seconds = 0.0  # of all polls
        self._credits_used: int | None = None
        self._credits_left: int | None = None
        self._last_success: float | None = None  # by the age clock
        self._last_success_time = 0.0  # epoch seconds

        self.history_state: str | None = None  # "ok" or "failing"; None without a file
        self.history_write_errors = 0
        self.history_last_write = 0.0  # epoch seconds

    # What changes it

    def note_success(self) -> None:
        """Prices of a poll were sent."""
        self._last_success, self._last_success_time = self._age_clock(), self._wall_clock()
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

    # What it tells

    @property
    def client_count(self) -> int:
        """Open clients of all formats."""
        return self.clients.total()

    @property
    def stale_after(self) -> float:
        """Seconds after which prices are no longer current."""
        return max(3 * self.interval, self.stale_floor)

    def age(self) -> float | None:
        """Seconds since the last successful poll, or None."""
        return None if self._last_success is None else self._age_clock() - self._last_success

    def state(self) -> str:
        """One of: ok; starting, before the first success; stale; paused, while polls are left out."""
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
            "time": round(self._wall_clock(), 3),
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
            "history": self.history_state,
        }

    def metrics(self) -> str:
        """The counters and gauges in Prometheus' text format; what is not known is left out."""
        self.measure()
        parts = (self._describe_clients(), self._describe_polls(), self._describe_prices(), self._describe_server())
        return "".join(chain(*parts, _describe_process(self.started_at, self._count_open_files())))

    def _describe_clients(self) -> Iterator[str]:
        yield gauge("clients", "Open clients.", self.client_count)
        yield gauge("clients_by_format", "Open clients, by how they are written to.", self.clients, "format")
        yield gauge("max_clients", "Clients allowed; the next one is refused.", self.max_clients)
        yield counter("clients_accepted_total", "Clients that were let in.", self.clients_accepted)
        yield counter("clients_refused_total", "Requests for the feed that got no client.", self.refused, "reason")
        yield counter("clients_dropped_total", "Clients that the server hung up on.", self.dropped, "reason")
        yield counter("messages_sent_total", "Messages handed to the network.", self.messages_sent)
        yield gauge("held_bytes", "Bytes that slow connections have yet to take.", self.held_bytes)

    def _describe_polls(self) -> Iterator[str]:
        yield counter("polls_total", "Polls of the price source.", self.polls, "result")
        yield counter("poll_failures_total", "Failed polls, by what went wrong.", self.poll_failures, "cause")
        yield _family("histogram", "poll_duration_seconds", "How long polls take.", self._poll_durations())
        yield gauge("last_success_timestamp_seconds", "Last successful poll; 0 for none.", self._last_success_time)
        yield gauge("interval_seconds", "From one poll to the next.", self.interval)
        yield gauge("stale_after_seconds", "Age from which on prices count as stale.", self.stale_after)
        yield gauge("paused", "1 while polls are left out because nobody listens.", int(self.paused))
        yield gauge("credits_used", "Credits used, as CoinAPI last said.", self._credits_used)
        yield gauge("credits_left", "Credits left, as CoinAPI last said; billed below 0.", self._credits_left)

    def _poll_durations(self) -> dict[str, float]:
        samples: dict[str, float] = {}
        for bound, polls in zip((*POLL_BUCKETS, "+Inf"), accumulate(self._polls_within), strict=True):
            samples[f'_bucket{{le="{bound}"}}'] = polls
        return samples | {"_sum": self._poll_seconds, "_count": sum(self._polls_within)}

    def _describe_prices(self) -> Iterator[str]:
        latest = {_labels(asset_id=asset, quote=self.quote): each for asset, each in self.prices.latest.items()}
        prices = {labels: update.price for labels, update in latest.items()}
        times = {labels: epoch for labels, update in latest.items() if (epoch := _epoch(update.time)) is not None}
        yield gauge("price", "Last price of one asset, in the quote currency.", prices)
        yield gauge("price_timestamp_seconds", "The source's own time of that price.", times)
        yield gauge("assets_without_price", "Tracked assets that never had a price.", len(self._without_price()))

    def _describe_server(self) -> Iterator[str]:
        yield counter("http_responses_total", "HTTP responses, by their status.", self.http_responses, "status")
        yield gauge("visitors", "Connections that are not clients.", self.visitors)
        yield gauge("batch_seconds_max", "The longest batch of events of the last 60 s.", self.batch_seconds_max)
        if self.history_state is not None:
            last_write = self.history_last_write
            yield counter("history_write_errors_total", "Failed writes of the history file.", self.history_write_errors)
            yield gauge("history_last_write_timestamp_seconds", "Last write of the file; 0 for none.", last_write)
        yield gauge("start_timestamp_seconds", "When the server was made.", self.started_at)
        labels = _labels(version=self.version, python=platform.python_version())
        yield gauge("build_info", "Always 1; its labels say what runs.", {labels: 1})

    def _count_open_files(self) -> int:
        """As the system lists them; with many connections, these and as many other files as at the last listing."""
        connections = self.client_count + self.visitors
        if connections <= MAX_LISTED:
            try:
                self._other_files = len(os.listdir(OPEN_FILES)) - 1 - connections  # 1: the listing itself
            except OSError:
                pass  # hidden by a container, or there is no such directory
        return self._other_files + connections

    def _without_price(self) -> list[str]:
        """The assets that never had a price."""
        return [asset for asset in self.prices.assets if asset not in self.prices.latest]


def _start_at_0(keys: Iterable[Any]) -> Counter[Any]:
    return Counter(dict.fromkeys(keys, 0))


def _family(kind: str, name: str, text: str, samples: Samples | None, label: str = "") -> str:
    """One metric with all its samples, keyed by their labels or by the value of `label`; "" while none is known."""
    if samples is None or samples == {}:
        return ""
    if not isinstance(samples, Mapping):
        samples = {"": samples}
    elif label:
        samples = {_labels(**{label: str(key)}): number for key, number in samples.items()}
    if not name.startswith("process_"):
        name = f"price_tracker_{name}"
    lines = [f"{name}{labels} {number}\n" for labels, number in samples.items()]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}"


gauge = partial(_family, "gauge")
counter = partial(_family, "counter")


def _labels(**labels: str) -> str:
    """Labels as Prometheus' text format has them."""
    return "{" + ",".join([f'{name}="{value.translate(ESCAPES)}"' for name, value in labels.items()]) + "}"


def _epoch(time_text: str) -> float | None:
    """Epoch seconds of a time like CoinAPI's, or None for any other text."""
    try:
        moment = datetime.fromisoformat(time_text)
        return moment.timestamp() if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _describe_process(started_at: float, open_files: int) -> Iterator[str]:
    """The process metrics of the official client libraries, under their names, as far as this system has them."""
    yield counter("process_cpu_seconds_total", "CPU time used, user and system.", time.process_time())
    try:
        with open("/proc/self/statm", "rb") as file:  # Linux
            virtual, resident = [int(pages) * mmap.PAGESIZE for pages in file.read().split()[:2]]
        yield gauge("process_virtual_memory_bytes", "Virtual memory.", virtual)
        yield gauge("process_resident_memory_bytes", "Resident memory.", resident)
    except (OSError, ValueError):
        pass
    if resource:
        yield gauge("process_open_fds", "Open files and sockets.", open_files)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield gauge("process_max_fds", "Files and sockets that may be open.", limit if limit >= 0 else None)
    yield gauge("process_start_time_seconds", "When the program was started.", started_at)
