"""What went wrong once and no test noticed, in Chromium."""

from collections.abc import Callable, Iterator

import pytest
from browser import RESTART, Clock, Line, Page, StartServer, prices, record, remember, time_of
from running import wait_for
from selenium.webdriver import ActionChains, Keys

from coin_api import PriceUpdate
from price_server import PriceServer

LayLine = Callable[[PriceServer], Line]
# What Safari 16, Chrome 108 and Firefox 115 did not have yet.
OLD = """
    delete AbortSignal.any; delete AbortSignal.timeout; delete Promise.withResolvers; delete Object.groupBy;
    for (const name of ['toSorted', 'toReversed', 'toSpliced', 'with']) delete Array.prototype[name];
    for (const name of Object.keys(Element.prototype)) if (name.startsWith('aria')) delete Element.prototype[name];
    for (const name of ['union', 'difference', 'intersection']) delete Set.prototype[name];
    delete URL.canParse; delete window.scheduler; delete window.requestIdleCallback;
"""


@pytest.fixture
def old_browser(page: Page) -> Iterator[None]:
    script = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": OLD})
    yield
    page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@pytest.mark.usefixtures("old_browser")
def test_an_old_browser_shows_prices_past_and_order(page: Page, server: PriceServer) -> None:
    record(server, 7200, 60)
    page.show(server, 110.0, XLM=0.5, query="?sort=price")
    wait_for(lambda: page.part("asset")[0] == "XLM")
    assert page.first("[data-sort=price]").get_attribute("aria-sort") == "ascending"
    page.first("[data-part=chart]").send_keys(Keys.HOME)
    assert "USD at" in (page.first("[data-part=chart]").get_attribute("aria-valuetext") or "")


def test_a_page_whose_modules_do_not_load_says_so(page: Page, server: PriceServer, lay_line: LayLine) -> None:
    page.expect(r"/server.js - Failed to load resource: .* status of 502")
    line = lay_line(server)
    line.rates = {"/server.js": None}
    page.browser.get(f"http://127.0.0.1:{line.port}/")
    wait_for(lambda: page.first("#loading").is_displayed(), 10, "the text that stands in the HTML")
    assert not page.first("#status").is_displayed()


def test_the_hole_of_a_lost_connection_is_filled(page: Page, server: PriceServer, lay_line: LayLine) -> None:
    page.expect(*RESTART)
    line = lay_line(server)
    record(server, 3000, 10)
    prices(server, 100.0)
    page.visit(line.port, query="?range=1h")
    page.wait_for_charts()
    page.requests()
    line.freeze()
    line.cut()
    page.pass_time(120)
    wait_for(lambda: any("/history?" in url for url in page.requests()), what="the past asked for again")


def test_an_attempt_that_fails_is_not_followed_by_another_at_once(page: Page, server: PriceServer) -> None:
    page.expect(*RESTART)
    page.show(server, 100.0)
    page.run("clock.held = true")
    server.shutdown_gracefully()
    page.wait_for_state("Connection lost, reconnecting")
    for _ in range(5):  # ever later
        page.errors()
        page.pass_time(11)
        wait_for(lambda: any("/healthz" in error for error in page.errors()), what="an attempt that failed")
    page.requests()
    page.run("for (let i = 0; i < 50; i += 1) clock.tick()")
    assert page.requests() == []


def test_a_key_of_the_browser_is_not_swallowed_by_a_chart(page: Page, server: PriceServer) -> None:
    page.show(server, 100.0)
    chart = page.first("[data-part=chart]")
    page.run("addEventListener('keydown', (event) => { window.swallowed = event.defaultPrevented; })")
    for modifiers, swallowed in (("", True), ("altKey", False), ("ctrlKey", False), ("metaKey", False)):
        init = {"key": "ArrowLeft", "bubbles": True, "cancelable": True, modifiers: True}
        page.run("arguments[0].dispatchEvent(new KeyboardEvent('keydown', arguments[1]))", chart, init)
        assert page.run("return swallowed") == swallowed, modifiers


def test_rows_do_not_move_away_under_the_pointer(page: Page, start_server: StartServer) -> None:
    server = start_server(("AAA", "BBB", "CCC", "DDD"))
    page.show(server, 1.0, AAA=5.0, BBB=4.0, query="?sort=-price")
    ActionChains(page.browser).move_to_element(page.all("tbody tr")[1]).perform()
    prices(server, 1.0, AAA=5.0, BBB=9.0)
    wait_for(lambda: page.part("price")[1] == "9.00")
    page.pass_time(6)
    assert page.part("asset")[:2] == ["AAA", "BBB"]
    ActionChains(page.browser).move_to_element(page.first("h1")).perform()
    page.pass_time(6)
    wait_for(lambda: page.part("asset")[:2] == ["BBB", "AAA"])


def test_rows_out_of_sight_are_current_once_they_are_scrolled_to(page: Page, start_server: StartServer) -> None:
    server = start_server(tuple(f"T{number:02}" for number in range(40)))
    page.show(server, 1.0)
    page.run("clock.held = true")  # no drawing
    prices(server, 2.0)
    wait_for(lambda: page.part("price")[0] == "2.00")
    assert page.part("price")[-1] == "1.00"
    page.run("scrollTo(0, document.body.scrollHeight)")
    wait_for(lambda: page.part("price")[-1] == "2.00")


