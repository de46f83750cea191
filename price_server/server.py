"""PriceServer, a WebsocketServer: what other threads may call.

Each method hands a function to the loop, whose thread owns the connections, the prices and the counters; see
"The threads" in tracker.py. What the methods do is in hub.py.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from websocket_server import WebsocketServer

from . import clocks
from .archive import NOTICE, Archive
from .commands import apply_command, encode_error, is_command
from .connection import Connection
from .frames import encode_close
from .history import History
from .hub import OWN_FILES, SPARE_VISITORS, Hub
from .loop import Loop, LoopState, RateLimitedLog
from .prices import Price, Prices, Update, split_valid
from .status import Status
from .transport import configure_listener
from .version import __version__
from .web import Site

Client = dict[str, Any]  # {"id": 1, "handler": ClientHandler, "address": (host, port)}

logger = logging.getLogger(__name__)


class PriceServer(WebsocketServer):
    """Sends prices to every client; `run_forever(threaded=True)` starts it.

    assets: ids in the order in which every client gets them. interval: seconds between two polls.
    history_file: keeps the price history across restarts; None for memory only.
    clock: monotonic seconds, for deadlines; age_clock: seconds that go on while the machine sleeps; wall_clock: epoch
    seconds.

    Callbacks run in the server thread, one after the other: one that blocks delays every client. A message is str
    or bytes, as it came; `send_message` sends text for str and binary for bytes.
    Raises OSError when it cannot listen, ValueError when the history file cannot be used or an origin is not one.
    """

    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # on Windows it would let a second server take the same port

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
        history_file: str | None = None,
        pause_when_idle: bool = False,
        clock: Callable[[], float] = time.monotonic,
        age_clock: Callable[[], float] = clocks.boottime,
        wall_clock: Callable[[], float] = time.time,
    ):
        self.assets = tuple(assets)
        self.client_connected = threading.Event()  # set with each new client, for a poller that pauses
        self.on_housekeeping: Callable[[], None] = lambda: None  # called twice a second in the server thread
        self._wall_clock = wall_clock
        self._invalid: set[str] = set()  # assets whose price was dropped, until they have a valid one
        self._prices = Prices(self.assets)
        self._history = History(self.assets, wall_clock)
        self._status = Status(
            self._prices,
            self._history,
            quote=quote,
            source=source,
            interval=interval,
            max_clients=max_clients,
            pause_when_idle=pause_when_idle,
            version=__version__,
            age_clock=age_clock,
            wall_clock=wall_clock,
        )
        self._archive: Archive | None = None
        self._loop = Loop(clock)
        self._log = RateLimitedLog(clock)
        self._hub = self._make_hub(allow_origins)
        self._open(host, port, history_file)

    def _open(self, host: str, port: int, history_file: str | None) -> None:
        """Open the history file and the port; after an error nothing is left open."""
        try:
            if history_file is not None:
                self._open_archive(history_file)
            if ":" in host:
                self.address_family = socket.AF_INET6
            super().__init__(host, port)
            self._hub.start(self.socket)
        except BaseException:
            self._loop.close(self._hub)
            raise

    def _make_hub(self, allow_origins: Iterable[str]) -> Hub:
        return Hub(
            self._loop,
            self._prices,
            self._status,
            Site(self._prices, self._history, self._status, allow_origins=allow_origins),
            log=self._log,
            call_back=self._call_back,
            make_handler=lambda connection: ClientHandler(self, connection),
            on_housekeeping=lambda: self.on_housekeeping(),  # which may be set later
            on_end=self._stop_archive,
        )

    # Prices

    def publish(self, updates: Iterable[Update], expect_all: bool = False) -> list[str]:
        """Send prices to every client, and return when that is done; no client can block it. Any thread.

        Returns the assets that were sent. An update that is not valid (see prices.py) is dropped, and its asset named
        in the log once, until it has a valid price again; with expect_all, an asset without an update is named too.
        Raises TimeoutError when a callback blocks the server thread.
        """
        valid, faults = split_valid(updates, self.assets, expect_all)
        sent: list[str] = self._loop.call(lambda: self._publish(valid, faults))
        return sent

    def _publish(self, prices: dict[str, Price], faults: dict[str, str]) -> list[str]:
        self._note_faults(prices, faults)
        if prices:
            self._prices.remember(prices)
            self._status.note_success()
            self._hub.fan_out(prices)
            texts = {asset: json.dumps(price.price) for asset, price in prices.items()}
            poll = self._history.add(texts, self._wall_clock())
            if self._archive:
                self._archive.write(poll)
        return list(prices)

    def _note_faults(self, valid: dict[str, Price], faults: dict[str, str]) -> None:
        new = [f"{asset}: {fault}" for asset, fault in faults.items() if asset not in self._invalid]
        back = [asset for asset in valid if asset in self._invalid]
        self._invalid = self._invalid.union(faults).difference(back)
        if new:
            logger.warning("no valid price for %s; clients keep the last one", ", ".join(new)[:1000])
        if back:
            logger.log(NOTICE, "a valid price again for %s", ", ".join(back))

    def report_failure(self, reason: str, cause: str = "other") -> None:
        """Note a poll that brought no prices; /healthz shows `reason` until one succeeds. Any thread."""
        self._loop.call_soon(lambda: self._status.note_failure(reason, cause))

    def note_poll(self, seconds: float, credits_used: int | None, credits_left: int | None) -> None:
        """Note how long a poll took, and CoinAPI's credits; it ends a pause. Any thread."""
        self._loop.call_soon(lambda: self._status.note_poll(seconds, credits_used, credits_left))

    def pause(self) -> None:
        """Note that there are no polls while no client is connected. Any thread."""
        self._loop.call_soon(lambda: setattr(self._status, "paused", True))

    @property
    def last_error(self) -> str | None:
        """Why the last poll brought no prices; None when it brought some."""
        return self._status.last_error

    # Clients

    @property
    def client_count(self) -> int:
        return self._status.client_count

    @property
    def clients(self) -> list[Client]:
        """The connected clients at this moment."""
        clients: list[Client] = self._loop.call(lambda: list(self._hub.clients.values()))
        return clients

    @clients.setter
    def clients(self, _: list[Client]) -> None:
        """The library's __init__ sets an empty list."""

    def follow(self, client: Client, assets: Iterable[str]) -> None:
        """Set what a client follows, and send it the current price of what is new to it. Any thread.

        Does nothing for a client that has left. Raises ValueError for an asset that is not tracked.
        """
        followed = self._prices.choose(assets)
        self._loop.call(lambda: self._hub.follow(client["handler"].connection, followed))

    def message_received(self, client: Client, server: WebsocketServer, message: str | bytes) -> None:
        """What a client's message does until `set_fn_message_received` sets something else: see commands.py."""
        if not is_command(message):
            return
        connection = client["handler"].connection
        try:
            followed = apply_command(str(message), connection.assets, self._prices)
        except ValueError as error:
            self._hub.send(connection, encode_error(error))
        else:
            self._hub.follow(connection, followed)

    def _call_back(self, name: str, client: Client, *message: str | bytes) -> None:
        """Run one of the callbacks of user code. What it raises is logged, and reaches no client."""
        if name == "new_client":
            self.client_connected.set()
        try:
            getattr(self, name)(client, self, *message)
        except BaseException as error:  # sys.exit() too: it would end the thread that serves every client
            self._log.warn(name, f"the callback {name} failed", error)

    # Overrides of what websocket-server's public methods call

    def handler_to_client(self, handler: "ClientHandler") -> Client | None:
        return self._hub.clients.get(handler.connection)

    def _multicast(self, message: str | bytes) -> None:
        self._loop.call(lambda: self._hub.send_to_all(message))

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        close = _checked_close(status, reason)
        self._loop.call(lambda: self._hub.disconnect(list(self._hub.clients), *close))

    def _disconnect_clients_abruptly(self) -> None:
        self._loop.call(self._hub.drop_all)

    def _deny_new_connections(self, status: int, reason: bytes | str) -> None:
        self._hub.deny_close = _checked_close(status, reason)

    def _allow_new_connections(self) -> None:
        self._hub.deny_close = None

    # Start and stop

    @staticmethod
    def files_needed(max_clients: int) -> int:
        """File descriptors that a server needs for this number of clients."""
        return max_clients + OWN_FILES + SPARE_VISITORS

    @property
    def has_ended(self) -> bool:
        return self._loop.state is LoopState.ENDED

    def server_activate(self) -> None:
        configure_listener(self.socket)
        super().server_activate()

    def _run_forever(self, threaded: bool) -> None:
        if threaded and self._loop.state is LoopState.BEFORE:
            self.thread = threading.Thread(target=self.serve_forever, name="server", daemon=True)
            self.thread.start()
            self._loop.started.wait()
        else:
            self.thread = threading.current_thread()
            self.serve_forever()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """The loop, until a shutdown. `poll_interval` is the base class's, and not used."""
        restore = _stop_on_interrupt(self._loop.request_stop)
        try:
            self._loop.run(self._hub)
        finally:
            restore()

    def _shutdown_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        self._shut_down(_checked_close(status, reason))

    def _shutdown_abruptly(self) -> None:
        self._shut_down(None)

    def shutdown(self) -> None:
        self._shut_down(self._hub.stop_close)

    def server_close(self) -> None:
        """Also called by the base class when it cannot bind its socket."""
        self._shut_down(self._hub.stop_close)
        if self.has_ended:
            self.socket.close()  # even one that never listened

    def _shut_down(self, close: tuple[int, str | bytes] | None) -> None:
        """close: status and reason of the close that every client gets; None for none."""
        self._hub.stop_close = close
        if self._loop.state is LoopState.BEFORE:
            self._loop.close(self._hub)
        else:
            self._loop.stop()

    def _open_archive(self, file: str) -> None:
        archive = Archive(
            file,
            self._status.source,
            self._status.quote,
            self.assets,
            loaded=lambda step, texts: self._loop.call_soon(lambda: archive.write(self._history.load(step, texts))),
            wall_clock=self._wall_clock,
        )
        self._archive = self._status.archive = archive
        archive.start()

    def _stop_archive(self) -> None:
        if self._archive:
            self._archive.stop()


