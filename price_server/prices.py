"""The latest price of each asset, its encoded message in each format, and what a valid price is.

No socket, no thread: the server thread owns a server's `Prices`.
"""

import math
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from .formats import FORMATS, Format

T = TypeVar("T")


class Update(Protocol):
    """What `publish` takes; `coin_api.PriceUpdate` is one."""

    @property
    def asset_id(self) -> str: ...
    @property
    def price(self) -> float: ...
    @property
    def time(self) -> str: ...
    def to_json(self) -> str: ...


class Price(NamedTuple):
    """A valid price of one asset."""

    price: float
    time: str
    text: str  # the JSON that every client gets


def split_valid(
    updates: Iterable[Update], assets: Iterable[str], expect_all: bool = False
) -> tuple[dict[str, Price], dict[str, str]]:
    """The valid prices by asset id, and for each other asset id what is wrong with it, in a few words.

    expect_all: an asset without an update has a fault too.
    """
    assets = dict.fromkeys(assets)
    valid: dict[str, Price] = {}
    faults: dict[str, str] = {}
    for update in updates:
        try:
            fault = _find_fault(update, assets)
            if not fault:
                text = update.to_json()
                if isinstance(text, str):
                    text.encode()  # raises for half of a surrogate pair
                    valid[update.asset_id] = Price(update.price, update.time, text)
                else:
                    fault = "to_json() is not a text"
        except Exception as error:  # not an update, or one that lacks an attribute
            fault = type(error).__name__
        if fault:
            faults[_name(update)] = fault
    if expect_all:
        faults = dict.fromkeys(assets, "not in the response") | faults
    return valid, {asset_id: fault for asset_id, fault in faults.items() if asset_id not in valid}


def _name(update: object) -> str:
    """An update's asset id, or the type of what is not an update; fit for a log."""
    try:
        name = str(update.asset_id)[:40]  # type: ignore[attr-defined]
    except Exception:
        name = f"({type(update).__name__})"
    return "".join(char if char.isprintable() else "?" for char in name)


def _find_fault(update: Update, assets: Container[str]) -> str:
    price: Any = update.price
    if not isinstance(update.asset_id, str) or update.asset_id not in assets:
        return "not tracked"
    if not isinstance(price, int | float) or isinstance(price, bool):
        return f"price {str(price)[:40]!r} is not a number"
    if isinstance(price, int) and price.bit_length() > 1023:  # more than a float can hold
        return "price inf"
    if not (price > 0 and math.isfinite(price)):
        return f"price {price:.6g}"
    return "" if isinstance(update.time, str) else f"time {str(update.time)[:40]!r} is not a text"


class Feed:
    """The latest prices as messages of one format."""

    def __init__(self, output_format: Format):
        self.format = output_format
        self.messages: dict[str, bytes] = {}  # by asset, in the order tracked


class Prices:
    """The latest price of each asset. Only the server thread changes it."""

    def __init__(self, assets: Sequence[str]):
        self.assets = tuple(assets)
        self._upper = [asset.upper() for asset in self.assets]
        self.latest: dict[str, Price] = {}  # in the order tracked; only those that have had a price
        self.feeds = {each.name: Feed(each) for each in FORMATS}

    def remember(self, prices: dict[str, Price]) -> None:
        """Take a poll's valid prices; an asset that is not among them keeps its last price."""
        self.latest = self._merge(self.latest, prices)
        for feed in self.feeds.values():
            messages = {asset: feed.format.encode_price(price.text) for asset, price in prices.items()}
            feed.messages = self._merge(feed.messages, messages)

    def _merge(self, before: dict[str, T], new: dict[str, T]) -> dict[str, T]:
        """Both, in the order tracked."""
        merged = before | new
        if len(merged) == len(before):
            return merged
        return {asset: merged[asset] for asset in self.assets if asset in merged}

    def choose(self, asset_ids: Iterable[str]) -> tuple[str, ...]:
        """These assets, in the order tracked; case does not matter. Raises ValueError for one that is not tracked."""
        chosen = {asset_id.strip().upper() for asset_id in asset_ids}
        for asset_id in sorted(chosen.difference(self._upper)):
            raise ValueError(f"unknown asset {asset_id[:40]!r}: this server tracks {', '.join(self.assets)}")
        return tuple([asset for asset, upper in zip(self.assets, self._upper, strict=True) if upper in chosen])
