"""One accepted socket: what came and is not whole yet, what must go out and did not fit.

A connection is a visitor until the head of its request is whole. Then it is a client, which speaks
WebSocket, or it gets one answer. Only the server thread calls what is
here, but for `send_message` and `send_close`, which hand themselves over to it. Its methods raise
OSError when the socket is gone: whoever runs a connection's step ends the connection then.
"""

import logging
import selectors
import socket
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from .frames import MessageReader, Opcode, ProtocolError, answer_to_close, encode_close, encode_frame, encode_message
from .web import MAX_REQUEST, Answer, Refusal, Upgrade, find_end, refuse, respond

if TYPE_CHECKING:
    from .server import PriceServer  # whom a connection belongs to: known by name only

RECEIVE_SIZE = 4 << 10  # bytes per connection and turn: small, so that a flood from one leaves turns to the others
SEND_SIZE = 32 << 10  # bytes that small pieces are joined to for one send, about what a send buffer takes
FIN_FOLLOWS = getattr(socket, "MSG_MORE", 0)  # on Linux: the last bytes and the end behind them go in one packet
OWED_AT_ONCE = 256  # assets whose prices are joined for one send
# A connection's state. Closing: its last bytes go out; lingering: they are out, and the other side has yet to hang up.
VISITOR, CLIENT, CLOSING, LINGERING, ENDED = "visitor", "client", "closing", "lingering", "ended"

logger = logging.getLogger(__name__)


