"""PriceServer, a WebsocketServer: the server thread's loop, publish, clients, start and stop.

Only the server thread touches a connection, the latest prices and the counters. What other threads
want of them they hand over as a function, in a queue: that removes the need for locks. The loop
looks at the queue between any two connections that it serves, so they wait for one short step.
"""

import errno
import json
import logging
import selectors
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from websocket_server import WebsocketServer

from .connection import CLIENT, ENDED, VISITOR, WAITING, Connection, Owner
from .figures import Update
from .frames import Opcode, encode_close, encode_frame, encode_message
from .history import History
from .web import Question, Upgrade, answer_history

SEND_BUFFER = 32 << 10  # bytes; the default lets a client that stopped reading absorb hours of old prices
RECEIVE_BUFFER = 16 << 10  # bytes
OWN_FILES = 20  # descriptors that are no connection: logs, listener, selector, history, CoinAPI
SELECT_ROOM = 512  # sockets that Windows' select takes
SHARED_SIZE = 4 << 10  # bytes from which on a piece that several connections keep is counted once
AT_ONCE = 256  # events, or pings, before the loop looks around; 64 arriving connections
BATCH_SECONDS = 0.05  # or so long
WARNING_PAUSE = 60.0  # seconds without a kind of trouble until it is logged again
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


def socket_room() -> float:
    """How many sockets and files this process may have open."""
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):
        return SELECT_ROOM
    try:
        import resource
    except ImportError:  # Windows
        return SELECT_ROOM
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if soft == resource.RLIM_INFINITY else soft


