"""How the page keeps its connection, and what it says when there is none, in a real browser."""

import re
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from browser import (
    NO_SERVER,
    NO_SOCKET,
    NO_STREAM,
    NOT_READY,
    RESTART,
    Clock,
    Line,
    Page,
    StartServer,
    prices,
    record,
    time_of,
)
from running import ASSETS, Tracker, wait_for
from stand_in import KEY, StandIn
from websockets.sync.client import connect

from coin_api import CoinApi, PriceUpdate
from price_server import PriceServer
from price_server.status import Status
from tracker import Poller

LOST = "Connection lost, reconnecting"
HOUR = 3600
LayLine = Callable[[PriceServer], Line]


def wait_for_price(page: Page, price: str, seconds: float = 30.0) -> None:
    everywhere = f"{price} in each row"
    wait_for(lambda: page.part("price") == [price] * len(page.part("price")) != [], seconds, everywhere)


def xs(page: Page, row: int = 0) -> list[float]:
    """Where the points of a chart stand, of 1000."""
    return [float(x) for x in re.findall(r"[ML](-?[\d.]+) ", page.path("line", row))]


# A slow line


def test_prices_wait_for_nothing_else(page: Page, server: PriceServer, lay_line: LayLine) -> None:
    page.expect(NO_SERVER)
    line = lay_line(server)
    line.rates = {"/healthz": 0, "/history?": 0}
    prices(server, 2.0)
    page.visit(line.port, "Connecting …")
    wait_for_price(page, "2.00")
    assert page.part("asset") == list(ASSETS)
    prices(server, 3.0)
    wait_for_price(page, "3.00")
    page.wait_for_state("Live")
    for _ in range(4):
        page.pass_time(30)
        prices(server, 3.0)
    assert page.text("#state") == "Live"
    line.rates = {"/healthz": None}  # a browser asks once more when it is cut off
    line.cut()
    line.rates = {}

    def is_whole() -> bool:
        page.pass_time(16)
        return page.text("h1") == "Prices in USD"

    wait_for(is_whole, what="the rest as soon as it can be had")
    page.wait_for_charts()


def test_the_past_may_take_longer_than_the_patience_for_the_rest(
    page: Page, server: PriceServer, lay_line: LayLine
) -> None:
    line = lay_line(server)
    line.rates = {"/history?": 2000}
    record(server, 2 * HOUR, 300)
    prices(server, 110.0)
    page.visit(line.port)
    page.requests()
    for _ in range(4):
        page.pass_time(15)
    wait_for_price(page, "110.00")
    assert set(page.part("line")) == {""}
    assert page.part("change") == ["–"] * 10
    line.rates = {}
    wait_for(lambda: page.part("change") == ["+10.00%"] * 10, 30)
    assert not [url for url in page.requests() if "/ws" in url]


def test_a_range_that_does_not_come_leaves_the_one_before_in_place(
    page: Page, server: PriceServer, lay_line: LayLine
) -> None:
    page.expect(r"/history\S+ - Failed to load resource: .* status of 502")
    line = lay_line(server)
    record(server, 2 * HOUR, 300)
    prices(server, 110.0)
    page.visit(line.port, query="?range=1h")
    page.wait_for_charts()
    before = page.path("line").count("L")
    line.rates = {"/history?": None}
    page.all("#ranges button")[1].click()
    wait_for(lambda: page.first("#rows").get_attribute("aria-busy") == "true")
    assert page.path("line").count("L") >= before
    line.rates = {}
    page.pass_time(16)
    wait_for(lambda: page.first("#rows").get_attribute("aria-busy") == "false")
    assert page.texts("#ranges [aria-pressed=true]") == ["24h"]


# Sleep, and clocks


