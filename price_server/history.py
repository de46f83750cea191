"""The price history of each asset in memory, as the JSON text that /history sends.

No socket, no thread, no file: the server thread owns it. archive.py keeps a copy in a file.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
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


RANGES = (  # about 360 points each; a step is the key of its range, also in the file
    Range("1h", 3600, 10),
    Range("24h", 86400, 300),
    Range("7d", 7 * 86400, 1800),
    Range("30d", 30 * 86400, 7200),
    Range("1y", 365 * 86400, 86400),
)

Text = bytes | bytearray  # points with commas between them: [1800000000.123,45000.0],[1800000010.123,45001.5]
Row = tuple[int, int, str, float, str]  # step, number of the step, asset, epoch seconds, price
Forgotten = tuple[int, str, bytearray]  # step, asset, point: one that memory no longer holds


class Poll(NamedTuple):
    """One poll, for the archive. Nothing changes it, so that another thread may read it."""

    at: float
    prices: Mapping[str, str]
    steps: tuple[int, ...]
    forgotten: list[Forgotten]

    def is_empty(self) -> bool:
        return not self.prices

    def rows(self) -> Iterator[Row]:
        for step in self.steps:
            for asset, price in self.prices.items():
                yield step, int(self.at // step), asset, self.at, price


class Known(NamedTuple):
    """All points of one range, for an archive that was just opened. As text, because copying that is quick."""

    step: int
    texts: dict[str, bytes]
    forgotten: list[Forgotten]

    def is_empty(self) -> bool:
        return not (self.texts or self.forgotten)

    def rows(self) -> Iterator[Row]:
        for asset, text in self.texts.items():
            for point in _split(text):
                at = _time(point)
                yield self.step, int(at // self.step), asset, at, point[point.index(b",") + 1 : -1].decode()


class Loaded(NamedTuple):
    """What a file has of one range: by asset, points made by `encode_point` in the order of time, each step once."""

    step: int
    texts: dict[str, bytes]


def encode_point(at: float, price: str) -> bytes:
    """A point; `at` epoch seconds, `price` JSON."""
    return f"[{at:.3f},{price}]".encode()


def step_number(point: Text, step: int, begin: int = 0) -> int:
    """The number of the step of the point that begins at `begin`."""
    return int(_time(point, begin) // step)


class History:
    """The last points of each asset in each range. A series drops one only when a newer one arrives.

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
        for one, other in ((one, other) for one in ranges for other in ranges if one is not other):
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
        forgotten: list[Forgotten] = []
        for step, range_points in self._by_step.items():
            forgotten += range_points.add(int(at // step), points)
        return Poll(at, prices, tuple(self._by_step), forgotten)

    def load(self, loaded: Loaded) -> Known:
        """Add what a file has before what is here; on the same step, what is here wins.

        Returns what the archive must write: what was here already.
        """
        return self._by_step[loaded.step].load(loaded)

    def describe(self) -> list[dict[str, Any]]:
        """The ranges, as /healthz shows them; `since` is the time of the oldest point that is shown, or None."""
        now = self._now()
        return [points.span._asdict() | {"since": points.since(now)} for points in self._ranges.values()]

    def answer(self, range_name: str, assets: Iterable[str]) -> list[bytes]:
        """{"BTC":[[epoch_seconds,price],...],...} in pieces, which responses share until a point changes.

        Raises KeyError for an unknown range or asset.
        """
        now, points = self._now(), self._ranges[range_name]
        pieces = [piece for asset in assets for piece in (b",", points.member(asset, now))]
        return [b"{", *pieces[1:], b"}"]

    def csv(self, range_name: str, assets: Iterable[str]) -> Iterator[bytes]:
        """The same as lines like 2026-11-24T12:00:00.413Z,BTC,45000.0; each asset's are made when they are taken."""
        points = self._ranges[range_name]
        yield b"time,asset_id,price\n"
        # No name for what is yielded, because that would hold it until the next is taken, by thousands at once.
        yield from filter(None, (_csv_lines(asset, points.shown(asset, self._now())) for asset in assets))

    def _now(self) -> float:
        return round(self._wall_clock(), 3)


class _RangePoints:
    """The points of all assets in one range. Those of the current step are apart, because each poll replaces them."""

    def __init__(self, span: Range, assets: Iterable[str]):
        self.span = span
        self._series = {asset: _Series(span.step) for asset in assets}
        self._heads = {asset: f"{json.dumps(asset)}:[".encode() for asset in self._series}
        self._slot: int | None = None  # the number of the current step
        self._current: dict[str, bytes] = {}  # its points
        # By asset, since the last change: the member that was shown, and which pieces of text it is.
        self._members: dict[str, tuple[list[tuple[int, int]], bytes]] = {}
        self._since: tuple[float, float] | None = None  # when `since` was last asked, and what it was

    def add(self, slot: int, points: dict[str, bytes]) -> list[Forgotten]:
        forgotten: list[Forgotten] = []
        if slot != self._slot:
            self._finish_step()
            self._slot = slot
        most = self.span.max_points
        for asset in points.keys() - self._current.keys() if self._current else points:
            series = self._series[asset]
            if slot <= series.last or len(series.runs) > 1:
                series.remove(slot)
            if series.count >= most:
                forgotten.append((self.span.step, asset, series.pop_first()))
        self._current.update(points)
        self._forget_answers()
        return forgotten

    def _finish_step(self) -> None:
        for asset, point in self._current.items():
            self._series[asset].append(self._slot, point)  # type: ignore[arg-type]
        self._slot, self._current = None, {}

    def load(self, loaded: Loaded) -> Known:
        self._finish_step()
        known = {asset: series.copy() for asset, series in self._series.items() if series.count}
        forgotten: list[Forgotten] = []
        for asset, text in loaded.texts.items():
            series = self._series[asset]
            series.insert(text)
            while series.count > self.span.max_points:
                forgotten.append((self.span.step, asset, series.pop_first()))
        self._forget_answers()
        return Known(self.span.step, known, forgotten)

    def _forget_answers(self) -> None:
        self._members.clear()
        self._since = None

    def since(self, now: float) -> float | None:
        oldest = now - self.span.seconds
        if self._since and self._since[0] <= now and self._since[1] > oldest:
            return self._since[1]  # all series of 400 assets take 3 ms a range, and /healthz is asked often
        texts = [text for asset in self._series for text in self._texts(asset)]
        begins = [(text, _find_later(text, oldest)) for text in texts]
        firsts = [_time(text, begin) for text, begin in begins if begin < len(text)]
        since = min((first for first in firsts if first <= now), default=None)
        self._since = None if since is None else (now, since)
        return since

    def member(self, asset: str, now: float) -> bytes:
        """The asset's member of the JSON object."""
        found = self._find_shown(asset, now)
        if asset in self._members and self._members[asset][0] == found:
            return self._members[asset][1]
        member = b"%b%b]" % (self._heads[asset], self._join(asset, found))
        self._members[asset] = found, member
        return member

    def shown(self, asset: str, now: float) -> bytes:
        return self._join(asset, self._find_shown(asset, now))

    def _texts(self, asset: str) -> list[Text]:
        current = self._current.get(asset)
        return [*self._series[asset].runs, current] if current else [*self._series[asset].runs]

    def _find_shown(self, asset: str, now: float) -> list[tuple[int, int]]:
        oldest = now - self.span.seconds
        return [_find_within(text, oldest, now) for text in self._texts(asset)]

    def _join(self, asset: str, found: list[tuple[int, int]]) -> bytes:
        texts = zip(self._texts(asset), found, strict=True)
        parts = [text[begin:end] for text, (begin, end) in texts if begin < end]
        if any(_time(one, one.rindex(b"[")) > _time(other) for one, other in pairwise(parts)):  # the clock was set
            parts = sorted((point for part in parts for point in _split(part)), key=_time)
        return b",".join(parts)


class _Series:
    """The points of one asset in one range, as text in the order of arrival, each step once.

    `runs`: in each of these texts the time only rises. There is one, until a clock is set back.
    """

    __slots__ = ("_step", "count", "last", "runs")

    def __init__(self, step: int):
        self._step = step
        self.runs: list[bytearray] = []
        self.count = 0
        self.last: float = -math.inf  # the number of the last point's step

    def append(self, slot: int, point: bytes) -> None:
        """Add a point of a step that is not here."""
        if slot > self.last and self.runs:
            run = self.runs[-1]
            run += b"," + point
        else:
            self.runs.append(bytearray(point))
        self.count += 1
        self.last = slot

    def insert(self, text: bytes) -> None:
        """Add points before all others; on a step that is here they are left out."""
        points = _split(text)
        if self.runs and points and (len(self.runs) > 1 or self._slot(points[-1]) >= self._slot(self.runs[0])):
            held = {point for run in self.runs for point in _split(run)}
            points = [point for point in points if point not in held]  # mostly none is left, and parsing is slow
            slots = {self._slot(point) for point in held} if points else set()
            points = [point for point in points if self._slot(point) not in slots]
        if points:
            self.runs.insert(0, bytearray(b",".join(points)))
            self.count += len(points)
            self._join_runs()

    def remove(self, slot: int) -> None:
        """Remove the point of this step, if there is one."""
        for run in self.runs:
            begin = _find_later(run, math.nextafter(slot * self._step, -math.inf))
            if begin < len(run) and self._slot(run, begin) == slot:
                end = run.index(b"]", begin) + 1
                del run[max(begin - 1, 0) if end == len(run) else begin : end + 1]
                self.count -= 1
        self._join_runs()

    def pop_first(self) -> bytearray:
        """Remove the point that arrived first."""
        run = self.runs[0]
        end = run.index(b"]") + 1
        point = run[:end]
        del run[: end + 1]
        self.count -= 1
        if not run:
            self._join_runs()
        return point

    def copy(self) -> bytes:
        return b",".join(self.runs)

    def _join_runs(self) -> None:
        """Join runs whose times rise from one to the next, and note the last step."""
        runs = [run for run in self.runs if run]
        self.runs = runs[:1]
        for run in runs[1:]:
            before = self.runs[-1]
            if _time(before, before.rindex(b"[")) < _time(run):
                before += b"," + run
            else:
                self.runs.append(run)
        self.last = self._slot(runs[-1], runs[-1].rindex(b"[")) if runs else -math.inf

    def _slot(self, text: Text, begin: int = 0) -> int:
        return step_number(text, self._step, begin)


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


def _find_within(text: Text, oldest: float, newest: float) -> tuple[int, int]:
    """Begin and end of the points later than `oldest`, up to `newest`; begin >= end when there are none."""
    begin = 0 if _time(text) > oldest else _find_later(text, oldest)
    end = len(text) if _time(text, text.rindex(b"[")) <= newest else _find_later(text, newest) - 1
    return begin, end


def _csv_lines(asset: str, text: Text) -> bytes:
    return "".join([_csv_line(asset, point) for point in _split(text)]).encode()


def _csv_line(asset: str, point: bytes) -> str:
    moment = datetime.fromtimestamp(_time(point), UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    return f"{moment}Z,{asset},{point[point.index(b',') + 1 : -1].decode()}\n"
