"""What websocket-server documents for its WebsocketServer, over a loop: for any thread, callbacks too."""

import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from websocket_server import WebsocketServer

from .connection import Connection
from .frames import encode_close, encode_message
from .loop import Loop

SEND_BUFFER = 32 << 10  # bytes; the default lets a client that stopped reading absorb hours of old prices
RECEIVE_BUFFER = 16 << 10  # bytes


class Interface(Loop, WebsocketServer):
    """The library's calls. `_clients` has the open clients; what is done to one is a step of its connection."""

    request_queue_size = 1024
    step: Callable[[Connection, Callable[[], Any]], None]
    drop: Callable[[Connection, str], None]

    def __init__(self, clock: Callable[[], float]):
        Loop.__init__(self, clock)
        self._clients: dict[Connection, dict[str, Any]] = {}
        self._deny_frame = b""  # what deny_new_connections has new clients told
        self._stop_frame: bytes | None = encode_close(1001, "server is stopping")  # None to hang up without

    def bind(self, host: str, port: int) -> None:
        """Raises OSError when the port cannot be had."""
        if ":" in host:
            self.address_family = socket.AF_INET6
        WebsocketServer.__init__(self, host, port)

    def server_activate(self) -> None:
        # Set here, as accepted sockets inherit them.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.socket.setblocking(False)
        super().server_activate()

    @property
    def clients(self) -> list[dict[str, Any]]:
        """The open clients at this moment: {"id": 1, "handler": Connection, "address": (host, port)}."""
        return list(self._clients.copy().values())

    @clients.setter
    def clients(self, _: list[Any]) -> None:
        """The library's __init__ sets an empty list."""

    def call_back(self, name: str, client: dict[str, Any], *message: str | bytes) -> None:
        """Have the loop run one of the modifier's callbacks; what it raises is logged and reaches no client."""

        def run() -> None:
            try:
                getattr(self, name)(client, self, *message)
            except BaseException as error:  # sys.exit() too: it would end the thread of all
                self.warn(name, f"the callback {name} failed", error)

        self._callbacks.append(run)

    def handler_to_client(self, handler: Connection) -> dict[str, Any] | None:
        return self._clients.get(handler)

    def _multicast(self, message: str | bytes) -> None:
        frame = encode_message(message)
        self._for_all(lambda connection: connection.send_frames(frame, messages=1))

    def _disconnect_clients_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        frame = encode_close(status, reason)
        self._for_all(lambda connection: connection.close(frame))

    def _disconnect_clients_abruptly(self) -> None:
        self._for_all(lambda connection: self.drop(connection, "disconnected"))

    def _for_all(self, act: Callable[[Connection], None]) -> None:
        def run() -> None:
            for connection in list(self._clients):
                self.step(connection, partial(act, connection))
                self.look()

        self.call(run)

    def _deny_new_connections(self, status: int, reason: bytes | str) -> None:
        self._deny_frame = encode_close(status, reason)

    def _allow_new_connections(self) -> None:
        self._deny_frame = b""

    def _run_forever(self, threaded: bool) -> None:
        if threaded and self.state == "before":
            self.thread = threading.Thread(target=self.serve_forever, name="server", daemon=True)
            self.thread.start()
            self._started.wait()
        else:
            self.thread = threading.current_thread()
            self.serve_forever()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """The loop, until a shutdown. `poll_interval` is the base class's, and not used."""
        self.run_loop()

    def _shutdown_gracefully(self, status: int = 1000, reason: bytes | str = b"") -> None:
        self._shut_down(encode_close(status, reason))

    def _shutdown_abruptly(self) -> None:
        self._shut_down(None)

    def shutdown(self) -> None:
        self._shut_down(self._stop_frame)

    def server_close(self) -> None:
        self._shut_down(self._stop_frame)

    def _shut_down(self, frame: bytes | None) -> None:
        if self.state == "before":
            self.state = "ended"
            self.end()
            self._started.set()
            self._ended.set()
        else:
            self._stop_frame = frame
            self.ask_to_stop()
