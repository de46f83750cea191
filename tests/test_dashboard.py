"""The page, in a real browser: headless Chromium, driven by Selenium."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from running import ASSETS, Tracker, outside, wait_for
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from stand_in import KEY, StandIn

import price_server
from coin_api import CoinApi, PriceUpdate
from price_server import PriceServer
from tracker import Poller

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1280,800"""
Updates = Callable[[float], list[PriceUpdate]]
StartServer = Callable[..., PriceServer]


class Page:
    """The page of one server after another, in one browser; a visit starts with an empty log."""

    def __init__(self, browser: Chrome):
        self.browser = browser
        self.run = browser.execute_script

    def visit(self, port: int, state: str = "Live") -> None:
        self.browser.get(f"http://127.0.0.1:{port}/")
        self.wait_for_state(state)

    def wait_for_state(self, state: str, seconds: float = 10.0) -> None:
        wait_for(lambda: self.text("#state") == state, seconds, f"{state!r} on the page")

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        return list(self.run(script, selector))

    def style(self, selector: str, name: str) -> str:
        return str(
            self.run("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)
        )

    def emulate(self, **features: str) -> None:
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def errors(self) -> list[str]:
        """What the console said since the last call; a test that expects an error takes it off with this."""
        return [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]

    def leave(self) -> None:
        errors = self.errors()
        self.browser.get("about:blank")
        assert errors == []


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
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: Chrome, start_server: StartServer) -> Iterator[Page]:
    """The browser's page, left before the servers stop: else it would look for them, and say so in its console."""
    page = Page(browser)
    page.resize(1280, 800)
    page.emulate()
    yield page
    page.leave()


def fill_history(server: PriceServer, seconds: int = 3600, gap: range = range(0)) -> float:
    """A point each 5 s, from 100.0 on and 0.5 up each time, but none at the ages in `gap`; returns the first's time."""
    now, epoch = time.monotonic(), time.time()
    for points in server.history.values():
        for age in range(seconds - 5, 0, -5):
            if age not in gap:
                points.append((now - age, f"[{epoch - age:.3f},{100 + (seconds - 5 - age) / 10}]"))
    return epoch - seconds + 5


