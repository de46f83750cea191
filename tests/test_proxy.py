"""HAProxy in front of trackers, with the file of deploy/ as it is: TLS, what comes through, who gets which client."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from crowd import Crowd
from proxies import DEPLOY, Certificate, HAProxy, deployed, free_port, get, make_certificate
from running import ASSETS, Tracker, outside, wait_for
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

CLIENTS = 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


# One tracker or several fall over


class Pool:
    """Three trackers on fixed ports, which a test stops, kills and starts again, behind HAProxy."""

    def __init__(self, folder: Path, certificate: Certificate, *changes: tuple[str, object]):
        self.ports = [free_port() for _ in range(3)]
        self.trackers: list[Tracker | None] = [None] * 3
        self.proxy = HAProxy(folder, self.ports, certificate, *changes)

    def start(self, number: int) -> None:
        self.trackers[number] = Tracker("--demo", "--interval", "0.5", "--port", str(self.ports[number])).__enter__()

    def stop(self, number: int, how: int = signal.SIGTERM) -> None:
        tracker = self.trackers[number]
        assert tracker
        tracker.stop(how)
        tracker.__exit__()
        self.trackers[number] = None

    def signal(self, number: int, how: int) -> None:
        tracker = self.trackers[number]
        assert tracker
        tracker.process.send_signal(how)

    def clients(self) -> list[int]:
        """How many each tracker says it has."""
        return [json.loads(get(f"http://127.0.0.1:{port}/healthz")[1])["clients"] for port in self.ports]

    def __enter__(self) -> "Pool":
        for number in range(3):
            self.start(number)
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()
        for tracker in filter(None, self.trackers):
            tracker.__exit__()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, certificate: Certificate) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("pool"), certificate) as running:
        yield running


@pytest.fixture(scope="module")
def everybody(pool: Pool, certificate: Certificate) -> Iterator[Crowd]:
    with Crowd(f"wss://localhost:{pool.proxy.port}/ws?assets=BTC", CLIENTS, certificate.context) as crowd:
        yield crowd


@pytest.fixture
def crowd(everybody: Crowd) -> Crowd:
    """Two hundred clients, all with current prices, and new ones all the time."""
    all_served(everybody, time.monotonic(), 20)
    everybody.refused.clear()
    everybody.unserved.clear()
    return everybody


def all_served(crowd: Crowd, since: float, seconds: float) -> None:
    wait_for(lambda: crowd.served_since(since) == CLIENTS, seconds, f"prices for all {CLIENTS} clients")


def nobody_refused(crowd: Crowd) -> None:
    came = crowd.newcomers
    wait_for(lambda: crowd.newcomers > came + 2, what="prices for new clients")
    assert (crowd.refused, crowd.unserved) == ([], [])


def test_all_clients_are_back_after_each_tracker_of_a_rolling_restart(pool: Pool, crowd: Crowd) -> None:
    for number in range(3):
        pool.stop(number)
        pool.start(number)
        all_served(crowd, time.monotonic(), 10)
    nobody_refused(crowd)


def test_all_clients_are_back_when_all_trackers_were_down_for_4_s(pool: Pool, crowd: Crowd) -> None:
    for number in range(3):
        pool.stop(number)
    time.sleep(4)  # how long they are down is the point
    for number in range(3):
        pool.start(number)
    up = time.monotonic()
    all_served(crowd, up, 10)
    crowd.refused = [(when, status) for when, status in crowd.refused if when > up + 1.5]  # the first check of all
    crowd.unserved.clear()
    nobody_refused(crowd)


def test_clients_of_a_killed_tracker_are_back_on_the_others(pool: Pool, crowd: Crowd) -> None:
    pool.stop(0, signal.SIGKILL)
    all_served(crowd, time.monotonic(), 10)
    nobody_refused(crowd)
    pool.start(0)
    wait_for(lambda: pool.clients()[0] > 0, what="new clients on the one that is back")


def test_clients_of_a_hung_tracker_are_back_on_the_others_and_it_serves_again_when_it_goes_on(
    pool: Pool, crowd: Crowd
) -> None:
    pool.signal(1, signal.SIGSTOP)
    hung = time.monotonic()
    try:
        all_served(crowd, hung + 0.5, 10)
        time.sleep(hung + 15 - time.monotonic())  # how long it hangs is the point
    finally:
        pool.signal(1, signal.SIGCONT)
    all_served(crowd, time.monotonic(), 10)
    wait_for(lambda: pool.proxy.sessions()["3032"] > 0, what="new clients on the one that hung")
    nobody_refused(crowd)


def test_reload_of_the_proxy_brings_all_clients_back_spread_over_all_trackers(pool: Pool, crowd: Crowd) -> None:
    (old,) = pool.proxy.workers()
    lost = crowd.lost
    pool.proxy.reload()
    wait_for(lambda: old not in pool.proxy.workers(), 15, "the old process ends")
    all_served(crowd, time.monotonic(), 10)
    assert crowd.lost - lost >= CLIENTS
    spread = pool.clients()
    assert max(spread) - min(spread) <= CLIENTS // 10, spread
    nobody_refused(crowd)
