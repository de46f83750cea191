"""What the page shows, in a real browser. How it keeps its connection stands in test_page_states.py."""

import os
import re
import time
from typing import Any

import pytest
from browser import NO_SOCKET, NO_STREAM, NOT_READY, Clock, Page, StartServer, prices, record, remember, time_of
from running import ASSETS, ROOT, Tracker, wait_for
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.interaction import POINTER_TOUCH
from selenium.webdriver.common.actions.pointer_input import PointerInput
from stand_in import KEY, StandIn
from websockets.sync.client import connect

from coin_api import PriceUpdate
from price_server import PriceServer

AXE = ROOT / ".venv/node_modules/axe-core/axe.min.js"
DAY = 86400
LONG_ID = "A" + 30 * "W" + "Z"  # the longest that the tracker takes


def walk(age: int) -> float:
    """A price between 90 and 120, 100 a day ago."""
    return {DAY - 21600: 90.0, DAY - 43200: 120.0}.get(age, 100.0)


# Prices


def test_ten_rows_stand_in_the_tracked_order_with_prices_as_a_person_reads_them(page: Page, coin_api: StandIn) -> None:
    with Tracker(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as tracker:
        page.visit(tracker.port)
        shown = "65,980.10 4,166.21 1.1234 634.50 2.2093 207.43 27.81 0.0934 44.40 177.53"
        assert page.part("asset") == list(ASSETS)
        assert page.part("price") == shown.split()
        assert page.text("h1") == "Prices in USD"
        assert page.browser.title == "65,980.10 BTC"
        page.leave()


def test_prices_move_without_a_reload(page: Page) -> None:
    with Tracker("--demo", "--interval", "0.2") as tracker:
        page.visit(tracker.port)
        page.run("window.same = true")
        before = page.part("price")
        wait_for(lambda: all(a != b for a, b in zip(before, page.part("price"), strict=True)))
        assert page.run("return window.same")
        page.leave()


def test_the_arrow_belongs_to_the_change(page: Page, server: PriceServer) -> None:
    record(server, DAY, 300)
    page_shows = []
    page.show(server, 110.0)
    for price in (109.0, 95.0, 96.0, 100.0):
        prices(server, price)
        wait_for(lambda price=price: page.part("price")[0] == f"{price:.2f}")  # type: ignore[misc]
        page_shows.append((page.part("arrow")[0], page.part("change")[0], page.path("line") != ""))
    assert page_shows == [("▲", "+9.00%", True), ("▼", "−5.00%", True), ("▼", "−4.00%", True), ("", "0.00%", True)]


# The change and its range


def test_the_change_names_its_period(page: Page, start_server: StartServer) -> None:
    page.browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Europe/Berlin"})
    clock = Clock(18 * 3600 - time.time() % DAY)  # 18 h UTC
    server = start_server(**clock.options())
    for past, shown in ((4 * 3600, "since 15:00"), (22 * 3600, r"since \d+ \w+, 21:00"), (DAY, "24 h")):
        record(server, past, 300)
        page.show(server, 110.0)
        wait_for(lambda shown=shown: re.fullmatch(shown, page.text("#period")), what=shown)  # type: ignore[misc]
        assert page.part("change") == ["+10.00%"] * 10
        assert page.part("since") == [""] * 10
    page.browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


def test_a_row_with_less_past_than_the_others_says_so(page: Page, server: PriceServer) -> None:
    record(server, DAY, 300)
    for age in range(1200, 0, -300):
        remember(server, (time.time() - age, {"BTC": "1.0"}))
    remember(server, (time.time(), {"BTC": "1.0"}))
    page.expect(NOT_READY)
    page.visit(server.port, "Waiting for the first prices")
    page.wait_for_charts()
    assert page.part("since") == [""] * 10
    assert page.text("#period") == "24 h"


def test_a_day_is_shown_first_once_there_is_more_than_an_hour_of_past(page: Page, start_server: StartServer) -> None:
    for past, shown in ((3000, "1h"), (2 * 3600, "24h")):
        server = start_server()
        record(server, past, 300)
        page.show(server, 110.0)
        assert page.texts("#ranges button") == ["1h", "24h", "7d", "30d", "1y"]
        assert page.texts("#ranges [aria-pressed=true]") == [shown]
        assert page.browser.current_url == f"http://127.0.0.1:{server.port}/"


def test_the_range_stands_in_the_address_and_is_remembered_by_it_alone(page: Page, server: PriceServer) -> None:
    record(server, 6 * DAY, 1800)
    record(server, DAY - 300, 300, lambda age: 50.0)
    prices(server, 110.0)
    page.visit(server.port, query="?assets=BTC,ETH")
    wait_for(lambda: page.part("change") == ["+120.00%"] * 2)
    button = page.all("#ranges button")[2]
    button.click()
    wait_for(lambda: page.part("change") == ["+10.00%"] * 2)
    assert page.text("#period").startswith("since ")
    assert page.texts("#ranges [aria-pressed=true]") == ["7d"]
    assert page.run("return document.activeElement.textContent") == "7d"
    assert page.browser.current_url == f"http://127.0.0.1:{server.port}/?assets=BTC,ETH&range=7d"
    assert page.first("#history").get_attribute("href") == (
        f"http://127.0.0.1:{server.port}/history?range=7d&assets=BTC,ETH"
    )
    page.browser.refresh()
    wait_for(lambda: page.part("change") == ["+10.00%"] * 2)
    page.visit(server.port, query="?range=2h")
    assert page.texts("#ranges [aria-pressed=true]") == ["24h"]
    assert page.run("return localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_low_and_high_stand_beside_the_chart_and_on_a_phone_in_the_reading(page: Page, server: PriceServer) -> None:
    record(server, DAY, 300, walk)
    page.show(server, 110.0)
    assert (page.part("low"), page.part("high")) == (["90.00"] * 10, ["120.00"] * 10)
    chart, low = page.first("[data-part=chart]"), page.first("[data-part=low]")
    assert low.location["x"] >= chart.location["x"] + chart.size["width"]
    page.visit(server.port, query="?assets=BTC")  # one chart, as wide as the page
    page.wait_for_charts()
    chart, low = page.first("[data-part=chart]"), page.first("[data-part=low]")
    assert low.is_displayed()
    assert low.location["x"] >= chart.location["x"] + chart.size["width"]
    page.resize(390)
    chart.send_keys(Keys.HOME)
    assert page.first("[data-part=reading]").text.splitlines()[1:] == ["low 90.00 · high 120.00"]
    assert low.size["width"] <= 1 or low.location["x"] < 0 or page.style(".extent", "clipPath") == "inset(50%)"


def test_at_an_interval_of_an_hour_two_polls_make_a_chart_and_a_change(page: Page, start_server: StartServer) -> None:
    clock = Clock()
    server = start_server(interval=3600.0, **clock.options())
    prices(server, 100.0)
    page.visit(server.port)
    assert page.texts("#ranges [aria-pressed=true]") == ["24h"]
    clock.ahead = 3600
    page.pass_time(3600)
    page.wait_for_state("Live")
    prices(server, 105.0)
    wait_for(lambda: page.part("change") == ["+5.00%"] * 10)
    page.wait_for_charts()


# Which assets


def test_only_the_assets_in_the_address_are_shown_and_asked_for(page: Page, server: PriceServer) -> None:
    page.show(server, 2.0, query="?assets=eth,%20BTC&assets=SOL")
    assert page.part("asset") == ["ETH", "BTC", "SOL"]
    asked = [url.partition(f":{server.port}")[2] for url in page.requests()]
    assert {path for path in asked if "." not in path} == {
        "/?assets=eth,%20BTC&assets=SOL", "/healthz", "/history?range=1h&assets=ETH,BTC,SOL", "/ws?assets=ETH,BTC,SOL"
    }  # fmt: skip
    assert page.first("#all").is_displayed()
    assert page.first("#all").get_attribute("href") == f"http://127.0.0.1:{server.port}/"
    prices(server, 3.0)
    wait_for(lambda: page.part("price") == ["3.00"] * 3)


def test_an_unknown_asset_is_named_and_the_others_are_shown(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    for query, named, shown in (
        ("?assets=DOGE,BTC,<b>", "Not tracked here: DOGE, <B>.", ["BTC"]),
        ("?assets=DOGE", "Not tracked here: DOGE.", list(ASSETS)),
        ("?assets=", "", list(ASSETS)),
    ):
        page.visit(server.port, query=query)
        assert page.text("#unknown") == named
        assert page.part("asset") == shown


def test_with_few_rows_the_charts_grow(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    heights = []
    for query in ("", "?assets=BTC,ETH,XRP,SOL", "?assets=BTC,ETH", "?assets=BTC"):
        page.visit(server.port, query=query)
        heights.append(page.first("[data-part=chart]").size["height"])
        bottom = page.run("return document.querySelector('main').getBoundingClientRect().bottom")
        assert bottom <= 800 or not query
    assert heights == sorted(heights)
    assert len(set(heights)) == 4
    assert heights[-1] > 400


def test_rows_are_sorted_by_a_click_and_the_address_keeps_it(page: Page, start_server: StartServer) -> None:
    server = start_server(("BTC", "AAA", "ZZZ"))
    record(server, 2 * 3600, 300)
    prices(server, 101.0, ZZZ=90.0, AAA=120.0)
    page.visit(server.port, query="?range=1h")
    wait_for(lambda: page.part("change")[2] == "−10.00%")
    name, price, change = page.all("thead button")
    for button, first, last, way, kept in (
        (change, "AAA", "ZZZ", "descending", "&sort=-change"),
        (change, "ZZZ", "AAA", "ascending", "&sort=change"),
        (change, "BTC", "ZZZ", "none", ""),
        (name, "AAA", "ZZZ", "ascending", "&sort=asset"),
        (price, "AAA", "ZZZ", "descending", "&sort=-price"),
        (price, "ZZZ", "AAA", "ascending", "&sort=price"),
    ):
        button.click()
        assert [page.part("asset")[0], page.part("asset")[-1]] == [first, last]
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == way
        assert page.browser.current_url.endswith(f"/?range=1h{kept}")
    assert page.run("return history.length") == page.run("return arguments[0].click(), history.length", name)
    page.visit(server.port, query="?sort=price")
    wait_for(lambda: page.part("asset") == ["ZZZ", "BTC", "AAA"])
    assert page.browser.title.endswith("BTC")


# Charts


def test_a_chart_breaks_where_prices_are_missing(page: Page, server: PriceServer) -> None:
    now = time.time()
    for age in range(3000, 0, -10):
        if age not in range(1000, 1500):
            remember(server, (now - age, dict.fromkeys(ASSETS, "100.0")))
    page.show(server, 500.0, query="?range=1h")
    assert page.part("change") == ["+400.00%"] * 10
    for row in (0, 9):
        path = page.path("line", row)
        first, *_, last = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", path)]
        assert path.count("L") > 200
        assert path.count("M") == 2
        assert (first, last) == (pytest.approx(0, abs=5), pytest.approx(1000, abs=5))


def test_what_was_just_begun_is_drawn_only_where_there_are_prices(page: Page, start_server: StartServer) -> None:
    server = start_server()
    now = time.time()
    remember(server, (now - 12, dict.fromkeys(ASSETS, "100.0")))
    page.show(server, 100.01)
    xs = [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", page.path("line"))]
    ys = [float(y) for y in re.findall(r"[ML]-?[\d.]+ ([\d.]+)", page.path("line"))]
    assert min(xs) > 900  # 12 s of 5 min
    assert max(ys) - min(ys) < 10  # of 100: no slash
    base = re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", page.path("base"))
    assert base
    assert [float(x) for x in base.groups()] == [min(xs), max(xs)]


def test_the_noise_of_a_stablecoin_does_not_look_like_a_crash(page: Page, start_server: StartServer) -> None:
    server = start_server(("USDT", "BTC"))
    for age in range(3000, 0, -10):
        noise = 1e-5 * (age % 20 > 0)
        remember(server, (time.time() - age, {"USDT": f"{1 + noise}", "BTC": f"{100 + 1e5 * noise}"}))
    page.show(server, 1.0, BTC=100.0, query="?range=1h")
    heights = []
    for row in (0, 1):
        ys = [float(y) for y in re.findall(r"[ML]-?[\d.]+ ([\d.]+)", page.path("line", row))]
        heights.append(max(ys) - min(ys))
    assert heights == [pytest.approx(0.5, abs=0.2), pytest.approx(92, abs=1)]


# Notes and texts


def test_an_asset_without_a_price_says_so(page: Page, server: PriceServer) -> None:
    server.publish([PriceUpdate("BTC", 2.0, time_of(server))])
    page.visit(server.port)
    wait_for(lambda: page.part("note") == ["", *["no price yet"] * 9])
    prices(server, 3.0)
    wait_for(lambda: page.part("price") == ["3.00"] * 10)
    page.pass_time(5)
    wait_for(lambda: page.part("note") == [""] * 10)


def test_an_asset_that_only_the_past_knows_says_since_when(page: Page, server: PriceServer) -> None:
    record(server, 7200, 300)
    server.publish([PriceUpdate("BTC", 2.0, time_of(server))])
    page.visit(server.port)
    wait_for(lambda: page.part("note")[1].startswith("no price since "))
    assert (page.part("price")[1], page.part("note")[0]) == ("100.00", "")
    assert page.all("tbody tr")[1].get_attribute("class") == "old"


def test_one_asset_with_an_old_time_is_marked(page: Page, server: PriceServer) -> None:
    server.publish([PriceUpdate(asset, 2.0, time_of(server, -780 * (asset == "XLM"))) for asset in ASSETS])
    page.visit(server.port)
    wait_for(lambda: page.part("note") == ["13 min behind" if asset == "XLM" else "" for asset in ASSETS])
    page.resize(1280)
    assert page.run("return document.querySelectorAll('[data-part=note]')[7].offsetHeight") < 24, "in one line"
    assert page.style("tr:nth-child(8) .price", "color") != page.style("tr:nth-child(7) .price", "color")


def test_simulated_prices_are_labelled_and_the_rate_is_said_to_be_an_average(
    page: Page, start_server: StartServer
) -> None:
    for source, shown, about in (
        ("demo", True, "simulated"),
        ("coinapi", False, "24 hours weighted by volume, not the last trade. Change, high and low are those of this"),
    ):
        server = start_server(source=source)
        prices(server, 45000)
        page.visit(server.port)
        assert page.first("header [data-source=demo]").is_displayed() == shown
        assert page.browser.title == ("DEMO " if shown else "") + "45,000.00 BTC"
        assert about in page.first("footer").text.replace("\n", " ")


def test_the_footer_tells_the_addresses_of_the_data_and_of_the_feed(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    page.visit(server.port)
    here = f"127.0.0.1:{server.port}"
    links = [link.get_attribute("href") for link in page.all("footer a")]
    assert links == [f"http://{here}/{path}" for path in ("prices", "history?range=1h", "stream")]
    assert page.text("#feed") == f"ws://{here}/ws"


def test_no_other_host_is_asked(page: Page, server: PriceServer) -> None:
    page.show(server, 2.0)
    here = f"//127.0.0.1:{server.port}/"
    assert [url for url in page.requests() if here not in url] == []


# Reading a chart


def test_the_keyboard_reads_a_chart(page: Page, server: PriceServer) -> None:
    record(server, 600, 10, lambda age: 160.0 - age / 10)
    page.show(server, 160.0)
    assert page.run("return document.querySelectorAll('[tabindex=\"0\"]').length") == 10
    chart = page.first("[data-part=chart]")
    for key, price in (
        (Keys.HOME, "100.00"),
        (Keys.RIGHT, "101.00"),
        (Keys.LEFT, "100.00"),
        (Keys.UP, "101.00"),
        (Keys.PAGE_UP, "137.00"),
        (Keys.DOWN, "136.00"),
        (Keys.END, "160.00"),
    ):
        chart.send_keys(key)
        assert page.part("text")[0].split(" · ")[0] == price, key
    assert (chart.get_attribute("aria-valuetext") or "").startswith("160.00 USD at ")
    chart.send_keys(Keys.ESCAPE)
    assert not page.first("[data-part=reading]").is_displayed()


def test_what_is_read_does_not_move_by_itself(page: Page, server: PriceServer) -> None:
    record(server, 600, 10)
    page.show(server, 100.0)
    chart = page.first("[data-part=chart]")
    for key in (Keys.END, Keys.LEFT):
        chart.send_keys(key)
        values = "const {ariaValueNow, ariaValueText} = arguments[0]; return [ariaValueNow, ariaValueText]"
        before, line = page.run(values, chart), page.path("line")
        for price in (101.0, 102.0):
            prices(server, price)
            wait_for(lambda price=price: page.part("price")[0] == f"{price:.2f}")  # type: ignore[misc]
        page.pass_time(20)
        wait_for(lambda line=line: page.path("line") != line)  # type: ignore[misc]
        assert page.run(values, chart) == before


def test_the_time_that_is_read_names_its_zone(page: Page, start_server: StartServer) -> None:
    """A day in which Berlin's clocks go back: 3:00 comes twice, an hour apart."""
    page.browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Europe/Berlin"})
    change = 1792890000  # 2026-10-25T01:00Z
    clock = Clock(change + 7200 - time.time())
    server = start_server(**clock.options())
    record(server, 4 * 3600, 300)
    page.show(server, 100.0)
    page.first("[data-part=chart]").send_keys(Keys.HOME)
    assert re.search(r" (CEST|GMT\+2)$", page.part("text")[0])
    page.browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


def test_the_mouse_reads_a_chart_while_it_is_over_it(page: Page, server: PriceServer) -> None:
    record(server, 3600, 10, lambda age: 460.0 - age / 10)
    page.show(server, 460.0, query="?range=1h")
    ActionChains(page.browser).move_to_element(page.all("[data-part=chart]")[4]).click().perform()
    assert [reading.is_displayed() for reading in page.all("[data-part=reading]")] == [row == 4 for row in range(10)]
    assert float(page.part("text")[4].split(" · ")[0]) == pytest.approx(280, abs=4)
    ActionChains(page.browser).move_to_element(page.first("h1")).perform()
    assert not page.all("[data-part=reading]")[4].is_displayed()


def test_what_a_finger_read_stays_when_it_is_lifted(page: Page, server: PriceServer) -> None:
    record(server, 3600, 10)
    prices(server, 460.0)
    page.resize(390, 844)
    page.visit(server.port)
    page.wait_for_charts()
    for chart in (2, 5):
        finger = ActionBuilder(page.browser, mouse=PointerInput(POINTER_TOUCH, "finger"))
        finger.pointer_action.move_to(page.all("[data-part=chart]")[chart]).pointer_down().pointer_up()
        finger.perform()
        shown = [reading.is_displayed() for reading in page.all("[data-part=reading]")]
        assert shown == [row == chart for row in range(10)]


# Room


@pytest.mark.parametrize("width", [320, 390, 640, 768, 1280])
def test_nothing_scrolls_sideways_however_large_the_text(page: Page, start_server: StartServer, width: int) -> None:
    server = start_server((*ASSETS, LONG_ID, "PEPE", "HUGE", "OLD"))
    record(server, DAY, 300)
    late = PriceUpdate("OLD", 1.0, time_of(server, -25 * 3600))
    prices(server, 123456.0, **{LONG_ID: 1.23456e-5, "PEPE": 0.00000123, "HUGE": 124591970537.0})
    server.publish([late])
    page.resize(width)
    page.visit(server.port)
    page.wait_for_charts()
    wait_for(lambda: page.part("note")[-1] == "25 h 0 min behind")
    for size in (100, 130, 200):
        page.run("document.documentElement.style.fontSize = `${arguments[0]}%`", size)
        for key in (Keys.END, Keys.HOME):
            page.first("[data-part=chart]").send_keys(key)
            # By the window's width, which a phone's browser would widen, and in the frame behind the change.
            wait_for(lambda: page.width() <= width, what=f"{width} px at {size} %: {page.width()}")
            assert page.first("[data-part=reading]").is_displayed()


def test_a_narrow_row_has_two_lines(page: Page, server: PriceServer) -> None:
    record(server, 3600, 300, lambda age: 120000.0)
    prices(server, 123456.0)
    for width, lines in ((320, 2), (639, 2), (900, 1)):
        page.resize(width)
        page.visit(server.port)
        page.wait_for_charts()
        row = page.first("tbody tr")
        tops = [row.find_element("css selector", name).rect for name in ("th", ".price", ".change", ".chart")]
        assert max(rect["y"] for rect in tops[:3]) < min(rect["y"] + rect["height"] for rect in tops[:3])
        assert (tops[3]["y"] >= max(rect["y"] for rect in tops[:3]) + 15) == (lines == 2)
        assert (tops[3]["width"] > width - 50) == (lines == 2)


def test_an_id_is_not_cut_where_there_is_room(page: Page, start_server: StartServer) -> None:
    ids = ("WSTETH.ARBITRUM", LONG_ID)
    server = start_server((*ASSETS, *ids))
    prices(server, 2.0)
    page.visit(server.port)
    one, long = [element for element in page.all("[data-part=asset]") if element.text.replace("\n", "") in ids]
    assert one.size["height"] < 1.5 * page.first("[data-part=asset]").size["height"]  # one line
    assert page.run("return arguments[0].scrollWidth <= arguments[0].clientWidth", long)


def test_the_state_stays_in_sight_and_its_header_small_with_a_long_error(page: Page, start_server: StartServer) -> None:
    clock = Clock(-7200)
    server = start_server(**clock.options())
    prices(server, 2.0)
    clock.ahead = 0
    server.report_failure("CoinAPI answered 403: Quota exceeded: Insufficient Usage Credits or Subscription. " * 4)
    page.resize(320, 568)
    page.expect(NOT_READY)
    page.visit(server.port, "Stale")
    assert page.first("#error").is_displayed()
    page.run("scrollTo(0, document.body.scrollHeight)")
    assert page.run("return scrollY") > 100
    box = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    for size, share in ((100, 0.12), (200, 0.35)):  # the heading goes, the state stays
        page.run("document.documentElement.style.fontSize = `${arguments[0]}%`", size)
        wait_for(lambda share=share: page.run(box, "header")["bottom"] < 568 * share)  # type: ignore[misc]
        assert page.run(box, "#status")["top"] >= 0


def test_what_has_the_focus_is_not_hidden_behind_the_header(page: Page, server: PriceServer) -> None:
    record(server, 3600, 300)
    prices(server, 2.0)
    page.resize(390, 500)
    page.visit(server.port)
    page.wait_for_charts()
    page.all("[data-part=chart]")[-1].send_keys(Keys.END)
    for _ in range(9):
        ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        top = "return document.activeElement.getBoundingClientRect().top"
        assert page.run(top) >= page.first("header").size["height"]


# For everybody


def test_a_screen_reader_hears_the_state_and_never_each_price(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    page.visit(server.port)
    assert [each.text for each in page.all("[role=status], [aria-live], output")] == ["Live", ""]
    for width in (1280, 390):
        page.resize(width)
        roles = ["rowheader", "cell", "cell", "cell", "cell"]
        assert [each.aria_role for each in page.all("tbody tr:first-child > *")] == roles
    assert page.first("[data-part=chart]").accessible_name == "BTC chart"
    # The text is set once: setting it again would have it said again.
    page.run("window.said = []; new MutationObserver((all) => said.push(...all)).observe(state, {childList: true})")
    prices(server, 3.0)
    wait_for(lambda: page.part("price") == ["3.00"] * 10)
    assert page.run("clock.tick(); clock.tick(); return said.length") == 0


def axe_source() -> str:
    if not AXE.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"not installed: {AXE.name}")
        pytest.skip("not installed: axe-core, which `npm install --prefix .venv --no-save axe-core` brings")
    return AXE.read_text(encoding="utf-8")


def violations(page: Page, *rules: str) -> list[Any]:
    """Of these rules, or of all."""
    options = {"preload": False, **({"runOnly": rules} if rules else {})}
    found = page.browser.execute_async_script("axe.run(arguments[0]).then(arguments[1])", options)
    assert found["passes"]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]


@pytest.mark.parametrize(
    "state", ["Connecting …", "Waiting for the first prices", "Live", "Stale", "Connection lost, reconnecting",
              "The server is full", "No live prices", "demo"]
)  # fmt: skip
def test_axe_finds_nothing_in_any_state_and_theme(page: Page, start_server: StartServer, state: str) -> None:
    source = axe_source()
    page.expect(NOT_READY, NO_SOCKET, NO_STREAM)
    clock = Clock(-7200 if state == "Stale" else 0)
    server = start_server((*ASSETS, *(f"T{number}" for number in range(6))), max_clients=1, **clock.options(),
                          source="demo" if state == "demo" else "coinapi")  # fmt: skip
    record(server, DAY, 300, walk)
    if state == "The server is full":
        neighbour = connect(f"ws://127.0.0.1:{server.port}/ws")
        wait_for(lambda: server.clients, what=f"{neighbour} in the only place")
    if state != "Waiting for the first prices":
        prices(server, 110.0)
    server.report_failure("no response from CoinAPI: no connection within 3 s")
    clock.ahead = 0
    at_once = {
        "Connecting …": "Live",
        "Connection lost, reconnecting": "Live",
        "No live prices": "Live",
        "demo": "Live",
    }
    page.visit(server.port, at_once.get(state, state), query="?assets=DOGE," + ",".join(server.assets[:15]))
    page.wait_for_charts()
    if state not in (*at_once, "Live"):
        page.wait_for_state(state)
    else:  # held there: how it comes to be so is tested elsewhere
        states = {"Connecting …": "connecting", "Connection lost, reconnecting": "lost", "No live prices": "blocked"}
        page.run("clock.held = true; document.body.dataset.state = arguments[0]", states.get(state, "live"))
    page.first("[data-part=chart]").send_keys(Keys.HOME)
    page.run(source)
    assert violations(page) == []
    page.emulate(prefers_color_scheme="dark")
    assert violations(page, "color-contrast") == []
    page.resize(390)
    assert violations(page) == []
