"""The price history of each asset in memory, as the JSON text that /history sends.

No socket, no thread, no file: the server thread owns it. archive.py keeps a copy in a file.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, NamedTuple


class Range(NamedTuple):
    """How far back a chart goes, and how far apart its points are."""

    name: str
    seconds: int
    step: int  # seconds

    @property
    def max_points(self) -> int:
        """Points that a series holds: one more than fit, so that the range is covered at any moment of a step."""
        return self.seconds // self.step + 1


RANGES = (  # 288 to 365 steps each; a step is the key of its range, also in the file; the first is the default
    Range("1h", 3600, 10),
    Range("24h", 86400, 300),
    Range("7d", 7 * 86400, 1800),
    Range("30d", 30 * 86400, 7200),
    Range("1y", 365 * 86400, 86400),
)

Text = bytes | bytearray  # points with commas between them: [1800000000.123,45000.0],[1800000010.123,45001.5]
Row = tuple[int, int, str, float, str]  # step, number of the step, asset, epoch seconds, price
Dropped = tuple[int, int, str]  # step, number of the step, asset: of a point that memory no longer holds


class Poll(NamedTuple):
    """One poll, for the archive. Nothing changes it, so that another thread may read it."""

    at: float
    prices: Mapping[str, str]
    steps: tuple[int, ...]
    dropped: list[Dropped]

    def rows(self) -> Iterator[Row]:
        for step in self.steps:
            for asset, price in self.prices.items():
                yield step, int(self.at // step), asset, self.at, price


class Snapshot(NamedTuple):
    """All points that one range had before a file was read. As text, because copying that is quick."""

    step: int
    texts: dict[str, bytes]
    dropped: list[Dropped]

    def rows(self) -> Iterator[Row]:
        for asset, text in self.texts.items():
            for point in _split(text):
                at = _time(point)
                yield self.step, int(at // self.step), asset, at, point[point.index(b",") + 1 : -1].decode()


def encode_point(at: float, price: str) -> bytes:
    """A point; `at` epoch seconds, `price` JSON."""
    return f"[{at:.3f},{price}]".encode()


class History:
    """The last points of each asset in each range. A series drops points only when it is full.

    The clock drops nothing, because it may be wrong: points older than the range or ahead of the clock are kept,
    and not shown.

    wall_clock: epoch seconds. Raises ValueError for ranges of which two have the same name or step.
    """

    def __init__(
        self,
        assets: Iterable[str],
        wall_clock: Callable[[], float] = time.time,
        ranges: Sequence[Range] = RANGES,
    ):
        for one, other in combinations(ranges, 2):
            if one.step == other.step or one.name == other.name:
                raise ValueError(
                    f"RANGES: {one.name!r} every {one.step} s and {other.name!r} every {other.step} s: "
                    "each range needs a name and a step that no other has"
                )
        self._wall_clock = wall_clock
        self.names = tuple(span.name for span in ranges)
        self._ranges = {span.name: _RangePoints(span, assets) for span in ranges}
        self._by_step = {points.span.step: points for points in self._ranges.values()}

    def add(self, prices: Mapping[str, str], at: float) -> Poll:
        """Add one poll, made `at` epoch seconds: prices by asset, as JSON text. Returns what the archive must write.

        `prices` must not be changed afterwards.
        """
        at = round(at, 3)  # as in the text
        head = f"[{at:.3f},"
        points = {asset: f"{head}{price}]".encode() for asset, price in prices.items()}
        dropped: list[Dropped] = []
        for step, range_points in self._by_step.items():
            dropped += range_points.add(int(at // step), points)
        return Poll(at, prices, tuple(self._by_step), dropped)

    def load(self, step: int, texts: Mapping[str, bytes]) -> Snapshot:
        """Add the points that a file has of one range before those in memory, which win where both have one of a step.

        texts: by asset, points made by `encode_point` in the order of time, each step once, with commas between them.
        Returns what the archive must write: what was in memory already.
        """
        return self._by_step[step].load(texts)

    def describe(self) -> list[dict[str, Any]]:
        """The ranges, as /healthz shows them; `since` is the time of the oldest point that is shown, or None."""
        now = self._now()
        return [points.span._asdict() | {"since": points.since(now)} for points in self._ranges.values()]

    def json_pieces(self, range_name: str, assets: tuple[str, ...]) -> list[bytes]:
        """{"BTC":[[epoch_seconds,price],...],...} in pieces, which responses share until a point changes.

        Raises KeyError for an unknown range or asset.
        """
        return self._ranges[range_name].json_pieces(assets, self._now())

    def csv(self, range_name: str, assets: Iterable[str]) -> Iterator[bytes]:
        """The same as lines like 2026-11-24T12:00:00.413Z,BTC,45000.0; each asset's are made when they are read."""
        points = self._ranges[range_name]
        yield b"time,asset_id,price\n"
        # Not bound to a name: a suspended generator would hold these bytes, and there may be thousands of them.
        yield from filter(None, (_csv_lines(asset, points.shown(asset, self._now())) for asset in assets))

    def _now(self) -> float:
        return round(self._wall_clock(), 3)


