"""Send every price at once to every WebSocket client, and answer the HTTP requests beside it.

Threads, one per job and never one per client:

  server     accepts connections; upgrades at once what came whole (`_upgrade_at_once`); twice a
             second does the housekeeping (`_keep_house`)
  handshake  one per other arriving connection: reads one HTTP request and answers it, or upgrades
             it, hands the socket to the reader and ends; housekeeping cuts it off when it is late
  reader     one selector loop over all open clients: their pings, closes and messages, and what
             a full socket did not take at first. Only this thread takes a client out
  caller's   whoever calls `publish` writes to every client itself, one non-blocking send each

All but the caller's stop in `shutdown_gracefully` and `shutdown_abruptly`. They are daemons, so
that a program which forgets to call one of these still ends.
"""

import base64
import errno
import hashlib
import io
import json
import logging
import math
import re
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from http.client import HTTPMessage, LineTooLong
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from websocket_server import WebsocketServer
from websocket_server.websocket_server import (
    OPCODE_BINARY,
    OPCODE_CLOSE_CONN,
    OPCODE_CONTINUATION,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    WebSocketHandler,
)

HANDSHAKE_TIMEOUT = 10.0  # seconds for the whole request, dribbled or not
TAKE_TIMEOUT = 30.0  # seconds for the client to take an HTTP answer
MAX_HANDSHAKES = 1_000  # under way; beyond it the oldest is cut off: some limits stop at 1,000 threads
MAX_REQUEST = 32 << 10  # bytes of request line and headers
MAX_MESSAGE = 64 << 10  # bytes of one message from a client, fragments summed
MAX_QUEUE = 1 << 20  # bytes of send_message waiting for one client
SEND_BUFFER = 32 << 10  # bytes; the default lets a client that stopped reading absorb hours of old prices
RECEIVE_SIZE = 4 << 10  # bytes per client and turn: small, so that a flood from one leaves turns to the others
HOUSEKEEPING_INTERVAL = 0.5  # seconds: how late a deadline may be noticed
BEHIND_TIMEOUT = 30.0  # seconds with a full socket
CLOSE_TIMEOUT = 5.0  # seconds from our close frame until the client hangs up
STOP_TIMEOUT = 1.0  # seconds that a stop waits for the clients' closes
PING_INTERVAL = 20.0  # seconds; under the 60 s after which proxies drop a silent connection
MAX_UNANSWERED = 3  # pings, so 60 s; counted, not timed: a machine that slept finds its clients again
HISTORY = 3600.0  # seconds
HISTORY_SPACING = 4.0  # seconds; under the default interval of 5 s, and a bound for shorter ones
STALE_AFTER = 60.0  # seconds: CoinAPI's own times lag by about 30 s
LINGER_TIMEOUT = 2.0  # seconds from an HTTP answer until the client hangs up
DASHBOARD = Path(__file__).with_name("dashboard.html")
METRICS = (  # name without "tracker_", type, help
    ("clients", "gauge", "Open WebSocket clients."),
    ("clients_dropped_total", "counter", "Clients that the server hung up on, by reason."),
    ("messages_sent_total", "counter", "Messages handed to the network."),
    ("polls_total", "counter", "Polls of the price source, by result."),
    ("last_success_timestamp_seconds", "gauge", "When a poll last succeeded; 0 for never."),
    ("price", "gauge", "Last price of one asset, in the quote currency."),
    ("credits_used", "gauge", "Credits used, as CoinAPI last said."),
    ("credits_left", "gauge", "Credits left, as CoinAPI last said; below 0 when more are billed."),
)
COUNTERS = (
    "messages_sent_total",
    *(f'polls_total{{result="{result}"}}' for result in ("success", "failure")),
    *(
        f'clients_dropped_total{{reason="{reason}"}}'
        for reason in ("behind", "no_pong", "no_close", "queue_full", "disconnected")
    ),
)

logger = logging.getLogger(__name__)


class Update(Protocol):
    """What `publish` takes; `coin_api.PriceUpdate` is one."""

    @property
    def asset_id(self) -> str: ...
    @property
    def price(self) -> float: ...
    def to_json(self) -> str: ...


class Latest(NamedTuple):
    """The last known update of each asset, in the order tracked; replaced whole, never changed."""

    version: int
    updates: dict[str, Update]
    frames: dict[str, bytes]


