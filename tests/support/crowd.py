"""Clients that come back, as many as a test wants, and a new one ten times a second."""

import asyncio
import json
import random
import ssl
import threading
import time
from concurrent.futures import Future
from types import TracebackType

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus


class Crowd:
    """`with Crowd(uri, 200) as crowd:` follows the uri with 200 clients until the block ends.

    Each comes back within a second, as the page does. They come from ten addresses of 127.0.0.0/8: a proxy
    limits the connections from one. All of them live in one thread of their own, with a loop of asyncio.
    """

    def __init__(self, uri: str, clients: int, context: ssl.SSLContext | None = None):
        self.uri = uri
        self.context = context
        self.last = [0.0] * clients  # when each had its last price, monotonic seconds
        self.lost = 0  # connections that ended
        self.refused: list[tuple[float, int]] = []  # (when, HTTP status) of each client that was not let in
        self.newcomers = 0  # new clients that had a price
        self.unserved: list[tuple[float, str]] = []  # (when, what) of each new client that had none
        self._end: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="crowd")

    def __enter__(self) -> "Crowd":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set_result(None)
        self._thread.join()

    def served_since(self, when: float) -> int:
        """How many of the clients had a price after that moment."""
        return sum(last > when for last in self.last)

    async def _run(self) -> None:
        tasks = [asyncio.create_task(self._follow(number)) for number in range(len(self.last))]
        tasks.append(asyncio.create_task(self._keep_coming()))
        await asyncio.wrap_future(self._end)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, number: int) -> None:
        while True:
            try:
                async with connect(
                    self.uri, ssl=self.context, local_addr=(f"127.0.0.{2 + number % 10}", 0), compression=None
                ) as client:
                    async for message in client:
                        assert json.loads(message)["price"] > 0
                        self.last[number] = time.monotonic()
            except InvalidStatus as error:
                self.refused.append((time.monotonic(), error.response.status_code))
            except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed):
                pass
            self.lost += 1
            await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _keep_coming(self) -> None:
        visits = set()
        try:
            while True:
                visits.add(visit := asyncio.create_task(self._visit()))
                visit.add_done_callback(visits.discard)
                await asyncio.sleep(0.1)
        finally:
            for visit in visits:
                visit.cancel()

    async def _visit(self) -> None:
        came = time.monotonic()
        try:
            async with connect(self.uri, ssl=self.context, local_addr=("127.0.0.12", 0), open_timeout=8) as client:
                await asyncio.wait_for(client.recv(), 5)
                self.newcomers += 1
        except InvalidStatus as error:
            self.refused.append((came, error.response.status_code))
        except ConnectionClosed:
            pass  # let in, by a tracker that ended before its first price
        except (OSError, TimeoutError, InvalidHandshake) as error:
            self.unserved.append((came, repr(error)))
