"""The latest prices and the counters of one server, and what /healthz and /metrics say of them.

No socket, no thread: the server thread owns all of it. What the poller alone sets (`paused`,
`credits_used`, `credits_left`, `poll_seconds`, `last_error`) are whole values, replaced and never changed.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Protocol

from .frames import Opcode, encode_frame

MAX_SUBSETS = 100  # of the assets, for which frames are held joined: there are 2^n


class Update(Protocol):
    """What `publish` takes; `coin_api.PriceUpdate` is one."""

    @property
    def asset_id(self) -> str: ...
    @property
    def price(self) -> float: ...
    @property
    def time(self) -> str: ...
    def to_json(self) -> str: ...


class Figures:
    """What one server knows: its assets, their last prices, and how it is.

    interval: seconds between two polls. clock: steady seconds; wall_clock: epoch seconds.
    """

    stale_floor = 60.0  # seconds; CoinAPI's own times lag by about 30 s

    def __init__(
        self,
        assets: Sequence[str],
        *,
        quote: str = "USD",
        source: str = "coinapi",
        interval: float = 5.0,
        max_clients: int = 10_000,
        allow_origins: Iterable[str] = (),
        pause_when_idle: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        self.assets = tuple(assets)
        self.quote = quote
        self.source = source
        self.interval = interval
        self.max_clients = max_clients
        self.allow_origins = frozenset(origin.lower().rstrip("/") for origin in allow_origins)
        self.pause_when_idle = pause_when_idle
        self.clock = clock
        self.wall_clock = wall_clock
        self.started_at = wall_clock()  # epoch seconds

        self.updates: dict[str, Update] = {}  # the last of each asset, in the order tracked
        self.frames: dict[str, bytes] = {}  # the same, as they go out
        self._snapshots: dict[tuple[str, ...], bytes] = {}  # the same, by what a client follows
        self.last_success: float | None = None  # steady seconds
        self.last_success_time = 0.0  # epoch seconds
        self.last_error: str | None = None
        self.paused = False  # while polls are left out because nobody listens
        self.poll_seconds: float | None = None  # the last poll's duration
        self.credits_used: int | None = None
        self.credits_left: int | None = None
        self.client_count = 0
        self.client_came = threading.Event()  # set with each new client, for a poller that pauses
        self.messages_sent = 0
        self.polls = _counter("result", "success", "failure")
        self.refused = _counter("reason", "asset", "denied", "full", "handshake", "origin")
        self.dropped = _counter(
            "reason", "behind", "disconnected", "failed", "memory", "no_close", "no_pong", "queue_full", "unfinished"
        )

    # What changes them

    def remember(self, updates: dict[str, Update], frames: dict[str, bytes]) -> None:
        """Note a successful poll; an asset that it does not have keeps its last price."""
        known_updates, known_frames = self.updates | updates, self.frames | frames
        self.updates = {asset: known_updates[asset] for asset in self.assets if asset in known_updates}
        self.frames = {asset: known_frames[asset] for asset in self.updates}
        self._snapshots = {}
        self.last_success, self.last_success_time, self.last_error = self.clock(), self.wall_clock(), None
        self.polls['{result="success"}'] += 1

    def note_poll(self, seconds: float, credits_used: int | None, credits_left: int | None) -> None:
        """Note how long a poll took, and what is known of the credits. Any thread."""
        self.poll_seconds, self.credits_used, self.credits_left = seconds, credits_used, credits_left
        self.paused = False

    def pause(self) -> None:
        """Polls are left out until the next `note_poll`. Any thread."""
        self.paused = True

    # What they tell

    def encode(self, updates: Iterable[Update]) -> tuple[dict[str, Update], dict[str, bytes]]:
        """A poll's updates and their frames; ValueError for an asset that is not tracked."""
        new = {update.asset_id: update for update in updates}
        for asset_id in new.keys() - set(self.assets):
            raise ValueError(self.unknown(asset_id))
        return new, {asset: encode_frame(Opcode.TEXT, update.to_json().encode()) for asset, update in new.items()}

    def snapshot(self, assets: tuple[str, ...]) -> bytes:
        """The frames of all prices known so far, for a client that follows `assets`."""
        snapshot = self._snapshots.get(assets)
        if snapshot is None:
            snapshot = b"".join([self.frames[asset] for asset in assets if asset in self.frames])
            if len(self._snapshots) >= MAX_SUBSETS:
                self._snapshots.clear()
            self._snapshots[assets] = snapshot
        return snapshot

    def unknown(self, asset_id: str) -> str:
        """The message for an asset that is not tracked."""
        return f"unknown asset {asset_id[:40]!r}: this server tracks {', '.join(self.assets)}"

    @property
    def stale_after(self) -> float:
        """Seconds after which prices are no longer current."""
        return max(3 * self.interval, self.stale_floor)

    def age(self) -> float | None:
        """Seconds since the last successful poll, or None."""
        return None if self.last_success is None else self.clock() - self.last_success

    def status(self) -> str:
        """One of: ok; starting, before the first success; stale; paused, while polls are left out."""
        age = self.age()
        if self.paused:
            return "paused"
        if age is None:
            return "starting"
        return "ok" if age <= self.stale_after else "stale"

    def health(self, ranges: Sequence[Any]) -> dict[str, Any]:
        """The fields of /healthz."""
        age = self.age()
        return {
            "status": self.status(),
            "time": round(self.wall_clock(), 3),
            "age_seconds": None if age is None else round(age, 3),
            "stale_after_seconds": self.stale_after,
            "interval_seconds": self.interval,
            "pause_when_idle": self.pause_when_idle,
            "clients": self.client_count,
            "max_clients": self.max_clients,
            "source": self.source,
            "quote": self.quote,
            "assets": self.assets,
            "without_price": self.without_price(),
            "ranges": ranges,
            "last_error": self.last_error,
        }

    def without_price(self) -> list[str]:
        """The assets that never had a price."""
        return [asset for asset in self.assets if asset not in self.updates]

    def metrics(self) -> str:
        """The counters and gauges in Prometheus' text format; what is not known is left out."""
        prices = {self._labels(asset): update.price for asset, update in self.updates.items()}
        times = {self._labels(asset): _epoch(update.time) for asset, update in self.updates.items()}
        families: tuple[tuple[str, str, str, Any], ...] = (
            ("clients", "gauge", "Open WebSocket clients.", self.client_count),
            ("max_clients", "gauge", "Clients allowed; the next one is refused.", self.max_clients),
            ("clients_refused_total", "counter", "Requests for the feed that got no client.", self.refused),
            ("clients_dropped_total", "counter", "Clients that the server hung up on.", self.dropped),
            ("messages_sent_total", "counter", "Messages handed to the network.", self.messages_sent),
            ("polls_total", "counter", "Polls of the price source.", self.polls),
            ("poll_duration_seconds", "gauge", "How long the last poll took.", self.poll_seconds),
            ("last_success_timestamp_seconds", "gauge", "Last successful poll; 0 for none.", self.last_success_time),
            ("interval_seconds", "gauge", "From one poll to the next.", self.interval),
            ("stale_after_seconds", "gauge", "Age from which on prices count as stale.", self.stale_after),
            ("start_timestamp_seconds", "gauge", "When the server was made.", self.started_at),
            ("paused", "gauge", "1 while polls are left out because nobody listens.", int(self.paused)),
            ("price", "gauge", "Last price of one asset, in the quote currency.", prices),
            ("price_timestamp_seconds", "gauge", "The source's own time of that price.", times),
            ("assets_without_price", "gauge", "Tracked assets that never had a price.", len(self.without_price())),
            ("credits_used", "gauge", "Credits used, as CoinAPI last said.", self.credits_used),
            ("credits_left", "gauge", "Credits left, as CoinAPI last said; billed below 0.", self.credits_left),
        )
        lines = []
        for name, kind, text, value in families:
            samples = value if isinstance(value, dict) else {"": value}
            known = [f"price_tracker_{name}{key} {each}" for key, each in samples.items() if each is not None]
            if known:
                lines += [f"# HELP price_tracker_{name} {text}", f"# TYPE price_tracker_{name} {kind}", *known]
        return "\n".join(lines) + "\n"

    def _labels(self, asset: str) -> str:
        return f'{{asset_id="{asset}",quote="{self.quote}"}}'


def _epoch(time_text: str) -> float | None:
    """Epoch seconds of a time like CoinAPI's, or None for another kind of text."""
    try:
        moment = datetime.fromisoformat(time_text)
        return moment.timestamp() if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _counter(label: str, *values: str) -> dict[str, int]:
    """Counts by the value of a label, as /metrics shows it."""
    return {f'{{{label}="{value}"}}': 0 for value in values}
