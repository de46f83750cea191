"""A tracker with `--history FILE`, and what can befall the file: kills, company, trouble of the disk, visitors."""

import json
import multiprocessing
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import requests
from history_files import fill, rows, start_archive
from running import ASSETS, ROOT, Tracker, wait_for
from stand_in import KEY, StandIn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from price_server.archive import ArchiveError
from price_server.history import RANGES, History

NAMES = [span.name for span in RANGES]
LAST = "SELECT price FROM points WHERE asset = 'BTC' AND step = 10 ORDER BY slot DESC LIMIT 1"
BEHIND = "the price history is kept in memory alone until the file can be used"
AGAIN = "is up to date again"


class Honest(threading.Thread):
    """A client that reads all it gets, and notes when: what a disk does must not show in it."""

    def __init__(self, tracker: Tracker):
        super().__init__(daemon=True)
        self.prices: list[str] = []  # of BTC, as text
        self.times: list[float] = []
        self._url = tracker.ws + "?assets=BTC"
        self.start()

    def run(self) -> None:
        try:
            with connect(self._url) as client:
                for message in client:
                    self.prices.append(json.dumps(json.loads(message)["price"]))
                    self.times.append(time.monotonic())
        except ConnectionClosed:
            pass

    def wait_for_polls(self, count: int) -> None:
        already = len(self.times)
        wait_for(lambda: len(self.times) >= already + count, what=f"{count} polls")

    def missed_nothing(self) -> bool:
        """Whether it got each poll, none of them late; each has another price: see `track`."""
        steps = [float(later) - float(earlier) for earlier, later in pairwise(self.prices)]
        return set(steps) == {1.0} and max(later - earlier for earlier, later in pairwise(self.times)) < 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "past.db"


