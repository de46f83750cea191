"""Measure what one poll costs with N clients: this server, what people would use instead, and the floor.

    python tests/bench_fanout.py [--clients 100,1000,8000] [--rounds 15] [--sides this,picows] [--quick]

Each side is a server process of its own and has a reader process of its own, which opens the N
connections and does nothing but read. A round is one poll: the side sends the same ten messages
to every client, message by message, as its own documentation shows. Its time runs from just
before the first send until the last client has its last byte; all processes stamp with
CLOCK_MONOTONIC, which is one for the machine. All sides stay connected and take turns, so that
noise hits all alike. No side compresses or pings; the messages are made beforehand (this server
makes its own, timed). In a first round, not timed, every client's bytes must be the expected ones.

The table has the median and the worst round, the median as a multiple of this server's and of
the floor's, and what N clients add to the server process: memory (RSS after garbage collection,
connected and after one round) and threads. A side that cannot hold N clients says why; one whose
package is missing is left out and named. The exit status is 1 when any byte was missing or too
many. The last sections run the real `tracker.py`. Needs Linux or macOS, psutil, and for `ws`
Node with `npm install --prefix .venv ws`.
"""

import argparse
import asyncio
import gc
import importlib.metadata
import json
import math
import os
import platform
import queue
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {"NODE_PATH": str(ROOT / ".venv" / "node_modules")} | os.environ
HOST = "127.0.0.1"
KEY, ACCEPT = b"dGhlIHNhbXBsZSBub25jZQ==", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3
TIME = "2021-10-20T21:34:13.0000000Z"  # the stand-in's, so that a tracker sends the same bytes
PING, PONG = b"\x89\x00", b"\x8a\x80\x00\x00\x00\x00"  # as the tracker sends it; the masked answer
IN_FLIGHT = 32  # connections being opened at a time
CHUNKS = 4  # parts in which the clients are connected, the sides taking turns
CONNECT_TIMEOUT = 30.0  # seconds for one part
ROUND_TIMEOUT = 20.0  # seconds
BUDGET = 70.0  # seconds of rounds for one N; behind it those missing of --rounds are left out
SETTLE = 0.2  # seconds from the last arrival until clients count as idle
PAUSE = 0.02  # seconds between two turns, for what is still on its way, like acknowledgements


# The sides: each runs in a server process, `obey` has them send and tell


def this_server(messages: list[str]) -> None:
    import price_server
    from coin_api import PriceUpdate

    price_server.PING_INTERVAL = math.inf  # as for the other sides; the tracker below keeps its pings
    price_server.BEHIND_TIMEOUT = math.inf  # stalled clients stay for as long as they are measured
    updates = [PriceUpdate(**json.loads(message)) for message in messages]
    server = price_server.PriceServer([update.asset_id for update in updates], max_clients=1_000_000)
    server.run_forever(threaded=True)

    async def send() -> None:
        server.publish(updates)

    def behind() -> int:
        return sum(bool(client["handler"].kept or client["handler"].owed) for client in server.clients)

    asyncio.run(obey(server.port, send, lambda: len(server.clients), behind))


def floor(messages: list[str]) -> None:
    """Nothing but the loop of `send` that no server can do without."""
    sockets = []
    listener = socket.create_server((HOST, 0), backlog=1024)
    frames = b"".join(bytes([0x81, len(message)]) + message.encode() for message in messages)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.recv(4096)
            sock.send(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\n"
            )
            sockets.append(sock)

    async def send() -> None:
        for sock in sockets:
            sock.send(frames)

    threading.Thread(target=accept, daemon=True).start()
    asyncio.run(obey(listener.getsockname()[1], send, lambda: len(sockets)))


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


