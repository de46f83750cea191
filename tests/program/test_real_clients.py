"""Clients of other makers: each takes prices until the last, has a ping of its own answered, and closes."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest
from rigged import Clock, pass_time
from running import ASSETS, ROOT, outside, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer
from price_server.hub import HEARTBEAT_INTERVAL

NODE_MODULES = ROOT / ".venv" / "node_modules"
LAST = 60.0
PAYLOAD = b"\x00\xff\xfe\xfd"


class Visit(NamedTuple):
    messages: int
    ponged: bool  # its own ping came back
    code: int  # of the close, as this client sees it


def visit_websockets(url: str) -> Visit:
    from websockets.sync.client import connect

    with connect(url, proxy=None) as client:
        pong = client.ping(PAYLOAD)
        messages = 1
        while json.loads(client.recv(30)) != {"asset_id": "SOL", "price": LAST, "time": "now"}:
            messages += 1
        client.close()
        return Visit(messages, pong.wait(5), client.close_code or 0)


def visit_websocket_client(url: str) -> Visit:
    import websocket

    client = websocket.create_connection(url, timeout=30)
    client.ping(PAYLOAD)
    messages, ponged = 0, False
    while True:
        opcode, frame = client.recv_data_frame(control_frame=True)  # answers pings
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            client.shutdown()
            return Visit(messages, ponged, int.from_bytes(frame.data[:2], "big"))
        if opcode == websocket.ABNF.OPCODE_PONG:
            ponged = frame.data == PAYLOAD
        elif opcode == websocket.ABNF.OPCODE_TEXT:
            messages += 1
            if json.loads(frame.data) == {"asset_id": "SOL", "price": LAST, "time": "now"}:
                client.send_close()


def visit_picows(url: str) -> Visit:
    from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

    class Listener(WSListener):
        messages, ponged, code = 0, False, 0

        def on_ws_connected(self, transport: WSTransport) -> None:
            transport.send_ping(PAYLOAD)

        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.PONG:
                self.ponged = frame.get_payload_as_bytes() == PAYLOAD
            elif frame.msg_type == WSMsgType.CLOSE:
                self.code = frame.get_close_code().value
                transport.disconnect()
            elif frame.msg_type == WSMsgType.TEXT:
                self.messages += 1
                if json.loads(frame.get_payload_as_bytes()) == {"asset_id": "SOL", "price": LAST, "time": "now"}:
                    transport.send_close(WSCloseCode.OK)

    async def visit() -> Visit:
        transport, listener = await ws_connect(Listener, url)
        await transport.wait_disconnected()
        assert isinstance(listener, Listener)
        return Visit(listener.messages, listener.ponged, listener.code)

    return asyncio.run(visit())


NODE_SCRIPT = """
const WebSocket = require("ws");
const client = new WebSocket(process.argv[1]);
let messages = 0, ponged = false;
client.on("open", () => client.ping(Buffer.from([0, 255, 254, 253])));
client.on("pong", (data) => { ponged = data.equals(Buffer.from([0, 255, 254, 253])); });
client.on("message", (data) => {
  messages += 1;
  const update = JSON.parse(data);
  if (update.asset_id === "SOL" && update.price === 60) client.close(1000);
});
client.on("close", (code) => console.log(JSON.stringify([messages, ponged, code])));
"""


def visit_node(url: str) -> Visit:
    environment = os.environ | {"NODE_PATH": str(NODE_MODULES)}
    command = ["node", "-e", NODE_SCRIPT, url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    return Visit(*json.loads(done.stdout))


VISITS: dict[str, Callable[[str], Visit]] = {
    "websockets": visit_websockets,
    "websocket-client": visit_websocket_client,
    "picows": visit_picows,
    "node": visit_node,
}


def installed(name: str) -> bool:
    return name != "node" or (shutil.which("node") is not None and (NODE_MODULES / "ws").is_dir())


@pytest.fixture(scope="module")
def visits() -> dict[str, Future[Visit]]:
    """All clients at once at one server, through 60 pings that each of them has to answer."""

    def all_answered() -> bool:
        return not any(client["handler"].connection.unanswered for client in server.clients)

    server = PriceServer(ASSETS, clock=Clock())  # which pings when the test lets time pass, however slow the machine is
    server.run_forever(threaded=True)
    url = f"ws://127.0.0.1:{server.port}/ws"
    with ThreadPoolExecutor(len(VISITS)) as pool:
        running = {name: pool.submit(visit, url) for name, visit in VISITS.items() if installed(name)}
        wait_for(lambda: len(server.clients) + sum(each.done() for each in running.values()) == len(running), 60)
        for number in range(1, 61):
            pass_time(server, HEARTBEAT_INTERVAL)
            wait_for(all_answered, what="all pongs")
            server.publish([PriceUpdate(asset, float(number), "now") for asset in ASSETS])
    server.shutdown_gracefully()
    return running


@pytest.mark.parametrize("name", VISITS)
def test_a_real_client_stays_through_sixty_pings_and_closes_with_1000(
    name: str, visits: dict[str, Future[Visit]]
) -> None:
    if name == "node" and shutil.which("node"):
        outside(*([] if installed(name) else ["the package ws of node"]))
    outside(*(["node"] if name == "node" else []))
    assert visits[name].result(60) == Visit(messages=600, ponged=True, code=1000)