def test_ten_rows_stand_in_the_tracked_order_with_prices_as_a_person_reads_them(page: Page, coin_api: StandIn) -> None:
    with Tracker(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as tracker:
        page.visit(tracker.port)
        prices = "65,980.10 4,166.21 1.1234 634.50 2.2093 207.43 27.81 0.0934 44.40 177.53"
        assert page.texts("tbody th") == list(ASSETS)
        assert page.texts(".value") == prices.split()
        assert page.text("h1") == "Prices in USD"
        assert page.browser.title == "65,980.10 BTC"
        page.leave()


def test_a_price_keeps_the_digits_that_matter(page: Page, server: PriceServer) -> None:
    page.visit(server.port, "Waiting for the first prices")
    page.errors()
    prices = [45000, 0.0934, 0.00001234, 1e-9, 177.534123456789, 0.093412345, 9.99999, 1065000000.4, 1e300]
    read = page.run("return arguments[0].map((price) => formatPrice(price, decimalsOf(price)))", prices)
    expected = "45,000.00 0.0934 0.00001234 1.0000e-9 177.53 0.093412 10.00 1,065,000,000 1.0000e+300"
    assert read == expected.split()


def test_prices_move_without_a_reload(page: Page) -> None:
    with Tracker("--demo", "--interval", "0.2") as tracker:
        page.visit(tracker.port)
        page.run("window.same = true")
        before = page.texts(".value")
        wait_for(lambda: all(a != b for a, b in zip(before, page.texts(".value"), strict=True)))
        newest = "return document.querySelector('.chart').ariaValueText.split(' ')[0]"  # in the chart
        wait_for(lambda: page.run(newest) != before[0])
        assert page.run("return window.same")
        page.leave()


def test_a_move_is_marked_by_more_than_colour(page: Page, server: PriceServer, updates: Updates) -> None:
    server.publish(updates(2.0))
    page.visit(server.port)
    assert set(page.texts(".mark")) == {""}
    for price, mark, label in ((2.1, "▲", "up"), (2.0, "▼", "down")):
        server.publish(updates(price))
        wait_for(lambda mark=mark: set(page.texts(".mark")) == {mark})  # type: ignore[misc]
        assert page.all(".mark")[0].accessible_name == label


def test_charts_are_filled_at_first_sight_and_break_where_prices_are_missing(page: Page, server: PriceServer) -> None:
    fill_history(server, gap=range(1000, 1500))
    server.publish([PriceUpdate(asset, 500.0, "2026-11-22T07:44:05.1234567Z") for asset in ASSETS])
    page.visit(server.port)
    assert page.text("#span") == "Last hour"
    assert set(page.texts(".change")) == {"+400.00%"}
    for line in page.all(".line"):
        path = line.get_attribute("d") or ""
        first, *_, last = [float(x) for x in re.findall(r"[ML]([\d.]+) ", path)]
        assert path.count("L") > 600
        assert path.count("M") == 2
        assert first < 5
        assert last > 995


def test_a_server_without_prices_yet_is_waited_for(page: Page, server: PriceServer, updates: Updates) -> None:
    server.report_failure("no answer from CoinAPI: no connection within 3 s")
    page.visit(server.port, "Waiting for the first prices")
    assert page.texts(".value") == ["–"] * 10
    assert page.all("#reason")[0].text == "Last error: no answer from CoinAPI: no connection within 3 s"
    assert all("healthz" in error and "503" in error for error in page.errors())
    server.publish(updates(2.0))
    page.wait_for_state("Live")
    wait_for(lambda: page.texts(".value") == ["2.00"] * 10)
    wait_for(lambda: all(line.get_attribute("d") for line in page.all(".line")))


def test_a_lost_connection_shows_and_the_page_comes_back_by_itself(page: Page) -> None:
    with Tracker("--demo") as tracker:
        page.visit(tracker.port)
        page.run("window.same = true")
        live = page.style(".value", "color")
        tracker.stop()
        page.wait_for_state("Connection lost, reconnecting", 2)
        assert page.style(".value", "color") != live
        assert page.browser.title.startswith("LOST ")
    with Tracker("--demo", "--port", str(tracker.port)):
        page.wait_for_state("Live")
        wait_for(lambda: page.style(".value", "color") == live)
        assert page.run("return window.same")
        assert [error for error in page.errors() if "WebSocket connection" not in error] == []
        page.leave()


def test_the_page_comes_back_at_once_when_the_browser_comes_online(
    page: Page, start_server: StartServer, updates: Updates
) -> None:
    first = start_server()
    page.visit(first.port, "Waiting for the first prices")
    page.run("attempts = 9")  # so that the next try is 5 to 10 s away
    first.shutdown_gracefully()
    page.wait_for_state("Connection lost, reconnecting", 2)
    start_server(port=first.port).publish(updates(2.0))
    page.run("dispatchEvent(new Event('online'))")
    page.wait_for_state("Live", 2)
    page.errors()


def test_a_server_restarted_with_other_assets_gets_other_rows(
    page: Page, start_server: StartServer, updates: Updates
) -> None:
    first = start_server()
    first.publish(updates(2.0))
    page.visit(first.port)
    first.shutdown_gracefully()
    second = start_server(("SOL", "BTC"), port=first.port, quote="EUR", source="demo")
    second.publish([PriceUpdate("SOL", 177.5, "2026-11-22T07:44:05.1234567Z")])
    wait_for(lambda: page.texts("tbody th") == ["SOL", "BTC"])
    assert page.texts(".value") == ["177.50", "–"]
    assert page.text("h1") == "Prices in EUR"
    assert page.browser.title == "DEMO 177.50 SOL"
    page.errors()


def test_prices_that_a_restarted_server_does_not_know_leave_the_page(
    page: Page, start_server: StartServer, updates: Updates
) -> None:
    server = start_server()
    fill_history(server)
    server.publish(updates(2.0))
    page.visit(server.port)
    for known in (1, 0):
        server.shutdown_gracefully()
        server = start_server(port=server.port)
        if known:
            server.publish(updates(3.0)[:known])
        wait_for(lambda known=known: page.texts(".value") == ["3.00"] * known + ["–"] * (10 - known))  # type: ignore[misc]
    page.wait_for_state("Waiting for the first prices")
    assert {line.get_attribute("d") for line in page.all(".line")} == {None}
    assert page.browser.title == "Prices"
    page.errors()


def test_coinapi_failing_turns_the_page_stale_until_it_answers_again(
    page: Page, start_server: StartServer, coin_api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_server, "STALE_AFTER", 1.5)
    server = start_server(interval=0.2)
    poller = Poller(CoinApi(KEY, url=coin_api.url), server, 0.2)
    threading.Thread(target=poller.run, daemon=True).start()
    wait_for(lambda: server.last_success)
    page.visit(server.port)
    live = page.style(".value", "color")
    coin_api.say(b"", 500)
    page.wait_for_state("Stale", 5)
    assert page.style(".value", "color") != live
    assert page.browser.title == "STALE 65,980.10 BTC"
    coin_api.recover()
    page.wait_for_state("Live")
    assert page.style(".value", "color") == live
    poller.stop()


def test_prices_that_were_old_on_arrival_do_not_look_fresh(page: Page, server: PriceServer, updates: Updates) -> None:
    server.publish(updates(2.0))
    assert server.last_success
    server.last_success -= 7260
    server.report_failure("CoinAPI answered 403: Quota exceeded")
    page.visit(server.port, "Stale")
    assert page.text("#age") == "prices 2 h 1 min old"
    assert page.all("#reason")[0].text == "Last error: CoinAPI answered 403: Quota exceeded"
    assert all("healthz" in error and "503" in error for error in page.errors())
    server.publish(updates(2.0))
    page.wait_for_state("Live", 2)
    assert not page.all("#reason")[0].is_displayed()


def test_a_connection_that_went_silent_is_replaced(
    page: Page, start_server: StartServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_server, "STALE_AFTER", 6.0)
    server = start_server(interval=0.2)
    server.publish(updates(2.0))
    page.visit(server.port)
    page.run("socket.onmessage = () => {}; polled -= 10; checked -= 60")  # nothing came for long, nothing closed
    server.publish(updates(3.0))
    wait_for(lambda: page.texts(".value") == ["3.00"] * 10)
    page.wait_for_state("Live")


def test_one_asset_with_an_old_time_is_marked(page: Page, server: PriceServer) -> None:
    times = dict.fromkeys(ASSETS, "2026-11-22T07:44:05.1234567Z") | {"XLM": "2026-11-22T07:31:05.1234567Z"}
    server.publish([PriceUpdate(asset, 2.0, at) for asset, at in times.items()])
    page.visit(server.port)
    shown = {row.text.split()[0]: row.text for row in page.all("tbody tr")}
    assert "13 min behind" in shown.pop("XLM")
    assert not any("behind" in text for text in shown.values())
    assert page.style("tr:nth-child(8) .value", "color") != page.style("tr:nth-child(7) .value", "color")


def test_simulated_prices_are_labelled(page: Page, start_server: StartServer, updates: Updates) -> None:
    for source, shown, about in (("demo", True, "simulated"), ("coinapi", False, "24 hours weighted by volume")):
        server = start_server(source=source)
        server.publish(updates(45000))
        page.visit(server.port)
        assert page.all("#demo")[0].is_displayed() == shown
        assert page.browser.title == ("DEMO " if shown else "") + "45,000.00 BTC"
        assert about in page.text("#about")


def test_no_other_host_is_asked(page: Page, server: PriceServer, updates: Updates) -> None:
    page.browser.get_log("performance")  # type: ignore[no-untyped-call]
    server.publish(updates(2.0))
    page.visit(server.port)
    events = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]  # type: ignore[no-untyped-call]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    urls |= {event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"}
    here = f"http://127.0.0.1:{server.port}/"
    assert {url for url in urls if not url.startswith("data:")} == {
        here, f"{here}healthz", f"{here}history", f"ws://127.0.0.1:{server.port}/ws"
    }  # fmt: skip


