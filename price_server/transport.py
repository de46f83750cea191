"""Moves bytes between sockets and connections: accept, receive, send, what to wait for, room for sockets.

Knows nothing of what the bytes mean. Everything runs in the loop's thread.
"""

import errno
import math
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from .connection import Connection, State
from .loop import Loop, RateLimitedLog

ACCEPTS_PER_ROUND = 256  # with fewer, a long round would let the kernel's queue overflow
ACCEPT_SECONDS = 0.05  # or as many as come in so long: each may bring commands, or ask for the history
CLIENT_TURN = 512  # bytes received from a client in one turn: 85 pings
VISITOR_TURN = 4 << 10  # bytes received from a visitor in one turn: most requests
SEND_TURN = 128 << 10  # bytes sent to one peer in one turn: a fast reader of a large CSV must not delay the others
SEND_BUFFER = 32 << 10  # bytes; by default a client that stopped reading absorbs hours of old prices
RECEIVE_BUFFER = 16 << 10  # bytes
USER_TIMEOUT = 60_000  # milliseconds until a peer that acknowledges nothing is given up, where the system supports it
SELECT_ROOM = 512  # sockets that `select` takes on Windows
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
FIN_FOLLOWS = getattr(socket, "MSG_MORE", 0)  # on Linux: the last bytes and the FIN after them share a packet

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def socket_room() -> tuple[float, str]:
    """How many sockets and files this process may have open, and what limits that."""
    rooms = [(math.inf, "")]
    if issubclass(selectors.DefaultSelector, selectors.SelectSelector):
        rooms.append((SELECT_ROOM, f"select takes {SELECT_ROOM} sockets here"))
    if resource is not None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY:
            rooms.append((files, f"only {files} files may be open (ulimit -n)"))
    return min(rooms)


def configure_listener(listener: socket.socket) -> None:
    """Set what accepted sockets inherit."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
    listener.setblocking(False)


class ConnectionHandler(Protocol):
    """What knows the meaning of the bytes: hub.py."""

    def connection_made(self, connection: Connection) -> None: ...
    def data_received(self, connection: Connection, data: bytes) -> None: ...
    def flush(self, connection: Connection) -> None: ...  # its socket has room
    def close(self, connection: Connection) -> None: ...  # its peer has closed
    def attempt(self, action: Callable[[Connection], None], connection: Connection) -> None: ...


class Transport:
    def __init__(self, loop: Loop, handler: ConnectionHandler, log: RateLimitedLog):
        self._loop, self._handler, self._log = loop, handler, log
        self._listener: socket.socket | None = None
        self._accepting = False

    def serve(self, data: Any, events: int) -> None:
        """A socket is ready. An event of a connection that was closed earlier in the same batch is ignored."""
        if data is None:  # the listener
            return  # `accept` comes after all events: earlier, it would evict visitors whose request has arrived
        if events & data.watched & READ:
            self._handler.attempt(self.receive, data)
        elif events & data.watched:
            self._handler.attempt(self._handler.flush, data)

    # The listener

    def listen(self, listener: socket.socket) -> None:
        self._listener = listener
        self.resume_accepting()

    def resume_accepting(self) -> None:
        if self._listener and not self._accepting:
            self._loop.register(self._listener, READ, None)
            self._accepting = True

    def pause_accepting(self) -> None:
        if self._listener and self._accepting:
            self._loop.unregister(self._listener)
            self._accepting = False

    def close_listener(self) -> None:
        self.pause_accepting()
        if self._listener:
            self._listener.close()
            self._listener = None

    def accept(self) -> None:
        """Accept the connections that wait, at most 256 and for 50 ms, and receive what they have sent."""
        began = time.monotonic()
        for number in range(ACCEPTS_PER_ROUND):
            if not (self._listener and self._accepting) or (number and time.monotonic() > began + ACCEPT_SECONDS):
                return
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_DESCRIPTOR:
                    # The connection stays in the kernel's queue, and every `select` would return immediately.
                    self.pause_accepting()
                    self._log.warn("exhausted", f"cannot accept clients for now: {error.strerror or error}")
                return
            sock.setblocking(False)
            connection = Connection(self._loop.clock())
            connection.socket, connection.address, connection.watched = sock, address, 0
            self._handler.connection_made(connection)
            self._handler.attempt(self.receive, connection)  # usually the request has arrived already
            if connection.state is State.VISITOR:
                self._handler.attempt(self.update_interest, connection)

    # One connection

    def receive(self, connection: Connection) -> None:
        """Receive as much as one turn allows. Raises OSError when the connection is broken."""
        try:
            data = connection.socket.recv(VISITOR_TURN if connection.state is State.VISITOR else CLIENT_TURN)
        except BlockingIOError:
            return
        if data:
            self._handler.data_received(connection, data)
        else:
            self._handler.close(connection)

    def flush(self, connection: Connection) -> int:
        """Send what is pending as far as the socket takes it, in one turn. Returns how many prices were begun.

        After the last bytes this side is shut down. Raises OSError when the connection is broken.
        """
        begun, room, before = 0, SEND_TURN, connection.state
        flags = FIN_FOLLOWS if before is State.CLOSING else 0
        while True:
            data = connection.data_to_send()
            try:
                sent = connection.socket.send(data, flags) if data else 0
            except BlockingIOError:
                sent = 0
            room -= sent
            begun += connection.advance(sent, self._loop.clock())
            if not connection.outbox or sent < len(data) or room <= 0:
                break
        if before is State.CLOSING and connection.state is State.LINGERING:
            connection.socket.shutdown(socket.SHUT_WR)
        self.update_interest(connection)
        return begun

    def update_interest(self, connection: Connection) -> None:
        """Wait for room while something is pending, and for data otherwise: pongs to a slow client must not pile up."""
        before, events = connection.watched, WRITE if connection.outbox else READ
        if before == events or connection.state is State.ENDED:
            return
        connection.watched = 0  # after an error the selector has the socket no more
        if before:
            self._loop.modify(connection.socket, events, connection)
        else:
            self._loop.register(connection.socket, events, connection)
        connection.watched = events

    def close(self, connection: Connection) -> None:
        if connection.watched:
            self._loop.unregister(connection.socket)
            connection.watched = 0
        connection.end()
        with suppress(OSError):  # of a connection that failed already
            connection.socket.close()
