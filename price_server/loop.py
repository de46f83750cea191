"""A selector, and functions handed over by other threads. Knows nothing of clients.

The thread that runs the loop owns everything that its handler serves, so none of it needs a lock. Other threads
hand over functions. While the loop runs, these run in one place, `_between_batches`: never inside one another or in
the middle of another step.
"""

import heapq
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum, auto
from itertools import count
from typing import Any, Protocol

BATCH_EVENTS = 256  # events until functions of other threads have their turn,
BATCH_SECONDS = 0.05  # or seconds, whichever comes first
CALL_TIMEOUT = 10.0  # seconds that another thread waits for its function
STOP_TIMEOUT = 1.0  # seconds that a stop waits until the handler is drained
MAX_SELECT = 0.5  # seconds of one `select`: timers that a test's clock makes due are noticed within them
WARNING_PAUSE = 60.0  # seconds without a kind of problem until it is logged again
BATCH_WINDOW = 60.0  # seconds that the longest batch is remembered

logger = logging.getLogger(__name__)


class LoopState(Enum):
    BEFORE = auto()
    RUNNING = auto()
    ENDED = auto()


class Handler(Protocol):
    """What the loop serves. All of it runs in the loop's thread."""

    def serve(self, data: Any, events: int) -> None: ...  # a socket that was registered with `data` is ready
    def after_events(self) -> None: ...  # every event of one `select` was served
    def begin_stop(self) -> None: ...  # a stop was asked for
    def is_drained(self) -> bool: ...  # whether a stop has nothing left to wait for
    def end(self) -> None: ...  # the loop has ended, also after an error