def test_a_price_is_never_outside_its_low_and_high(page: Page, server: PriceServer) -> None:
    record(server, 3000, 10)
    page.show(server, 100.0, query="?range=1h")
    page.run("clock.held = true")  # no drawing
    for price, low, high in ((120.0, "100.00", "120.00"), (90.0, "90.00", "120.00")):
        prices(server, price)
        wait_for(lambda price=price: page.part("price")[0] == f"{price:.2f}")  # type: ignore[misc]
        assert (page.part("low")[0], page.part("high")[0]) == (low, high)


TINTS = """
    window.tints = [];
    new MutationObserver(() => {
      const {className, textContent} = document.querySelector('[data-part=price]');
      if (className !== tints.at(-1)?.[0]) {
        const colour = getComputedStyle(document.querySelector('[data-part=price]')).color;
        tints.push([className, colour, document.getAnimations().length]);
      }
    }).observe(document.querySelector('[data-part=price]'), {attributes: true});
"""


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_price_that_moved_is_tinted_for_a_moment_without_a_fade(page: Page, server: PriceServer, motion: str) -> None:
    page.emulate(prefers_reduced_motion=motion)
    prices(server, 2.0)
    page.visit(server.port)
    ink = page.style("[data-part=price]", "color")
    page.run(TINTS)
    for price in (2.1, 1.9):
        prices(server, price)
        wait_for(lambda: page.run("return tints.at(-1)?.[0]") == "", what="the tint gone")
        assert page.style("[data-part=price]", "color") == ink
        page.run("tints.push(['-'])")
    (up, up_colour, up_moves), _, _, (down, down_colour, down_moves), *_ = page.run("return tints")
    assert (up, down, up_moves, down_moves) == ("up", "down", 0, 0)
    assert (len({ink, up_colour, down_colour}) == 3) == (motion == "no-preference")


def test_a_change_that_is_not_shown_is_not_tinted(page: Page, server: PriceServer) -> None:
    prices(server, 1.00001)
    page.visit(server.port)
    script = "window.seen = []; new MutationObserver(() => seen.push(1)).observe(arguments[0], {attributes: true})"
    page.run(script, page.first("[data-part=price]"))
    prices(server, 1.00002, ETH=2.0)
    wait_for(lambda: page.part("price")[1] == "2.00")
    assert page.run("return seen.length") == 0


def test_one_time_ahead_marks_that_asset_and_no_other(page: Page, server: PriceServer) -> None:
    times = {asset: time_of(server, 86400.0 * (asset == "SOL")) for asset in server.assets}
    server.publish([PriceUpdate(asset, 2.0, at) for asset, at in times.items()])
    page.visit(server.port)
    wait_for(lambda: page.part("note") == [*[""] * 9, "23 h 59 min ahead"])
    server.publish([PriceUpdate(asset, 2.0, time_of(server, -7200)) for asset in server.assets])
    page.pass_time(6)
    wait_for(lambda: "differ by about 2 h 0 min" in page.text("#clocks"))
    assert page.part("note") == [""] * 10


def test_a_filter_keeps_its_focus_while_rows_move(page: Page, start_server: StartServer) -> None:
    server = start_server(tuple(f"T{number:02}" for number in range(20)))
    prices(server, 1.0)
    page.visit(server.port, query="?sort=price")
    box = page.first("#filter")
    box.send_keys("t1")
    prices(server, 1.0, T11=0.5)
    page.pass_time(6)
    wait_for(lambda: page.part("asset")[0] == "T11")
    box.send_keys("1")
    assert [row.is_displayed() for row in page.all("tbody tr")].count(True) == 1
    box.send_keys("x")
    assert page.first("#unmatched").is_displayed()


def test_a_name_links_to_the_asset_alone_and_back(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    page.visit(server.port, query="?range=7d&assets=ETH,BTC")
    assert page.part("asset") == ["ETH", "BTC"]
    page.first("[data-part=asset]").click()
    wait_for(lambda: page.part("asset") == ["ETH"])
    page.wait_for_charts()
    assert page.browser.current_url.endswith("/?range=7d&assets=ETH")
    assert (page.first("#csv").get_attribute("href") or "").endswith("/history?range=7d&assets=ETH&format=csv")
    page.first("#all").click()
    wait_for(lambda: len(page.part("asset")) == 10)
    assert page.browser.current_url.endswith("/?range=7d")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_single_chart_has_labelled_lines(page: Page, server: PriceServer, width: int) -> None:
    record(server, 3600, 10, lambda age: 100 + age / 100)
    prices(server, 100.0)
    page.resize(width)
    page.visit(server.port, query="?assets=BTC&range=1h")
    page.wait_for_charts()
    assert 3 <= len(page.texts(".at-price")) <= 4
    assert 2 <= len(page.texts(".at-time")) <= 6


def test_a_hidden_page_prunes_its_points(page: Page, start_server: StartServer) -> None:
    clock = Clock()
    server = start_server(**clock.options())
    remember(server, (server._wall_clock() - 3000, dict.fromkeys(server.assets, "100.0")))
    page.show(server, 100.0, query="?range=1h")
    page.look_away()
    for _ in range(100):
        clock.ahead += 40
        page.pass_time(40)
        prices(server, 101.0)
    page.look_away(False)
    wait_for(lambda: page.part("price")[0] == "101.00")
    page.wait_for_charts()
    assert page.path("line").count("L") + page.path("line").count("M") <= 91
