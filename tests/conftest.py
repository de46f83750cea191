"""Fixtures for all tests."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from rigged import Clock, RiggedServer
from running import ASSETS
from stand_in import StandIn

from coin_api import PriceUpdate
from price_server import PriceServer

pytest_plugins = ("browser", "calling", "sites")  # their fixtures

sys.setswitchinterval(0.0002)  # as the program does at its start
# What runs the tests may ignore these (nohup, a job in the background), and each program started here would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def coin_api() -> Iterator[StandIn]:
    """A CoinAPI stand-in that serves."""
    with StandIn() as stand_in:
        yield stand_in


@pytest.fixture
def start_server() -> Iterator[Callable[..., RiggedServer]]:
    """Starts PriceServers in this process, on free ports; they are stopped after the test.

    They are plain ones, but for `kind=RiggedServer`.
    """
    with ExitStack() as stack:

        def start(assets: tuple[str, ...] = ASSETS, kind: type[PriceServer] = PriceServer, **options: object) -> Any:
            server = kind(assets, **options)  # type: ignore[arg-type]
            server.run_forever(threaded=True)
            stack.callback(server.thread.join, 10)  # the stop itself waits only so long
            stack.callback(server.shutdown_gracefully)
            return server

        yield start


@pytest.fixture
def server(start_server: Callable[..., PriceServer]) -> PriceServer:
    """A running PriceServer for the ten assets, with no prices yet."""
    return start_server()


@pytest.fixture
def rigged(start_server: Callable[..., RiggedServer]) -> RiggedServer:
    """The same with sockets that a test can fill, watch and break."""
    return start_server(kind=RiggedServer)


@pytest.fixture
def timed(start_server: Callable[..., RiggedServer]) -> RiggedServer:
    """The same with clocks that stand still until the test lets time pass (`pass_time`)."""
    clock = Clock()
    return start_server(kind=RiggedServer, clock=clock, age_clock=clock)


@pytest.fixture
def updates() -> Callable[[float], list[PriceUpdate]]:
    """Makes one poll's updates: every asset at the same price."""

    def make(price: float) -> list[PriceUpdate]:
        return [PriceUpdate(asset_id, price, "2026-11-22T07:44:05.1234567Z") for asset_id in ASSETS]

    return make


@pytest.fixture
def quick_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits less long for clients that do not hang up."""
    monkeypatch.setattr("price_server.loop.STOP_TIMEOUT", 0.3)


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What is logged as an error: the test fails when that is anything, and one that means it clears the list."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield logged
    logging.getLogger().removeHandler(handler)
    assert logged == []
