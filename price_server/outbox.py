"""What is still to be sent to one connection. No I/O.

First come the pieces that must go out as they are: the rest of a message that is partially sent, a pong,
an HTTP response. Then come the stale assets, whose current price is to be sent. Prices never queue up: a client
that was behind for three polls gets the last one.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

SEND_SIZE = 32 << 10  # bytes to which small pieces are joined for one send, about what a send buffer takes
STALE_PER_SEND = 256  # assets whose messages are joined for one send


class Outbox:
    """It is falsy when nothing is pending.

    messages (an argument of several methods): the current message of each asset, in the connection's format.
    """

    __slots__ = ("_counted", "_sent_of_first", "_upcoming", "enqueued", "pieces", "size", "stale_assets")

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self._sent_of_first = 0  # bytes of the first piece that are out already
        self._upcoming: Iterator[bytes] = iter(())  # pieces of an HTTP body, made when they are read
        self.stale_assets: tuple[str, ...] = ()
        self.size = 0  # bytes in pieces
        self.enqueued = 0  # bytes that were ever in pieces: a large download has more time
        self._counted = 0  # bytes of these that `take_uncounted` has returned

    def __bool__(self) -> bool:
        return bool(self.pieces or self.stale_assets)

    @property
    def unsent(self) -> int:
        """Bytes in pieces that the socket has not taken yet."""
        return self.size - self._sent_of_first

    def enqueue(self, piece: bytes) -> None:
        if piece:
            self.pieces.append(piece)
            self.size += len(piece)
            self.enqueued += len(piece)

    def finish_with(self, pieces: Iterable[bytes]) -> None:
        """Add the last bytes: nothing follows them, and no stale price goes before them.

        A list is added whole; any other iterable is read as it is sent.
        """
        self.stale_assets = ()
        if isinstance(pieces, list):
            for piece in pieces:
                self.enqueue(piece)
        else:
            self._upcoming = iter(pieces)
        self._take_upcoming()

    def mark_stale(self, assets: Iterable[str]) -> None:
        """Have the current price of these assets sent after those that wait already: each asset gets its turn."""
        waiting = set(self.stale_assets)  # a set, because 400 assets would take a millisecond for each slow client
        self.stale_assets += tuple([asset for asset in assets if asset not in waiting] if waiting else assets)

    def keep_only(self, assets: Iterable[str]) -> None:
        """Remove the stale assets that are not among these."""
        followed = set(assets)
        self.stale_assets = tuple(asset for asset in self.stale_assets if asset in followed)

    def split_unsent(self, assets: tuple[str, ...], sent: int, messages: Mapping[str, bytes]) -> int:
        """While no piece is pending: the socket took `sent` bytes of the messages of `assets`; keep the rest.

        The rest of the message that is partially sent must go out as it is; the assets after it are stale.
        Returns how many messages are begun.
        """
        for index, asset in enumerate(assets):
            message = messages[asset]
            if sent < len(message):
                if sent:
                    self.enqueue(message)
                    self._sent_of_first = sent
                begun = index + (sent > 0)
                self.stale_assets = assets[begun:]
                return begun
            sent -= len(message)
        self.stale_assets = ()
        return len(assets)

    def data_to_send(self, messages: Mapping[str, bytes]) -> bytes | memoryview:
        """The bytes for the next send; b"" when nothing is pending."""
        while self.unsent < SEND_SIZE and self._take_upcoming():
            pass
        parts: list[bytes | memoryview] = []
        room = SEND_SIZE
        for piece in self.pieces:
            part = piece if parts else memoryview(piece)[self._sent_of_first :]
            room -= len(part)
            if room < 0:
                return b"".join(parts) if parts else part  # a large piece is not copied
            parts.append(part)
        parts += [messages[asset] for asset in self.stale_assets[:STALE_PER_SEND]]
        return b"".join(parts)

    def advance(self, sent: int, messages: Mapping[str, bytes]) -> int:
        """The socket took the first `sent` bytes of `data_to_send`. Returns how many stale messages are begun."""
        self._sent_of_first += sent
        while self.pieces and self._sent_of_first >= len(self.pieces[0]):
            piece = self.pieces.popleft()
            self._sent_of_first -= len(piece)
            self.size -= len(piece)
        if self.pieces or self._take_upcoming() or not self.stale_assets:
            return 0
        sent, self._sent_of_first = self._sent_of_first, 0
        later = self.stale_assets[STALE_PER_SEND:]
        begun = self.split_unsent(self.stale_assets[:STALE_PER_SEND], sent, messages)
        self.stale_assets += later
        return begun

    def take_uncounted(self) -> int:
        """Bytes that were added to `pieces` since this was last asked."""
        uncounted, self._counted = self.enqueued - self._counted, self.enqueued
        return uncounted

    def _take_upcoming(self) -> bool:
        """Add the next piece of the body. Returns whether there was one."""
        for piece in self._upcoming:
            if piece:
                self.enqueue(piece)
                return True
        return False
