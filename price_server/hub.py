"""Which connection is a client, what it gets, and when it is dropped: fan-out, admission, deadlines, stop.

Everything here runs in the server thread. A connection is a visitor first. Then it becomes a client, or it is
finishing: it receives a response, and is closed.
"""

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from .archive import NOTICE
from .connection import (
    CLOSE_TIMEOUT,
    DOWNLOAD_TIMEOUT,
    NO_FEED,
    Connection,
    Message,
    RequestHead,
    State,
    held_bytes,
    largest_holders,
)
from .formats import FORMATS
from .loop import Loop, RateLimitedLog
from .prices import Feed, Prices
from .status import Status
from .transport import Transport, socket_room
from .web import NewClient, Site

OWN_FILES = 20  # descriptors that are not connections: logs, listener, selector, archive, CoinAPI
SPARE_VISITORS = 30  # visitors that find room when the server is full of clients
HEARTBEAT_INTERVAL = 20.0  # seconds; under the 60 s after which proxies close a silent connection
MAX_UNANSWERED = 3  # heartbeats; counted, not timed, so that waking from sleep drops no client
HEARTBEATS_PER_BATCH = 256
HOUSEKEEPING_INTERVAL = 0.5  # seconds: how late a deadline may be noticed
MAX_QUEUE = 1 << 20  # bytes of send_message that may be pending for one client
MAX_HELD = 64 << 20  # bytes that all connections together may hold
RECOUNT_AFTER = 16 << 20  # bytes added until what is held is counted again
MAX_JOINED = 100  # sets of followed assets whose messages are kept joined within a fan-out

logger = logging.getLogger(__name__)