class _Call:
    """A function that another thread has handed over, and what became of it."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error
        self.done.set()


class PriceServer(Owner, WebsocketServer):
    """A WebsocketServer that sends prices; `run_forever(threaded=True)` starts it.

    assets: ids in the order in which every client gets them.
    quote, source, interval (seconds), pause_when_idle: told at /healthz; prices are stale after 3 intervals.
    max_clients: the next one gets 503. allow_origins: web origins that may read; empty for all.
    history_file: where the past is kept; None for memory. clock, wall_clock: steady and epoch seconds.

    Callbacks run in the server thread, one after the other: one that blocks keeps everybody waiting.
    A message is str or bytes, as it came; `send_message` sends text for str and binary for bytes.
    Raises OSError when the port cannot be had, ValueError when the history file cannot be used.
    """

    request_queue_size = 1024
    ping_interval = 20.0  # seconds; under the 60 s after which proxies drop a silent connection
    max_unanswered = 3  # pings, so 60 s; counted, not timed: a machine that slept finds its clients again
    housekeeping_interval = 0.5  # seconds: how late a deadline may be noticed
    call_timeout = 10.0  # seconds that another thread waits for its call
    stop_timeout = 1.0  # seconds that a stop waits for the clients' closes
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
        super().__init__(assets, **figures)
        self.state = "before"  # running, ended: who owns the connections; set by the loop itself
        self._owner = 0  # the server thread's ident
        self._clients: dict[Connection, dict[str, Any]] = {}
        self._visitors: dict[Connection, None] = {}  # whose request is not whole, the oldest first
        self._answered: dict[Connection, Question | None] = {}  # who wait for history's answer, or take one
        self._shared: Counter[int] = Counter()  # by how many connections a large piece is kept
        self._publishes: deque[_Call] = deque()  # go before the other calls
        self._calls: deque[_Call] = deque()
        self._callbacks: deque[Callable[[], Any]] = deque()
        self._publishing = self._calling = False
        self._deny_frame = b""  # what deny_new_connections has new clients told
        self._stop_frame: bytes | None = None
        self._stop_asked = self._stop_begun = False
        self._stop_deadline = 0.0  # real monotonic seconds: whatever clock was given, a stop ends
        self._listening = False
        self._next_check = 0.0
        self._next_ping = self.clock() + self.ping_interval
        self._to_ping: deque[Connection] = deque()
        self._stale = False
        self._warned: dict[str, float] = {}  # when each kind of trouble was last met
        self._started, self._ended = threading.Event(), threading.Event()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self.history = History(self.assets, self.quote, self.source, history_file, self.wall_clock)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            self.history.start()
            WebsocketServer.__init__(self, host, port)
        except BaseException:
            self._close_all()
            raise

    # Prices

    def publish(self, updates: Iterable[Update]) -> None:
        """Send the result of a successful poll to every client, and return then; no client can block it.

        Raises ValueError, and sends nothing, for an asset that is not tracked; TimeoutError when a callback blocks.
        """
        new, frames = self.encode(updates)
        self.call(lambda: self._publish(new, frames), self._publishes)

    def report_failure(self, reason: str) -> None:
        self._hand_over(lambda: super(PriceServer, self).report_failure(reason))
        self.last_error = reason

    def _publish(self, new: dict[str, Update], frames: dict[str, bytes]) -> None:
        self._publishing = True
        try:
            self.remember(new, frames)
            self.counts["messages_sent_total"] += self._send_to_all(frames)
            self.history.add({asset: json.dumps(update.price) for asset, update in new.items()}, self.last_success_time)
        finally:
            self._publishing = False

    def _send_to_all(self, frames: dict[str, bytes]) -> int:
        """How many messages went out. One send for each client: what is added to that counts 8,000 times."""
        parts: dict[tuple[str, ...], tuple[tuple[str, ...], bytes]] = {}  # by what a client follows
        messages = 0
        for connection in list(self._clients):
            if self._calls:
                self._look()
            part = parts.get(connection.assets)
            if part is None:
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

    # What other threads hand over

    def call(self, function: Callable[[], Any], queue: deque[_Call] | None = None) -> Any:
        """Run it in the server thread; what it returns or raises. TimeoutError when it could not begin within 10 s."""
        if self.state != "running" or threading.get_ident() == self._owner:
            return function()
        call = _Call(function)
        queue = self._calls if queue is None else queue
        queue.append(call)
        self._wake()
        if self.state != "running":
            self._release_calls()  # the loop ended meanwhile, and may not have seen this one
        if not call.done.wait(self.call_timeout):
            try:
                queue.remove(call)
            except ValueError:
                call.done.wait(self.call_timeout)  # it has begun
            else:
                raise TimeoutError(f"the server thread is busy for {self.call_timeout:g} s: does a callback block it?")
        if call.error is not None:
            raise call.error
        return call.result

    def _hand_over(self, function: Callable[[], Any]) -> None:
        """Have it run in the server thread, and do not wait for it."""
        if self.state == "running":
            self._calls.append(_Call(function))
            self._wake()
        else:
            function()

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            pass  # full, so the loop wakes anyway; or closed, so it has ended

    def _look(self) -> None:
        """Run as many calls as are queued now. One within a publish or another call waits for its like."""
        if self._publishes and not self._publishing:
            for _ in range(len(self._publishes)):
                self._take_call(self._publishes)
        if self._calls and not self._calling:
            self._calling = True
            for _ in range(len(self._calls)):
                self._take_call(self._calls)
            self._calling = False

    def _take_call(self, queue: deque[_Call]) -> None:
        try:
            queue.popleft().run()
        except IndexError:
            pass  # its caller gave it up

    def _release_calls(self) -> None:
        while self._publishes or self._calls:
            self._take_call(self._publishes)
            self._take_call(self._calls)

    # The loop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """The loop itself, until a shutdown: wait, serve, look around. `poll_interval` is the base class's."""
        if self.state != "before":
            raise RuntimeError("this server ran already: make another")
        self._owner, self._selector = threading.get_ident(), selectors.DefaultSelector()
        self._room = socket_room() - OWN_FILES
        before = self._catch_interrupt()
        self.socket.setblocking(False)
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._wake_receiver)
        self._listen()
        self.state = "running"
        self._started.set()
        try:
            while not self._is_done():
                waiting = not (self._callbacks or self._to_ping or self._calls or self._publishes)
                timeout = max(self._next_check - self.clock(), 0.0) if waiting else 0.0
                self._serve(self._selector.select(min(timeout, self.housekeeping_interval)))
                self._look_around()
        except Exception:
            logger.critical("the server thread failed", exc_info=True)
        finally:
            self._end()
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def _catch_interrupt(self) -> Any:
        """In the main thread ^C is a stop: raised, it could end a step half-way, with a frame torn."""
        if threading.current_thread() is not threading.main_thread():
            return None
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return None

        def stop(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends the program at once
            self._ask_to_stop(encode_close(1001, "server is stopping"))

        return signal.signal(signal.SIGINT, stop)

    def _serve(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        since = time.monotonic()
        for number, (key, mask) in enumerate(events, 1):
            connection = key.data
            if connection is self._wake_receiver:
                connection.recv(4096)
            elif connection is self:
                self._accept()
            elif mask & connection.watched & selectors.EVENT_READ:  # not one that was ended earlier in this batch
                self._step(connection, connection.on_readable)
            elif mask & connection.watched:
                self._step(connection, connection.flush)
            if self._calls or self._publishes:
                self._look()
            if number % AT_ONCE == 0 or time.monotonic() > since + BATCH_SECONDS:
                self._accept()
                self._look_around()
                since = time.monotonic()

    def _look_around(self) -> None:
        """What must not wait for the end of a batch: calls, a stop, the clock, callbacks, pings."""
        self._look()
        if self._stop_asked and not self._stop_begun:
            self._begin_stop()
        now = self.clock()
        if now >= self._next_check:
            self._next_check = now + self.housekeeping_interval
            try:
                self._keep_house(now)
            except Exception:
                self.warn("housekeeping", "housekeeping failed, and goes on", exc_info=True)
        for _ in range(len(self._callbacks)):
            self._callbacks.popleft()()
            self._look()
        for _ in range(min(len(self._to_ping), AT_ONCE)):
            connection = self._to_ping.popleft()
            self._step(connection, partial(self._ping, connection))
            self._look()

    def _step(self, connection: Connection, function: Callable[[], Any]) -> None:
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
        else:
            self.warn("failed", f"a connection failed, and is ended: {error!r}", exc_info=error)
        self.leave(connection)

    def _keep_house(self, now: float) -> None:
        """Deadlines, pings, stale prices."""
        if not self._listening and not self._stop_begun:
            self._listen()
        for connection in [*self._visitors, *self._answered, *self._clients]:
            if self._calls or self._publishes:
                self._look()
            if 0 < connection.deadline < now or 0 < connection.message_deadline < now:
                self._step(connection, partial(self._be_late, connection))
        if now >= self._next_ping:
            self._next_ping = now + self.ping_interval
            self._to_ping.extend(self._clients)
        stale = self.status() == "stale"
        if stale and not self._stale:
            logger.warning("prices are stale: no successful poll for %.0f s", self.age() or 0)
        self._stale = stale
        self.service_actions()

    def _be_late(self, connection: Connection) -> None:
        if connection.state is WAITING:
            self._answer_question(connection, None)
        elif connection.state is CLIENT:
            connection.drop("behind" if connection.deadline else "unfinished")
        elif connection in self._clients:
            connection.drop("no_close")
        else:
            self.leave(connection)

    def _ping(self, connection: Connection) -> None:
        if connection.state is CLIENT:
            if connection.unanswered >= self.max_unanswered:
                connection.drop("no_pong")
            else:
                connection.unanswered += 1
                connection.send_frames(encode_frame(Opcode.PING, b""))

    # Connections come and go

    def server_activate(self) -> None:
        # Set here, as accepted sockets inherit them.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        super().server_activate()

    def _listen(self) -> None:
        self._selector.register(self.socket, selectors.EVENT_READ, self)
        self._listening = True

    def _accept(self) -> None:
        for _ in range(AT_ONCE // 8 if self._listening else 0):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_DESCRIPTOR:
                    # It stays in the kernel's queue, so select would return at once until one is free: no spinning.
                    self._selector.unregister(self.socket)
                    self._listening = False
                    self.warn("exhausted", f"cannot accept clients for now: {error.strerror}")
                return
            sock.setblocking(False)
            if len(self._visitors) + len(self._answered) + len(self._clients) >= self._room:
                for oldest in [*self._visitors, *self._answered][:1]:
                    self.leave(oldest)
            connection = Connection(self, sock, address)
            self._visitors[connection] = None
            self._step(connection, connection.on_readable)  # the request is mostly here by now
            if connection.state is VISITOR:
                self.watch(connection, selectors.EVENT_READ)
            if self._calls or self._publishes:
                self._look()

    def ranges(self) -> Sequence[Any]:
        return self.history.ranges

    def admit(self, connection: Connection, upgrade: Upgrade) -> None:
        if self._deny_frame:
            self.count_refused("denied")
            connection.end([upgrade.head, self._deny_frame], self.close_timeout)
            return
        del self._visitors[connection]
        self.id_counter += 1
        client = {"id": self.id_counter, "handler": connection, "address": connection.address}
        self._clients[connection] = client
        self.client_count = len(self._clients)
        self._callbacks.append(partial(self._call_back, "new_client", client))
        self.client_came.set()
        logger.debug("client %s came, clients connected: %d", _address(connection, upgrade), self.client_count)
        connection.become_client(upgrade)
        if self.client_count >= self.max_clients:
            self.warn("full", f"full, clients connected: {self.client_count}; the next ones get 503")

    def ask_history(self, connection: Connection, question: Question) -> None:
        self._visitors.pop(connection)
        self._answered[connection] = question

        def answer(pieces: list[bytes] | None) -> None:  # in the history thread
            self._hand_over(lambda: self._step(connection, partial(self._answer_question, connection, pieces)))

        asked = self.history.ask(question.range_name, question.assets, answer, lambda: connection.state is WAITING)
        if not asked:
            self._answer_question(connection, None)

    def _answer_question(self, connection: Connection, pieces: list[bytes] | None) -> None:
        question = self._answered.get(connection)
        if question is not None and connection.state is WAITING:
            connection.answer(answer_history(question, self, pieces))

    def hear(self, connection: Connection, message: str | bytes) -> None:
        self._callbacks.append(partial(self._call_back, "message_received", self._clients[connection], message))
        self._callbacks.append(partial(self._step, connection, connection.receive))

    def _call_back(self, name: str, client: dict[str, Any], *message: str | bytes) -> None:
        """Run one of the modifier's callbacks; what it raises is logged and reaches no client."""
        try:
            getattr(self, name)(client, self, *message)
        except BaseException as error:  # sys.exit() too: it would end the thread of all
            self.warn(name, f"the callback {name} failed", exc_info=error)

    def watch(self, connection: Connection, events: int) -> None:
        if connection.watched == events or connection.state is ENDED:
            return
        if not connection.watched:
            self._selector.register(connection.socket, events, connection)
        elif events:
            self._selector.modify(connection.socket, events, connection)
        else:
            self._selector.unregister(connection.socket)
        connection.watched = events

    def leave(self, connection: Connection) -> None:
        if connection.state is ENDED:
            return
        if connection.watched:
            self._selector.unregister(connection.socket)
            connection.watched = 0
        connection.shut()
        self._visitors.pop(connection, None)
        self._answered.pop(connection, None)
        client = self._clients.pop(connection, None)
        if client is not None:
            self.client_count = len(self._clients)
            self._callbacks.append(partial(self._call_back, "client_left", client))
            logger.debug("client left, clients connected: %d", self.client_count)

    def hold(self, piece: bytes) -> None:
        if len(piece) >= SHARED_SIZE:
            self._shared[id(piece)] += 1
            if self._shared[id(piece)] > 1:
                return
        self.held += len(piece)

    def release(self, piece: bytes) -> None:
        if len(piece) >= SHARED_SIZE:
            self._shared[id(piece)] -= 1
            if self._shared[id(piece)]:
                return
            del self._shared[id(piece)]
        self.held -= len(piece)

    def _drop_largest(self) -> None:
        self.warn("memory", f"over {self.max_held} bytes wait for connections: the largest ones are dropped")
        everyone = [*self._visitors, *self._answered, *self._clients]
        for connection in sorted(everyone, key=lambda each: each.held, reverse=True):
            if self.held <= self.max_held:
                return
            if connection in self._clients:
                connection.drop("memory")
            else:
                self.leave(connection)

    def warn(self, kind: str, message: str, exc_info: Any = None) -> None:
        """Log trouble that clients or callbacks can cause: once, and again only after a minute without it."""
        now = self.clock()
        if now - self._warned.get(kind, -WARNING_PAUSE) >= WARNING_PAUSE:
            logger.log(logging.ERROR if exc_info else logging.WARNING, "%s", message, exc_info=exc_info)
        self._warned[kind] = now

    # The library's interface

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The open clients at this moment: {"id": 1, "handler": Connection, "address": (host, port)}."""
        return list(self._clients.copy().values())

    @clients.setter
    def clients(self, _: list[Any]) -> None:
        """The library's __init__ sets an empty list."""

    def handler_to_client(self, handler: Connection) -> dict[str, Any] | None:
        return self._clients.get(handler)

    def _multicast(self, message: str | bytes) -> None:
        frame = encode_message(message)
        self._for_all(lambda connection: connection.send_frames(frame, messages=1))

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        frame = encode_close(status, reason)
        self._for_all(lambda connection: connection.close(frame))

    def _disconnect_clients_abruptly(self) -> None:
        self._for_all(lambda connection: connection.drop("disconnected"))

    def _for_all(self, act: Callable[[Connection], None]) -> None:
        def run() -> None:
            for connection in list(self._clients):
                self._step(connection, partial(act, connection))
                self._look()

        self.call(run)

    def _deny_new_connections(self, status: int, reason: bytes | str) -> None:
        self._deny_frame = encode_close(status, reason)

    def _allow_new_connections(self) -> None:
        self._deny_frame = b""

    # Start and stop

    def _run_forever(self, threaded: bool) -> None:
        if threaded:
            self.thread = threading.Thread(target=self.serve_forever, name="server", daemon=True)
            self.thread.start()
            self._started.wait()
        else:
            self.thread = threading.current_thread()
            self.serve_forever()

    def _shutdown_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        self._ask_to_stop(encode_close(status, reason))
        self._wait_for_end()

    def _shutdown_abruptly(self) -> None:
        self._ask_to_stop(None)
        self._wait_for_end()

    def shutdown(self) -> None:
        self._shutdown_gracefully(1001, b"server is stopping")

    def server_close(self) -> None:
        """The end of a server that never ran; a running one is shut down."""
        if self.state == "running":
            self.shutdown()
        elif self.state == "before":
            self.state = "ended"
            self._close_all()

    def _ask_to_stop(self, frame: bytes | None) -> None:
        """frame: the close that clients get; None to hang up on them."""
        self._stop_frame, self._stop_asked = frame, True
        self._wake()

    def _wait_for_end(self) -> None:
        if self.state == "before":
            self.server_close()
        elif threading.get_ident() != self._owner:
            self._ended.wait(2 * self.stop_timeout)

    def _begin_stop(self) -> None:
        """Take no more connections; say goodbye to the clients, and nothing to half requests."""
        self._stop_begun = True
        self._stop_deadline = time.monotonic() + self.stop_timeout
        if self._listening:
            self._selector.unregister(self.socket)
            self._listening = False
        self.socket.close()
        for connection in [*self._visitors, *self._clients]:
            if connection in self._visitors or self._stop_frame is None:
                self.leave(connection)
            else:
                self._step(connection, partial(connection.close, self._stop_frame))
        for connection in list(self._answered):
            if connection.state is WAITING:
                self.leave(connection)

    def _is_done(self) -> bool:
        if not self._stop_begun:
            return False
        return not (self._clients or self._answered) or time.monotonic() >= self._stop_deadline

    def _end(self) -> None:
        for connection in [*self._visitors, *self._answered, *self._clients]:
            self.leave(connection)
        while self._callbacks:
            self._callbacks.popleft()()
        self.state = "ended"
        self._release_calls()
        self._close_all()
        self._selector.close()
        self._started.set()
        self._ended.set()

    def _close_all(self) -> None:
        self.history.stop()
        if hasattr(self, "socket"):
            self.socket.close()
        self._wake_receiver.close()
        self._wake_sender.close()


def _address(connection: Connection, upgrade: Upgrade) -> str:
    """Whose client it is: a proxy on this machine tells."""
    host = str(connection.address[0])
    forwarded = "".join(char for char in upgrade.forwarded_for[:100] if char.isprintable())
    return forwarded if forwarded and (host.startswith("127.") or host == "::1") else host
