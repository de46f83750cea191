"""Headless Chromium on the page, driven by Selenium: the fixtures and the eyes of the test_dashboard files."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import outside, wait_for
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from coin_api import PriceUpdate
from price_server import PriceServer

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1280,800"""
# Clocks that a test moves (milliseconds), and whether the page is looked at.
CLOCKS = """{
    window.clock = {wall: 0, steady: 0, hidden: false};
    const wall = Date.now, steady = performance.now.bind(performance);
    Date.now = () => wall() + clock.wall;
    performance.now = () => steady() + clock.steady;
    Object.defineProperty(document, 'hidden', {get: () => clock.hidden});
}"""
StartServer = Callable[..., PriceServer]


class Page:
    """The page of one server after another, in one browser; a visit starts with an empty log."""

    def __init__(self, browser: Chrome):
        self.browser = browser
        self.run = browser.execute_script
        self.port = 0

    def visit(self, port: int, state: str = "Live", query: str = "") -> None:
        self.port = port
        self.browser.get(f"http://127.0.0.1:{port}/{query}")
        self.wait_for_state(state)

    def wait_for_state(self, state: str, seconds: float = 10.0) -> None:
        wait_for(lambda: self.text("#state") == state, seconds, f"{state!r} on the page")

    def wait_for_charts(self) -> None:
        script = "return [...document.querySelectorAll('[data-part=line]')].every((line) => line.getAttribute('d'))"
        wait_for(lambda: self.run(script), what="a line in each chart")

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def first(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.texts(selector)[0]

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        return list(self.run(script, selector))

    def part(self, name: str) -> list[str]:
        """The text of this part of each row."""
        return self.texts(f"tbody [data-part={name}]")

    def path(self, name: str, row: int = 0) -> str:
        return str(self.all(f"tbody [data-part={name}]")[row].get_attribute("d") or "")

    def style(self, selector: str, name: str) -> str:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return str(self.run(script, selector, name))

    def emulate(self, **features: str) -> None:
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def resize(self, width: int, height: int = 800) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def width(self) -> int:
        """Of all there is; more than the window's is sideways scrolling."""
        return int(self.run("return document.documentElement.scrollWidth"))

    def look_away(self, hidden: bool = True) -> None:
        self.run("clock.hidden = arguments[0]; document.dispatchEvent(new Event('visibilitychange'))", hidden)

    def pass_time(self, seconds: float, asleep: bool = False) -> None:
        """In the page only; asleep: as on systems where the steady clock stands still in sleep."""
        script = "clock.wall += 1000 * arguments[0]; clock.steady += 1000 * arguments[1]; tick()"
        self.run(script, seconds, 0 if asleep else seconds)

    def requests(self) -> list[str]:
        """What the browser asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]  # type: ignore[no-untyped-call]
        params = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
        feeds = [each["params"]["url"] for each in events if each["method"] == "Network.webSocketCreated"]
        return [url for url in [*(each["request"]["url"] for each in params), *feeds] if not url.startswith("data:")]

    def errors(self) -> list[str]:
        """What the console said since the last call; a test that expects an error takes it off with this."""
        return [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        errors = self.errors()
        self.browser.get("about:blank")
        assert errors == []


class Clock:
    """For a server: its steady clock and its wall clock, `ahead` seconds from the real ones."""

    def __init__(self, ahead: float = 0.0):
        self.ahead = ahead

    def options(self) -> dict[str, Callable[[], float]]:
        return {"clock": lambda: time.monotonic() + self.ahead, "wall_clock": lambda: time.time() + self.ahead}


def record(server: PriceServer, seconds: int, step: int, price: Callable[[int], float] = lambda age: 100.0) -> None:
    """A past of so many seconds for each asset, `price` by its age."""
    now = server.wall_clock()
    for age in range(seconds, 0, -step):
        server.history.add(dict.fromkeys(server.assets, json.dumps(price(age))), now - age)
    wait_for(lambda: server.history.ranges[-1]["since"], what="the past")


def prices(server: PriceServer, price: float, time: str = "2026-11-22T07:44:05.1234567Z", **others: Any) -> None:
    """One poll: all assets at this price, but for the `others`."""
    server.publish([PriceUpdate(asset, others.get(asset, price), time) for asset in server.assets])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    outside("chromium", "chromedriver")
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With a path of ours Selenium looks for no driver elsewhere, and downloads none.
    browser = Chrome(options, ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCKS})
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome, start_server: StartServer) -> Iterator[Page]:
    """The browser's page, left before the servers stop: else it would look for them, and say so in its console."""
    page = Page(browser)
    page.resize(1280)
    page.emulate()
    page.requests()
    yield page
    page.leave()
