"""History files for tests: one that is filled, and what is in one."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from sqlite3 import connect  # not the attribute, because some tests replace it
from typing import Any

from price_server.archive import Archive
from price_server.history import History

NOON = 1_800_000_000.0  # a whole number of every step but the day's


def start_archive(file: Path | str, assets: Iterable[str]) -> Archive:
    archive = Archive(str(file), "coinapi", "USD", assets, loaded=lambda *_: None)
    archive.retry_interval = 0.1
    archive.start(5)
    return archive


def fill(file: Path, assets: Iterable[str]) -> Path:
    """Put a day of prices into a file, as a program does that has ended: 97 points, the price is the minute."""
    archive, past = start_archive(file, assets), History(assets)
    for minute in range(0, 1441, 15):
        archive.write(past.add(dict.fromkeys(assets, f"{minute}.5"), NOON + minute * 60))
    archive.stop(5)
    return file


def rows(file: Path, select: str = "SELECT * FROM points") -> list[tuple[Any, ...]]:
    with closing(connect(file)) as database:
        return database.execute(select).fetchall()
