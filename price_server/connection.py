"""One connection as a protocol: bytes in, events out, bytes to send. No I/O, no clock, no server.

A connection is a visitor until the head of its HTTP request is complete. Then it is a client, which follows
the feed, or it gets one response. A response, a refusal, a close frame, a protocol error and a stop end it in
one way: the last bytes are queued and nothing follows them; then this side is shut down, what still arrives
is discarded, and the socket is closed when the peer closes or the deadline passes.

The caller gives the time (`now`, in seconds of any clock) and exhausts the events of `receive_data`.
"""

import logging
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from typing import Any, NamedTuple

from .formats import FORMATS
from .frames import MessageReader, Opcode, ProtocolError, encode_close, encode_frame, reply_to_close
from .outbox import Outbox
from .prices import Feed
from .web import MAX_REQUEST, find_end

REQUEST_TIMEOUT = 10.0  # seconds for a whole request, dribbled or not
SLOW_CLIENT_TIMEOUT = 30.0  # seconds from when a client falls behind until it has caught up
MESSAGE_TIMEOUT = 30.0  # seconds for a message to be complete
DOWNLOAD_TIMEOUT = 30.0  # seconds for the peer to receive an HTTP response, plus its size / DOWNLOAD_RATE
DOWNLOAD_RATE = 8 << 10  # bytes per second
LINGER_TIMEOUT = 2.0  # seconds from the last byte of a response until the peer closes
CLOSE_TIMEOUT = 5.0  # seconds from the last bytes for a client until it closes
SHARED_SIZE = 4 << 10  # bytes; from this size on, a piece that several connections hold is counted once

NO_FEED = Feed(FORMATS[0])  # of a connection that was never a client

logger = logging.getLogger(__name__)


class State(Enum):
    VISITOR = auto()  # its request is not complete
    CLIENT = auto()  # it follows the feed
    CLOSING = auto()  # its last bytes are going out
    LINGERING = auto()  # its last bytes are out, and the peer has yet to close
    ENDED = auto()  # its socket is closed


TRANSITIONS = {
    State.VISITOR: (State.CLIENT, State.CLOSING, State.ENDED),
    State.CLIENT: (State.CLOSING, State.ENDED),
    State.CLOSING: (State.LINGERING, State.ENDED),
    State.LINGERING: (State.ENDED,),
    State.ENDED: (),
}


class RequestHead(NamedTuple):
    """The head of an HTTP request is complete, or over the limit already."""

    head: bytes


class Message(NamedTuple):
    """A client's message is complete: str for text, bytes for binary."""

    data: str | bytes


