"""Prices for a NATS server: follows a tracker as the page does, and publishes each message as `prices.BTC` and so on.

    python3 -m venv venv && venv/bin/pip install nats-py websockets
    TRACKER_URL=ws://127.0.0.1:3030/ws NATS_URL=nats://127.0.0.1:4222 venv/bin/python nats-bridge.py

A price is published within MAX_AGE seconds (5, the tracker's interval) or not at all: prices that come during an
outage of NATS replace one another here, and nats-py keeps none, because each connection has a client of its own.
"""

import asyncio
import json
import logging
import os
import time

import nats
from nats.aio.client import Client
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

TRACKER_URL = os.environ.get("TRACKER_URL", "ws://127.0.0.1:3030/ws")
NATS_URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
SUBJECT = os.environ.get("SUBJECT", "prices")
MAX_AGE = float(os.environ.get("MAX_AGE", "5"))
RETRY_AFTER = 1.0  # seconds

logger = logging.getLogger("bridge")


class Bridge:
    """Two tasks: one receives prices, the other publishes the newest of each asset."""

    def __init__(self) -> None:
        self.newest: dict[str, tuple[float, bytes]] = {}  # by asset: when it came, and the message
        self.came = asyncio.Event()

    async def receive(self) -> None:
        """Follow the tracker; `connect` comes back by itself when the connection is lost."""
        async for tracker in connect(TRACKER_URL, max_queue=None):
            logger.info("following %s", TRACKER_URL)
            known = set()
            try:
                async for message in tracker:
                    asset_id = json.loads(message)["asset_id"]
                    # The first one of each asset is the last known price, which may be of any age.
                    if asset_id in known:
                        self.newest[asset_id] = time.monotonic(), str(message).encode()
                        self.came.set()
                    known.add(asset_id)
            except ConnectionClosed as error:
                logger.warning("lost the tracker: %s", error)

    async def publish(self) -> None:
        """Publish over one connection until it is lost; then over the next."""
        while True:
            try:
                client = await nats.connect(NATS_URL, allow_reconnect=False, connect_timeout=2, error_cb=ignore)
                logger.info("connected to NATS")
                try:
                    while True:
                        await self.came.wait()
                        self.came.clear()
                        await self.publish_newest(client)
                finally:
                    await asyncio.wait_for(client.close(), 1)
            except (OSError, TimeoutError, nats.errors.Error) as error:
                logger.warning("no NATS: %s", error or type(error).__name__)
            await asyncio.sleep(RETRY_AFTER)

    async def publish_newest(self, client: Client) -> None:
        while self.newest:
            asset_id, (came, message) = self.newest.popitem()
            if time.monotonic() - came < MAX_AGE:
                await client.publish(f"{SUBJECT}.{asset_id}", message)
        # Until the server has answered, nothing more is sent: no prices wait in a socket that nobody reads.
        await client.flush(timeout=max(1, round(MAX_AGE)))


async def ignore(error: Exception) -> None:
    """nats-py logs errors with a traceback; `publish` gets and logs them anyway."""


async def main() -> None:
    bridge = Bridge()
    await asyncio.gather(bridge.receive(), bridge.publish())


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
    logging.getLogger("websockets").setLevel("WARNING")
    asyncio.run(main())