class _RangePoints:
    """The points of all assets in one range, and what was shown of them since the last change."""

    def __init__(self, span: Range, assets: Iterable[str]):
        self.span = span
        self._series = {asset: _Series(span) for asset in assets}
        self._assets = tuple(self._series)
        self._sorted: dict[str, bytes] = {}  # the text in the order of time, of series that arrived out of order
        self._whole = b""  # the JSON of all assets, in one piece because most ask for that; b"" when it is not made
        self._members: dict[str, bytes] = {}  # the members of that JSON, for requests of some assets
        self._valid = (math.inf, -math.inf)  # from and until when both are right, epoch seconds
        self._since: tuple[float, float] | None = None  # when `since` was last asked, and what it was

    def add(self, number: int, points: dict[str, bytes]) -> list[Dropped]:
        dropped: list[Dropped] = []
        for asset, point in points.items():
            gone = self._series[asset].add(number, point)
            if gone is not None:
                dropped.append((self.span.step, gone, asset))
        since = self._since
        self._clear_shown()
        if since and not dropped and since[1] < number * self.span.step:
            self._since = since  # the oldest point is still there, and no older one came
        return dropped

    def load(self, texts: Mapping[str, bytes]) -> Snapshot:
        known = {asset: bytes(series.text) for asset, series in self._series.items() if series.text}
        numbers = [(asset, number) for asset, text in texts.items() for number in self._series[asset].load(text)]
        self._clear_shown()
        return Snapshot(self.span.step, known, [(self.span.step, number, asset) for asset, number in numbers])

    def _clear_shown(self) -> None:
        self._sorted.clear()
        self._valid = (math.inf, -math.inf)
        self._since = None

    def since(self, now: float) -> float | None:
        if self._since and self._since[0] <= now and self._since[1] > now - self.span.seconds:
            return self._since[1]  # all series of 400 assets take 3 ms a range, and /healthz is asked often
        shown = ((self._text(asset), self._find_shown(asset, now)) for asset in self._series)
        since = min((_time(text, part.start) for text, part in shown if part.start < part.stop), default=None)
        self._since = None if since is None else (now, since)
        return since

    def json_pieces(self, assets: tuple[str, ...], now: float) -> list[bytes]:
        if not self._valid[0] <= now < self._valid[1]:
            self._whole, self._members, self._valid = b"", {}, (now, math.inf)
        if assets == self._assets:
            self._whole = self._whole or b"{%b}" % b",".join([self._make_member(asset, now) for asset in assets])
            return [self._whole]
        for asset in assets:
            if asset not in self._members:
                self._members[asset] = self._make_member(asset, now)
        pieces = [piece for asset in assets for piece in (b",", self._members[asset])]
        return [b"{", *pieces[1:], b"}"]

    def _make_member(self, asset: str, now: float) -> bytes:
        """The asset's member of the JSON object; lowers the time until when it is valid."""
        text, part = self._text(asset), self._find_shown(asset, now)
        begin, end = self._valid
        if part.start < part.stop:  # until its first point leaves the range
            end = min(end, _time(text, part.start) + self.span.seconds)
        if part.stop < len(text):  # and one that is ahead of the clock comes into it
            end = min(end, _time(text, text.index(b"[", part.stop)))
        self._valid = begin, end
        return b"".join((json.dumps(asset).encode(), b":[", text[part], b"]"))

    def shown(self, asset: str, now: float) -> Text:
        return self._text(asset)[self._find_shown(asset, now)]

    def _find_shown(self, asset: str, now: float) -> slice:
        """Which part of the text is in the range and not ahead of the clock."""
        text = self._text(asset)
        begin = _find_later(text, now - self.span.seconds)
        if begin >= len(text):
            return slice(len(text), len(text))
        end = len(text) if _time(text, text.rindex(b"[")) <= now else _find_later(text, now) - 1
        return slice(begin, max(begin, end))

    def _text(self, asset: str) -> Text:
        """All points in the order of time."""
        series = self._series[asset]
        if series.is_rising:
            return series.text
        if asset not in self._sorted:
            points = sorted(_split(series.text), key=_time)
            self._sorted[asset] = b",".join(points)
        return self._sorted[asset]