class Hub:
    """Serves the loop's events.

    call_back: `call_back("new_client", client)`, or with a message: runs user code, and raises nothing.
    make_handler: the 'handler' of a client's dict, which user code sees.
    on_housekeeping: called twice a second.
    """

    def __init__(
        self,
        loop: Loop,
        prices: Prices,
        status: Status,
        site: Site,
        *,
        log: RateLimitedLog,
        call_back: Callable[..., None],
        make_handler: Callable[[Connection], Any],
        on_housekeeping: Callable[[], None],
        on_end: Callable[[], None],
    ):
        self._loop, self._prices, self._status, self._site, self._log = loop, prices, status, site, log
        self._call_back, self._make_handler = call_back, make_handler
        self._on_housekeeping, self._on_end = on_housekeeping, on_end
        self._transport = Transport(loop, self, log)
        self.clients: dict[Connection, dict[str, Any]] = {}
        self._visitors: dict[Connection, None] = {}  # the oldest first
        self._finishing: dict[Connection, None] = {}  # the oldest first
        self._last_id = 0
        self._added = 0  # bytes that connections were given since the last count of those held
        self.deny_close: tuple[int, str | bytes] | None = None  # the close that new clients get; None: admit them
        self.stop_close: tuple[int, str | bytes] | None = (1001, "server is stopping")  # None: no close frame
        self._was_stale = False
        self._room = self._fit_clients()
        status.measure = self._measure

    def _fit_clients(self) -> float:
        """Lower the number of clients to what there is room for. Returns the room for all connections."""
        room, why = socket_room()
        most = max(room - OWN_FILES - SPARE_VISITORS, 1)
        if most < self._status.max_clients:
            logger.warning("--max-clients lowered from %d to %d: %s", self._status.max_clients, most, why)
            self._status.max_clients = int(most)
        return room - OWN_FILES

    def start(self, listener: socket.socket) -> None:
        self._transport.listen(listener)
        self._loop.call_later(0, self._run_housekeeping)
        self._loop.call_later(HEARTBEAT_INTERVAL, self._send_heartbeats)

    # The loop's events

    def serve(self, data: Any, events: int) -> None:
        self._transport.serve(data, events)

    def after_events(self) -> None:
        self._transport.accept()

    # The transport's events

    def connection_made(self, connection: Connection) -> None:
        others = self._visitors or self._finishing  # `max_clients` leaves room for them
        if others and len(self._visitors) + len(self._finishing) + len(self.clients) >= self._room:
            self.close(next(iter(others)))
        self._visitors[connection] = None

    def data_received(self, connection: Connection, data: bytes) -> None:
        self._count_added(len(data))
        for event in connection.receive_data(data, self._loop.clock()):
            if isinstance(event, Message):
                self._call_back("message_received", self.clients[connection], event.data)
            else:
                self._respond(connection, event)
        if connection.outbox is not None:
            self.flush(connection)

    def flush(self, connection: Connection) -> None:
        """Send what is pending, as far as the socket takes it. Raises OSError when the connection is broken."""
        self._status.messages_sent += self._transport.flush(connection)
        if connection.outbox:
            self._count_added(connection.outbox.take_uncounted())

    def close(self, connection: Connection) -> None:
        if connection.state is State.ENDED:
            return
        self._transport.close(connection)
        self._visitors.pop(connection, None)
        self._finishing.pop(connection, None)
        client = self.clients.pop(connection, None)
        if client is not None:
            self._status.clients[connection.feed.format.name] -= 1
            # Later: a client may be dropped inside a fan-out.
            self._loop.call_soon(lambda: self._call_back("client_left", client))
            logger.debug("client disconnected, clients connected: %d", len(self.clients))

    def attempt(self, action: Callable[[Connection], None], connection: Connection) -> None:
        """Do something with one connection: an error in it ends this connection only."""
        try:
            action(connection)
        except Exception as error:
            self._fail(connection, error)

    def _fail(self, connection: Connection, error: Exception) -> None:
        if isinstance(error, OSError):
            logger.debug("connection lost: %s", error)
            self.close(connection)
        else:
            self._log.warn("failed", f"a connection failed, and is closed: {error!r}", error)
            self._drop(connection, "failed")

    def _drop(self, connection: Connection, reason: str) -> None:
        """Close a connection without a close frame; for a client the reason is counted."""
        if connection in self.clients:
            self._status.dropped[reason] += 1
            logger.debug("client dropped: %s", reason)
        self.close(connection)

    # Requests and clients

    def _respond(self, connection: Connection, request: RequestHead) -> None:
        response = self._site.respond(request.head)
        del self._visitors[connection]
        if isinstance(response, NewClient):
            self._admit(connection, response)
            return
        self._status.http_responses[response.status] += 1
        if response.refused:
            self._status.refused[response.refused] += 1
            if response.refused == "full":
                self._log.warn("full", f"full, clients connected: {len(self.clients)}; the next ones get 503")
        body = response.body
        pieces = [response.head, *body] if isinstance(body, list) else chain((response.head,), body)
        self._finishing[connection] = None
        connection.finish_with(pieces, self._loop.clock() + DOWNLOAD_TIMEOUT)

    def _admit(self, connection: Connection, new_client: NewClient) -> None:
        feed = self._prices.feeds[new_client.format]
        connection.become_client(feed, new_client.assets, new_client.head)
        if close := self.deny_close:  # read once, because another thread may set it
            self._status.refused["denied"] += 1
            self._finishing[connection] = None
            connection.finish_with([feed.format.encode_close(*close)], self._loop.clock() + CLOSE_TIMEOUT)
            return
        self.flush(connection)  # first, because a peer that is gone already must not become a client
        self._last_id += 1
        client = {"id": self._last_id, "handler": self._make_handler(connection), "address": connection.address}
        self.clients[connection] = client
        self._status.clients[feed.format.name] += 1
        self._status.clients_accepted += 1
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "client %s connected, clients connected: %d", _address_of(connection, new_client), len(self.clients)
            )
        self._call_back("new_client", client)

    def follow(self, connection: Connection, assets: tuple[str, ...]) -> None:
        """Set what a client follows, and send the current price of what is new to it."""
        if connection in self.clients and connection.state is State.CLIENT:
            connection.follow(assets)
            self.attempt(self.flush, connection)

    def send(self, connection: Connection, message: str | bytes) -> None:
        """Send a message of user code to a client, after the bytes that are pending. Raises what its format raises."""
        if connection.state is State.CLIENT:
            self._send(connection, connection.feed.format.encode_message(message))

    def send_to_all(self, message: str | bytes) -> None:
        """Send a message to every client whose format can carry it."""
        able = [each for each in FORMATS if each.carries_bytes or isinstance(message, str)]
        encoded = {each.name: each.encode_message(message) for each in able}
        for connection in list(self.clients):
            if connection.state is State.CLIENT and connection.feed.format.name in encoded:
                self._send(connection, encoded[connection.feed.format.name])

    def _send(self, connection: Connection, data: bytes) -> None:
        self._status.messages_sent += 1
        connection.enqueue(data)
        self.attempt(self.flush, connection)
        if connection.outbox and connection.outbox.unsent > MAX_QUEUE:
            self._drop(connection, "queue_full")

    def disconnect(self, connections: Iterable[Connection], status: int, reason: str | bytes) -> None:
        """Send these clients a close as the last bytes."""
        for connection in connections:
            if connection.state is State.CLIENT:
                last = connection.feed.format.encode_close(status, reason)
                connection.finish_with([last], self._loop.clock() + CLOSE_TIMEOUT)
                self.attempt(self.flush, connection)

    def drop_all(self) -> None:
        for connection in list(self.clients):
            self._drop(connection, "disconnected")

    # Fan-out

    def fan_out(self, assets: Iterable[str]) -> None:
        """Send the current prices of these assets to every client that follows them, each with one send."""
        new = set(assets)
        joined: dict[tuple[Feed, tuple[str, ...]], tuple[tuple[str, ...], bytes]] = {}
        due: tuple[str, ...] = ()
        feed, followed, data, messages = NO_FEED, due, b"", 0
        client_state = State.CLIENT  # a local name, because an Enum looks its members up slowly
        # One loop with its fast path inline, because it runs 8,000 times.
        for connection in list(self.clients):
            if connection.assets is not followed or connection.feed is not feed:  # most are like the one before
                feed, followed = connection.feed, connection.assets
                if (feed, followed) not in joined:
                    if len(joined) >= MAX_JOINED:
                        joined.clear()
                    due = tuple([asset for asset in followed if asset in new])
                    joined[feed, followed] = due, b"".join([feed.messages[asset] for asset in due])
                due, data = joined[feed, followed]
            try:
                sent = 0
                if data and connection.outbox is None and connection.state is client_state:
                    try:
                        sent = connection.socket.send(data)
                    except BlockingIOError:
                        pass
                    if sent == len(data):
                        messages += len(due)
                        continue
                messages += connection.keep_unsent(due, sent, self._loop.clock())
                self._transport.update_interest(connection)
            except Exception as error:
                self._fail(connection, error)
        self._status.messages_sent += messages

    # Housekeeping

    def _run_housekeeping(self) -> None:
        self._loop.call_later(HOUSEKEEPING_INTERVAL, self._run_housekeeping)
        try:
            self._close_overdue()
            self._transport.resume_accepting()
            self._note_stale()
            self._on_housekeeping()
        except BaseException as error:  # user code's sys.exit() too: it would end the thread that serves every client
            self._log.warn("housekeeping", "housekeeping failed, and goes on", error)

    def _close_overdue(self) -> None:
        now = self._loop.clock()
        for connection in self._all_connections():
            if reason := connection.find_overdue(now):
                self._drop(connection, reason)

    def _note_stale(self) -> None:
        state = self._status.state()
        if state == "stale" and not self._was_stale:
            logger.warning("prices are stale: no successful poll for %.0f s", self._status.age() or 0)
            self._was_stale = True
        elif state == "ok" and self._was_stale:
            logger.log(NOTICE, "prices are no longer stale")
            self._was_stale = False

    def _send_heartbeats(self) -> None:
        self._loop.call_later(HEARTBEAT_INTERVAL, self._send_heartbeats)
        self._send_some_heartbeats(iter(list(self.clients)))

    def _send_some_heartbeats(self, connections: Iterator[Connection]) -> None:
        """In batches, because 8,000 in one step would delay everything else."""
        some = list(islice(connections, HEARTBEATS_PER_BATCH))
        for connection in some:
            if connection.state is not State.CLIENT:
                continue
            if connection.unanswered >= MAX_UNANSWERED:
                self._drop(connection, "no_pong")
            else:
                connection.unanswered += connection.feed.format.is_two_way
                connection.enqueue(connection.feed.format.heartbeat)
                self.attempt(self.flush, connection)
        if some:
            self._loop.call_soon(lambda: self._send_some_heartbeats(connections))

    # What is held

    def _count_added(self, size: int) -> None:
        """Count bytes given to a connection. Every 16 MiB, drop the largest holders if all hold over MAX_HELD."""
        self._added += size
        if self._added < RECOUNT_AFTER:
            return
        self._added = 0
        if held_bytes(self._all_connections()) <= MAX_HELD:
            return
        self._log.warn("memory", f"over {MAX_HELD} bytes are held for connections: the largest holders are dropped")
        for connection in largest_holders(self._all_connections(), MAX_HELD):
            self._drop(connection, "memory")

    def _measure(self) -> None:
        """Bring the gauges of /metrics up to date."""
        self._status.visitors = len(self._visitors) + len(self._finishing)
        self._status.held_bytes = held_bytes(self._all_connections())
        self._status.batch_seconds_max = self._loop.longest_batch()

    def _all_connections(self) -> list[Connection]:
        return [*self._visitors, *self._finishing, *self.clients]

    # The stop

    def begin_stop(self) -> None:
        """Accept no more connections, close visitors, and send clients a close. Responses have a second more."""
        self._transport.close_listener()
        for connection in list(self._visitors):
            self.close(connection)
        close = self.stop_close  # read once, because another thread may set it
        if close is None:
            for connection in self._all_connections():
                self.close(connection)
        else:
            self.disconnect(list(self.clients), *close)

    def is_drained(self) -> bool:
        return not self.clients and not self._finishing

    def end(self) -> None:
        for connection in self._all_connections():
            self.close(connection)
        self._transport.close_listener()
        self._on_end()


def _address_of(connection: Connection, new_client: NewClient) -> str:
    """The address of the client's user, for the log: as a proxy on this machine says, or the peer's."""
    host = str(connection.address[0]).removeprefix("::ffff:")
    forwarded = "".join(char for char in new_client.forwarded_for[:100] if char.isprintable())
    return forwarded if forwarded and (host.startswith("127.") or host == "::1") else host
