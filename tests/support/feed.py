"""A tracker with an honest client, for tests of what others at the same tracker cost it."""

import json
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from itertools import pairwise

from running import ASSETS, Tracker, wait_for
from stand_in import KEY, StandIn
from websockets.sync.client import connect


class Lateness:
    """`with Lateness() as lateness:` measures how late this process wakes: what a busy machine adds to any wait."""

    FACTOR = 4  # a wait that is measured goes through about so many wake-ups: CoinAPI's stand-in, tracker, client

    def __init__(self) -> None:
        self.longest = 0.0  # seconds
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.measure, daemon=True)

    def measure(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(0.005):
            now = time.monotonic()
            self.longest = max(self.longest, now - before - 0.005)
            before = now

    def __enter__(self) -> "Lateness":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def allows(self, seconds: float, promised: float) -> bool:
        """Whether a wait of so many seconds keeps the promise."""
        print(f"took {seconds:.3f} s of {promised} s; this process woke up to {self.longest:.3f} s late")
        return seconds <= promised + self.FACTOR * self.longest


class Feed:
    """A tracker with an interval of 0.25 s and an honest client that notes what comes, and when.

    The prices of the n-th poll are n: so the client can tell whether it missed one.
    """

    INTERVAL = 0.25  # seconds

    def __init__(self, stack: ExitStack, program: str = "tracker.py") -> None:
        self.polls = 0
        coin_api = self.coin_api = stack.enter_context(StandIn())
        coin_api.answer = self.answer
        options = ("--interval", str(self.INTERVAL))
        self.tracker = stack.enter_context(
            Tracker(*options, program=program, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
        )
        self.client = stack.enter_context(connect(self.tracker.ws, proxy=None, max_queue=None))
        self.arrivals: list[tuple[float, str, float]] = []  # monotonic seconds, asset, price
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.wait_for_polls(3)
        self.usage = self.tracker.usage()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.polls += 1
        self.coin_api.rates = dict.fromkeys(ASSETS, float(self.polls))
        self.coin_api.send_rates(handler)

    def watch(self) -> None:
        for message in self.client:
            update = json.loads(message)
            self.arrivals.append((time.monotonic(), update["asset_id"], update["price"]))

    def wait_for_polls(self, number: int) -> None:
        wanted = len(self.arrivals) + number * len(ASSETS)
        wait_for(lambda: len(self.arrivals) >= wanted, what="the next poll")

    def longest_wait(self, since: float) -> float:
        """The longest time between two polls at the honest client, in seconds."""
        times = [at for at, asset, _ in self.arrivals if asset == ASSETS[-1]]
        first = max(index for index, at in enumerate(times) if at <= since)
        return max(later - earlier for earlier, later in pairwise(times[first:]))

    def missed_nothing(self) -> bool:
        seen = [[price for _, each, price in list(self.arrivals) if each == asset] for asset in ASSETS]
        return all(prices == [prices[0] + number for number in range(len(prices))] for prices in seen)

    def is_as_before(self) -> bool:
        """Whether threads and files are back where they were."""
        threads, files, *_ = self.tracker.usage()
        return threads <= self.usage[0] and files <= self.usage[1]
