"""PriceServer, a WebsocketServer: publish, clients and visitors, start and stop.

The loop is in loop.py. All that is here and does not say otherwise runs in the loop's thread.
"""

import errno
import json
import logging
import math
import selectors
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from .archive import Archive
from .connection import CLIENT, ENDED, VISITOR, Connection
from .figures import MAX_SUBSETS, Figures, Update
from .frames import Opcode, encode_frame
from .history import History, Loaded
from .interface import Interface
from .loop import AT_ONCE
from .web import Upgrade

ACCEPT_AT_ONCE = 32  # connections
SELECT_ROOM = 512  # sockets that Windows' select takes
SHARED_SIZE = 4 << 10  # bytes from which on a piece that several connections keep is counted once
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PING = encode_frame(Opcode.PING, b"")

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def socket_room() -> tuple[float, str]:
    """How many sockets and files this process may have open, and what says so."""
    rooms = [(math.inf, "")]
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):
        rooms.append((SELECT_ROOM, f"select takes {SELECT_ROOM} sockets here"))
    if resource is not None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY:
            rooms.append((files, f"only {files} files may be open (ulimit -n)"))
    return min(rooms)


class PriceServer(Interface, Figures):
    """A WebsocketServer that sends prices; `run_forever(threaded=True)` starts it.

    assets: ids in the order in which every client gets them. figures: see `Figures`.
    history_file: where the past is kept; None for memory.

    Callbacks run in the server thread, one after the other: one that blocks keeps everybody waiting.
    A message is str or bytes, as it came; `send_message` sends text for str and binary for bytes.
    Raises OSError when the port cannot be had, ValueError when the history file cannot be used.
    """

    own_files = 20  # descriptors that are no connection: logs, listener, selector, history, CoinAPI
    spare_visitors = 30  # that find room when the server is full of clients
    request_timeout = 10.0  # seconds for a whole request, dribbled or not
    take_timeout = 30.0  # seconds for the visitor to take an HTTP answer,
    take_rate = 8 << 10  # and one more for each so many bytes of it
    linger_timeout = 2.0  # seconds from an HTTP answer until the visitor hangs up
    close_timeout = 5.0  # seconds from our close frame until the client hangs up
    behind_timeout = 30.0  # seconds with a full socket
    message_timeout = 30.0  # seconds for a message that is begun
    ping_interval = 20.0  # seconds; under the 60 s after which proxies drop a silent connection
    max_unanswered = 3  # pings, so 60 s; counted, not timed: a machine that slept finds its clients again
    max_queue = 1 << 20  # bytes of send_message waiting for one client
    max_held = 64 << 20  # bytes that all connections together may have waiting

    def __init__(
        self,
        assets: Sequence[str],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        history_file: str | None = None,
        **figures: Any,
    ):
        Figures.__init__(self, assets, **figures)
        Interface.__init__(self, self.clock)
        self.held = 0  # bytes that all connections together have waiting
        self._visitors: dict[Connection, None] = {}  # whose request is not whole, the oldest first
        self._answered: dict[Connection, None] = {}  # that take an answer
        self._shared: Counter[int] = Counter()  # by how many connections a large piece is kept
        self._room = self._fit_clients()
        self._listening = False
        self._next_ping = self.clock() + self.ping_interval
        self._stale = False
        self.archive: Archive | None = None
        try:
            self.history = History(self.assets, self.wall_clock)
            if history_file:
                self._start_archive(history_file)
            self.bind(host, port)
        except BaseException:
            self._stop_archive()
            self.close_wakers()
            raise

    def _start_archive(self, file: str) -> None:
        starter = threading.get_ident()

        def load(loaded: Loaded) -> None:
            if threading.get_ident() == starter and self.state == "before":
                self._load_past(loaded)
            else:  # not `hand_over`: before the start that would run it here, while the start may be under way
                self._calls.append((partial(self._load_past, loaded), Future()))
                self._wake()

        self.archive = Archive(file, self.source, self.quote, self.assets, loaded=load, wall_clock=self.wall_clock)
        self.archive.start()

    def _load_past(self, loaded: Loaded) -> None:
        if self.archive is not None:
            self.archive.write(self.history.load(loaded))

    def _stop_archive(self) -> None:
        if self.archive is not None:
            self.archive.stop()

    def _fit_clients(self) -> float:
        """Lower `max_clients` to what there is room for; the room for all connections."""
        room, why = socket_room()
        most = max(room - self.own_files - self.spare_visitors, 1)
        if most < self.max_clients:
            logger.warning("--max-clients lowered from %d to %d: %s", self.max_clients, most, why)
            self.max_clients = int(most)
        return room - self.own_files

    # Prices

    def publish(self, updates: Iterable[Update]) -> None:
        """Send the result of a successful poll to every client, and return then; no client can block it. Any thread.

        Raises ValueError, and sends nothing, for an asset that is not tracked; TimeoutError when a callback blocks.
        """
        new, frames = self.encode(updates)
        prices = {asset: json.dumps(update.price) for asset, update in new.items()}
        self.call(lambda: self._publish(new, frames, prices), urgent=True)

    def report_failure(self, reason: str) -> None:
        """Note a poll that brought no prices; /healthz shows `reason` until one succeeds. Any thread."""
        self.last_error = reason
        self.hand_over(self._count_failure)

    def _count_failure(self) -> None:
        self.polls['{result="failure"}'] += 1

    def _publish(self, new: dict[str, Update], frames: dict[str, bytes], prices: dict[str, str]) -> None:
        if self._in_urgent and self.state == "running":  # from a call that had its turn between two clients
            self._urgent.append((lambda: self._publish(new, frames, prices), Future()))
            return
        self._in_urgent = True
        try:
            self.remember(new, frames)
            sent = self._send_to_all(frames)
            self.messages_sent += sent  # read only now: calls between two clients add to it too
            poll = self.history.add(prices, self.last_success_time)
            if self.archive is not None:
                self.archive.write(poll)
        finally:
            self._in_urgent = False

    def _send_to_all(self, frames: dict[str, bytes]) -> int:
        """How many messages went out. One send for each client: what is added to that counts 8,000 times."""
        parts: dict[tuple[str, ...], tuple[tuple[str, ...], bytes]] = {}  # by what a client follows
        messages = 0
        for connection in list(self._clients):
            if self._calls:
                self.look()
            part = parts.get(connection.assets)
            if part is None:
                if len(parts) >= MAX_SUBSETS:
                    parts.clear()
                assets = tuple(asset for asset in connection.assets if asset in frames)
                part = parts[connection.assets] = assets, b"".join([frames[asset] for asset in assets])
            assets, buffer = part
            try:
                sent = 0
                if buffer and connection.state is CLIENT and not connection.kept and not connection.owed:
                    try:
                        sent = connection.socket.send(buffer)
                    except BlockingIOError:
                        pass
                    if sent == len(buffer):
                        messages += len(assets)
                        continue
                messages += connection.deliver(assets, sent)
            except Exception as error:
                self._fail(connection, error)
        return messages

    # Connections come and go

    def begin(self) -> None:
        self.selector.register(self.socket, selectors.EVENT_READ, self.socket)
        self._listening = True

    def serve(self, data: Any, events: int) -> None:
        if data is self.socket:
            self._accept()
        elif events & data.watched & selectors.EVENT_READ:  # not one that was ended earlier in this batch
            self.step(data, data.on_readable)
        elif events & data.watched:
            self.step(data, data.flush)

    def look_around(self) -> None:
        self._accept()
        super().look_around()

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE if self._listening else 0):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_DESCRIPTOR:
                    # It stays in the kernel's queue, and select would return at once: no spinning until housekeeping.
                    self._stop_listening()
                    self.warn("exhausted", f"cannot accept clients for now: {error.strerror}")
                return
            sock.setblocking(False)
            others = self._visitors or self._answered  # clients never take all the room
            if others and len(self._visitors) + len(self._answered) + len(self._clients) >= self._room:
                self.leave(next(iter(others)))
            connection = Connection(self, sock, address)
            self._visitors[connection] = None
            self.step(connection, connection.on_readable)  # the request is mostly here by now
            if connection.state is VISITOR:
                self.step(connection, partial(self.watch, connection, selectors.EVENT_READ))
            self.look()

    def _stop_listening(self) -> None:
        if self._listening:
            self.selector.unregister(self.socket)
            self._listening = False

    def step(self, connection: Connection, function: Callable[[], Any]) -> None:
        """One step of one connection: what goes wrong in it ends this one only."""
        try:
            function()
        except BlockingIOError:
            pass
        except Exception as error:
            self._fail(connection, error)
        if connection.state is not VISITOR and connection in self._visitors:
            del self._visitors[connection]
            self._answered[connection] = None
        if self.held > self.max_held:
            self._drop_largest()

    def _fail(self, connection: Connection, error: Exception) -> None:
        if isinstance(error, OSError):
            logger.debug("connection lost: %s", error)
            self.leave(connection)
        else:
            self.warn("failed", f"a connection failed, and is ended: {error!r}", error)
            self.drop(connection, "failed")

    def admit(self, connection: Connection, upgrade: Upgrade) -> None:
        """A visitor asks to be a client."""
        if self._deny_frame:
            self.note_refused("denied")
            connection.assets = upgrade.assets  # it speaks WebSocket, and has a close's time to hang up
            connection.end([upgrade.head, self._deny_frame], self.close_timeout)
            return
        del self._visitors[connection]
        self.id_counter += 1
        client = {"id": self.id_counter, "handler": connection, "address": connection.address}
        self._clients[connection] = client
        self.client_count = len(self._clients)
        self.call_back("new_client", client)
        self.client_came.set()
        logger.debug("client %s came, clients connected: %d", _address(connection, upgrade), self.client_count)
        connection.become_client(upgrade)

    def note_refused(self, reason: str) -> None:
        """A request for the feed got no client."""
        self.refused[f'{{reason="{reason}"}}'] += 1
        if reason == "full":
            self.warn("full", f"full, clients connected: {self.client_count}; the next ones get 503")

    def hear(self, connection: Connection, message: str | bytes) -> None:
        """A client said something: the callback hears it before the rest is read."""
        self.call_back("message_received", self._clients[connection], message)
        self._callbacks.append(partial(self.step, connection, connection.receive))

    def watch(self, connection: Connection, events: int) -> None:
        """Wait for these events of a connection from now on."""
        if connection.watched == events or connection.state is ENDED:
            return
        before, connection.watched = connection.watched, 0  # what a selector fails at is not in it any more
        if not before:
            self.selector.register(connection.socket, events, connection)
        elif events:
            self.selector.modify(connection.socket, events, connection)
        else:
            self.selector.unregister(connection.socket)
        connection.watched = events

    def leave(self, connection: Connection) -> None:
        """A connection is at its end: close it and forget it."""
        if connection.state is ENDED:
            return
        if connection.watched:
            self.selector.unregister(connection.socket)
            connection.watched = 0
        connection.shut()
        self._visitors.pop(connection, None)
        self._answered.pop(connection, None)
        client = self._clients.pop(connection, None)
        if client is not None:
            self.client_count = len(self._clients)
            self.call_back("client_left", client)
            logger.debug("client left, clients connected: %d", self.client_count)

    def hold(self, piece: bytes, change: int) -> None:
        """A connection keeps this piece (change: 1), or no longer (-1); a large one that several keep counts once."""
        if len(piece) >= SHARED_SIZE:
            self._shared[id(piece)] += change
            if self._shared[id(piece)] > (change > 0):
                return
            if change < 0:
                del self._shared[id(piece)]
        self.held += change * len(piece)

    def _everyone(self) -> list[Connection]:
        return [*self._visitors, *self._answered, *self._clients]

    def _drop_largest(self) -> None:
        self.warn("memory", f"over {self.max_held} bytes wait for connections: the largest ones are dropped")
        for connection in sorted(self._everyone(), key=lambda each: each.held, reverse=True):
            if self.held > self.max_held:
                self.drop(connection, "memory")

    def drop(self, connection: Connection, reason: str) -> None:
        """Hang up without a word; of a client the reason is counted."""
        if connection in self._clients:
            self.dropped[f'{{reason="{reason}"}}'] += 1
            logger.debug("client dropped: %s", reason)
        self.leave(connection)

    # Housekeeping

    def keep_house(self, now: float) -> None:
        """Deadlines, pings, stale prices."""
        if not self._listening and not self._stop_begun:
            self.begin()
        for connection in self._everyone():
            self.look()
            if 0 < connection.deadline < now or 0 < connection.message_deadline < now:
                self.step(connection, partial(self._be_late, connection))
        if now >= self._next_ping:
            self._next_ping = now + self.ping_interval
            self._ping_some(iter(list(self._clients)))
        stale = self.status() == "stale"
        if stale and not self._stale:
            logger.warning("prices are stale: no successful poll for %.0f s", self.age() or 0)
        self._stale = stale
        self.service_actions()

    def _be_late(self, connection: Connection) -> None:
        if connection.state is CLIENT:
            self.drop(connection, "behind" if connection.deadline else "unfinished")
        else:
            self.drop(connection, "no_close")

    def _ping_some(self, connections: Iterator[Connection]) -> None:
        """In slices, or 8,000 pings would be one step."""
        for number, connection in enumerate(connections, 1):
            self.step(connection, partial(self._ping, connection))
            self.look()
            if number == AT_ONCE:
                self._callbacks.append(partial(self._ping_some, connections))
                return

    def _ping(self, connection: Connection) -> None:
        if connection.state is CLIENT and connection.unanswered >= self.max_unanswered:
            self.drop(connection, "no_pong")
        else:
            connection.unanswered += 1
            connection.send_frames(PING)

    # The stop

    def begin_stop(self) -> None:
        """Take no more connections; say goodbye to the clients, and nothing to who has no answer on its way."""
        self._stop_listening()
        self.socket.close()
        for connection in self._everyone():
            if self._stop_frame is None or connection.state is VISITOR:
                self.leave(connection)
            else:
                self.step(connection, partial(connection.close, self._stop_frame))

    def is_done(self) -> bool:
        return not self._clients and not self._answered

    def end(self) -> None:
        for connection in self._everyone():
            self.leave(connection)
        self._stop_archive()
        self.socket.close()
        self.close_wakers()


def _address(connection: Connection, upgrade: Upgrade) -> str:
    """Whose client it is: a proxy on this machine tells."""
    host = str(connection.address[0])
    forwarded = "".join(char for char in upgrade.forwarded_for[:100] if char.isprintable())
    return forwarded if forwarded and (host.startswith("127.") or host == "::1") else host
