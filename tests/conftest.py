"""Fixtures for all tests."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from running import ASSETS
from stand_in import StandIn

from coin_api import PriceUpdate
from price_server import PriceServer


@pytest.fixture
def coin_api() -> Iterator[StandIn]:
    """A CoinAPI stand-in that serves."""
    with StandIn() as stand_in:
        yield stand_in


@pytest.fixture
def start_server() -> Iterator[Callable[..., PriceServer]]:
    """Starts PriceServers in this process, on free ports; they are stopped behind the test."""
    with ExitStack() as stack:

        def start(assets: tuple[str, ...] = ASSETS, **options: object) -> PriceServer:
            server = PriceServer(assets, **options)  # type: ignore[arg-type]
            stack.callback(server.shutdown_gracefully)
            server.run_forever(threaded=True)
            return server

        yield start


@pytest.fixture
def server(start_server: Callable[..., PriceServer]) -> PriceServer:
    """A running PriceServer for the ten assets, with no prices yet."""
    return start_server()


@pytest.fixture
def updates() -> Callable[[float], list[PriceUpdate]]:
    """Makes one poll's updates: every asset at the same price."""

    def make(price: float) -> list[PriceUpdate]:
        return [PriceUpdate(asset_id, price, "2026-11-22T07:44:05.1234567Z") for asset_id in ASSETS]

    return make