def test_the_page_tells_the_address_that_it_uses_itself(page: Page, server: PriceServer, updates: Updates) -> None:
    server.publish(updates(2.0))
    page.visit(server.port)
    assert page.text("#feed") == page.run("return socket.url") == f"ws://127.0.0.1:{server.port}/ws"
    behind = {
        "https://prices.example/": "wss://prices.example/ws",
        "https://example.org/prices/?theme=x#top": "wss://example.org/prices/ws",
        "http://[::1]:8080/a/index.html": "ws://[::1]:8080/a/ws",
    }
    assert {base: page.run("return feedAddress(arguments[0])", base) for base in behind} == behind


def test_a_phone_needs_no_sideways_scrolling(page: Page, server: PriceServer, updates: Updates) -> None:
    fill_history(server)
    server.publish(updates(123456.0))
    page.resize(390, 844)
    page.visit(server.port)
    chart = page.all(".chart")[0]
    for key in (Keys.END, Keys.HOME):
        chart.send_keys(key)
        assert page.all(".reading")[0].is_displayed()
        assert page.run("return document.documentElement.scrollWidth") == 390
    assert chart.size["width"] > 40


def test_the_state_stays_in_sight(page: Page, server: PriceServer, updates: Updates) -> None:
    server.publish(updates(2.0))
    page.resize(390, 400)
    page.visit(server.port)
    page.run("scrollTo(0, document.body.scrollHeight)")
    assert page.run("return scrollY") > 100
    assert page.run("return document.querySelector('#state').getBoundingClientRect().top") > 0


