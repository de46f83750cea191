"""Headless Chromium on the page, driven by Selenium: the fixtures and the eyes of the test_page files."""

import json
import re
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

import pytest
from running import outside, wait_for
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from coin_api import PriceUpdate
from price_server import PriceServer

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1280,800"""
# Clocks that a test moves (milliseconds), what the page does once a second, and whether it is looked at.
CLOCKS = """{
    window.clock = {wall: 0, steady: 0, hidden: false, held: false, ticks: [],
                    tick: () => clock.ticks.forEach((f) => f())};
    const setReal = window.setInterval.bind(window);
    window.setInterval = (f, ms) => clock.ticks.push(f) && setReal(() => { if (!clock.held) f(); }, ms);
    const wall = Date.now, steady = performance.now.bind(performance);
    Date.now = () => wall() + clock.wall;
    performance.now = () => steady() + clock.steady;
    Object.defineProperty(document, 'hidden', {get: () => clock.hidden});
}"""
StartServer = Callable[..., PriceServer]
# What Chromium's console says, for Page.expect.
NOT_READY = r"/healthz - Failed to load resource: .* status of 503"  # no prices yet, or stale ones
NO_SOCKET = r"WebSocket connection to 'ws://.*' failed|WebSocket is closed before"
NO_STREAM = r"/stream\S* - Failed to load resource: .* status of 50[23]"
NO_SERVER = r"Failed to load resource: net::ERR_(CONNECTION_|EMPTY_RESPONSE|INCOMPLETE_CHUNKED_ENCODING)"
RESTART = (NO_SERVER, NO_SOCKET, NOT_READY)


class Page:
    """The page of one server after another, in one browser; a visit starts with an empty log."""

    def __init__(self, browser: Chrome):
        self.browser = browser
        self.run = browser.execute_script
        self.port = 0
        self.expected: list[str] = []  # what the console may say in this test

    def visit(self, port: int, state: str = "Live", query: str = "") -> None:
        self.port = port
        self.browser.get(f"http://127.0.0.1:{port}/{query}")
        self.wait_for_state(state)

    def show(self, server: PriceServer, price: float, query: str = "", **others: float) -> None:
        """This price of all assets, but for the `others`, and their charts."""
        prices(server, price, **others)
        self.visit(server.port, query=query)
        self.wait_for_charts()

    def wait_for_state(self, state: str, seconds: float = 30.0) -> None:
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
        self.run(
            "clock.hidden = arguments[0]; document.dispatchEvent(new Event('visibilitychange', {bubbles: true}))",
            hidden,
        )

    def pass_time(self, seconds: float, asleep: bool = False) -> None:
        """In the page only; asleep: as on systems where the steady clock stands still in sleep."""
        script = "clock.wall += 1000 * arguments[0]; clock.steady += 1000 * arguments[1]; clock.tick()"
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
        assert [error for error in errors if not any(re.search(each, error) for each in self.expected)] == []

    def expect(self, *patterns: str) -> None:
        """In the console, as often as they come: how often depends on the time that a test takes."""
        self.expected += patterns


class Line(socketserver.ThreadingTCPServer):
    """Between the browser and a server, bad where a test says so.

    rates: bytes a second, by what a path starts with. 0: nothing comes. None: refused, as by a proxy without WebSocket.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: PriceServer):
        super().__init__(("127.0.0.1", 0), LineHandler)
        self.to, self.port = server.port, int(self.server_address[1])
        self.rates: dict[str, int | None] = {}
        self.late: dict[str, float] = {}  # seconds that an answer comes late, by what a path starts with
        self.frozen, self.cut_off = threading.Event(), threading.Event()  # for the connections so far

    def freeze(self) -> None:
        """Nothing comes any more on what is open, and nothing says so."""
        self.frozen.set()
        self.frozen = threading.Event()

    def cut(self) -> None:
        """End what is open and hangs."""
        self.cut_off.set()
        self.cut_off = threading.Event()

    def handle_error(self, *_: object) -> None:
        """The browser hung up."""