class Refusal(Exception):
    """An HTTP error answer: status, text, and what headers it needs."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Denied(Exception):
    """deny_new_connections is in force; `payload` is that of the close frame for the client."""

    def __init__(self, payload: bytes):
        super().__init__()
        self.payload = payload


class ProtocolError(Exception):
    """A client broke RFC 6455; `code` is the close code that says how."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """One whole, unmasked frame, as a server sends it (RFC 6455, 5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def decode_frame(buffer: bytearray, room: int) -> tuple[bool, int, bytes] | None:
    """Take the first frame off `buffer`: (fin, opcode, payload), or None while it is not whole.

    room: bytes that a data frame may have. Raises ProtocolError as soon as the header tells.
    """
    if len(buffer) < 2:
        return None
    fin, opcode, masked, size = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x80, buffer[1] & 0x7F
    if buffer[0] & 0x70:
        raise ProtocolError(1002, "reserved bit set")
    if opcode not in (0, 1, 2, 8, 9, 10):
        raise ProtocolError(1002, f"unknown opcode {opcode}")
    if not masked:
        raise ProtocolError(1002, "frame is not masked")
    if opcode >= 8 and (size > 125 or not fin):
        raise ProtocolError(1002, "control frame is fragmented or over 125 bytes")
    start = 2
    if size >= 126:
        start, smallest, layout = (4, 126, "!H") if size == 126 else (10, 1 << 16, "!Q")
        if len(buffer) < start:
            return None
        (size,) = struct.unpack_from(layout, buffer, 2)
        if size < smallest or size >> 63:
            raise ProtocolError(1002, "frame length is not minimal")
    if opcode < 8 and size > room:
        raise ProtocolError(1009, f"message is over {MAX_MESSAGE} bytes")
    end = start + 4 + size
    if len(buffer) < end:
        return None
    # One XOR of two long integers: a loop over the bytes takes milliseconds.
    mask = bytes(buffer[start : start + 4]) * (size // 4 + 1)
    payload = int.from_bytes(buffer[start + 4 : end], "big") ^ int.from_bytes(mask[:size], "big")
    del buffer[:end]
    return fin, opcode, payload.to_bytes(size, "big")


def decode_text(payload: bytes) -> str:
    """The text of a message or close reason; ProtocolError 1007 if it is not UTF-8."""
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(1007, "text is not UTF-8") from None


def checked_close(payload: bytes) -> bytes:
    """A close frame's payload, checked, cut to the code: what the echo of it carries."""
    if not payload:
        return b""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not ((1000 <= code <= 1014 and code not in (1004, 1005, 1006)) or 3000 <= code <= 4999):
        raise ProtocolError(1002, "close frame without a code that may be sent")
    decode_text(payload[2:])
    return payload[:2]


def encode_close(status: int, reason: bytes | str = b"") -> bytes:
    """The payload of a close frame: the status and at most 123 bytes of UTF-8."""
    payload = struct.pack("!H", status) + (reason.encode() if isinstance(reason, str) else reason)
    if len(payload) > 125:
        raise ValueError(f"close reason of {len(payload) - 2} bytes: 123 are the most")
    return payload


class Connection:
    """One open client, from the moment of its upgrade: what it follows, and what it has yet to get.

    It is the 'handler' of the client dict that callbacks get. `lock` guards every field from
    `kept` on and every write to the socket; it is held only around calls that do not block. The
    reader owns `inbox`, `fragments` and `watched`.
    """

    # fmt: off
    __slots__ = ("assets", "closing", "deadline", "fragments", "inbox", "kept", "lock", "owed",
                 "server", "socket", "unanswered", "version", "watched")
    # fmt: on

    def __init__(self, server: "PriceServer", sock: socket.socket, assets: tuple[str, ...], answer: bytes):
        self.server = server
        self.socket = sock
        self.assets = assets  # what it follows, in the order tracked
        self.inbox = bytearray()  # received and not yet parsed
        self.fragments: tuple[int, bytearray] | None = None  # opcode and payload so far of a message not whole yet
        self.unanswered = 0  # pings since the last pong
        self.watched = 0  # selector events, the reader's own note
        self.lock = threading.Lock()
        self.kept = bytearray(answer)  # bytes that must go out before any other: never tear a frame
        self.owed = assets  # assets whose current price has to follow the kept bytes
        self.version = 0  # of the last publish it got, or will get through `owed`
        self.closing = False  # a close frame is sent or kept: nothing may follow it
        self.deadline = 0.0  # monotonic seconds when housekeeping drops it; 0 for none

    def send_message(self, message: str | bytes) -> None:
        """Queue a text (str) or binary (bytes) message behind what is queued already; never blocks."""
        if isinstance(message, str):
            self.send_frame(OPCODE_TEXT, message.encode())
        else:
            self.send_frame(OPCODE_BINARY, message)

    def send_frame(self, opcode: int, payload: bytes) -> None:
        """Queue one frame and send what the socket takes; a client with over 1 MiB queued is dropped."""
        with self.lock:
            if self.closing:
                return
            self.kept += encode_frame(opcode, payload)
            self.server.count("messages_sent_total", opcode < 8)
            self.flush()
            if len(self.kept) > MAX_QUEUE:
                self.drop("queue_full")

    def send_close(self, status: int = 1000, reason: bytes | str = b"") -> None:
        """Queue a close frame and hang up behind it; ValueError for a reason over 123 bytes of UTF-8."""
        self.close(encode_close(status, reason))

    def close(self, payload: bytes) -> None:
        """Queue a close frame with this payload; the reader waits up to 5 s for the client to hang up."""
        with self.lock:
            if self.closing:
                return
            self.kept += encode_frame(OPCODE_CLOSE_CONN, payload)
            self.owed = ()
            self.closing = True
            self.deadline = time.monotonic() + CLOSE_TIMEOUT
            self.flush()

    def drop(self, reason: str) -> None:
        """Hang up without a close frame. Needs the lock. The reader wakes and takes the client out."""
        if self.closing and not self.deadline:
            return  # dropped already
        self.closing = True
        self.deadline = 0.0
        self.kept.clear()
        self.owed = ()
        self.server.count(f'clients_dropped_total{{reason="{reason}"}}')
        logger.debug("client dropped: %s", reason)
        _hang_up(self.socket)

    def deliver(self, latest: Latest, assets: tuple[str, ...], buffer: bytes) -> int:
        """Send a poll's frames of `assets`, or owe them. Needs the lock. Returns how many went out."""
        if self.closing or self.version >= latest.version or not assets:
            return 0
        if self.kept or self.owed:
            self.owed = self.assets
            return 0
        self.version = latest.version
        sent = self._write(buffer)
        if sent == len(buffer):
            return len(assets)
        begun = self._keep_rest(assets, latest, sent)
        self._settle()
        return begun

    def flush(self) -> None:
        """Send what is kept, then the current price of each asset owed. Needs the lock."""
        if self.kept:
            del self.kept[: self._write(self.kept)]
        if self.owed and not self.kept:
            latest = self.server.latest
            if self.owed is self.assets:
                self.version = latest.version
            assets = tuple(asset for asset in self.owed if asset in latest.frames)
            self.owed = ()
            sent = self._write(b"".join([latest.frames[asset] for asset in assets]))
            self.server.count("messages_sent_total", self._keep_rest(assets, latest, sent))
        self._settle()

    def _keep_rest(self, assets: tuple[str, ...], latest: Latest, sent: int) -> int:
        """The kernel took `sent` bytes: the rest of a torn frame must go first, later assets are owed.

        Returns how many frames are begun: only the end of the client can stop those.
        """
        for index, asset in enumerate(assets):
            frame = latest.frames[asset]
            if sent < len(frame):
                begun = index + (sent > 0)
                self.kept += frame[sent:] if sent else b""
                self.owed = assets[begun:]
                return begun
            sent -= len(frame)
        return len(assets)

    def _write(self, data: bytes | bytearray) -> int:
        """How many bytes the socket took. A dead one takes all: the reader meets the same error."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _settle(self) -> None:
        """After a write: have the reader wait for room, or no longer; hang up behind a close frame."""
        behind = bool(self.kept or self.owed)
        if not self.closing:
            if behind != bool(self.deadline):
                self.deadline = time.monotonic() + BEHIND_TIMEOUT if behind else 0.0
        elif not behind:
            _hang_up(self.socket, socket.SHUT_WR)
        if self.watched and self.watched != self.events():
            self.server.watch(self)

    def events(self) -> int:
        """What the reader waits for. While something is kept nothing is read: so no pongs pile up."""
        return selectors.EVENT_WRITE if self.kept or self.owed else selectors.EVENT_READ

    def receive(self, data: bytes) -> None:
        """Parse what came, answer it, and send on what is kept. Only the reader calls this."""
        if not self.closing:
            self.inbox += data
        try:
            while not self.closing:
                room = MAX_MESSAGE - (len(self.fragments[1]) if self.fragments else 0)
                frame = decode_frame(self.inbox, room)
                if frame is None:
                    break
                self._receive_frame(*frame)
        except ProtocolError as error:
            logger.debug("client broke the protocol: %s", error)
            self.send_close(error.code, str(error))
        with self.lock:
            self.flush()

    def _receive_frame(self, fin: bool, opcode: int, payload: bytes) -> None:
        if opcode == OPCODE_CLOSE_CONN:
            self.close(checked_close(payload))
        elif opcode == OPCODE_PING:
            with self.lock:  # kept, not sent: one write answers all the pings of a turn
                if not self.closing:
                    self.kept += encode_frame(OPCODE_PONG, payload)
        elif opcode == OPCODE_PONG:
            self.unanswered = 0
        else:
            if (opcode == OPCODE_CONTINUATION) != (self.fragments is not None):
                raise ProtocolError(1002, "continuation without a start, or a start inside a fragmented message")
            if self.fragments is None and not fin:
                self.fragments = (opcode, bytearray())
            if self.fragments is not None:
                self.fragments[1].extend(payload)
                if not fin:
                    return
                opcode, payload = self.fragments[0], bytes(self.fragments[1])
                self.fragments = None
            self.server.call("message_received", self, decode_text(payload) if opcode == OPCODE_TEXT else payload)


def _hang_up(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Wakes whoever waits on the socket; close() would not, and would free its number for another client."""
    try:
        sock.shutdown(how)
    except OSError:
        pass  # it is gone already


class PriceServer(WebsocketServer):
    """A WebsocketServer that sends prices; `run_forever(threaded=True)` starts it.

    assets: ids in the order in which every client gets them.
    quote, source, interval: shown at /healthz and to the page; the interval (seconds) also says
        when prices count as stale.
    max_clients: the next one gets 503. allow_origins: web origins that may read; empty for all.

    The library's callbacks run outside all locks: new_client in a handshake thread, the others in
    the reader, so one that blocks there keeps the other clients' pings and closes waiting (not
    their prices). A message is str or bytes, as it came; `send_message` sends text for str and
    binary for bytes. Raises OSError when the port cannot be had.
    """

    request_queue_size = 1024

    def __init__(
        self,
        assets: Sequence[str],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        quote: str = "USD",
        source: str = "coinapi",
        interval: float = 5.0,
        max_clients: int = 10_000,
        allow_origins: Iterable[str] = (),
    ):
        self._clients: dict[Connection, dict[str, Any]] = {}
        self._lock = threading.Lock()  # guards _clients, _handshakes and counts
        self.assets = tuple(assets)
        self.quote = quote
        self.source = source
        self.interval = interval
        self.max_clients = max_clients
        self.allow_origins = frozenset(origin.lower().rstrip("/") for origin in allow_origins)

        self.latest = Latest(0, {}, {})
        self.history: dict[str, deque[tuple[float, str]]] = {asset: deque() for asset in self.assets}
        self.last_success: float | None = None  # monotonic seconds
        self.last_success_time = 0.0  # epoch seconds
        self.last_error: str | None = None
        self.paused = False  # set while polls are left out because nobody listens
        self.client_came = threading.Event()  # set with each new client, for a poller that pauses
        self.credits_used: int | None = None
        self.credits_left: int | None = None
        self.counts = Counter(dict.fromkeys(COUNTERS, 0))  # for /metrics

        self._publishing = threading.Lock()  # held for a whole publish: prices never overtake each other
        # Open but while a publish runs. Each of its sends gives up the interpreter lock, and a busy
        # thread would keep that for 5 ms each time: so the others start no new piece of work then.
        self.gate = threading.Event()
        self.gate.set()
        self._history_answers: tuple[int, dict[tuple[str, ...], bytes]] = (0, {})
        self._handshakes: dict[socket.socket, float] = {}  # monotonic deadlines, oldest connection first
        self._warned: dict[str, float] = {}  # when each kind of trouble was last met, monotonic seconds
        self._stale = False
        self._next_check = 0.0
        self._next_ping = time.monotonic() + PING_INTERVAL
        self._changed: deque[Connection] = deque()  # for the reader to look at what they wait for
        self._stopping = False
        self._reader: threading.Thread | None = None
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__(host, port)  # the last step, as it calls server_close when the port cannot be had
        self.RequestHandlerClass = Handler

    # Prices

    def publish(self, updates: Iterable[Update]) -> None:
        """Send the result of a successful poll to every client; blocks on none of them.

        Raises ValueError, and sends nothing, for an asset that is not tracked.
        """
        new = {update.asset_id: update for update in updates}
        for asset_id in new:
            if asset_id not in self.history:
                raise ValueError(self.unknown(asset_id))
        frames = {asset: encode_frame(OPCODE_TEXT, update.to_json().encode("utf-8")) for asset, update in new.items()}
        with self._publishing:
            self.gate.clear()
            try:
                self._remember(new, frames)
                self._send_to_all(frames)
            finally:
                self.gate.set()

    def _remember(self, new: dict[str, Update], frames: dict[str, bytes]) -> None:
        version, known_updates, known_frames = self.latest
        known_updates, known_frames = known_updates | new, known_frames | frames
        known = [asset for asset in self.assets if asset in known_frames]
        self.latest = Latest(
            version + 1,
            {asset: known_updates[asset] for asset in known},
            {asset: known_frames[asset] for asset in known},
        )
        now, epoch = time.monotonic(), time.time()
        self.last_success, self.last_success_time, self.last_error = now, epoch, None
        self.count('polls_total{result="success"}')
        for asset, update in new.items():
            points = self.history[asset]
            if len(points) > 1 and now - points[-2][0] < HISTORY_SPACING:
                points.pop()  # thinned, but the last point is always the current price
            points.append((now, f"[{epoch:.3f},{json.dumps(update.price)}]"))
            while points[0][0] < now - HISTORY:
                points.popleft()

    def _send_to_all(self, frames: dict[str, bytes]) -> None:
        latest = self.latest
        parts: dict[tuple[str, ...], tuple[tuple[str, ...], bytes]] = {}  # by what a client follows
        sent = 0
        with self._lock:
            connections = list(self._clients)
        for connection in connections:
            part = parts.get(connection.assets)
            if part is None:
                assets = tuple(asset for asset in connection.assets if asset in frames)
                part = parts[connection.assets] = assets, b"".join([frames[asset] for asset in assets])
            with connection.lock:
                sent += connection.deliver(latest, *part)
        self.count("messages_sent_total", sent)

    def report_failure(self, reason: str) -> None:
        """Note a poll that brought no prices; `reason` is shown at /healthz until one succeeds."""
        self.last_error = reason
        self.count('polls_total{result="failure"}')

    @property
    def stale_after(self) -> float:
        """Seconds after which prices are no longer current."""
        return max(3 * self.interval, STALE_AFTER)

    def age(self) -> float | None:
        """Seconds since the last successful poll, or None."""
        return None if self.last_success is None else time.monotonic() - self.last_success

    def status(self) -> str:
        """One of: ok; starting, before the first success; stale; paused, while polls are left out."""
        age = self.age()
        if self.paused:
            return "paused"
        if age is None:
            return "starting"
        return "ok" if age <= self.stale_after else "stale"

    def history_json(self, assets: tuple[str, ...]) -> bytes:
        """The last hour, {"BTC": [[epoch_seconds, price], ...], ...}; made once for each publish."""
        with self._publishing:
            if self._history_answers[0] != self.latest.version:
                self._history_answers = (self.latest.version, {})
            answers = self._history_answers[1]
            if assets not in answers:
                points = [f'"{asset}":[{",".join([text for _, text in self.history[asset]])}]' for asset in assets]
                answers[assets] = ("{" + ",".join(points) + "}").encode()
            return answers[assets]

    def metrics(self) -> str:
        """The counters and gauges in Prometheus' text format."""
        with self._lock:
            samples: dict[str, float | None] = {**self.counts, "clients": len(self._clients)}
        samples["last_success_timestamp_seconds"] = self.last_success_time
        samples["credits_used"], samples["credits_left"] = self.credits_used, self.credits_left
        for asset, update in self.latest.updates.items():
            samples[f'price{{asset_id="{asset}",quote="{self.quote}"}}'] = update.price
        lines = []
        for name, kind, text in METRICS:
            values = [(key, value) for key, value in samples.items() if key.partition("{")[0] == name]
            known = [f"tracker_{key} {value}" for key, value in values if value is not None]
            if known:
                lines += [f"# HELP tracker_{name} {text}", f"# TYPE tracker_{name} {kind}", *known]
        return "\n".join(lines) + "\n"

    def unknown(self, asset_id: str) -> str:
        """The message for an asset that is not tracked."""
        return f"unknown asset {asset_id[:40]!r}: this server tracks {', '.join(self.assets)}"

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def warn(self, kind: str, message: str) -> None:
        """Log trouble that clients can cause: once, and again only after a minute without it."""
        now = time.monotonic()
        if now - self._warned.get(kind, -math.inf) > 60:
            logger.warning("%s", message)
        self._warned[kind] = now

    # Clients come and go

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The open clients at this moment: {"id": 1, "handler": Connection, "address": (host, port)}."""
        with self._lock:
            return list(self._clients.values())

    @clients.setter
    def clients(self, _: list[Any]) -> None:
        """The library's __init__ sets an empty list."""

    def handler_to_client(self, handler: Connection) -> dict[str, Any] | None:
        return self._clients.get(handler)

    def admit(self, sock: socket.socket, address: Any, assets: tuple[str, ...], answer: bytes) -> Connection:
        """Make a client of a handshake: it gets `answer`, the prices known so far, and every publish from now on.

        Raises Refusal when there are `max_clients` already, Denied while deny_new_connections is in force.
        """
        connection = Connection(self, sock, assets, answer)
        with connection.lock:
            with self._lock:
                if self._deny_clients:
                    raise Denied(encode_close(**self._deny_clients))
                if len(self._clients) >= self.max_clients:
                    self.warn("full", f"full, clients connected: {self.max_clients}; the next ones get 503")
                    raise Refusal(503, f"full, clients connected: {self.max_clients}", {"Retry-After": "10"})
                del self._handshakes[sock]  # so shutdown_request leaves it open
                self.id_counter += 1
                self._clients[connection] = {"id": self.id_counter, "handler": connection, "address": address}
            sock.setblocking(False)
            connection.flush()
        return connection

    def park(self, connection: Connection) -> None:
        """Hand an admitted client to the reader, which takes it out again when it leaves."""
        self.client_came.set()
        self.call("new_client", connection)
        logger.debug("client came, clients connected: %d", len(self._clients))
        self.watch(connection)

    def call(self, callback: str, connection: Connection, *message: str | bytes) -> None:
        """Run one of the modifier's callbacks; what it raises is logged and reaches no client."""
        client = self._clients.get(connection)
        if client is None:
            return  # the server stopped meanwhile
        try:
            getattr(self, callback)(client, self, *message)
        except Exception:
            logger.exception("the callback %s failed", callback)

    def watch(self, connection: Connection) -> None:
        """Have the reader look at what this connection waits for."""
        self._changed.append(connection)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            pass  # full, so the reader wakes anyway; or closed, so it has ended

    def _read_clients(self) -> None:
        """The reader thread."""
        with self._selector, self._wake_sender, self._wake_receiver:
            while not self._stopping:
                try:
                    for key, events in self._selector.select():
                        self.gate.wait()
                        if key.data is None:
                            self._wake_receiver.recv(4096)
                        else:
                            self._serve(key.data, events)
                    while self._changed:
                        self._register(self._changed.popleft())
                except Exception:
                    logger.exception("the reader failed, and goes on")
                    time.sleep(0.1)
            for client in self.clients:
                self._leave(client["handler"])

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            data = b""
            if events & selectors.EVENT_READ:
                data = connection.socket.recv(RECEIVE_SIZE)
                if not data:
                    self._leave(connection)
                    return
            connection.receive(data)
        except BlockingIOError:
            pass
        except OSError:
            self._leave(connection)

    def _register(self, connection: Connection) -> None:
        with connection.lock:
            before, connection.watched = connection.watched, connection.events()
            if connection.socket.fileno() < 0 or before == connection.watched:
                return
            if before:
                self._selector.modify(connection.socket, connection.watched, connection)
            else:
                self._selector.register(connection.socket, connection.watched, connection)
        if not before and connection.inbox:
            self._serve(connection, 0)

    def _leave(self, connection: Connection) -> None:
        """Take a client out. Only the reader calls this, so it happens once."""
        if connection.watched:
            self._selector.unregister(connection.socket)
        with connection.lock:  # nobody may write to a number that another client gets next
            connection.closing = True
            connection.kept.clear()
            connection.owed = ()
            connection.socket.close()
        self.call("client_left", connection)
        with self._lock:
            del self._clients[connection]
        logger.debug("client left, clients connected: %d", len(self._clients))

    # Handshakes and housekeeping

    def server_activate(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # accepted sockets inherit it
        super().server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.warn("exhausted", f"cannot accept clients for now: {error.strerror}")
                time.sleep(0.1)  # the connection stays in the queue, so select would return at once: no spinning
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        with self._lock:
            if len(self._handshakes) >= MAX_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                self._handshakes[oldest] = 0.0  # now the newest: the next one cuts off another
                _hang_up(oldest)
            self._handshakes[request] = time.monotonic() + HANDSHAKE_TIMEOUT
        if self._upgrade_at_once(request, client_address):
            return
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, name="handshake", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.warn("exhausted", f"cannot accept clients for now: {error}")
            self.shutdown_request(request)

    def _upgrade_at_once(self, request: socket.socket, client_address: Any) -> bool:
        """Upgrade a request that is here whole, without a thread: starting one costs more than the handshake.

        Any other leaves no trace, for the thread. So does each while a new_client callback is set: it may block.
        """
        if "new_client" in vars(self):  # where set_fn_new_client puts it
            return False
        self.gate.wait()
        request.setblocking(False)
        try:
            head = request.recv(MAX_REQUEST, socket.MSG_PEEK)
            if head.startswith(b"GET /ws") and b"\r\n\r\n" in head:
                EagerHandler(request, client_address, self, head)
        except (OSError, Refusal, LineTooLong):
            pass
        with self._lock:
            if request not in self._handshakes:
                return True
        request.setblocking(True)
        return False

    def shutdown_request(self, request: socket.socket) -> None:
        """A handshake's last step; a socket that the reader has by now stays open."""
        with self._lock:
            handshake = self._handshakes.pop(request, None)
        if handshake is not None:
            super().shutdown_request(request)

    def extend(self, request: socket.socket, seconds: float) -> None:
        """Give a handshake's connection this much time from now on."""
        with self._lock:
            self._handshakes[request] = time.monotonic() + seconds

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            logger.debug("connection lost before it was a client: %s", error)
        else:
            logger.exception("answering a request failed")

    def service_actions(self) -> None:
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + HOUSEKEEPING_INTERVAL
            try:
                self._keep_house(now)
            except Exception:
                logger.exception("housekeeping failed, and goes on")

    def _keep_house(self, now: float) -> None:
        """Cut off what is late, send pings, notice stale prices."""
        self.gate.wait()
        with self._lock:
            for sock, deadline in self._handshakes.items():
                if deadline < now:  # under the lock: out of it the socket could be a client's already
                    _hang_up(sock)
            connections = list(self._clients)
        ping = now >= self._next_ping
        if ping:
            self._next_ping = now + PING_INTERVAL
        for connection in connections:
            silent = ping and connection.unanswered >= MAX_UNANSWERED
            if silent or 0 < connection.deadline < now:
                with connection.lock:
                    connection.drop("no_close" if connection.closing else "no_pong" if silent else "behind")
            elif ping:
                connection.unanswered += 1
                connection.send_frame(OPCODE_PING, b"")
        stale = self.status() == "stale"
        if stale and not self._stale:
            logger.warning("prices are stale: no successful poll for %.0f s", self.age() or 0)
        self._stale = stale

    # Start and stop, behind the library's run_forever, shutdown_* and disconnect_clients_*

    def _run_forever(self, threaded: bool) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._reader = threading.Thread(target=self._read_clients, name="reader", daemon=True)
        self._reader.start()
        super()._run_forever(threaded)
        if threaded:
            self.thread.name = "server"

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: bytes = b"") -> None:
        for client in self.clients:
            client["handler"].send_close(status, reason)

    def _disconnect_clients_abruptly(self) -> None:
        for client in self.clients:
            with client["handler"].lock:
                client["handler"].drop("disconnected")

    def _shutdown_gracefully(self, status: int = 1000, reason: bytes = b"") -> None:
        self._deny_new_connections(status, reason)
        self._disconnect_clients_gracefully(status, reason)
        self._stop()

    def _shutdown_abruptly(self) -> None:
        self._deny_new_connections(1001, b"")
        self._disconnect_clients_abruptly()
        self._stop()

    def _stop(self) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT
        _hang_up(self.socket)  # the accept loop wakes at once; where that does not work, within half a second
        if self.thread is not None:
            self.shutdown()
        self.socket.close()
        while self._clients and time.monotonic() < deadline:
            time.sleep(0.01)
        self.server_close()

    def server_close(self) -> None:
        super().server_close()
        self._stopping = True
        if self._reader is not None and self._reader is not threading.current_thread():
            self._wake()
            self._reader.join()
        with self._lock:
            for sock in self._handshakes:
                _hang_up(sock)


class _RequestReader(io.BufferedReader):
    """Ends a request whose head is too large: the standard library alone allows 6 MB."""

    room = MAX_REQUEST

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self.room + 1)  # whatever `size` is: the room is the bound
        self.room -= len(line)
        if self.room < 0:
            raise LineTooLong("request")
        if not line.endswith(b"\n"):
            raise ConnectionError("the request ended early")
        return line


class Handler(BaseHTTPRequestHandler):
    """Reads one HTTP request and answers it, or makes a client of it, in a handshake thread."""

    server: PriceServer
    rfile: "_RequestReader"
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # or garbage is answered as in HTTP 0.9, without a status
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.rfile = _RequestReader(self.rfile.detach())
        self.requestline, self.request_version, self.command, self.headers = "", "HTTP/1.1", "", HTTPMessage()

    def handle(self) -> None:
        self.server.gate.wait()
        try:
            self.raw_requestline = self.rfile.readline()
            if self.parse_request() and self.respond():
                return  # it is a client now, and the reader's
        except LineTooLong:
            self.send_error(431)
        except Refusal as refusal:
            self.send_error(refusal.status, str(refusal), headers=refusal.headers)
        self._linger()

    def respond(self) -> bool:
        """Answer the request; True when its connection has become a client."""
        if self.command not in ("GET", "HEAD"):
            raise Refusal(
                405, f"method {self.command[:20]} is not supported, only GET and HEAD", {"Allow": "GET, HEAD"}
            )
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise Refusal(400, "the request target is not a URL") from None
        match unquote(url.path).split("/")[1:]:
            case ["ws"]:
                return self.upgrade(self.wanted(url.query))
            case [""]:
                self.send_dashboard()
            case ["prices"]:
                updates = self.server.latest.updates.values()
                self.send_body(b"[" + ",".join([update.to_json() for update in updates]).encode() + b"]")
            case ["prices", asset_id]:
                self.send_price(asset_id.upper())
            case ["history"]:
                self.send_body(self.server.history_json(self.wanted(url.query)))
            case ["healthz"]:
                self.send_health()
            case ["metrics"]:
                self.send_body(self.server.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
            case _:
                raise Refusal(404, "not found: there are /, /ws, /prices, /history, /healthz and /metrics")
        return False

    def wanted(self, query: str) -> tuple[str, ...]:
        """The assets of `?assets=`, in the order tracked; all when it does not say."""
        values = parse_qs(query, keep_blank_values=True).get("assets")
        if values is None:
            return self.server.assets
        ids = {asset_id.strip().upper() for asset_id in ",".join(values).split(",")}
        for asset_id in sorted(ids.difference(self.server.assets)):
            raise Refusal(400, self.server.unknown(asset_id))
        return tuple(asset for asset in self.server.assets if asset in ids)

    def upgrade(self, assets: tuple[str, ...]) -> bool:
        """The opening handshake of RFC 6455, 4.2."""
        if (
            self.command != "GET"
            or self.request_version < "HTTP/1.1"
            or "websocket" not in self._tokens("Upgrade")
            or "upgrade" not in self._tokens("Connection")
        ):
            raise Refusal(
                426, "this path speaks WebSocket: connect to it with a WebSocket client", {"Upgrade": "websocket"}
            )
        if self._tokens("Sec-WebSocket-Version") != ["13"]:
            raise Refusal(426, "Sec-WebSocket-Version must be 13", {"Sec-WebSocket-Version": "13"})
        keys = self.headers.get_all("Sec-WebSocket-Key", [])
        if len(self.headers.get_all("Host", [])) != 1:
            raise Refusal(400, "there must be one Host header")
        if len(keys) != 1 or not _is_key(keys[0].strip()):
            raise Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64")
        if not self._origin_is_allowed():
            raise Refusal(403, f"origin {self.headers['Origin'][:100]} is not allowed")
        answer = WebSocketHandler.make_handshake_response(keys[0].strip()).encode()
        try:
            connection = self.server.admit(self.request, self.client_address, assets, answer)
        except Denied as denied:
            self.wfile.write(answer + encode_frame(OPCODE_CLOSE_CONN, denied.payload))
            return False
        try:
            connection.inbox += self.early_bytes()
        except OSError:
            pass  # reset: the reader meets the end
        self.server.park(connection)
        return True

    def early_bytes(self) -> bytes:
        """What came right behind the request."""
        return self.rfile.peek()

    def send_price(self, asset_id: str) -> None:
        if asset_id not in self.server.assets:
            raise Refusal(404, self.server.unknown(asset_id))
        if asset_id not in self.server.latest.updates:
            raise Refusal(503, f"no price of {asset_id} is known yet", {"Retry-After": "5"})
        self.send_body(self.server.latest.updates[asset_id].to_json().encode())

    def send_health(self) -> None:
        server = self.server
        status, age = server.status(), server.age()
        health = {
            "status": status,
            "age_seconds": None if age is None else round(age, 3),
            "stale_after_seconds": server.stale_after,
            "interval_seconds": server.interval,
            "clients": len(server.clients),
            "source": server.source,
            "quote": server.quote,
            "assets": server.assets,
            "last_error": server.last_error,
        }
        self.send_body(json.dumps(health).encode(), status=200 if status in ("ok", "paused") else 503)

    def send_dashboard(self) -> None:
        try:
            page = DASHBOARD.read_bytes().replace(b"\r\n", b"\n")  # as a browser reads it before it hashes
        except OSError as error:
            raise Refusal(404, f"no page: {DASHBOARD.name} beside {Path(__file__).name}: {error.strerror}") from None
        # Only the script and the style that stand in the page may run, and only this server may be asked.
        parts = {tag: re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL) for tag in (b"script", b"style")}
        hashes = {tag: " ".join(f"'sha256-{_sha256(part)}'" for part in found) for tag, found in parts.items()}
        policy = (
            f"default-src 'none'; script-src {hashes[b'script']}; style-src {hashes[b'style']}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
        )
        self.send_body(page, "text/html; charset=utf-8", headers={"Content-Security-Policy": policy})

    def send_body(
        self,
        body: bytes,
        content_type: str = "application/json",
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Send a whole answer; HEAD gets all but the body."""
        self.server.extend(self.request, TAKE_TIMEOUT)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if not self.server.allow_origins:
            self.send_header("Access-Control-Allow-Origin", "*")
        else:
            self.send_header("Vary", "Origin")
            if "Origin" in self.headers and self._origin_is_allowed():
                self.send_header("Access-Control-Allow-Origin", self.headers["Origin"])
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        """Errors are JSON; the standard library's are HTML."""
        body = json.dumps({"error": message or HTTPStatus(code).phrase}).encode()
        self.send_body(body, status=code, headers=headers)

    def _linger(self) -> None:
        """Wait for the client to hang up: closing over bytes it still sends would destroy the answer."""
        self.wfile.flush()
        _hang_up(self.request, socket.SHUT_WR)
        self.server.extend(self.request, LINGER_TIMEOUT)
        while self.request.recv(4096):
            pass

    def _tokens(self, header: str) -> list[str]:
        values = ",".join(self.headers.get_all(header, []))
        return [token.strip().lower() for token in values.split(",")]

    def _origin_is_allowed(self) -> bool:
        """A browser's page may read if it came from here, or from an allowed origin; the rest are no browsers."""
        origin = self.headers.get("Origin")
        if origin is None or not self.server.allow_origins:
            return True
        origin = origin.lower()
        return origin in self.server.allow_origins or origin.partition("://")[2] == self.headers.get("Host", "").lower()

    def version_string(self) -> str:
        return "price-server"  # the default tells the exact Python version

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class EagerHandler(Handler):
    """Upgrades a request whose bytes, `head`, are only looked at so far, in the server thread.

    Raises Refusal for any other; what it writes is lost, as the thread answers anew.
    """

    def __init__(self, request: socket.socket, client_address: Any, server: PriceServer, head: bytes):
        self.head = head
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.rfile, self.wfile = _RequestReader(io.BytesIO(self.head)), io.BytesIO()

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            self.respond()

    def early_bytes(self) -> bytes:
        self.request.recv(len(self.head))
        return self.rfile.read()

    def send_error(self, *_: Any, **__: Any) -> None:
        raise Refusal(400, "left to the thread")


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except ValueError:
        return False


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
