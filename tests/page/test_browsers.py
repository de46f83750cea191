"""What must be seen in each browser: Chromium, Firefox and WebKit. The rest stands beside, in Chromium alone."""

from collections.abc import Callable, Iterator

import pytest
from browser import Line, StartServer, prices, record
from browsers import ARROW_LEFT, END, NAMES, View, open_browser
from running import ASSETS, wait_for
from websockets.sync.client import connect

from price_server import PriceServer

LayLine = Callable[[PriceServer], Line]
FIRED = "[role=status]#news"


@pytest.fixture(scope="module", params=NAMES)
def open_view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    with open_browser(request.param, tmp_path_factory.mktemp(request.param)) as view:
        yield view


@pytest.fixture
def view(open_view: View, server: PriceServer) -> Iterator[View]:
    """Left before the server stops; the server has a past and a price."""
    record(server, 7200, 60, lambda age: 90.0 + age % 600 / 30)
    prices(server, 110.0)
    open_view.driver.set_size(1280, 800)
    yield open_view
    open_view.driver.get("about:blank")


def set_text_size(view: View, percent: int) -> None:
    view.run("document.documentElement.style.fontSize = `${arguments[0]}%`", percent)


def test_prices_move_ranges_change_and_rows_are_sorted(view: View, server: PriceServer) -> None:
    view.visit(server.port)
    view.wait_for_charts()
    assert view.part("asset") == list(ASSETS)
    prices(server, 45000.0, XLM=0.0934)
    wait_for(lambda: view.part("price")[::7] == ["45,000.00", "0.0934"])
    view.click("#ranges button:nth-child(1)")
    wait_for(lambda: view.texts("#ranges [aria-pressed=true]") == ["1h"])
    assert view.run("return location.search") == "?range=1h"
    assert view.style("thead button", "textDecorationLine") == "underline"
    view.click("[data-sort=price] button")
    view.click("[data-sort=price] button")
    wait_for(lambda: view.part("asset")[0] == "XLM")


def test_high_and_low_stand_at_the_edges_of_the_row(view: View, server: PriceServer) -> None:
    view.visit(server.port)
    wait_for(lambda: view.part("high") == ["110.00"] * 10)
    row, high, low = (view.box(f"tbody {part}") for part in ("tr", "[data-part=high]", "[data-part=low]"))
    assert row["top"] <= high["top"] < row["top"] + row["height"] / 3
    assert row["bottom"] >= low["bottom"] > row["bottom"] - row["height"] / 3


def test_a_server_that_stops_shows_and_comes_back(view: View, server: PriceServer, start_server: StartServer) -> None:
    view.visit(server.port)
    server.shutdown_gracefully()
    view.wait_for_state("Connection lost, reconnecting")
    again = start_server(port=server.port)
    prices(again, 111.0)
    view.wait_for_state("Live")
    wait_for(lambda: view.part("price") == ["111.00"] * 10)


def test_where_websocket_does_not_pass_the_stream_serves(view: View, server: PriceServer, lay_line: LayLine) -> None:
    line = lay_line(server)
    line.rates = {"/ws": None}
    view.visit(line.port)
    prices(server, 112.0)
    wait_for(lambda: view.part("price") == ["112.00"] * 10)


def test_where_no_feed_passes_the_prices_are_asked_for(view: View, server: PriceServer, lay_line: LayLine) -> None:
    line = lay_line(server)
    line.rates = {"/ws": None, "/stream": None, "/history?": None}
    view.visit(line.port, "No live prices")
    wait_for(lambda: view.part("price") == ["110.00"] * 10)
    line.rates = {}
    view.wait_for_state("Live")


def test_a_full_server_shows_its_prices(view: View, start_server: StartServer) -> None:
    server = start_server(max_clients=1)
    prices(server, 2.0)
    with connect(f"ws://127.0.0.1:{server.port}/ws"):
        view.visit(server.port, "The server is full")
        wait_for(lambda: view.part("price") == ["2.00"] * 10)
    view.wait_for_state("Live")


