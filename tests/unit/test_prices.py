"""prices: what a valid price is, the latest ones, and their messages in each format."""

import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from price_server.prices import Prices, split_valid

TIME = "2026-11-22T07:44:05.1234567Z"


class Price(NamedTuple):
    asset_id: Any
    price: Any
    time: Any = TIME

    def to_json(self) -> str:
        return json.dumps([self.asset_id, self.price], separators=(",", ":"))

    @property
    def kept(self) -> tuple[float, str, str]:
        return self.price, self.time, self.to_json()


def test_valid_prices_are_kept_as_they_came() -> None:
    updates = [Price("ETH", 2500.5), Price("BTC", 45_000), Price("XRP", 5e-324), Price("ADA", 1.7e308, "")]
    assert split_valid(iter(updates), ("BTC", "ETH", "XRP", "ADA")) == (
        {update.asset_id: update.kept for update in updates},
        {},
    )


@pytest.mark.parametrize(
    ("price", "fault"),
    [
        (float("nan"), "price nan"),
        (float("inf"), "price inf"),
        (0, "price 0"),
        (-0.0, "price -0"),
        (-1.23456789, "price -1.23457"),
        (10**400, "price inf"),
        (2**1023, "price inf"),
        (True, "price 'True' is not a number"),
        (None, "price 'None' is not a number"),
        ("45000", "price '45000' is not a number"),
        (["x" * 99], f'price "[\'{"x" * 38}" is not a number'),
    ],
)
def test_a_price_that_is_not_a_finite_number_above_0_is_not_valid(price: object, fault: str) -> None:
    assert split_valid([Price("BTC", price), Price("ETH", 1)], ("BTC", "ETH")) == (
        {"ETH": Price("ETH", 1).kept},
        {"BTC": fault},
    )


@pytest.mark.parametrize(
    ("time", "fault"), [(None, "time 'None' is not a text"), (12 * 10**39, f"time '12{'0' * 38}' is not a text")]
)
def test_a_time_that_is_not_a_text_is_not_valid(time: object, fault: str) -> None:
    assert split_valid([Price("BTC", 2**1022, time)], ("BTC",)) == ({}, {"BTC": fault})


@pytest.mark.parametrize(
    ("asset_id", "name"), [("DOGE", "DOGE"), ("btc", "btc"), (None, "None"), ([], "[]"), ("x" * 99, "x" * 40)]
)
def test_an_asset_that_is_not_tracked_is_not_valid(asset_id: object, name: str) -> None:
    assert split_valid([Price(asset_id, None)], ("BTC", "ETH")) == ({}, {name: "not tracked"})


@pytest.mark.parametrize(
    ("update", "name", "fault"),
    [
        (None, "(NoneType)", "AttributeError"),
        (SimpleNamespace(asset_id="BTC"), "BTC", "AttributeError"),
        (SimpleNamespace(asset_id="BTC", price=1, time=TIME, to_json=lambda: 1 // 0), "BTC", "ZeroDivisionError"),
        (SimpleNamespace(asset_id="BTC", price=1, time=TIME, to_json=lambda: b""), "BTC", "to_json() is not a text"),
        (SimpleNamespace(asset_id="BTC", price=1, time=TIME, to_json=lambda: "\udc80"), "BTC", "UnicodeEncodeError"),
        (SimpleNamespace(asset_id="B\nTC", price=1), "B?TC", "not tracked"),
    ],
)
def test_an_invalid_update_does_not_affect_the_others(update: Any, name: str, fault: str) -> None:
    assert split_valid([update, Price("ETH", 1)], ("BTC", "ETH")) == ({"ETH": Price("ETH", 1).kept}, {name: fault})


def test_an_asset_that_comes_twice_has_its_last_valid_price() -> None:
    updates = [Price("BTC", 0), Price("BTC", 1), Price("BTC", 2), Price("BTC", None)]
    assert split_valid(updates, {"BTC"}) == ({"BTC": updates[2].kept}, {})


def test_a_poll_must_have_every_asset_and_an_update_must_not() -> None:
    updates = [Price("BTC", 1), Price("ETH", None)]
    valid, faults = split_valid(updates, ("XRP", "BTC", "ETH"), expect_all=True)
    assert (valid, list(faults.items())) == (
        {"BTC": updates[0].kept},
        [("XRP", "not in the response"), ("ETH", "price 'None' is not a number")],
    )
    assert split_valid(updates[:1], ("XRP", "BTC")) == ({"BTC": updates[0].kept}, {})


# The latest prices


def make_prices(*updates: Price) -> Prices:
    prices = Prices(["BTC", "ETH", "XRP"])
    prices.remember(split_valid(updates, prices.assets)[0])
    return prices


def test_there_are_no_prices_before_the_first_poll() -> None:
    prices = Prices(["BTC", "ETH"])
    assert (prices.assets, prices.latest) == (("BTC", "ETH"), {})
    assert {name: feed.messages for name, feed in prices.feeds.items()} == {"websocket": {}, "event_stream": {}}


def test_prices_are_in_the_order_tracked_and_stay_until_a_new_one_comes() -> None:
    prices = make_prices(Price("XRP", 3), Price("BTC", 1))
    prices.remember(split_valid([Price("ETH", 2), Price("XRP", 4)], prices.assets)[0])
    assert list(prices.latest.items()) == [
        (each.asset_id, each.kept) for each in (Price("BTC", 1), Price("ETH", 2), Price("XRP", 4))
    ]
    assert list(prices.feeds["websocket"].messages.items()) == [
        *(("BTC", b'\x81\x09["BTC",1]'), ("ETH", b'\x81\x09["ETH",2]'), ("XRP", b'\x81\x09["XRP",4]'))
    ]
    assert list(prices.feeds["event_stream"].messages.values()) == [
        *(b'data: ["BTC",1]\n\n', b'data: ["ETH",2]\n\n', b'data: ["XRP",4]\n\n')
    ]


def test_assets_are_chosen_in_any_case_and_in_the_order_tracked() -> None:
    prices = make_prices()
    assert prices.choose(["xrp", " Btc ", "XRP"]) == ("BTC", "XRP")
    assert prices.choose([]) == ()
    assert Prices(["eurUSD", "BTC"]).choose(["btc", "EURusd"]) == ("eurUSD", "BTC")


def test_an_unknown_asset_is_named_with_what_there_is() -> None:
    prices = make_prices()
    with pytest.raises(ValueError, match=r"^unknown asset 'CAT': this server tracks BTC, ETH, XRP$"):
        prices.choose(["BTC", "doge", "cat"])
    with pytest.raises(ValueError, match=rf"^unknown asset '{'X' * 40}': this server"):
        prices.choose(["x" * 99])
