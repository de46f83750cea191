"""Measure what the past costs with a year in it: a poll, an answer, its memory; and the file beside it."""

import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from running import ASSETS

from price_server.archive import Archive
from price_server.history import RANGES, History, encode_point

NOW = 1_800_000_000.0  # epoch seconds, when the year is over
INTERVAL = 5.0  # seconds between two polls
MANY = tuple(f"A{number:03}" for number in range(400))


def show_history(print_table: Callable[..., None], rounds: int) -> None:
    """Tables of how long it takes for ten assets and for 400, and how large it is."""
    for assets in (ASSETS, MANY) if rounds > 1 else (ASSETS,):  # 400 take a minute
        clock = Clock()
        tracemalloc.start()
        past = fill(assets, clock)
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        times = measure(past, clock, assets, rounds)
        began = time.perf_counter()
        size = write(past, assets)
        rows = [
            [what, *(f"{pick(each) * 1e3:.3f}" for pick in (statistics.median, min, max))]
            for what, each in times.items()
        ]
        note = (
            f"A year has {memory / 1e6:.2f} MB in memory and {size / 1e6:.2f} MB in a file, "
            f"which is written in {time.perf_counter() - began:.2f} s."
        )
        head = ["history", "median ms", "least", "worst"]
        print_table(f"A year of {len(assets)} assets", head, *rows, notes=[note])


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


def fill(assets: tuple[str, ...], clock: Clock) -> History:
    """A past in which each series is full."""
    made_up = random.Random(1)
    past = History(assets, clock)
    for span in RANGES:
        times = range(int(NOW) - span.seconds, int(NOW) + 1, span.step)
        for asset in assets:
            points = [encode_point(at, repr(made_up.uniform(0.1, 100_000))) for at in times]
            past.load(span.step, {asset: b",".join(points)})
    return past


def measure(past: History, clock: Clock, assets: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of call."""
    made_up = random.Random(2)
    times: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[[], object]) -> None:
        began = time.perf_counter()
        function()
        times.setdefault(what, []).append(time.perf_counter() - began)

    for _ in range(rounds):
        clock.now += INTERVAL
        prices = {asset: repr(made_up.uniform(0.1, 100_000)) for asset in assets}
        timed("a poll, added", partial(past.add, prices, clock.now))
        for span in RANGES:
            timed(f"{span.name}, after a poll", partial(past.json_pieces, span.name, assets))
            timed("the same again", partial(past.json_pieces, span.name, assets))
        timed("the ranges for /healthz", past.describe)
    return times


def write(past: History, assets: tuple[str, ...]) -> int:
    """The size of a file with all of it."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "past.db"
        archive = Archive(str(file), "coinapi", "USD", assets, loaded=lambda *_: None)
        archive.start(30)
        for span in RANGES:
            archive.write(past.load(span.step, {}))
        archive.stop(60)
        return file.stat().st_size
