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
from price_server.history import RANGES, History, Loaded, encode_point

NOW = 1_800_000_000.0  # epoch seconds, when the year is over
INTERVAL = 5.0  # seconds between two polls
MANY = tuple(f"A{number:03}" for number in range(400))


def show_history(print_table: Callable[..., None], rounds: int) -> None:
    """Tables of how long it takes for ten assets and for 400, and how large it is."""
    for assets in (ASSETS, MANY):
        tracemalloc.start()
        past = fill(assets)
        memory = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        times, size = measure(past, assets, rounds)
        rows = [
            [what, *(f"{pick(each) * 1e3:.3f}" for pick in (statistics.median, min, max))]
            for what, each in times.items()
        ]
        note = f"A year has {memory / 1e6:.2f} MB in memory and {size / 1e6:.2f} MB in the file."
        head = ["history", "median ms", "least", "worst"]
        print_table(f"A year of {len(assets)} assets", head, *rows, notes=[note])


def fill(assets: tuple[str, ...]) -> History:
    """A past in which each series is full."""
    made_up = random.Random(1)
    past = History(assets, lambda: NOW)
    for span in RANGES:
        texts = {}
        for asset in assets:
            times = range(int(NOW) - span.seconds, int(NOW) + 1, span.step)
            texts[asset] = b",".join(encode_point(at, repr(made_up.uniform(0.1, 100_000))) for at in times)
        past.load(Loaded(span.step, texts))
    return past


def measure(past: History, assets: tuple[str, ...], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each kind of call, and the size of a file with all of it."""
    made_up = random.Random(2)
    times: dict[str, list[float]] = {}

    def timed(what: str, function: Callable[[], object]) -> None:
        began = time.perf_counter()
        function()
        times.setdefault(what, []).append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "past.db"
        archive = Archive(str(file), "coinapi", "USD", assets, loaded=lambda _: None, wall_clock=lambda: 0.0)
        archive.start(30)
        for span in RANGES:
            archive.write(past.load(Loaded(span.step, {})))
        for number in range(1, rounds + 1):
            prices = {asset: repr(made_up.uniform(0.1, 100_000)) for asset in assets}
            at = NOW - INTERVAL * (rounds - number)  # after what is in it, and not ahead of its clock
            timed("a poll, added", partial(add, past, archive, prices, at))
            for span in RANGES:
                timed(f"{span.name}, after a poll", partial(past.answer, span.name, assets))
                timed("the same again", partial(past.answer, span.name, assets))
            timed("the ranges for /healthz", past.describe)
        timed("until the file has all of it", lambda: archive.stop(60))
        size = file.stat().st_size
    return times, size


def add(past: History, archive: Archive, prices: dict[str, str], at: float) -> None:
    archive.write(past.add(prices, at))
