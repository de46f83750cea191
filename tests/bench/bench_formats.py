"""What a poll costs with event-stream clients beside WebSocket clients, in turns in one run.

    .venv/bin/python tests/bench/bench_formats.py [--clients 8000] [--rounds 15]

Two servers, with their readers in processes of their own: all clients over WebSocket; and half of them over
event streams, at last beside a tenth more that never read. Measured is how long `publish`
takes, which returns when every client has been sent its prices, and the process memory for an idle client.
"""

import argparse
import math
import selectors
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from bench_sides import raise_file_limit
from child import Clients
from raw import get, request, visit
from running import ASSETS

from coin_api import PriceUpdate
from price_server import PriceServer, connection, hub

REQUESTS = {"websocket": request(), "stream": get("/stream")}
PAUSE = 0.3  # seconds between two polls, in which the readers read


def read(what: str, port: int, clients: int, reads: int) -> None:
    """The readers' process: open connections, say so, and read until stdin ends."""
    with selectors.DefaultSelector() as selector:
        opened = []
        for _ in range(clients):
            opened.append(visit(port, REQUESTS[what]))
            opened[-1].recv(4096)
            if reads:
                selector.register(opened[-1], selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print('"open"', flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return
                key.fileobj.recv(1 << 16)  # type: ignore[union-attr]


def connect(stack: ExitStack, server: PriceServer, clients: int, what: str, reads: bool = True) -> float:
    """Bytes of process memory that a client of this kind takes."""
    before = psutil.Process().memory_info().rss
    readers = stack.enter_context(Clients(__file__, what, server.port, clients, int(reads)))
    assert readers.receive() == "open"
    return (psutil.Process().memory_info().rss - before) / clients


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    hub.HEARTBEAT_INTERVAL = connection.SLOW_CLIENT_TIMEOUT = math.inf  # readers that never answer or read stay
    half = options.clients // 2
    updates = [PriceUpdate(asset, 45000.0, "2026-11-22T07:44:05.1234567Z") for asset in ASSETS]
    with ExitStack() as stack:
        alone, mixed = (PriceServer(ASSETS, max_clients=1_000_000) for _ in range(2))
        for server in (alone, mixed):
            server.run_forever(threaded=True)
            stack.callback(server.shutdown_abruptly)
        memory = connect(stack, alone, options.clients, "websocket")
        print(f"memory for a WebSocket client: {memory / 1024:.2f} KiB")
        connect(stack, mixed, half, "websocket")
        memory = connect(stack, mixed, half, "stream")
        print(f"memory for an event-stream client: {memory / 1024:.2f} KiB")
        show_polls("half of them over event streams", alone, mixed, updates, options.rounds)
        connect(stack, mixed, options.clients // 10, "stream", reads=False)
        show_polls("and a tenth more that never read", alone, mixed, updates, options.rounds)


def show_polls(name: str, alone: PriceServer, mixed: PriceServer, updates: list[PriceUpdate], rounds: int) -> None:
    """Publish to both in turns."""
    seconds: dict[PriceServer, list[float]] = {alone: [], mixed: []}
    for _ in range(rounds):
        for server, times in seconds.items():
            began = time.monotonic()
            server.publish(updates)
            times.append(time.monotonic() - began)
            time.sleep(PAUSE)
    ratio = statistics.median(b / a for a, b in zip(seconds[alone], seconds[mixed], strict=True))
    first, second = (statistics.median(times) * 1000 for times in seconds.values())
    print(f"WebSocket alone {first:.1f} ms, {name} {second:.1f} ms: {ratio:.2f} times")


if __name__ == "__main__":
    raise_file_limit()
    if sys.argv[1:2] in (["websocket"], ["stream"]):
        read(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
