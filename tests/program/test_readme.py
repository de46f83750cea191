"""README.md: what it shows is run."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import requests
from proxies import put
from running import ASSETS, ROOT, Tracker, outside, wait_for
from stand_in import KEY, StandIn
from websockets.sync.client import connect

from coin_api import PriceUpdate
from options import parse_arguments
from price_server import PriceServer

TOP = ("tracker.py", "options.py", "coin_api.py", "system.py")  # and no source that somebody puts beside them
PROGRAM = [*(ROOT / name for name in TOP), *ROOT.glob("price_server/*.py")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, mark: str) -> str:
    """The one fenced block of this language that holds `mark`."""
    found = [
        text for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if mark in text
    ]
    assert len(found) == 1, f"{len(found)} blocks of {language} with {mark!r}"
    return found[0]


def program(folder: Path, name: str, text: str, *changes: tuple[str, object]) -> Path:
    """A file with this text of the README, each first string of the changes replaced."""
    (folder / name).write_text(put(text, *changes))
    return folder / name


@contextmanager
def running(file: Path) -> Iterator[Callable[[], str]]:
    """Runs a program that never ends; gives what reads its next line."""
    command = [sys.executable, "-u", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=file.parent) as client:
        assert client.stdout
        try:
            yield lambda: client.stdout.readline().strip()  # type: ignore[union-attr]
        finally:
            client.kill()


def test_the_message_that_the_readme_shows_is_the_feeds() -> None:
    shown = json.loads(block("json", "asset_id"))
    with Tracker("--demo") as tracker, connect(tracker.ws) as client:
        message = json.loads(client.recv(5))
    assert {name: type(value) for name, value in message.items()} == {
        name: type(value) for name, value in shown.items()
    }


def test_the_python_client_comes_back_by_itself(tmp_path: Path) -> None:
    with Tracker("--demo", "--interval", "0.5") as first:
        port = str(first.port)
        with running(program(tmp_path, "follow.py", block("python", "def follow("), ("3030", port))) as next_line:
            assert [next_line().split()[0] for _ in range(2)] == ["BTC", "ETH"]
            first.process.kill()
            first.process.wait()
            while not next_line().startswith("no prices: "):
                pass
            with Tracker("--demo", "--port", port):
                while not next_line().startswith("BTC "):
                    pass


def test_the_alert_runs_its_command_each_time_the_price_crosses_the_line(tmp_path: Path, coin_api: StandIn) -> None:
    alert = block("python", "subprocess")
    assert len(alert.strip().splitlines()) <= 11
    program(tmp_path, "follow.py", block("python", "def follow("))
    coin_api.rates["BTC"] = 49_000.0
    with Tracker("--interval", "0.2", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as tracker:
        command = (
            f"[{sys.executable!r}, '-c', 'import sys; open(sys.argv[1], chr(97)).write(sys.argv[2] + chr(10))', 'log'"
        )
        changes = (("3030", tracker.port), ('["notify-send"', command))
        with running(program(tmp_path, "alert.py", alert, *changes)):
            wait_for(lambda: requests.get(tracker.http + "/healthz", timeout=5).json()["clients"] == 1)
            said: list[str] = []
            for price in (49_500.0, 50_500.0, 50_600.0, 49_900.0):
                asked = len(coin_api.requests)
                coin_api.rates["BTC"] = price
                wait_for(partial(lambda asked: len(coin_api.requests) > asked + 2, asked))
                if price in (50_500.0, 49_900.0):
                    said.append(f"BTC crossed 50000: {price}")
                    wait_for(lambda: (tmp_path / "log").exists())
                    wait_for(lambda: (tmp_path / "log").read_text().splitlines() == said)
            assert (tmp_path / "log").read_text().splitlines() == said


def test_your_own_source_takes_any_json_address(tmp_path: Path, coin_api: StandIn) -> None:
    invalid = b'"ETH": null, "BCH": "n/a", "ADA": NaN, "LTC": 0, "LINK": -1, "XLM": true'
    coin_api.say(b'{"BTC": 45000, "XRP": 0.5, %b}' % invalid)
    text = block("python", "class MyPrices")
    own = program(tmp_path, "mine.py", text, ("https://prices.example.org/usd.json", coin_api.url))
    with Tracker("--interval", "0.3", program=str(own), PYTHONPATH=str(ROOT)) as tracker:
        with connect(tracker.ws) as client:
            updates = [json.loads(client.recv(5)) for _ in range(2)]
        assert [(update["asset_id"], update["price"]) for update in updates] == [("BTC", 45000.0), ("XRP", 0.5)]
        health = requests.get(tracker.http + "/healthz", timeout=5).json()
        assert (health["status"], health["source"], len(health["without_price"])) == ("ok", "my-prices", 8)
        assert all(tracker.text.count(f" {name}") == 2 for name in ("ETH", "BCH", "ADA", "LTC", "LINK", "XLM", "DOT"))
        coin_api.say(b"", 500)
        tracker.wait_for_log("WARNING no prices: no answer from my prices: ")


def test_a_callback_that_waits_in_another_thread_delays_no_client(
    server: PriceServer, updates: Callable[[float], list[PriceUpdate]]
) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def work(message: str) -> str:
        waiting.set()
        assert go_on.wait(10)
        return message.upper()

    names = {"server": server, "work": work}
    exec(block("python", "set_fn_message_received"), names)
    try:
        with connect(f"ws://127.0.0.1:{server.port}/ws", max_queue=None) as client:
            client.send("hello")
            assert waiting.wait(5)
            server.publish(updates(1.0))
            assert [json.loads(client.recv(5))["asset_id"] for _ in ASSETS] == list(ASSETS)
            go_on.set()
            assert client.recv(5) == "HELLO"
    finally:
        go_on.set()
        names["workers"].shutdown()  # type: ignore[attr-defined]


def test_a_token_lets_only_those_in_that_know_it(tmp_path: Path) -> None:
    guarded = program(tmp_path, "guarded.py", block("python", "FEED_TOKEN"))
    with Tracker("--demo", program=str(guarded), PYTHONPATH=str(ROOT), FEED_TOKEN="sesame") as tracker:
        with connect(f"{tracker.ws}?token=sesame&assets=BTC") as client:
            assert json.loads(client.recv(5))["asset_id"] == "BTC"
        for path in ("/stream", "/stream?token=open"):
            refused = requests.get(tracker.http + path, timeout=5, stream=True)
            assert (refused.status_code, refused.json()) == (403, {"error": "the feed needs ?token="})
        assert requests.get(tracker.http + "/prices", timeout=5).status_code == 200
        metrics = requests.get(tracker.http + "/metrics", timeout=5).text
        assert 'price_tracker_clients_refused_total{reason="token"} 2' in metrics


def test_the_readme_is_read_in_one_sitting() -> None:
    assert README.count("\n") <= 260


def test_the_threads_of_the_readme_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\w+)(?:, with [^|]+)? \|", README[README.index("| thread |") :], re.MULTILINE)[:6]
    assert rows == ["thread", "main", "poller", "server", "archive", "log"]
    names = re.findall(r'name="(\w+)", daemon=True', "".join(path.read_text() for path in PROGRAM))
    assert sorted(names) == sorted(rows[2:])


def test_every_file_of_the_program_is_in_the_readme() -> None:
    assert all(f"| `{name}` |" in README for name in TOP)


def test_the_javascript_client_prints_the_assets_that_it_asks_for() -> None:
    outside("node")
    with Tracker("--demo") as started:
        text = block("js", "WebSocket").replace("3030", str(started.port))
        command = ["node", "--experimental-websocket", "-e", text]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout
            lines = [client.stdout.readline() for _ in range(2)]
            client.kill()
    assert [line.split()[0] for line in lines] == ["BTC", "ETH"]


def test_every_flag_and_default_is_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    usage = re.search(r"^    python tracker\.py .*\n(?:    .*\n)+", README, re.MULTILINE)
    assert usage
    assert set(re.findall(r"--[a-z-]+", usage[0])) == flags
    no_value = r"[\[\]]|\.\.\.|ORIGIN|FILE|--assets BTC,ETH|--(allow-origin|demo|history|once|pause-when-idle|version)"
    assert parse_arguments(re.sub(no_value, "", usage[0]).split()[2:]) == parse_arguments([])


def test_every_link_within_the_readme_leads_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("http"):
            assert (ROOT / target).is_file(), target