async def aiohttp(messages: list[str]) -> None:
    from aiohttp import web

    clients = set()

    async def handle(request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse(compress=False)
        await connection.prepare(request)
        clients.add(connection)
        async for _ in connection:
            pass
        return connection

    async def send() -> None:  # asyncio.gather for each message takes 1.6 times as long
        for message in messages:
            for connection in clients:
                await connection.send_str(message)

    app = web.Application()
    app.router.add_get("/ws", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    await obey(runner.addresses[0][1], send, lambda: len(clients))


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
    serve: Callable[[list[str]], Any] | None  # None for Node's
    in_flight: int = IN_FLIGHT


SIDES = (
    Side("this server", "", this_server),
    Side("floor", "", floor),
    Side("websocket-server", "websocket-server", websocket_server, in_flight=4),  # its backlog is 5
    Side("websockets", "websockets", websockets),
    Side("aiohttp", "aiohttp", aiohttp),
    Side("picows", "picows", picows),
    Side("ws", "ws", None),
)
THIS, FLOOR = SIDES[0].name, SIDES[1].name


# The reader process


class Client:
    __slots__ = ("missing", "seen", "sock")

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.missing = 0  # bytes, in this round
        self.seen = b""  # what came, in a round that checks it


class Reader:
    """Opens connections and reads them, all in one thread; does what it is told on stdin."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.clients: list[Client] = []
        self.stalled: list[socket.socket] = []  # never read
        self.buffer = bytearray(1 << 16)

    def run(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = getattr(self, command.pop("do"))(**command)
            except (OSError, ValueError) as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)

    def connect(self, port: int, clients: int, in_flight: int, stall: bool) -> dict[str, float]:
        """Open this many connections, `in_flight` at a time."""
        opening: deque[socket.socket] = deque()
        start = time.monotonic()
        for number in range(clients + in_flight):
            if number >= in_flight and opening:
                self.finish(opening.popleft(), stall)
            if number < clients:
                opening.append(self.begin(port, stall))
            if time.monotonic() > start + CONNECT_TIMEOUT:
                raise TimeoutError(f"{number} of {clients} connections in {CONNECT_TIMEOUT:g} s")
        return {"seconds": time.monotonic() - start}

    def begin(self, port: int, stall: bool) -> socket.socket:
        sock = socket.socket()
        sock.settimeout(CONNECT_TIMEOUT)
        if stall:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((HOST, port))
        sock.send(
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        return sock

    def finish(self, sock: socket.socket, stall: bool) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(4096)
            if not data:
                raise ConnectionError(f"client {len(self.clients) + 1} was hung up on in its handshake")
            head += data
        if ACCEPT not in head:
            raise ConnectionError(f"no handshake: {head[:60]!r}")
        sock.setblocking(False)
        if stall:
            self.stalled.append(sock)
        else:
            self.clients.append(Client(sock))
            self.selector.register(sock, selectors.EVENT_READ, self.clients[-1])

    def round(self, poll: int, expected: str) -> dict[str, float]:
        """Read until every client got `poll` bytes more: when 99 % of them had, and when the last had."""
        for client in self.clients:
            client.missing = poll
        print("{}", flush=True)  # ready
        done: list[float] = []
        deadline = time.monotonic() + ROUND_TIMEOUT
        while len(done) < len(self.clients):
            ready = self.selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"{len(self.clients) - len(done)} clients lack bytes after {ROUND_TIMEOUT:g} s")
            for key, _ in ready:
                client = key.data
                client.missing -= self.read(client, bool(expected))
                if client.missing == 0:
                    done.append(time.monotonic())
                elif client.missing < 0:
                    raise ValueError(f"a client got {-client.missing} bytes too many")
        for client in self.clients:
            if client.seen != expected.encode("latin-1"):
                raise ValueError(f"a client got other bytes: {client.seen[:80]!r}")
            client.seen = b""
        return {"p99": done[math.ceil(len(done) * 0.99) - 1], "last": done[-1]}

    def drain(self, quiet: float, seconds: float) -> dict[str, float]:
        """Read on until nothing came for `quiet` seconds, or for `seconds` in all."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready = self.selector.select(min(quiet, left))
            if not ready and quiet < left:
                break
            for key, _ in ready:
                self.read(key.data)
        return {}

    def read(self, client: Client, keep: bool = False) -> int:
        """How many bytes of messages came. Pings are answered; their bytes stand in no price."""
        size = client.sock.recv_into(self.buffer)
        if not size:
            raise ConnectionError("a client was hung up on")
        if keep:
            client.seen += self.buffer[:size]
        if (size == 2 or size > client.missing) and PING in self.buffer[:size]:
            client.sock.send(PONG)
            client.seen = client.seen.replace(PING, b"")
            size -= len(PING)
        return size


# The benchmark's own process


class Trouble(Exception):
    """A child failed; the text says how."""


class Child:
    """A process that answers each line on its stdin with a line of JSON."""

    def __init__(self, stack: ExitStack, *command: str):
        self.errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
        self.process = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=ENVIRONMENT
            )
        )
        stack.callback(self.process.kill)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, line: str, seconds: float = ROUND_TIMEOUT + 10) -> dict[str, Any]:
        assert self.process.stdin
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: `hear` says so
        return self.hear(seconds)

    def hear(self, seconds: float = ROUND_TIMEOUT + 10) -> dict[str, Any]:
        try:
            answer = json.loads(self.lines.get(timeout=seconds) or '{"error": "it ended"}')
        except queue.Empty:
            answer = {"error": f"no answer within {seconds:g} s"}
        if "error" in answer:
            raise Trouble(answer["error"])
        return dict(answer)

    def last_error(self) -> str:
        """The last line that it wrote on stderr."""
        self.errors.seek(0)
        return next((line for line in reversed(self.errors.read().splitlines()) if line.strip("- ")), "")