class ClientHandler:
    """The 'handler' in a client's dict: acts on one client, from any thread. Does nothing for one that has left."""

    __slots__ = ("_server", "connection")

    def __init__(self, server: PriceServer, connection: Connection):
        self._server = server
        self.connection = connection

    def send_message(self, message: str | bytes) -> None:
        """Send a message after the bytes that are pending; a client with over 1 MiB pending is dropped.

        Raises ValueError for bytes to a client of an event stream.
        """
        self._server._loop.call(lambda: self._server._hub.send(self.connection, message))

    def send_close(self, status: int = 1000, reason: str | bytes = b"") -> None:
        """Disconnect the client after the bytes that are pending. ValueError for a reason over 123 bytes of UTF-8."""
        close = _checked_close(status, reason)
        self._server._loop.call(lambda: self._server._hub.disconnect([self.connection], *close))


def _checked_close(status: int, reason: str | bytes) -> tuple[int, str | bytes]:
    """Raises ValueError for a reason over 123 bytes of UTF-8."""
    encode_close(status, reason)
    return status, reason


def _stop_on_interrupt(stop: Callable[[], None]) -> Callable[[], Any]:
    """In the main thread, make ^C a stop: KeyboardInterrupt could end a step half-way. Returns what undoes this."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
        return lambda: None

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, handler)  # a second one ends the program immediately
        stop()

    signal.signal(signal.SIGINT, interrupt)
    return lambda: signal.signal(signal.SIGINT, handler)
