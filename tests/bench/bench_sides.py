"""The servers that the benchmark compares, each in a process of its own: `bench_sides.py NAME DIRECTORY MESSAGES`.

Each serves on a free port and obeys lines on stdin. DIRECTORY is the checkout that has the price server.
"""

import asyncio
import gc
import importlib
import importlib.metadata
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"NODE_PATH": str(ROOT / ".venv" / "node_modules")} | os.environ
HOST = "127.0.0.1"
IN_FLIGHT = 32  # connections being opened at a time


def price_server(messages: list[str]) -> None:
    """The price server of this checkout or of an earlier one, whatever the layout there."""
    import price_server
    from coin_api import PriceUpdate

    # As for the other sides, no pings; and stalled clients stay for as long as they are measured.
    if hasattr(price_server.PriceServer, "ping_interval"):  # an earlier one
        price_server.PriceServer.ping_interval = price_server.PriceServer.behind_timeout = math.inf
    else:
        vars(importlib.import_module("price_server.hub"))["HEARTBEAT_INTERVAL"] = math.inf
        vars(importlib.import_module("price_server.connection"))["SLOW_CLIENT_TIMEOUT"] = math.inf
    updates = [PriceUpdate(**json.loads(message)) for message in messages]
    server = price_server.PriceServer([update.asset_id for update in updates], max_clients=1_000_000)
    server.run_forever(threaded=True)

    async def send() -> None:
        server.publish(updates)

    def behind() -> int:
        handlers = [client["handler"] for client in server.clients]
        if handlers and hasattr(handlers[0], "kept"):  # an earlier one
            return sum(bool(handler.kept or handler.owed) for handler in handlers)
        return sum(bool(handler.connection.outbox) for handler in handlers)

    asyncio.run(obey(server.port, send, lambda: len(server.clients), behind))


def websocket_server(messages: list[str]) -> None:
    from websocket_server import WebsocketServer

    server = WebsocketServer(HOST, 0)
    server.run_forever(threaded=True)

    async def send() -> None:
        for message in messages:
            server.send_message_to_all(message)

    asyncio.run(obey(server.port, send, lambda: len(server.clients)))


async def websockets(messages: list[str]) -> None:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients = set()

    async def handle(connection: ServerConnection) -> None:
        clients.add(connection)
        await connection.wait_closed()

    async def send() -> None:
        for message in messages:
            broadcast(clients, message)

    async with serve(handle, HOST, 0, compression=None, ping_interval=None) as server:
        await obey(next(iter(server.sockets)).getsockname()[1], send, lambda: len(clients))


async def picows(messages: list[str]) -> None:
    from picows import WSListener, WSMsgType, WSTransport, ws_create_server

    clients = set()
    payloads = [message.encode() for message in messages]

    class Listener(WSListener):
        def on_ws_connected(self, transport: WSTransport) -> None:
            clients.add(transport)

    async def send() -> None:
        for payload in payloads:
            for transport in clients:
                transport.send(WSMsgType.TEXT, payload)

    server = await ws_create_server(lambda request: Listener(), HOST, 0)
    await obey(server.sockets[0].getsockname()[1], send, lambda: len(clients))


WS = """
const {WebSocketServer, WebSocket} = require("ws");
const messages = JSON.parse(process.argv[1]);
const options = {host: "127.0.0.1", port: 0, perMessageDeflate: false};
const server = new WebSocketServer(options, () => console.log(JSON.stringify({port: server.address().port})));
require("readline").createInterface({input: process.stdin}).on("line", line => {
  const start = Number(process.hrtime.bigint()) / 1e9;
  if (line === "send") {
    for (const message of messages)
      for (const client of server.clients)
        if (client.readyState === WebSocket.OPEN) client.send(message);
  } else gc();
  console.log(JSON.stringify({start, clients: server.clients.size}));
}).on("close", () => process.exit());
"""


async def obey(
    port: int, send: Callable[[], Awaitable[None]], clients: Callable[[], int], behind: Callable[[], int] = lambda: 0
) -> None:
    """Answer each line on stdin with one of JSON: "send" is a poll, all else collects garbage."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"port": port}), flush=True)
    while line := await lines.readline():
        answer: dict[str, float] = {"start": time.monotonic()}
        if line == b"send\n":
            await send()
        else:
            gc.collect()
            answer |= {"clients": clients(), "behind": behind()}
        print(json.dumps(answer), flush=True)


class Side(NamedTuple):
    name: str
    package: str  # what has to be installed; "" for nothing
    serve: Callable[[list[str]], Any] | None  # None for those that are no Python
    in_flight: int = IN_FLIGHT


SIDES = (
    Side("this server", "", price_server),
    Side("before", "", price_server),  # an earlier checkout
    Side("floor", "", None),  # bench_floor.c
    Side("websocket-server", "websocket-server", websocket_server, in_flight=4),  # its backlog is 5
    Side("websockets", "websockets", websockets),
    Side("picows", "picows", picows),
    Side("ws", "ws", None),
)
THIS, BEFORE, FLOOR = (side.name for side in SIDES[:3])


def installed(side: Side) -> str | None:
    """The version of the side's package ("" when it needs none); None when it is missing."""
    if not side.package:
        return ""
    if side.serve is not None:
        try:
            return importlib.metadata.version(side.package)
        except importlib.metadata.PackageNotFoundError:
            return None
    command = ["node", "-p", f"require('{side.package}/package.json').version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def serve(name: str, directory: str, messages: str) -> None:
    """One side's process."""
    sys.path.insert(0, directory)
    (side,) = (side for side in SIDES if side.name == name)
    assert side.serve
    started = side.serve(json.loads(messages))
    if started is not None:
        asyncio.run(started)


def raise_file_limit() -> int:
    """As far as allowed; how many files may be open then."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


if __name__ == "__main__":
    raise_file_limit()
    serve(*sys.argv[1:])