class _Series:
    """The points of one asset in one range, as text in the order of arrival, each step once."""

    __slots__ = ("_count", "_last", "_numbers", "_span", "text")

    def __init__(self, span: Range):
        self._span = span
        self.text = bytearray()
        self._count = 0
        self._last: float = -math.inf  # the number of the last point's step
        self._numbers: set[int] = set()  # of all steps; empty while the times only rise

    @property
    def is_rising(self) -> bool:
        """Whether the times only rise, as they do until a clock is set back."""
        return not self._numbers

    def add(self, number: int, point: bytes) -> int | None:
        """Add a point, in place of that of the same step. Returns the number of the step that is dropped for it."""
        if number == self._last:
            self.text[self.text.rindex(b"[") :] = point
            return None
        if number < self._last:  # the clock was set back
            self._numbers.update(map(self._number, _split(self.text)))
        replaced = number in self._numbers
        if replaced:
            self.text = bytearray(b",".join([each for each in _split(self.text) if self._number(each) != number]))
        self.text += b"," + point if self.text else point
        self._count += not replaced
        self._last = number
        if replaced:
            self._note_order()
        elif self._numbers:
            self._numbers.add(number)
        return self._drop_first() if self._count > self._span.max_points else None

    def load(self, text: bytes) -> list[int]:
        """Add points before all others, but none of a step that is here. Returns the numbers of dropped steps."""
        held = _split(self.text)
        known = set(held)
        added = [point for point in _split(text) if point not in known]  # mostly all or none, and parsing is slow
        if held and added:
            numbers = {self._number(point) for point in held}
            added = [point for point in added if self._number(point) not in numbers]
        if added:
            self._last = self._last if held else self._number(added[-1])
            self.text = bytearray(b",".join(added + held))
            self._count += len(added)
            if held and (self._numbers or _time(added[-1]) > _time(held[0])):
                self._note_order()
        return [self._drop_first() for _ in range(self._count - self._span.max_points)]

    def _drop_first(self) -> int:
        number = self._number(self.text)
        del self.text[: self.text.index(b"]") + 2]
        self._count -= 1
        self._numbers.discard(number)
        if self._numbers and self._number(self.text) < number:  # where the clock was set back: they may only rise now
            self._note_order()
        return number

    def _note_order(self) -> None:
        """Find out again whether the times only rise."""
        numbers = [self._number(point) for point in _split(self.text)]
        self._numbers = set() if numbers == sorted(numbers) else set(numbers)

    def _number(self, point: Text) -> int:
        """The number of the step of a point, or of the first of several."""
        return int(_time(point) // self._span.step)


def _time(text: Text, begin: int = 0) -> float:
    """Epoch seconds of the point that begins at `begin`."""
    return float(text[begin + 1 : text.index(b",", begin)])


def _split(text: Text) -> list[bytes]:
    """The points one by one."""
    return [b"[%b]" % point for point in bytes(text[1:-1]).split(b"],[")] if text else []


def _find_later(text: Text, moment: float) -> int:
    """Where the first point later than `moment` begins; the length of the text, or one more, when there is none."""
    low, high = 0, len(text)
    for _ in range(3):  # mostly it is one of the first three, which takes fewer steps than halving
        if low >= high or _time(text, low) > moment:
            return low
        low = text.index(b"]", low) + 2
    while low < high:
        begin = text.rindex(b"[", low, (low + high) // 2 + 1)  # of the point in the middle
        if _time(text, begin) > moment:
            high = begin
        else:
            low = text.index(b"]", begin) + 2
    return low


def _csv_lines(asset: str, text: Text) -> bytes:
    return "".join([_csv_line(asset, point) for point in _split(text)]).encode()


def _csv_line(asset: str, point: bytes) -> str:
    moment = datetime.fromtimestamp(_time(point), UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    return f"{moment}Z,{asset},{point[point.index(b',') + 1 : -1].decode()}\n"