@pytest.fixture
def track(file: Path, coin_api: StandIn) -> Iterator[Callable[..., Tracker]]:
    """Starts trackers with the file and ten polls a second, in which the price of BTC is 1.0, 2.0 and so on."""
    trackers = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        coin_api.rates["BTC"] = float(len(coin_api.requests))
        coin_api.send_rates(handler)

    coin_api.answer = answer

    def start() -> Tracker:
        options = ("--interval", "0.1", "--history", str(file))
        tracker = Tracker(*options, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
        trackers.append(tracker)
        return tracker.__enter__()

    yield start
    for tracker in trackers:
        tracker.__exit__()


@pytest.fixture
def filled(file: Path) -> Path:
    return fill(file, ASSETS)


def history(tracker: Tracker, name: str = "1h") -> dict[str, list[list[float]]]:
    return requests.get(f"{tracker.http}/history?range={name}", timeout=5).json()


def told(tracker: Tracker, path: str, pattern: str) -> str:
    return re.findall(pattern, requests.get(f"{tracker.http}/{path}", timeout=5).text)[-1]


def is_current(tracker: Tracker, client: Honest) -> bool:
    """Whether history has what the client had before it was asked, but for a poll under way."""
    price = float(client.prices[-2])
    return history(tracker)["BTC"][-1][1] >= price


def is_saved(file: Path, client: Honest) -> bool:
    """Whether the file has one of the last prices that the client got."""
    return rows(file, LAST)[0][0] in client.prices[-10:]


def has_last(file: Path, client: Honest) -> bool:
    """The same, of a tracker that has stopped."""
    client.join(5)
    return is_saved(file, client)


def warnings(tracker: Tracker) -> list[str]:
    return [line for line in tracker.log if "WARNING" in line]


def stops_in_time(tracker: Tracker) -> bool:
    began = time.monotonic()
    return tracker.stop() == 0 and time.monotonic() - began < 2


# Ends and starts


def test_a_program_that_is_killed_loses_at_most_the_poll_under_way(file: Path, track: Callable[..., Tracker]) -> None:
    began = time.time()
    for _ in range(20):
        tracker = track()
        client = Honest(tracker)
        client.wait_for_polls(3)
        tracker.process.kill()
        client.join(5)
        assert client.missed_nothing()
        assert rows(file, "PRAGMA integrity_check") == [("ok",)]
        assert has_last(file, client)
        assert warnings(tracker) == []
    tracker = track()
    points = history(tracker, "1h")["BTC"]
    assert points[0][0] < began + 15
    assert len(points) >= (time.time() - began) // 10
    ranges = requests.get(f"{tracker.http}/healthz", timeout=5).json()["ranges"]
    assert [shown["name"] for shown in ranges] == NAMES
    assert all(began < shown["since"] < time.time() for shown in ranges)


def test_charts_are_there_before_the_first_poll(file: Path) -> None:
    now = time.time()
    past = start_archive(file, ASSETS)
    past.write(History(ASSETS).add(dict.fromkeys(ASSETS, "1.50"), now - 1))
    past.stop(5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # CoinAPI, which does not answer
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Tracker("--history", str(file), COIN_API_KEY=KEY, COIN_API_URL=url) as tracker:
            health = requests.get(f"{tracker.http}/healthz", timeout=5).json()
            assert health["status"] == "starting"
            assert [shown["since"] for shown in health["ranges"]] == [round(now - 1, 3)] * 5
            for name in NAMES:
                assert history(tracker, name) == {asset: [[round(now - 1, 3), 1.5]] for asset in ASSETS}


def test_two_trackers_with_one_file_both_go_on(file: Path, track: Callable[..., Tracker]) -> None:
    trackers = [track(), track()]
    clients = [Honest(tracker) for tracker in trackers]
    for client in clients:
        client.wait_for_polls(20)
    for tracker, client in zip(trackers, clients, strict=True):
        assert is_current(tracker, client)
        assert len(warnings(tracker)) <= 1  # they may meet, on a slow disk
        wait_for(partial(is_saved, file, client), what="its price in the file")
    assert all(stops_in_time(tracker) for tracker in trackers)
    assert rows(file, "PRAGMA integrity_check") == [("ok",)]


def _start_first(name: str, directory: Path, together: Barrier, count: int) -> None:
    for number in range(count):
        file = directory / f"{number}.db"
        together.wait(30)
        past = start_archive(file, (name,))  # a refusal would end this process with status 1
        past.write(History((name,)).add({name: "1"}, time.time()))
        wait_for(lambda: (name,) in rows(file, "SELECT asset FROM points"), 20)  # noqa: B023
        past.stop(5)


def test_two_first_starts_in_the_same_moment(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    starters = [spawn.Process(target=_start_first, args=(name, tmp_path, together, 30)) for name in ("BTC", "ETH")]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(60)
        assert starter.exitcode == 0
    for number in range(30):
        assert rows(tmp_path / f"{number}.db", "PRAGMA integrity_check") == [("ok",)]
        assert len(rows(tmp_path / f"{number}.db", "SELECT * FROM points")) == 10


# Files that are refused


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def refusal(file: Path) -> str:
    """What is wrong with a file, which stays as it was."""
    before = snapshot(file.parent)
    with pytest.raises(ArchiveError) as refused:
        start_archive(file, ASSETS)
    assert snapshot(file.parent) == before
    found = re.fullmatch(rf"history file '{re.escape(str(file))}' (.*), or name another file", str(refused.value))
    assert found, refused.value
    return found[1]


def _stranger(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        for statement in ("CREATE TABLE theirs (x)", "INSERT INTO theirs VALUES (1)", *statements):
            database.execute(statement)
        database.commit()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (lambda path: path.mkdir(), "is a directory: name a file in it"),
    "a pipe": (lambda path: os.mkfifo(path), "is not a regular file: move it away"),
    "a text": (lambda path: path.write_text("BTC,45000\n" * 1000), "is not a SQLite database: move it away"),
    "a stranger's": (_stranger, "is a database of another program: move it away"),
    "a stranger's in WAL mode": (
        lambda path: _stranger(path, "PRAGMA journal_mode = WAL"),
        "is a database of another program: move it away",
    ),
    "another id": (
        lambda path: _stranger(path, "PRAGMA application_id = 1346524231", "PRAGMA user_version = 1"),
        "is a database of another program: move it away",
    ),
    "a newer one": (
        lambda path: _stranger(path, "PRAGMA application_id = 1347572808", "PRAGMA user_version = 2"),
        "was made by a newer version of this program: use that one",
    ),
}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("new/", "is a directory: name a file in it"),
        ("x" * 300, "cannot be opened (File name too long): correct it"),
        ("no/past.db", "is in a directory that does not exist: make '{}/no'"),
    ],
)
def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    said = f"history file '{tmp_path}/{name}' {complaint.format(tmp_path)}, or name another file"
    with pytest.raises(ArchiveError, match=f"^{re.escape(said)}$"):
        start_archive(f"{tmp_path}/{name}", ASSETS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_refused_stays_as_it_was(kind: str, file: Path) -> None:
    make, complaint = REFUSED[kind]
    make(file)
    assert refusal(file) == complaint
    wait_for(lambda: not any(thread.name == "archive" for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("kept", "how"),
    [
        (99, ""),
        (100, " (cut off)"),
        (8192, " (database disk image is malformed)"),
        (-4096, " (database disk image is malformed)"),
        (-1, " (cut off)"),
    ],
)
def test_a_file_that_was_cut_is_refused_and_stays_as_it_was(filled: Path, kept: int, how: str) -> None:
    filled.write_bytes(filled.read_bytes()[:kept])
    assert refusal(filled) == f"is damaged{how}: restore a backup"


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])  # with files beside it while it is looked at, and without
def test_a_file_whose_content_was_changed_is_refused_and_stays_as_it_was(filled: Path, mode: str) -> None:
    rows(filled, f"PRAGMA journal_mode = {mode}")
    content = bytearray(filled.read_bytes())
    content[8192:8292] = b"x" * 100
    filled.write_bytes(content)
    assert re.fullmatch(r"is damaged \(.*[Pp]age 3: .*\): restore a backup", refusal(filled))


@pytest.mark.parametrize(
    ("name", "denied", "complaint"),
    [
        ("past.db", os.R_OK, "must be readable and writable: change its permissions"),
        ("past.db", os.W_OK, "must be readable and writable: change its permissions"),
        ("", os.W_OK, "gets files beside it, like FILE-wal: make '{}' writable"),
        ("", os.X_OK, "gets files beside it, like FILE-wal: make '{}' writable"),
    ],
)
def test_what_may_not_be_written_is_refused(
    filled: Path, monkeypatch: pytest.MonkeyPatch, name: str, denied: int, complaint: str
) -> None:
    path = os.path.join(os.path.realpath(filled.parent), name).rstrip("/")
    monkeypatch.setattr(os, "access", lambda asked, mode: str(asked) != path or not mode & denied)
    assert refusal(filled) == complaint.format(path)


def test_a_file_that_cannot_be_used_is_wrong_usage(tmp_path: Path, file: Path) -> None:
    file.write_text("notes of mine\n")
    command = [sys.executable, str(ROOT / "tracker.py"), "--port", "0", "--demo", "--history", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"history file '{file}' is not a SQLite database: move it away, or name another file")
    assert file.read_text() == "notes of mine\n"
    assert os.listdir(tmp_path) == ["past.db"]


# Trouble of the disk


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no disk can be made full for a process here")
def test_a_full_disk_affects_no_client(file: Path, track: Callable[..., Tracker]) -> None:
    tracker = track()
    client = Honest(tracker)
    client.wait_for_polls(3)
    _, most = resource.prlimit(tracker.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(tracker.process.pid, resource.RLIMIT_FSIZE, (5000, most))
    tracker.wait_for_log(BEHIND)
    client.wait_for_polls(15)  # it is tried again meanwhile
    assert is_current(tracker, client)
    wait_for(lambda: told(tracker, "healthz", '"history": "(.*?)"') == "failing")
    assert float(told(tracker, "metrics", "_history_write_errors_total (.*)")) > 0
    assert time.time() - 60 < float(told(tracker, "metrics", "_last_write_timestamp_seconds (.*)")) < time.time()
    resource.prlimit(tracker.process.pid, resource.RLIMIT_FSIZE, (most, most))
    tracker.wait_for_log(AGAIN)
    wait_for(lambda: told(tracker, "healthz", '"history": "(.*?)"') == "ok")
    client.wait_for_polls(3)
    assert len(warnings(tracker)) == 1
    assert client.missed_nothing()
    assert stops_in_time(tracker)
    assert has_last(file, client)
