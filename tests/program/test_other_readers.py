"""The feed and the past by programs of other makers: curl, a library for event streams, EventSource, pandas."""

import io
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import sseclient
from running import ASSETS, Tracker, outside, wait_for
from selenium.webdriver import Chrome

COLLECT = """
    window.updates = [];
    const stream = new EventSource(arguments[0]);
    stream.onmessage = (event) => updates.push(JSON.parse(event.data).asset_id);
"""


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    with Tracker("--demo", "--interval", "0.3") as started:
        yield started


def test_curl_reads_the_stream(tracker: Tracker) -> None:
    outside("curl")
    command = ["curl", "-sN", "--max-time", "20", f"{tracker.http}/stream?assets=ETH,BTC"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout
        lines = [curl.stdout.readline() for _ in range(9)]
        curl.kill()
    assert lines[0].startswith("retry: ")
    assert [json.loads(line[6:])["asset_id"] for line in lines[1::2]] == ["BTC", "ETH", "BTC", "ETH"]


def test_a_library_for_event_streams_reads_the_stream(tracker: Tracker) -> None:
    with requests.get(f"{tracker.http}/stream", stream=True, timeout=10) as response:
        events: Iterator[Any] = sseclient.SSEClient(response).events()  # type: ignore[arg-type]
        assert [json.loads(next(events).data)["asset_id"] for _ in range(20)] == [*ASSETS, *ASSETS]


def test_a_browsers_event_source_comes_back_by_itself_after_a_restart(browser: Chrome) -> None:
    def updates() -> list[str]:
        found: list[str] = browser.execute_script("return updates.splice(0);")
        return found

    with Tracker("--demo", "--interval", "0.3") as first:
        browser.get(f"{first.http}/prices")
        browser.execute_script(COLLECT, f"{first.http}/stream?assets=BTC")
        wait_for(lambda: updates()[:1] == ["BTC"], what="a price")
        port = str(first.port)
        assert first.stop() == 0
    updates()
    with Tracker("--demo", "--interval", "0.3", "--port", port):
        wait_for(lambda: updates()[:1] == ["BTC"], what="a price after the restart")
    browser.get("about:blank")


def test_pandas_reads_the_past_without_an_option(tracker: Tracker) -> None:
    import pandas

    wait_for(lambda: requests.get(f"{tracker.http}/history", timeout=5).json()["SOL"])
    response = requests.get(f"{tracker.http}/history?format=csv&assets=SOL,BTC", timeout=5)
    table = pandas.read_csv(io.StringIO(response.text))
    assert list(table.columns) == ["time", "asset_id", "price"]
    assert list(table["asset_id"].unique()) == ["BTC", "SOL"]
    assert (table["price"] > 0).all()
    assert pandas.to_datetime(table["time"]).dt.tz is not None
