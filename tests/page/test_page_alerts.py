"""Alerts, in Chromium: what they remember, when they stay silent, and what the page can do where it may not notify."""

from collections.abc import Iterator

import pytest
from browser import NOT_READY, RESTART, Clock, Page, StartServer, prices
from running import wait_for
from selenium.webdriver import Keys

from price_server import PriceServer

NOTIFY = """
    window.notes = [];
    window.Notification = class {
        static permission = 'granted';
        constructor(text) { notes.push(text); }
    };
"""


@pytest.fixture(autouse=True)
def storage(page: Page) -> Iterator[None]:
    yield
    page.run("if (location.protocol === 'http:') localStorage.clear()")


def set_line(page: Page, text: str, row: int = 0) -> None:
    page.all("[data-part=bell]")[row].click()
    page.first("#line").send_keys(text, Keys.ENTER)
    page.first("#line").send_keys(Keys.ESCAPE)


def publish(page: Page, server: PriceServer, *all_prices: float) -> None:
    for price in all_prices:
        prices(server, price)
        wait_for(lambda price=price: page.part("price")[0] == f"{price:.2f}")  # type: ignore[misc]


def test_a_crossing_is_told_once_and_again_when_the_price_was_away(page: Page, server: PriceServer) -> None:
    prices(server, 99.0)
    page.visit(server.port)
    page.run(NOTIFY)
    set_line(page, "100")
    assert page.part("alert")[0] == "alert at 100.00"
    publish(page, server, 99.5, 100.05, 99.95, 100.05)
    assert page.run("return notes") == ["BTC crossed 100.00: 100.05."]
    publish(page, server, 101.0, 99.0)
    assert page.run("return notes") == ["BTC crossed 100.00: 100.05.", "BTC crossed 100.00: 99.00."]
    assert page.texts("#news span") == ["BTC crossed 100.00: 100.05. ", "BTC crossed 100.00: 99.00. "]


def test_after_a_reload_nothing_fires_but_the_crossing_is_told(page: Page, server: PriceServer) -> None:
    prices(server, 99.0)
    page.visit(server.port)
    set_line(page, "100")
    page.browser.refresh()
    page.wait_for_state("Live")
    wait_for(lambda: page.part("alert")[0] == "alert at 100.00")
    assert page.texts("#news span") == []
    prices(server, 101.0)
    wait_for(lambda: page.texts("#news span") == ["BTC crossed 100.00: 101.00. "])
    page.browser.get("about:blank")
    prices(server, 98.0)
    page.visit(server.port)
    wait_for(lambda: page.texts("#news span") == ["BTC crossed 100.00 while away. "])
    assert page.part("alert")[0] == "crossed 100.00 while away"


def test_stale_prices_fire_nothing(page: Page, start_server: StartServer) -> None:
    page.expect(NOT_READY)
    clock = Clock()
    server = start_server(**clock.options())
    prices(server, 99.0)
    page.visit(server.port)
    set_line(page, "100")
    page.browser.get("about:blank")
    prices(server, 101.0)
    clock.ahead = 600
    page.visit(server.port, "Stale")
    wait_for(lambda: page.part("price")[0] == "101.00")
    assert (page.part("alert")[0], page.texts("#news span")) == ("alert at 100.00", [])
    prices(server, 102.0)
    wait_for(lambda: page.texts("#news span") == ["BTC crossed 100.00 while away. "])


def test_what_crossed_unseen_stands_in_the_title(page: Page, server: PriceServer) -> None:
    prices(server, 99.0)
    page.visit(server.port)
    set_line(page, "100")
    page.look_away()
    prices(server, 101.0)
    wait_for(lambda: page.browser.title == "BTC crossed 100.00 · 101.00 BTC")
    page.look_away(False)
    wait_for(lambda: page.browser.title == "101.00 BTC")


def test_a_hidden_page_with_an_alert_keeps_the_server_polling(page: Page, start_server: StartServer) -> None:
    server = start_server(pause_when_idle=True)
    prices(server, 99.0)
    page.visit(server.port)
    set_line(page, "100")
    page.look_away()
    for _ in range(15):
        prices(server, 99.0)
        page.pass_time(60)
    assert len(server.clients) == 1


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        ("delete window.Notification", "This browser shows no notifications from a tab."),
        ("window.Notification = class { static permission = 'denied' }", "blocked"),
        ("Object.defineProperty(window, 'isSecureContext', {value: false})", "https"),
        ("Storage.prototype.setItem = () => { throw new Error('full') }", "It cannot be stored"),
    ],
)
def test_the_page_says_what_it_cannot_do(page: Page, server: PriceServer, break_it: str, told: str) -> None:
    prices(server, 99.0)
    page.visit(server.port)
    page.run(break_it)
    page.first("[data-part=bell]").click()
    page.first("#line").send_keys("abc", Keys.ENTER)
    assert page.text("#wrong").startswith("Not a price")
    page.first("#line").clear()
    page.first("#line").send_keys("100", Keys.ENTER)
    wait_for(lambda: told in page.text("#how"))
    prices(server, 101.0)
    wait_for(lambda: page.part("alert")[0].startswith("crossed 100.00 at "))
    page.first("#remove").click()
    assert page.part("alert")[0] == ""


def test_a_crossing_that_a_lost_connection_hid_is_told(
    page: Page, server: PriceServer, start_server: StartServer
) -> None:
    page.expect(*RESTART)
    prices(server, 99.0)
    page.visit(server.port)
    set_line(page, "100")
    publish(page, server, 99.5)
    server.shutdown_gracefully()
    page.wait_for_state("Connection lost, reconnecting")
    prices(start_server(port=server.port), 101.0)
    wait_for(lambda: page.texts("#news span") == ["BTC crossed 100.00 while away. "])