class Loop:
    """`call_soon`, `call_later`, `run` and `stop`, like asyncio's; and `call`, which waits.

    state: before the start and after the end, `call` runs a function where it is called.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.state = LoopState.BEFORE
        self.started, self.ended = threading.Event(), threading.Event()
        self._thread_id = threading.get_ident()
        self._once = threading.Lock()  # whoever gets it runs the loop, or ends one that never ran
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], Any]]] = []  # a heap: when, number, function
        self._timer_numbers = count()
        self._stop_requested = False
        self._stop_deadline: float | None = None  # monotonic time; None until the stop has begun
        self._busy_since = 0.0
        self._batches: deque[tuple[float, float]] = deque()  # (when, seconds), each longer than all later ones
        self._selector = selectors.DefaultSelector()
        self.register, self.modify = self._selector.register, self._selector.modify
        self.unregister = self._selector.unregister
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self.register(self._wake_receiver, selectors.EVENT_READ, self)

    # For any thread

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the loop's thread, and return what it returns or raise what it raises.

        Raises TimeoutError when it has not begun after 10 s; it is withdrawn then. One that has begun has 10 s more.
        In the loop's own thread it runs immediately.
        """
        if self.state is not LoopState.RUNNING or self.in_loop_thread():
            return function()
        future: Future[Any] = Future()
        self._queue(lambda: _complete(future, function))
        try:
            return future.result(CALL_TIMEOUT)
        except TimeoutError:
            if future.cancel():
                what = f"the server thread has been busy for {CALL_TIMEOUT:g} s: does a callback block it?"
                raise TimeoutError(what) from None
            return future.result(CALL_TIMEOUT)  # it has begun

    def call_soon(self, function: Callable[[], Any]) -> None:
        """Have a function run in the loop's thread, and do not wait. What it raises is logged.

        Before the start, the thread that made the loop runs it immediately; a function of another waits for the start.
        """
        if self.state is LoopState.ENDED or (self.state is LoopState.BEFORE and self.in_loop_thread()):
            _log_errors(function)
        else:
            self._queue(lambda: _log_errors(function))

    def call_later(self, seconds: float, function: Callable[[], Any]) -> None:
        """Have a function run in the loop's thread after these seconds. For that thread, or before the start."""
        heapq.heappush(self._timers, (self.clock() + seconds, next(self._timer_numbers), function))

    def stop(self) -> None:
        """Have the handler begin its stop, and the loop end when the handler is drained, or after a second.

        The stop begins before any function that is queued. A caller in another thread waits for the end, at most 2 s.
        """
        self.request_stop()
        if not self.in_loop_thread():
            self.ended.wait(2 * STOP_TIMEOUT)

    def request_stop(self) -> None:
        """`stop` without waiting; a signal handler may call it."""
        self._stop_requested = True
        self._wake()

    def in_loop_thread(self) -> bool:
        return threading.get_ident() == self._thread_id

    def longest_batch(self) -> float:
        """Seconds of the longest batch of the last 60 s: no function of another thread could run meanwhile."""
        oldest = time.monotonic() - BATCH_WINDOW
        return next((seconds for when, seconds in self._batches if when >= oldest), 0.0)

    def _queue(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        if not self.in_loop_thread():
            self._wake()
        if self.state is LoopState.ENDED:
            self._release_calls()  # the loop ended meanwhile, and may have missed this call

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            pass  # full, so the loop wakes anyway; or closed, so it has ended

    # The loop

    def run(self, handler: Handler) -> None:
        """Serve the handler until a stop. One round: wait, run what was handed over, serve the events in batches."""
        if not self._once.acquire(blocking=False):
            raise RuntimeError("this server has run already: make another one")
        self._thread_id = threading.get_ident()
        self.state = LoopState.RUNNING
        self.started.set()
        try:
            while self._stop_deadline is None or not (handler.is_drained() or time.monotonic() >= self._stop_deadline):
                events = self._selector.select(self._select_timeout())
                self._busy_since = time.monotonic()
                self._between_batches(handler)
                self._serve(handler, events)
                handler.after_events()
                self._note_batch()
        except Exception:
            logger.critical("the server thread failed", exc_info=True)
        finally:
            self._end(handler)

    def close(self, handler: Handler) -> None:
        """End a loop that never ran; stop one that another thread has just started."""
        if self._once.acquire(blocking=False):
            self._end(handler)
        else:
            self.stop()

    def _select_timeout(self) -> float:
        if self._calls or (self._stop_requested and self._stop_deadline is None):
            return 0.0
        waits = [MAX_SELECT]
        if self._timers:
            waits.append(self._timers[0][0] - self.clock())
        if self._stop_deadline is not None:
            waits.append(self._stop_deadline - time.monotonic())
        return max(min(waits), 0.0)

    def _serve(self, handler: Handler, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Walk all events: selecting again would return the same ones first (level-triggered) and starve the rest."""
        for number, (key, mask) in enumerate(events, 1):
            if key.data is self:
                self._wake_receiver.recv(4096)
            else:
                handler.serve(key.data, mask)
            if number % BATCH_EVENTS == 0 or time.monotonic() > self._busy_since + BATCH_SECONDS:
                self._between_batches(handler)

    def _between_batches(self, handler: Handler) -> None:
        """The one place where functions of other threads and timers run; those that they add wait for the next time."""
        for _ in range(len(self._calls)):
            self._begin_requested_stop(handler)
            self._calls.popleft()()
            self._note_batch()
        self._begin_requested_stop(handler)
        now = self.clock()
        for _ in range(sum(when <= now for when, *_ in self._timers)):
            _log_errors(heapq.heappop(self._timers)[2])
        self._note_batch()

    def _begin_requested_stop(self, handler: Handler) -> None:
        if self._stop_requested and self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + STOP_TIMEOUT  # not by `clock`, which may be a test's
            handler.begin_stop()

    def _note_batch(self) -> None:
        now = time.monotonic()
        seconds, self._busy_since = now - self._busy_since, now
        while self._batches and self._batches[-1][1] <= seconds:
            self._batches.pop()
        self._batches.append((now, seconds))
        if self._batches[0][0] < now - BATCH_WINDOW:
            self._batches.popleft()

    def _end(self, handler: Handler) -> None:
        try:
            handler.end()
        finally:
            self.state = LoopState.ENDED
            self._release_calls()
            self._selector.close()
            self._wake_receiver.close()
            self._wake_sender.close()
            self.started.set()
            self.ended.set()

    def _release_calls(self) -> None:
        """Run the calls left at the end, because their callers wait. Two threads may do this at the same time."""
        try:
            while True:
                self._calls.popleft()()
        except IndexError:
            pass


class RateLimitedLog:
    """Logs a problem that a peer can cause at will: once, and again only after a minute without it."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._last: dict[str, float] = {}  # when each kind of problem last occurred

    def warn(self, kind: str, message: str, error: BaseException | None = None) -> None:
        now = self._clock()
        if now - self._last.get(kind, -WARNING_PAUSE) >= WARNING_PAUSE:
            logger.log(logging.ERROR if error else logging.WARNING, "%s", message, exc_info=error)
        self._last[kind] = now


def _complete(future: "Future[Any]", function: Callable[[], Any]) -> None:
    """Run a function for a caller that waits, unless that gave up."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)


def _log_errors(function: Callable[[], Any]) -> None:
    try:
        function()
    except Exception:
        logger.exception("a function handed over to the server thread failed")
