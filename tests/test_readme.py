"""README.md: what it shows is run."""

import json
import re
import subprocess
import sys

import pytest
from running import ROOT, Tracker, outside

import tracker

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, mark: str) -> str:
    """The one fenced block of this language that holds `mark`."""
    found = [
        text for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE) if mark in text
    ]
    assert len(found) == 1, f"{len(found)} blocks of {language} with {mark!r}"
    return found[0]


def two_lines(command: list[str]) -> list[str]:
    """What a client that never ends prints first."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        try:
            return [client.stdout.readline().strip() for _ in range(2)]
        finally:
            client.kill()


def test_the_python_client_prints_the_message_that_the_readme_shows() -> None:
    shown = json.loads(block("json", "asset_id"))
    with Tracker("--demo") as running:
        program = block("python", "connect(").replace("3030", str(running.port))
        first, second = two_lines([sys.executable, "-u", "-c", program])
    assert {name: type(value) for name, value in json.loads(first).items()} == {
        name: type(value) for name, value in shown.items()
    }
    assert [json.loads(line)["asset_id"] for line in (first, second)] == ["BTC", "ETH"]


def test_the_javascript_client_prints_the_assets_that_it_asks_for() -> None:
    outside("node")
    with Tracker("--demo") as running:
        program = block("js", "WebSocket").replace("3030", str(running.port))
        lines = two_lines(["node", "--experimental-websocket", "-e", program])
    assert [line.split()[0] for line in lines] == ["BTC", "ETH"]


def test_every_flag_and_default_is_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tracker.parse_arguments(["--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    usage = re.search(r"^    python tracker\.py .*\n(?:    .*\n)+", README, re.MULTILINE)
    assert usage
    assert set(re.findall(r"--[a-z-]+", usage[0])) == flags
    options = tracker.parse_arguments(
        re.sub(r"[\[\]]|\.\.\.|ORIGIN|--(allow-origin|demo|once|pause-when-idle)", "", usage[0]).split()[2:]
    )
    defaults = tracker.parse_arguments([])
    assert (options.quote, options.interval, options.host, options.port) == (
        defaults.quote,
        defaults.interval,
        defaults.host,
        defaults.port,
    )
    assert (options.max_clients, options.log_level) == (defaults.max_clients, defaults.log_level)


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
