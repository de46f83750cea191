"""Measure what the past costs with a year of ten assets in a file: a poll, an answer, and the file's size."""

import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from running import ASSETS

from price_server.history import RANGES, History

NOW = 1_800_000_000.0  # epoch seconds, when the year is over


def show_history(print_table: Callable[..., None], rounds: int) -> None:
    """A table of how long it takes, from another thread's view."""
    times: dict[str, list[float]] = {}
    made_up = random.Random(1)

    def prices() -> dict[str, str]:
        return {asset: repr(made_up.uniform(0.1, 100_000)) for asset in ASSETS}

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "past.db"
        history = History(ASSETS, "USD", "coinapi", str(file), lambda: NOW)
        history.start()
        for span in reversed(RANGES):
            for at in range(int(NOW) - span.seconds + 1, int(NOW), span.step):
                history.add(prices(), at)
        keep(history, prices())
        for _ in range(rounds):
            for span in RANGES:
                times.setdefault("a poll, kept and in the file", []).append(keep(history, prices()))
                times.setdefault(f"{span.name} of ten assets, made", []).append(ask(history, span.name))
                times.setdefault("the same again", []).append(ask(history, span.name))
        history.stop(10)
        size = file.stat().st_size
    rows = [
        [what, *(f"{pick(each) * 1e3:.2f}" for pick in (statistics.median, min, max))] for what, each in times.items()
    ]
    note = f"The file has {size / 1e6:.2f} MB."
    print_table("A year of ten assets in a file", ["history", "median ms", "least", "worst"], *rows, notes=[note])


def keep(history: History, prices: dict[str, str]) -> float:
    """Seconds until a poll is in memory and in the file."""
    done = threading.Event()

    def wanted() -> bool:  # its turn comes behind the poll, and dropped it costs nothing itself
        done.set()
        return False

    began = time.perf_counter()
    history.add(prices, NOW)
    history.ask("1h", (), lambda _: None, wanted)
    done.wait(10)
    return time.perf_counter() - began


def ask(history: History, name: str) -> float:
    """Seconds until a range of all assets is answered."""
    done = threading.Event()
    began = time.perf_counter()
    history.ask(name, ASSETS, lambda _: done.set())
    done.wait(10)
    return time.perf_counter() - began