class Crowd(Child):
    """The reader process with the clients of one server."""

    def __init__(self, stack: ExitStack, in_flight: int, port: int = 0):
        super().__init__(stack, sys.executable, __file__, "--read")
        self.in_flight = in_flight
        self.port = port

    def tell(self, do: str, within: float, **options: object) -> dict[str, Any]:
        return self.ask(json.dumps({"do": do} | options), within)

    def connect(self, clients: int, stall: bool = False) -> float:
        """Seconds it took."""
        options = {"port": self.port, "clients": clients, "in_flight": self.in_flight, "stall": stall}
        return float(self.tell("connect", CONNECT_TIMEOUT * 2 + 10, **options)["seconds"])

    def drain(self, quiet: float = 0.2, seconds: float = 10.0) -> None:
        self.tell("drain", seconds + 10, quiet=quiet, seconds=seconds)

    def expect(self, messages: Sequence[str], check: bool = False) -> None:
        """Back as soon as the reader waits for a round, which `hear` then tells; check: byte by byte."""
        frames = "".join(f"\x81{chr(len(message))}{message}" for message in messages)
        self.tell("round", ROUND_TIMEOUT, poll=len(frames), expected=frames if check else "")


class Contender:
    """One side, its server starting, and what was measured of it so far."""

    def __init__(self, stack: ExitStack, side: Side, messages: Sequence[str]):
        node = ("node", "--expose-gc", "-e", WS)
        command = node if side.serve is None else (sys.executable, __file__, "--serve", side.name)
        self.name = side.name
        self.messages = messages
        self.server = Child(stack, *command, json.dumps(messages))
        self.crowd = Crowd(stack, side.in_flight)
        self.memory = 0.0  # bytes per client
        self.threads = 0  # more than without clients
        self.connecting = 0.0  # seconds
        self.times: list[float] = []  # seconds from the start of a round until the last client had its last byte
        self.p99: list[float] = []  # seconds until 99 % of the clients had theirs
        self.reason = ""  # why it is out of the race
        self.failed = False  # it is out because it lost bytes

    def start(self) -> None:
        """Wait until the server serves."""
        self.crowd.port = self.server.hear()["port"]
        self.before = self.usage()

    def usage(self) -> tuple[int, int]:
        """Bytes of memory, threads."""
        self.server.ask("collect")
        import psutil

        process = psutil.Process(self.server.process.pid)
        return process.memory_info().rss, process.num_threads()

    def connect(self, clients: int) -> None:
        self.connecting += self.crowd.connect(clients)

    def weigh(self, clients: int) -> None:
        """Note what the clients cost, once the server has all of them and they have had a poll."""
        deadline = time.monotonic() + 10
        while (known := self.server.ask("collect")["clients"]) != clients:
            if time.monotonic() > deadline:
                raise Trouble(f"knows {known:,} of {clients:,} clients")
            time.sleep(0.05)
        self.round(check=True)
        time.sleep(SETTLE)
        after = self.usage()
        self.memory = (after[0] - self.before[0]) / clients
        self.threads = after[1] - self.before[1]

    def round(self, check: bool = False) -> None:
        self.crowd.expect(self.messages, check)
        start = self.server.ask("send")["start"]
        end = self.crowd.hear()
        if not check:
            self.times.append(end["last"] - start)
            self.p99.append(end["p99"] - start)
        time.sleep(PAUSE)