class Connection:
    """Of a client it is the 'handler' in the dict that callbacks get."""

    # fmt: off
    __slots__ = ("address", "assets", "busy", "deadline", "held", "inbound", "inbox", "kept", "message_deadline",
                 "owed", "reader", "server", "socket", "state", "torn", "unanswered", "watched")
    # fmt: on

    def __init__(self, server: "PriceServer", sock: socket.socket, address: Any):
        self.server = server
        self.socket = sock
        self.address = address
        self.state = VISITOR
        self.deadline = server.clock() + server.request_timeout  # when housekeeping acts on it; 0 for never
        self.watched = 0  # selector events, the server's own note
        self.inbox: bytearray | None = None  # the request so far
        self.reader: MessageReader | None = None  # while a frame or a message is begun: most clients never need one
        self.message_deadline = 0.0  # for that; 0 for none
        self.busy = False  # a callback has to hear a message before the next one is read
        self.inbound = 0  # bytes in inbox or reader
        self.kept: deque[bytes] | tuple[()] = ()  # pieces that must go out before anything else
        self.torn = 0  # bytes of the first of them that are out already
        self.owed: tuple[str, ...] = ()  # assets whose current price has to follow the kept pieces
        self.assets: tuple[str, ...] = ()  # what a client follows, in the order tracked
        self.unanswered = 0  # pings since the last pong
        self.held = 0  # bytes in kept, inbox and reader

    # What the other side gets

    def send_message(self, message: str | bytes) -> None:
        """Queue a text (str) or binary (bytes) message behind what is queued already; any thread may call this.

        A client with over 1 MiB queued is dropped; for one that has left it does nothing.
        """
        frame = encode_message(message)
        self.server.call(lambda: self.server.step(self, lambda: self.send_frames(frame, messages=1)))

    def send_close(self, status: int = 1000, reason: bytes | str = b"") -> None:
        """Queue a close frame and hang up behind it; any thread may call this.

        Raises ValueError for a reason over 123 bytes of UTF-8.
        """
        frame = encode_close(status, reason)
        self.server.call(lambda: self.server.step(self, lambda: self.close(frame)))

    def send_frames(self, frames: bytes, messages: int = 0) -> None:
        """Send whole frames now, or as soon as the socket takes them."""
        if self.state is CLIENT:
            self.keep(frames)
            self.server.messages_sent += messages
            self.flush()
            if self.held - self.inbound > self.server.max_queue:
                self.server.drop(self, "queue_full")

    def close(self, frame: bytes) -> None:
        """Send a close frame as the last."""
        if self.state is CLIENT:
            self.end([frame], self.server.close_timeout)

    def answer(self, answer: Answer) -> None:
        """Send an HTTP answer as the last."""
        if answer.refused:
            self.server.note_refused(answer.refused)
        size = sum(map(len, answer.pieces))
        self.end(answer.pieces, self.server.take_timeout + size / self.server.take_rate)

    def end(self, pieces: Iterable[bytes], seconds: float) -> None:
        """The one way to an end: the last bytes, nothing behind them, and so long until both sides have hung up."""
        self.state = CLOSING
        self.owed = ()
        self._forget_inbound()
        for piece in pieces:
            self.keep(piece)
        self.deadline = self.server.clock() + seconds
        self.flush()

    def deliver(self, assets: tuple[str, ...], sent: int = 0) -> int:
        """A poll's frames of `assets`, of which the socket took `sent` bytes: keep and owe the rest.

        Returns how many messages are begun: only the end of the client can stop those.
        """
        if self.state is not CLIENT:
            return 0
        if self.kept or self.owed:
            if len(self.owed) < len(self.assets):  # go on where it stopped, not with the first ones for ever
                owed = set(self.owed)  # or 400 assets take a millisecond for each slow reader
                self.owed += tuple(asset for asset in assets if asset not in owed)
            return 0
        begun = self._owe_rest(assets, sent)
        self._settle()
        return begun

    def keep(self, piece: bytes) -> None:
        """Queue a piece."""
        if piece:
            if not self.kept:
                self.kept = deque()
            self.kept.append(piece)  # type: ignore[union-attr]
            self.held += len(piece)
            self.server.hold(piece, 1)

    def flush(self) -> None:
        """Send what is kept, then the current price of each asset owed, as far as the socket takes it."""
        while self.kept:
            data: bytes | memoryview = self.kept[0]
            if self.torn:
                data = memoryview(data)[self.torn :]
            if len(self.kept) > 1 and len(data) < SEND_SIZE:
                data = self._join(data)
            sent = self._send(data)
            self._release_sent(sent)
            if sent < len(data):
                break
        while self.owed and not self.kept:
            assets, later = self.owed[:OWED_AT_ONCE], self.owed[OWED_AT_ONCE:]
            frames = self.server.frames
            sent = self._send(b"".join([frames[asset] for asset in assets]))
            self.server.messages_sent += self._owe_rest(assets, sent)
            self.owed += later
            if not sent:
                break
        self._settle()

    def _join(self, first: bytes | memoryview) -> bytes:
        """The first kept pieces in one, up to a send's worth: a large one is never copied."""
        parts, size = [first], len(first)
        for piece in islice(self.kept, 1, None):
            if size + len(piece) > SEND_SIZE:
                break
            parts.append(piece)
            size += len(piece)
        return b"".join(parts)

    def _send(self, data: bytes | memoryview) -> int:
        """How many bytes the socket took."""
        try:
            return self.socket.send(data, FIN_FOLLOWS if self.state is CLOSING else 0)
        except BlockingIOError:
            return 0

    def _release_sent(self, sent: int) -> None:
        self.torn += sent
        while self.kept and self.torn >= len(self.kept[0]):
            piece = self.kept.popleft()
            self.torn -= len(piece)
            self.held -= len(piece)
            self.server.hold(piece, -1)
        if not self.kept:
            self.kept = ()

    def _owe_rest(self, assets: tuple[str, ...], sent: int) -> int:
        """The socket took `sent` bytes of the frames of `assets`: a torn one goes first, later ones are owed.

        Returns how many are begun.
        """
        for index, asset in enumerate(assets):
            frame = self.server.frames[asset]
            if sent < len(frame):
                if sent:
                    self.keep(frame)
                    self.torn = sent
                self.owed = assets[index + (sent > 0) :]
                return index + (sent > 0)
            sent -= len(frame)
        self.owed = ()
        return len(assets)

    def _settle(self) -> None:
        """After sending: wait for room, or no longer; hang up behind the last bytes."""
        behind = bool(self.kept or self.owed)
        if self.state is CLIENT:
            if behind != bool(self.deadline):
                self.deadline = self.server.clock() + self.server.behind_timeout if behind else 0.0
        elif self.state is CLOSING and not behind:
            self.state = LINGERING
            self.socket.shutdown(socket.SHUT_WR)
            if not self.assets:  # an HTTP answer: behind a close frame the time runs on
                self.deadline = self.server.clock() + self.server.linger_timeout
        # While something is kept nothing is read: so no pongs pile up.
        self.server.watch(self, selectors.EVENT_WRITE if behind else selectors.EVENT_READ)

    # What the other side sends

    def on_readable(self) -> None:
        """Take what came, a turn's worth."""
        if self.busy:
            return
        data = self.socket.recv(RECEIVE_SIZE)
        if not data:
            self.server.leave(self)
        elif self.state is CLIENT:
            self.feed(data)
        elif self.state is VISITOR:
            self._receive_request(data)
        # What comes behind the last bytes is thrown away: closing over it would destroy them.

    def _receive_request(self, data: bytes) -> None:
        if self.inbox is None:
            self.inbox = bytearray()
        self.inbox += data
        end = find_end(self.inbox, self.inbound)
        self._count_inbound(len(self.inbox))
        if (end if end >= 0 else len(self.inbox)) > MAX_REQUEST:
            self.answer(refuse(Refusal(431, f"request of more than {MAX_REQUEST} bytes"), self.server))
        elif end >= 0:
            head, behind = bytes(self.inbox[:end]), bytes(self.inbox[end:])
            self._forget_inbound()
            self._act(respond(head, self.server, self.server.history), behind)

    def _act(self, response: Answer | Upgrade, behind: bytes) -> None:
        if isinstance(response, Answer):
            self.answer(response)
        else:
            self.server.admit(self, response)
            if behind and self.state is CLIENT:
                self.feed(behind)

    def become_client(self, upgrade: Upgrade) -> None:
        """Upgrade: it gets the prices known so far with the answer, and every publish from now on."""
        self.state, self.assets, self.deadline = CLIENT, upgrade.assets, 0.0
        known = tuple(asset for asset in self.assets if asset in self.server.frames)
        sent = self._send(upgrade.head + self.server.snapshot(self.assets))
        if sent >= len(upgrade.head):
            self.server.messages_sent += self._owe_rest(known, sent - len(upgrade.head))
        else:
            self.keep(upgrade.head)
            self.torn, self.owed = sent, known
        self._settle()

    def feed(self, data: bytes) -> None:
        """Take what a client sent."""
        if self.reader is None:
            self.reader = MessageReader()
        self.reader.feed(data)
        self.receive()

    def receive(self) -> None:
        """Answer what came, up to a message, which the callback must hear before the rest is read."""
        self.busy = False
        if self.reader is None or self.state is not CLIENT:
            return
        whole = False
        try:
            for opcode, message in self.reader.read():
                whole = whole or not self.reader.is_fragmented  # a ping between fragments gives these no more time
                if opcode == Opcode.PONG:
                    self.unanswered = 0
                elif opcode == Opcode.PING:  # kept, not sent: one send answers all the pings of a turn
                    self.keep(encode_frame(Opcode.PONG, message))  # type: ignore[arg-type]
                elif opcode == Opcode.CLOSE:
                    self.close(answer_to_close(message))  # type: ignore[arg-type]
                    return
                else:
                    self.busy = True
                    self.server.hear(self, message)
                    break
        except ProtocolError as error:
            logger.debug("client broke the protocol: %s", error)
            self.close(encode_close(error.code, str(error)))
            return
        self._note_unfinished(whole)
        if self.kept:
            self.flush()

    def _note_unfinished(self, whole: bool) -> None:
        """What is begun has a deadline, anew behind each message that became whole."""
        assert self.reader
        self._count_inbound(self.reader.held)
        if self.reader.is_idle:
            self.reader, self.message_deadline = None, 0.0
        elif whole or not self.message_deadline:
            self.message_deadline = self.server.clock() + self.server.message_timeout

    def _count_inbound(self, size: int) -> None:
        change = size - self.inbound
        self.inbound = size
        self.held += change
        self.server.held += change

    def _forget_inbound(self) -> None:
        self._count_inbound(0)
        self.inbox = self.reader = None
        self.message_deadline = 0.0

    def shut(self) -> None:
        """Close the socket and let go of all that is held."""
        self.state = ENDED
        self._forget_inbound()
        for piece in self.kept:
            self.server.hold(piece, -1)
        self.kept, self.owed, self.held = (), (), 0
        try:
            self.socket.close()
        except OSError:
            pass  # of a connection that failed already