def contrast(one: str, other: str) -> float:
    """The contrast of two colours like "rgb(1, 2, 3)", as WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark_and_in_each_state(
    page: Page, server: PriceServer, updates: Updates, scheme: str
) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    fill_history(server)
    server.publish(updates(45000))
    page.visit(server.port)
    assert (contrast(page.style("body", "backgroundColor"), "rgb(255, 255, 255)") < 2) == (scheme == "light")
    for state in ("live", "stale", "lost", "starting"):
        script = """document.body.dataset.state = arguments[0];
            const colour = (name, element) => getComputedStyle(document.querySelector(element))[name];
            const at = (element, behind) => [element, colour('color', element), colour('backgroundColor', behind)];
            return ['#state', '#age', '#reason'].map((element) => at(element, 'header'))
                .concat(['.value', '.change', 'thead th', '#about'].map((element) => at(element, 'body')))
                .concat([at('#demo', '#demo'), at('code', 'code'), at('.reading', '.reading')])"""
        for element, text, behind in page.run(script, state):
            opaque = page.style("body", "backgroundColor") if behind == "rgba(0, 0, 0, 0)" else behind
            assert contrast(text, opaque) >= 4.5, (scheme, state, element)


@pytest.mark.parametrize(("motion", "animated"), [("no-preference", 10), ("reduce", 0)])
def test_nothing_moves_for_people_who_asked_for_that(
    page: Page, server: PriceServer, updates: Updates, motion: str, animated: int
) -> None:
    page.emulate(prefers_reduced_motion=motion)
    server.publish(updates(2.0))
    page.visit(server.port)
    server.publish(updates(2.1))
    wait_for(lambda: set(page.texts(".mark")) == {"▲"})
    assert page.run("return document.getAnimations().length") == animated


def test_the_keyboard_reads_a_chart(page: Page, server: PriceServer, updates: Updates) -> None:
    began = fill_history(server, 600)
    server.publish(updates(160.0))
    page.visit(server.port)
    assert page.run("return document.querySelectorAll('[tabindex=\"0\"]').length") == 10
    chart = page.all(".chart")[0]
    for key, price, at in (
        (Keys.HOME, "100.00", began),
        (Keys.RIGHT, "100.50", began + 5),
        (Keys.LEFT, "100.00", began),
    ):
        chart.send_keys(key)
        assert page.text(".reading") == f"{price} · {page.run('return formatTime(arguments[0])', at)}"
    chart.send_keys(Keys.END)
    assert (chart.get_attribute("aria-valuetext") or "").startswith("160.00 USD at ")
    chart.send_keys(Keys.ESCAPE)
    assert not page.all(".reading")[0].is_displayed()


def test_the_mouse_reads_a_chart_while_it_is_over_it(page: Page, server: PriceServer, updates: Updates) -> None:
    fill_history(server)
    server.publish(updates(460.0))
    page.visit(server.port)
    ActionChains(page.browser).move_to_element(page.all(".chart")[4]).click().perform()
    assert [reading.is_displayed() for reading in page.all(".reading")] == [row == 4 for row in range(10)]
    price = float(page.texts(".reading")[4].split(" · ")[0])
    assert price == pytest.approx(280, abs=4)
    ActionChains(page.browser).move_to_element(page.all("h1")[0]).perform()
    assert not page.all(".reading")[4].is_displayed()


def test_what_a_finger_read_stays_when_it_is_lifted(page: Page, server: PriceServer, updates: Updates) -> None:
    fill_history(server)
    server.publish(updates(460.0))
    page.resize(390, 844)
    page.visit(server.port)
    for chart in (2, 5):
        finger = ActionBuilder(page.browser, mouse=PointerInput(POINTER_TOUCH, "finger"))
        finger.pointer_action.move_to(page.all(".chart")[chart]).pointer_down().pointer_up()
        finger.perform()
        shown = [reading.is_displayed() for reading in page.all(".reading")]
        assert shown == [row == chart for row in range(10)]


def test_a_screen_reader_hears_the_state_and_never_each_price(
    page: Page, server: PriceServer, updates: Updates
) -> None:
    server.publish(updates(2.0))
    page.visit(server.port)
    assert [each.text for each in page.all("[role=status], [aria-live], output")] == ["Live"]
    assert [each.aria_role for each in page.all("tbody tr:first-child > *")] == ["rowheader", "cell", "cell", "cell"]
    assert page.all(".chart")[0].accessible_name == "BTC chart"
    # The text is set once: setting it again would have it said again.
    page.run("window.said = []; new MutationObserver((all) => said.push(...all)).observe(state, {childList: true})")
    server.publish(updates(3.0))
    wait_for(lambda: page.texts(".value") == ["3.00"] * 10)
    assert page.run("tick(); tick(); return said.length") == 0