@pytest.mark.parametrize("clocks", ["one stands still", "both go on"])
def test_after_sleep_the_page_connects_anew_and_its_times_are_right(
    page: Page, start_server: StartServer, lay_line: LayLine, clocks: str
) -> None:
    page.expect(*RESTART)
    clock = Clock()
    server = start_server(**clock.options())
    line = lay_line(server)
    record(server, HOUR // 2, 10)
    prices(server, 100.0)
    page.visit(line.port, query="?range=1h")
    page.wait_for_charts()
    line.freeze()  # a half-open socket, as sleep leaves it
    clock.ahead = 900
    prices(server, 120.0)
    page.pass_time(900, asleep=clocks == "one stands still")
    wait_for_price(page, "120.00", 12)  # silence alone is noticed after 15 s
    page.wait_for_state("Live")
    wait_for(lambda: page.path("line").count("M") == 2, what="a gap of the sleep's length")
    points = xs(page)
    # half an hour, a quarter of an hour without, one point
    assert max(b - a for a, b in pairwise(points)) == pytest.approx(1000 / 3, abs=30)
    assert int(re.findall(r"\d+", page.text("#age"))[0]) < 30


@pytest.mark.parametrize("clocks", ["one stands still", "both go on"])
def test_a_connection_that_sleep_left_half_open_is_not_waited_for(
    page: Page, start_server: StartServer, lay_line: LayLine, clocks: str
) -> None:
    page.expect(*RESTART)
    server = start_server(interval=600.0)  # prices are not stale for half an hour
    line = lay_line(server)
    prices(server, 100.0)
    page.visit(line.port)
    line.freeze()
    prices(server, 120.0)
    page.pass_time(300, asleep=clocks == "one stands still")
    wait_for_price(page, "120.00")


@pytest.mark.parametrize("shift", [-HOUR, HOUR])
def test_a_clock_that_the_visitor_sets_changes_nothing(page: Page, server: PriceServer, shift: int) -> None:
    record(server, HOUR // 2, 10)
    page.show(server, 100.0, query="?range=1h")
    page.run("clock.wall += 1000 * arguments[0]", shift)
    prices(server, 101.0)
    page.run("clock.tick()")
    wait_for_price(page, "101.00")
    page.wait_for_state("Live")
    prices(server, 102.0)
    wait_for_price(page, "102.00")
    page.pass_time(6)
    page.wait_for_charts()
    points = xs(page)
    assert points == sorted(points)
    assert points[0] < 50
    assert page.path("line").count("M") == 1
    page.pass_time(50)
    assert re.fullmatch(r"prices (5|6)\d s old|prices 1 min .*", page.text("#age"))


def test_a_wrong_clock_of_the_visitor_is_not_believed(page: Page, start_server: StartServer) -> None:
    clock = Clock(-6 * HOUR)
    server = start_server(**clock.options())
    record(server, HOUR // 2, 10)
    page.show(server, 100.0, query="?range=1h")
    prices(server, 101.0)
    wait_for_price(page, "101.00")
    page.pass_time(6)
    assert int(re.findall(r"\d+", page.text("#age"))[0]) < 30
    assert page.path("line").count("M") == 1


def test_a_connection_that_went_silent_is_replaced(page: Page, start_server: StartServer, lay_line: LayLine) -> None:
    page.expect(*RESTART)
    clock = Clock()
    server = start_server(**clock.options())
    line = lay_line(server)
    prices(server, 2.0)
    page.visit(line.port)
    line.freeze()
    clock.ahead = 80
    prices(server, 3.0)
    page.pass_time(80)
    wait_for_price(page, "3.00")
    page.wait_for_state("Live")


# No feed


def test_a_feed_that_is_not_passed_on_is_told_from_a_lost_connection(
    page: Page, server: PriceServer, lay_line: LayLine
) -> None:
    page.expect(NO_SOCKET, NO_STREAM)
    line = lay_line(server)
    line.rates = {"/ws": None, "/stream": None}
    record(server, 2 * HOUR, 300)
    prices(server, 110.0)
    page.visit(line.port, "No live prices")
    assert "proxy" in page.first("[data-when=blocked]").text
    assert not page.first("[data-when=full]").is_displayed()
    wait_for_price(page, "110.00")  # what the history knows, and how old it is
    page.wait_for_charts()
    assert re.match(r"prices \d+ s old", page.text("#age"))
    assert page.style("tbody .price", "color") == page.style("thead th", "color")  # muted
    assert page.browser.title == "NOT LIVE 110.00 BTC"
    line.rates = {}
    page.pass_time(11)
    page.wait_for_state("Live")
    assert not page.first("[data-when=blocked]").is_displayed()


def test_a_feed_that_never_answers_is_given_up(page: Page, server: PriceServer, lay_line: LayLine) -> None:
    page.expect(NO_SOCKET, NO_SERVER)
    line = lay_line(server)
    line.rates = {"/ws": 0, "/stream": 0}
    prices(server, 110.0)
    page.visit(line.port, "Connecting …")
    wait_for(lambda: page.text("h1") == "Prices in USD", what="/healthz without a socket")
    for _ in "WebSocket", "stream":
        page.pass_time(6)
    page.wait_for_state("No live prices")


def test_a_full_server_says_so_until_there_is_a_place(page: Page, start_server: StartServer) -> None:
    page.expect(NO_SOCKET, NO_STREAM)
    server = start_server(max_clients=1)
    prices(server, 2.0)
    with connect(f"ws://127.0.0.1:{server.port}/ws"):
        page.visit(server.port, "The server is full")
        assert page.first("[data-when=full]").is_displayed()
        assert page.browser.title.startswith("FULL ")
    wait_for(lambda: not server.clients)
    page.pass_time(11)
    page.wait_for_state("Live")


def test_a_lost_connection_shows_and_the_page_comes_back_by_itself(page: Page) -> None:
    page.expect(*RESTART)
    with Tracker("--demo") as tracker:
        page.visit(tracker.port)
        page.run("window.same = true")
        live = page.style("tbody .price", "color")
        tracker.stop()
        page.wait_for_state(LOST)
        assert page.style("tbody .price", "color") != live
        assert page.browser.title.startswith("LOST ")
        assert page.text("#age").startswith("prices ")
    with Tracker("--demo", "--port", str(tracker.port)):
        page.wait_for_state("Live", 20)
        assert page.run("return window.same")
        page.leave()


def test_the_page_comes_back_at_once_when_the_browser_comes_online(page: Page, start_server: StartServer) -> None:
    page.expect(*RESTART)
    first = start_server()
    page.visit(first.port, "Waiting for the first prices")
    first.shutdown_gracefully()
    page.wait_for_state(LOST)
    page.run("clock.held = true")  # no attempt by itself
    prices(start_server(port=first.port), 2.0)
    page.run("dispatchEvent(new Event('online'))")
    page.wait_for_state("Live")


# Old prices


def test_a_server_without_prices_yet_is_waited_for(page: Page, server: PriceServer) -> None:
    page.expect(NOT_READY)
    server.report_failure("no response from CoinAPI: no connection within 3 s")
    page.visit(server.port, "Waiting for the first prices")
    assert page.part("price") == ["–"] * 10
    assert page.first("#reason").text == "Last error: no response from CoinAPI: no connection within 3 s"
    assert page.browser.title == "Prices"
    prices(server, 2.0)
    page.wait_for_state("Live")
    wait_for_price(page, "2.00")
    page.pass_time(6)
    page.wait_for_charts()
    assert not page.first("#error").is_displayed()


def test_a_server_that_starts_with_a_past_shows_its_last_prices_greyed(page: Page, start_server: StartServer) -> None:
    page.expect(NOT_READY)
    clock = Clock(-HOUR)
    server = start_server(**clock.options())
    record(server, 2 * HOUR, 300)
    clock.ahead = 0
    page.visit(server.port, "Waiting for the first prices")
    wait_for_price(page, "100.00")
    assert re.match(r"prices 1 h \d+ min old, of (\d+ \w+, )?\d\d:\d\d ", page.text("#age"))
    assert page.style("tbody .price", "color") == page.style("thead th", "color")
    prices(server, 2.0)
    page.wait_for_state("Live")
    wait_for_price(page, "2.00")
    assert page.style("tbody .price", "color") != page.style("thead th", "color")


def test_prices_that_were_old_on_arrival_do_not_look_fresh(page: Page, start_server: StartServer) -> None:
    page.expect(NOT_READY)
    clock = Clock(-7260)
    server = start_server(**clock.options())
    prices(server, 2.0)
    clock.ahead = 0
    server.report_failure("CoinAPI answered 403: Quota exceeded")
    page.visit(server.port, "Stale")
    assert page.text("#age").startswith("prices 2 h 1 min old, of ")
    assert page.first("#reason").text == "Last error: CoinAPI answered 403: Quota exceeded"
    prices(server, 3.0)
    page.wait_for_state("Live")
    assert not page.first("#error").is_displayed()


def test_while_prices_are_stale_change_and_chart_stand_still(page: Page, start_server: StartServer) -> None:
    page.expect(NOT_READY)
    clock = Clock()
    server = start_server(**clock.options())
    record(server, HOUR, 10, lambda age: 1000.0 - age / 10)
    page.show(server, 1000.0, query="?range=1h")

    def pass_time(seconds: int) -> int:
        clock.ahead += seconds
        page.pass_time(seconds)
        return page.path("line").count("L")

    pass_time(70)
    page.wait_for_state("Stale")
    before = pass_time(10)
    for _ in range(12):  # a chart that went on would lose 96 of its points
        assert pass_time(80) >= before - 2
    assert float(page.part("change")[0].strip("+%")) == pytest.approx(55, abs=2)
    assert page.text("#age").startswith("prices 17 min old")


def test_coinapi_failing_turns_the_page_stale_until_it_answers_again(
    page: Page, start_server: StartServer, coin_api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.expect(NOT_READY)
    monkeypatch.setattr(Status, "stale_floor", 3.0)
    server = start_server(interval=0.2)
    poller = Poller(CoinApi(KEY, url=coin_api.url), server, 0.2)
    threading.Thread(target=poller.run, daemon=True).start()
    page.visit(server.port)
    live = page.style("tbody .price", "color")
    coin_api.say(b"", 500)
    page.wait_for_state("Stale")
    assert page.style("tbody .price", "color") != live
    assert page.browser.title == "STALE 65,980.10 BTC"
    coin_api.recover()
    page.wait_for_state("Live", 20)
    assert page.style("tbody .price", "color") == live
    poller.stop()


# A hidden tab


def hide_for(page: Page, server: PriceServer, minutes: int) -> None:
    page.look_away()
    for _ in range(minutes):
        prices(server, 2.0)
        page.pass_time(60)


def test_a_hidden_page_lets_go_of_a_server_that_pauses_when_idle(page: Page, start_server: StartServer) -> None:
    server = start_server(pause_when_idle=True)
    page.expect(NO_SOCKET)  # looked at again, it may open another before the last has opened
    prices(server, 2.0)
    page.visit(server.port)
    hide_for(page, server, 9)
    assert len(server.clients) == 1
    hide_for(page, server, 2)
    wait_for(lambda: not server.clients)
    assert page.browser.title == "PAUSED 2.00 BTC"
    page.requests()
    for _ in range(5):
        page.pass_time(60)
    assert page.requests() == []
    prices(server, 3.0)
    page.look_away(False)
    page.wait_for_state("Live")
    wait_for_price(page, "3.00")
    wait_for(lambda: page.browser.title == "3.00 BTC")
    assert len(server.clients) == 1


def test_a_hidden_page_stays_with_a_server_that_does_not_pause(page: Page, server: PriceServer) -> None:
    prices(server, 2.0)
    page.visit(server.port)
    hide_for(page, server, 15)
    prices(server, 3.0)
    wait_for(lambda: page.browser.title == "3.00 BTC")
    assert (page.text("#state"), len(server.clients)) == ("Live", 1)


# A server that was restarted


def test_a_restarted_server_leaves_the_page_the_points_that_it_has(page: Page, start_server: StartServer) -> None:
    page.expect(*RESTART)
    server = start_server()
    record(server, 3000, 10)
    page.show(server, 110.0, query="?range=1h")
    before = page.path("line").count("L")
    server.shutdown_gracefully()
    page.wait_for_state(LOST)
    server = start_server(port=server.port)
    prices(server, 105.0)
    wait_for_price(page, "105.00")
    page.wait_for_state("Live")
    page.pass_time(16)
    page.pass_time(6)
    wait_for(lambda: page.part("change") == ["+5.00%"] * 10)
    assert page.path("line").count("L") >= before > 250
    assert page.part("change") == ["+5.00%"] * 10


def test_a_price_that_a_restarted_server_does_not_know_says_since_when(page: Page, start_server: StartServer) -> None:
    page.expect(*RESTART)
    server = start_server()
    record(server, HOUR // 2, 300)
    page.show(server, 2.0)
    server.shutdown_gracefully()
    server = start_server(port=server.port)
    server.publish([PriceUpdate("BTC", 3.0, time_of(server))])
    wait_for(lambda: page.part("price") == ["3.00", *["2.00"] * 9])
    page.pass_time(6)
    wait_for(lambda: [note[:14] for note in page.part("note")] == ["", *["no price since"] * 9])


def test_a_server_restarted_with_other_assets_gets_other_rows(page: Page, start_server: StartServer) -> None:
    page.expect(*RESTART)
    first = start_server()
    record(first, HOUR // 2, 300)
    prices(first, 2.0)
    page.visit(first.port)
    page.wait_for_charts()
    first.shutdown_gracefully()
    second = start_server(("SOL", "BTC"), port=first.port, quote="EUR", source="demo")
    second.publish([PriceUpdate("SOL", 177.5, time_of(second))])
    wait_for(lambda: page.part("asset") == ["SOL", "BTC"])
    wait_for(lambda: page.part("price") == ["177.50", "–"])  # euros are not drawn behind dollars
    page.wait_for_state("Live")
    assert page.part("change") == ["–"] * 2
    assert page.text("h1") == "Prices in EUR"
    assert page.browser.title == "DEMO 177.50 SOL"


# Size


def test_forty_assets_follow_their_prices(page: Page, start_server: StartServer) -> None:
    server = start_server(tuple(f"A{number:02}" for number in range(40)))
    record(server, 86400, 300)
    page.show(server, 110.0)
    prices(server, 120.0)
    wait_for_price(page, "120.00")
    assert page.part("change") == ["+20.00%"] * 40
    box = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    page.run("document.querySelector('#period').textContent = 'since 25 Nov, 16:32'")
    assert page.run(box, "#period")["right"] < page.run(box, "#from")["left"]