def test_the_page_comes_back_with_the_back_button(view: View, server: PriceServer) -> None:
    view.visit(server.port)
    view.driver.get(f"http://127.0.0.1:{server.port}/prices/BTC")
    view.driver.back()
    view.wait_for_state("Live")
    prices(server, 113.0)
    wait_for(lambda: view.part("price") == ["113.00"] * 10)


@pytest.mark.parametrize("size", [100, 200])
def test_nothing_scrolls_sideways_on_a_phone(view: View, server: PriceServer, size: int) -> None:
    # In a frame, as the window of WebKit's browser is never so narrow.
    view.driver.get(f"http://127.0.0.1:{server.port}/prices")
    view.run("""document.body.innerHTML = '<iframe width="320" height="568" style="border: 0" src="/"></iframe>'""")
    page = "const page = document.querySelector('iframe').contentDocument, root = page.documentElement; "
    wait_for(lambda: view.run(page + "return page.querySelectorAll('[data-part=line][d]').length") == 10)
    view.run(page + "root.style.fontSize = `${arguments[0]}%`", size)
    wait_for(lambda: view.run(page + "return root.scrollWidth") <= 320, what="320 px")


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (3840, 2160)])
def test_ten_assets_fill_a_wall(view: View, server: PriceServer, width: int, height: int) -> None:
    view.driver.set_size(width, height)
    view.visit(server.port)
    view.wait_for_charts()
    wait_for(lambda: 0.9 * height < view.box("footer")["bottom"] <= height)
    assert view.run(
        "const {scrollWidth, scrollHeight} = document.documentElement; return [scrollWidth, scrollHeight]"
    ) == [width, height]
    digits = 0.7  # of the size of the text
    assert float(view.style("tbody [data-part=price]", "fontSize").removesuffix("px")) * digits >= 28 * height / 1080


def test_keys_and_pointer_read_a_chart(view: View, server: PriceServer) -> None:
    view.visit(server.port)
    view.wait_for_charts()

    def point() -> bool:  # again where a row has moved meanwhile
        view.click("tbody tr:nth-child(4) [data-part=chart]")
        return " · " in view.part("text")[3]

    wait_for(point)
    assert not view.part("text")[3].startswith("110.00 · ")
    view.press(END)
    wait_for(lambda: view.part("text")[3].startswith("110.00 · "))
    view.press(ARROW_LEFT)
    wait_for(lambda: not view.part("text")[3].startswith("110.00 · "))


def test_an_alert_is_typed_or_pointed_at_and_fires_once(view: View, server: PriceServer) -> None:
    view.visit(server.port)
    view.wait_for_charts()
    view.click("tbody tr:nth-child(2) [data-part=bell]")
    wait_for(lambda: view.run("return document.activeElement.id") == "line")
    view.press(*"120.5\ue007")
    wait_for(lambda: view.part("alert")[1] == "alert at 120.50")
    for price, fired in ((120.0, ""), (121.0, "ETH crossed 120.50: 121.00."), (122.0, "ETH crossed 120.50: 121.00.")):
        prices(server, price)
        wait_for(lambda price=price: view.part("price")[1] == f"{price:.2f}")  # type: ignore[misc]
        assert view.texts(FIRED) == [fired]
    assert view.part("alert")[1].startswith("crossed 120.50 at ")
    view.click("tbody tr:nth-child(3) [data-part=bell]")
    wait_for(lambda: view.texts("#crosses") == ["Alert when XRP crosses"])
    view.click("tbody tr:nth-child(3) [data-part=chart]", y=0.5)
    wait_for(lambda: view.part("alert")[2].startswith("alert at "))
    assert 90 < float(view.part("alert")[2].split()[-1]) < 122
    view.run("localStorage.clear()")


@pytest.mark.parametrize("name", NAMES)
def test_a_dark_page_is_dark(name: str, server: PriceServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    prices(server, 2.0)
    with open_browser(name, tmp_path_factory.mktemp(name), dark=True) as view:
        view.visit(server.port)
        assert view.style("body", "backgroundColor") == "rgb(17, 20, 23)"
        assert view.style("tbody .price", "color") == "rgb(232, 235, 238)"
        view.driver.get("about:blank")