class LineHandler(socketserver.BaseRequestHandler):
    server: Line

    def handle(self) -> None:
        self.frozen, self.cut_off = self.server.frozen, self.server.cut_off
        head: bytes = self.request.recv(65536)
        path = head.decode().partition(" ")[2].partition(" ")[0]
        self.cut_off.wait(next((late for start, late in self.server.late.items() if path.startswith(start)), 0))
        rate = next((rate for start, rate in self.server.rates.items() if path.startswith(start)), 1 << 30)
        if rate is None:
            self.request.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif rate == 0:
            self.cut_off.wait()
        elif head:
            with socket.create_connection(("127.0.0.1", self.server.to)) as server:
                server.sendall(head)
                threading.Thread(target=self.pass_on, args=(self.request, server), daemon=True).start()
                self.pass_on(server, self.request, rate)

    def pass_on(self, one: socket.socket, other: socket.socket, rate: int = 1 << 30) -> None:
        with suppress(OSError):
            while data := one.recv(min(max(rate // 20, 1), 65536)):
                if self.frozen.is_set():
                    self.cut_off.wait()
                other.sendall(data)
                self.cut_off.wait(len(data) / rate)
            other.shutdown(socket.SHUT_WR)


class Clock:
    """For a server: its steady clock and its wall clock, `ahead` seconds from the real ones."""

    def __init__(self, ahead: float = 0.0):
        self.ahead = ahead

    def options(self) -> dict[str, Callable[[], float]]:
        return {"age_clock": lambda: time.monotonic() + self.ahead, "wall_clock": lambda: time.time() + self.ahead}


def record(server: PriceServer, seconds: int, step: int, price: Callable[[int], float] = lambda age: 100.0) -> None:
    """A past of so many seconds for each asset, `price` by its age."""
    now = server._wall_clock()
    past = [(now - age, json.dumps(price(age))) for age in range(seconds, 0, -step)]
    remember(server, *((at, dict.fromkeys(server.assets, text)) for at, text in past))


def remember(server: PriceServer, *points: tuple[float, dict[str, str]]) -> None:
    """These prices, as JSON, at these times."""

    def add() -> None:
        for at, texts in points:
            server._history.add(texts, at)

    server._loop.call(add)


def prices(server: PriceServer, price: float, **others: float) -> None:
    """One poll: all assets at this price, but for the `others`."""
    server.publish([PriceUpdate(asset, others.get(asset, price), time_of(server)) for asset in server.assets])


def time_of(server: PriceServer, ahead: float = 0.0) -> str:
    """CoinAPI's time of a price that comes now, by this server's clock; it lags by half a minute."""
    return datetime.fromtimestamp(server._wall_clock() - 30 + ahead, UTC).strftime("%Y-%m-%dT%H:%M:%S.1234567Z")


def start_chromium(*flags: str, logs: dict[str, str] | None = None) -> Chrome:
    """Chromium, headless; logs: which ones can be asked for."""
    outside("chromium", "chromedriver")
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS.split(), *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", logs or {})
    # With a path of ours Selenium looks for no driver elsewhere, and downloads none.
    return Chrome(options, ChromeService(shutil.which("chromedriver")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    folder = tmp_path_factory.mktemp("chromium")
    browser = start_chromium(f"--user-data-dir={folder}", logs={"browser": "ALL", "performance": "ALL"})
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCKS})
    yield browser
    browser.quit()


@pytest.fixture
def lay_line(start_server: StartServer) -> Iterator[Callable[[PriceServer], Line]]:
    """Lays lines to servers; they end behind the test."""
    with ExitStack() as stack:

        def lay(server: PriceServer) -> Line:
            line = stack.enter_context(Line(server))
            threading.Thread(target=line.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(line.cut)
            stack.callback(line.freeze)
            stack.callback(line.shutdown)
            return line

        yield lay


@pytest.fixture
def page(browser: Chrome, start_server: StartServer, lay_line: object) -> Iterator[Page]:
    """The browser's page, left before the servers stop: else it would look for them, and say so in its console."""
    page = Page(browser)
    page.resize(1280)
    page.emulate()
    page.requests()
    yield page
    page.leave()