def fan_out(sides: Sequence[Side], messages: Sequence[str], clients: int, rounds: int) -> list[Contender]:
    """All sides with this many clients, taking turns."""
    with ExitStack() as stack:
        contenders = [Contender(stack, side, messages) for side in sides]
        racing = list(contenders)

        def each(step: Callable[[Contender], None], must: bool = True) -> None:
            """Everyone's next turn; who fails is out. must: it has failed the benchmark too."""
            racing[:] = racing[1:] + racing[:1]  # nobody is always behind the same neighbour
            for contender in list(racing):
                try:
                    step(contender)
                except Trouble as trouble:
                    contender.reason = f"{trouble}; {contender.server.last_error()}".rstrip("; ")
                    contender.failed = must or contender.name == THIS
                    contender.server.process.kill()
                    contender.crowd.process.kill()
                    racing.remove(contender)

        each(Contender.start)
        for chunk in range(CHUNKS):
            share = clients * (chunk + 1) // CHUNKS - clients * chunk // CHUNKS
            each(lambda contender, share=share: contender.connect(share), must=False)  # type: ignore[misc]
        each(lambda contender: contender.weigh(clients))
        deadline = time.monotonic() + BUDGET
        for number in range(rounds):
            if racing and (number < 3 or time.monotonic() < deadline):
                each(Contender.round)
        return contenders


# What comes out