class Connection:
    """The transport keeps its own fields in `socket`, `address` and `watched`: that saves one object per client."""

    # fmt: off
    __slots__ = ("_deadline", "_inbox", "_message_deadline", "_reader", "_searched", "address", "assets", "feed",
                 "outbox", "socket", "state", "unanswered", "watched")
    # fmt: on

    socket: Any
    address: Any
    watched: int

    def __init__(self, now: float):
        self.state = State.VISITOR
        self.feed = NO_FEED  # of a client: the prices in its format
        self.assets: tuple[str, ...] = ()  # what a client follows, in the order tracked
        self.unanswered = 0  # heartbeats since the last pong
        self.outbox: Outbox | None = None  # while something is pending
        self._inbox: bytearray | None = None  # the request so far
        self._searched = 0  # bytes of it that were searched for the end of the head
        self._reader: MessageReader | None = None  # while a message is begun: most clients never need one
        self._deadline = now + REQUEST_TIMEOUT  # for the request, for catching up, or for the end; 0 for none
        self._message_deadline = 0.0  # for the message that is begun; 0 for none

    # What the peer sends

    def receive_data(self, data: bytes, now: float) -> Iterator[RequestHead | Message]:
        """Take what arrived, and yield what is complete in it. Nothing is half done at a yield.

        After a RequestHead the caller calls `become_client` or `finish_with`.
        """
        if self.state is State.VISITOR:
            head, data = self._read_request(data)
            if not head:
                return
            yield RequestHead(head)
        if self.state is State.CLIENT and self.feed.format.is_two_way and data:
            yield from self._read_messages(data, now)
        # After the last bytes, what arrives is discarded: closing a socket with unread data sends a reset, and the peer
        # could lose those bytes.

    def _read_request(self, data: bytes) -> tuple[bytes, bytes]:
        """Add to the request. Returns its head and what follows it; the head is b"" until it is complete."""
        if self._inbox:
            self._inbox += data
        request = self._inbox or bytearray(data)
        end = find_end(request, self._searched)
        self._searched = len(request)
        if not end and len(request) <= MAX_REQUEST:
            self._inbox = request
            return b"", b""
        self._inbox = None
        end = end or len(request)
        return bytes(request[:end]), bytes(request[end:])

    def _read_messages(self, data: bytes, now: float) -> Iterator[Message]:
        reader = self._reader = self._reader or MessageReader()
        reader.receive_data(data)
        completed = False
        try:
            for opcode, message in reader.read():
                # A ping between fragments does not give these more time.
                completed = completed or not reader.is_fragmented
                if opcode == Opcode.PONG:
                    self.unanswered = 0
                elif opcode == Opcode.PING:  # one send carries the pongs of everything that arrived together
                    self.enqueue(encode_frame(Opcode.PONG, message))  # type: ignore[arg-type]
                elif opcode == Opcode.CLOSE:
                    self.finish_with([reply_to_close(message)], now + CLOSE_TIMEOUT)  # type: ignore[arg-type]
                else:
                    yield Message(message)
                if self.state is not State.CLIENT:
                    return
        except ProtocolError as error:
            logger.debug("a client broke the protocol: %s", error)
            self.finish_with([encode_close(error.code, str(error))], now + CLOSE_TIMEOUT)
            return
        if reader.is_idle:
            self._reader, self._message_deadline = None, 0.0
        elif completed or not self._message_deadline:
            self._message_deadline = now + MESSAGE_TIMEOUT

    # What the peer gets

    def become_client(self, feed: Feed, assets: tuple[str, ...], head: bytes) -> None:
        """Its request was accepted: have the response's head sent, then the latest price of each asset."""
        self._change_state(State.CLIENT)
        self.feed, self.assets, self._deadline = feed, assets, 0.0
        self._open_outbox().enqueue(head)
        self._mark_stale(assets)

    def keep_unsent(self, assets: tuple[str, ...], sent: int, now: float) -> int:
        """The socket took `sent` bytes of the new messages of `assets`; keep the rest.

        Returns how many messages were sent, at least in part: the rest of a partially sent one always follows.
        """
        if self.state is not State.CLIENT:
            return 0
        if self.outbox:
            if len(self.outbox.stale_assets) < len(self.assets):  # otherwise all wait already
                self.outbox.mark_stale(assets)
            return 0
        begun = self._open_outbox().split_unsent(assets, sent, self.feed.messages)
        self._after_send(now)
        return begun

    def follow(self, assets: tuple[str, ...]) -> None:
        """Follow these assets from now on; the current price of each new one is to be sent."""
        if self.state is not State.CLIENT:
            return
        new = set(assets).difference(self.assets)
        self.assets = assets
        self._open_outbox().keep_only(assets)
        self._mark_stale([asset for asset in assets if asset in new])

    def _mark_stale(self, assets: Iterable[str]) -> None:
        """Have the current price of each of these sent, as far as it is known."""
        self._open_outbox().mark_stale([asset for asset in assets if asset in self.feed.messages])

    def enqueue(self, piece: bytes) -> None:
        """Have these bytes sent as they are: whole messages in the client's format."""
        if self.state is State.CLIENT:
            self._open_outbox().enqueue(piece)

    def finish_with(self, pieces: Iterable[bytes], deadline: float) -> None:
        """Have these sent as the last bytes, until `deadline`. A list is added whole; an iterator is read later."""
        self._change_state(State.CLOSING)
        self._inbox = self._reader = None
        self._deadline = deadline
        self._open_outbox().finish_with(pieces)

    def data_to_send(self) -> bytes | memoryview:
        """What the socket should take now; b"" when nothing is pending."""
        return self.outbox.data_to_send(self.feed.messages) if self.outbox else b""

    def advance(self, sent: int, now: float) -> int:
        """The socket took the first `sent` bytes of `data_to_send`. Returns how many prices were begun."""
        begun = self.outbox.advance(sent, self.feed.messages) if self.outbox else 0
        self._after_send(now)
        return begun

    def end(self) -> None:
        """The socket is closed: release everything."""
        if self.state is not State.ENDED:
            self._change_state(State.ENDED)
        self.outbox = self._inbox = self._reader = None
        self._deadline = 0.0

    def _open_outbox(self) -> Outbox:
        if self.outbox is None:
            self.outbox = Outbox()
        return self.outbox

    def _after_send(self, now: float) -> None:
        """After a send: note whether the peer is behind, and whether the last bytes are out."""
        if not self.outbox:
            if self.state is State.CLOSING:
                self._change_state(State.LINGERING)
                if self.feed is NO_FEED:  # a response; after a close frame the time runs on
                    self._deadline = now + LINGER_TIMEOUT
            elif self.state is State.CLIENT and self._deadline:
                self._deadline = 0.0
                if self._message_deadline:  # nothing was read meanwhile
                    self._message_deadline = now + MESSAGE_TIMEOUT
            self.outbox = None
        elif self.state is State.CLIENT and not self._deadline:
            self._deadline = now + SLOW_CLIENT_TIMEOUT

    def _change_state(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a connection cannot go from {self.state.name} to {state.name}")
        self.state = state

    # Limits

    def find_overdue(self, now: float) -> str:
        """The deadline that has passed (behind, unfinished or no_close, as they are counted for clients), or ""."""
        if self.state is State.CLIENT:
            if self._deadline:  # while it is behind, nothing of it is read
                return "behind" if self._deadline < now else ""
            return "unfinished" if 0 < self._message_deadline < now else ""
        if not 0 < self._deadline < now:
            return ""
        size = self.outbox.enqueued if self.outbox and self.feed is NO_FEED else 0
        return "no_close" if self._deadline + size / DOWNLOAD_RATE < now else ""

    def unfinished_bytes(self) -> int:
        """Bytes that arrived of a request or a message that is not complete."""
        return len(self._inbox or b"") + (self._reader.held if self._reader else 0)


def held_bytes(connections: Iterable[Connection]) -> int:
    """Bytes that these connections hold; a large piece that several hold counts once."""
    return max(_running_totals(connections), default=0)


def largest_holders(connections: Iterable[Connection], limit: int) -> list[Connection]:
    """Those without which the others hold at most `limit` bytes. One pass, because there may be thousands."""
    sizes = {connection: held_bytes([connection]) for connection in connections}
    smallest_first = sorted(sizes, key=sizes.__getitem__, reverse=True)[::-1]
    totals = zip(smallest_first, _running_totals(smallest_first), strict=True)
    return [connection for connection, total in totals if total > limit]


def _running_totals(connections: Iterable[Connection]) -> Iterator[int]:
    """Bytes that the first of them holds, the first two, the first three, and so on."""
    held, shared = 0, set()
    for connection in connections:
        held += connection.unfinished_bytes()
        for piece in connection.outbox.pieces if connection.outbox else ():
            if len(piece) < SHARED_SIZE:
                held += len(piece)
            elif id(piece) not in shared:
                shared.add(id(piece))
                held += len(piece)
        yield held