def print_table(title: str, head: Sequence[str], *rows: Sequence[str], notes: Sequence[str] = ()) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    print(f"### {title}\n")
    for row in (head, ["-" * width for width in widths], *rows):
        print("|", " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), "|")
    print("".join(f"\n{note}\n" for note in notes), flush=True)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def compare(contenders: Sequence[Contender], versions: dict[str, str], clients: int, messages: int) -> None:
    """The table of one N."""
    rows = []
    medians = {each.name: statistics.median(each.times) for each in contenders if not each.reason}
    for each in contenders:
        name = f"{each.name} {versions[each.name]}".rstrip()
        if each.reason:
            rows.append([name, "FAILED" if each.failed else "cannot", *[""] * 7])
            continue
        median = medians[each.name]
        row = [name, milliseconds(median), milliseconds(max(each.times))]
        row += [f"{median / medians[base]:.2f}" if base in medians else "" for base in (THIS, FLOOR)]
        row += [f"{clients * messages / median:,.0f}", f"{each.memory / 1024:.2f}", f"{each.threads:+,d}"]
        rows.append([*row, f"{clients / each.connecting:,.0f}"])
    rounds = max(len(each.times) for each in contenders)
    head = ["side", "median ms", "worst ms", "x this", "x floor", "messages/s", "KiB/client", "threads", "accepted/s"]
    notes = [f"{each.name}: {each.reason}." for each in contenders if each.reason]
    print_table(f"{clients:,} clients, {rounds} rounds", head, *rows, notes=notes)


def show_growth(measured: Sequence[tuple[int, Contender]]) -> None:
    rows = []
    for clients, this in measured:
        median = statistics.median(this.times)
        row = [f"{clients:,}", milliseconds(median), f"{median / clients * 1e6:.1f}"]
        rows.append([*row, f"{this.memory / 1024:.2f}", f"{this.threads:+d}"])
    head = ["clients", "median ms", "microseconds per client", "KiB per client", "threads added"]
    print_table("This server: how it grows", head, *rows)


def show_stalled(messages: Sequence[str], clients: int, rounds: int) -> None:
    """Two of this server take turns, with as many clients that read; one has others that never do."""
    stalled = clients // 10
    with ExitStack() as stack:
        calm, hindered = (Contender(stack, SIDES[0], messages) for _ in range(2))
        calm.start()
        hindered.start()
        hindered.crowd.connect(stalled, stall=True)
        for _ in range(1_000):  # until all is full that the kernel keeps for them
            hindered.server.ask("send")
            if hindered.server.ask("collect")["behind"] == stalled:
                break
        calm.server.ask("send")
        for contender in (calm, hindered):
            contender.crowd.connect(clients - stalled)
            contender.crowd.drain()
            contender.round(check=True)
        for _ in range(rounds):
            calm.round()
            hindered.round()
        behind = int(hindered.server.ask("collect")["behind"])
    before, after = statistics.median(calm.p99), statistics.median(hindered.p99)
    print_table(
        "This server: one client in ten never reads",
        ["clients that read", "stalled ones", "99th percentile ms", "change"],
        [f"{clients - stalled:,}", "0", milliseconds(before), ""],
        [f"{clients - stalled:,}", f"{behind:,}", milliseconds(after), f"{after / before - 1:+.1%}"],
    )


def start_tracker(stack: ExitStack, interval: str) -> tuple[Any, Any, Crowd]:
    """A CoinAPI stand-in, a real tracker that polls it, and its clients-to-be."""
    from running import Tracker
    from stand_in import KEY, StandIn

    coin_api = stack.enter_context(StandIn())
    tracker = stack.enter_context(Tracker("--interval", interval, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url))
    return coin_api, tracker, Crowd(stack, IN_FLIGHT, tracker.port)


def show_tracker(messages: Sequence[str], clients: int, polls: int, seconds: float) -> None:
    with ExitStack() as stack:
        coin_api, _, crowd = start_tracker(stack, "0.5")
        crowd.connect(clients)
        crowd.drain()
        times = []
        for number in range(1 + polls):
            crowd.expect(messages, check=number == 0)
            times.append(crowd.hear()["last"] - coin_api.answered_at)
    with ExitStack() as stack:
        (_, empty, _), (_, full, crowd) = (start_tracker(stack, "5") for _ in range(2))
        crowd.connect(clients)
        crowd.drain()
        before, start = [tracker.usage()[3] for tracker in (empty, full)], time.monotonic()
        crowd.drain(quiet=math.inf, seconds=seconds)
        passed = time.monotonic() - start
        used = [tracker.usage()[3] - cpu for tracker, cpu in zip((empty, full), before, strict=True)]
    median, worst = statistics.median(times[1:]), max(times[1:])
    print_table(
        f"`tracker.py` and {clients:,} clients",
        ["what", "measured"],
        ["CoinAPI's last byte until the last client's, median ms", milliseconds(median)],
        [f"the worst of {polls} polls, ms", milliseconds(worst)],
        ["CPU at an interval of 5 s", f"{used[1] / passed:.2%} of a core"],
        ["the same without clients", f"{used[0] / passed:.2%} of a core"],
    )


def installed(side: Side) -> str | None:
    """The version of the side's package ("" when it needs none); None when it is missing."""
    if side.serve is not None:
        try:
            return importlib.metadata.version(side.package) if side.package else ""
        except importlib.metadata.PackageNotFoundError:
            return None
    command = ["node", "-p", f"require('{side.package}/package.json').version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: Sequence[str] | None = None) -> int:
    from running import ASSETS
    from stand_in import RATES

    from coin_api import PriceUpdate

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", default="100,1000,8000", metavar="N,N", help="default: 100,1000,8000")
    parser.add_argument("--rounds", type=int, default=15, help="timed polls for each number of clients (default: 15)")
    parser.add_argument("--sides", default="", metavar="this,floor", help="first letters of the sides (default: all)")
    parser.add_argument("--quick", action="store_true", help="measure the tracker for a moment only")
    options = parser.parse_args(argv)
    numbers = [int(number) for number in options.clients.split(",")]
    messages = [PriceUpdate(asset, float(RATES[asset]), TIME).to_json() for asset in ASSETS]

    print(
        f"One poll: {len(messages)} messages, {sum(map(len, messages))} bytes, to each client. "
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}."
    )
    versions = {}
    sides = [side for side in SIDES if side.name.startswith(tuple(options.sides.split(",")))]
    for side in list(sides):
        version = installed(side)
        if version is None:
            sides.remove(side)
            print(f"Left out: {side.name}, which is not installed.")
        versions[side.name] = version or ""
    print()

    failed = False
    this: list[tuple[int, Contender]] = []
    try:
        for clients in numbers:
            contenders = fan_out(sides, messages, clients, options.rounds)
            compare(contenders, versions, clients, len(messages))
            failed |= any(each.failed for each in contenders)
            this += [(clients, each) for each in contenders if each.name == THIS and not each.reason]
        if this:
            show_growth(this)
        show_stalled(messages, max(numbers), options.rounds)
        show_tracker(messages, min(max(numbers), 1_000), 3 if options.quick else 20, 1.0 if options.quick else 20.0)
    except Trouble as trouble:
        print(f"FAILED: {trouble}")
        failed = True
    print("FAILED: not every client got every byte." if failed else "Every client got every byte.")
    return int(failed)


def serve(name: str, messages: str) -> None:
    """A side's server process."""
    (side,) = (side for side in SIDES if side.name == name)
    assert side.serve
    started = side.serve(json.loads(messages))
    if started is not None:
        asyncio.run(started)


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1:2] == ["--read"]:
        Reader().run()
    elif sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        sys.exit(main())
