"""One thread that owns everything that can block, and the functions that other threads hand to it.

That removes the need for locks around a connection, the prices and the counters. What is handed over
waits in a queue, at which the loop looks between any two connections that it serves: so a caller
waits for one short step at the most.
"""

import logging
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

AT_ONCE = 256  # events of one batch before the loop looks around
BATCH_SECONDS = 0.05  # or so long
WARNING_PAUSE = 60.0  # seconds without a kind of trouble until it is logged again

logger = logging.getLogger(__name__)
Call = tuple[Callable[[], Any], "Future[Any]"]


class Loop:
    """The thread's part of a server, which adds what there is to do: the six functions that stand first here.

    state: before, running, ended. It says who owns, and only the loop itself sets it.
    """

    begin: Callable[[], None]
    serve: Callable[[Any, int], None]  # something registered with the selector is ready
    keep_house: Callable[[float], None]
    begin_stop: Callable[[], None]
    is_done: Callable[[], bool]  # whether nothing is left to wait for in a stop
    end: Callable[[], None]

    housekeeping_interval = 0.5  # seconds: how late a deadline may be noticed
    call_timeout = 10.0  # seconds that another thread waits for its call
    stop_timeout = 1.0  # seconds that a stop waits for the other sides to hang up

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.state = "before"
        self._owner = 0  # the thread's ident
        self._urgent: deque[Call] = deque()  # publishes: they go before the rest, and never within each other
        self._calls: deque[Call] = deque()
        self._callbacks: deque[Callable[[], Any]] = deque()  # run by the loop alone, from inside nothing else
        self._in_urgent = self._in_call = False
        self._next_check = 0.0
        self._stop_asked = self._stop_begun = False
        self._stop_deadline = 0.0
        self._warned: dict[str, float] = {}  # when each kind of trouble was last met
        self._started, self._ended = threading.Event(), threading.Event()
        self.selector = selectors.DefaultSelector()  # here, as it may find no descriptor
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

    # For any thread

    def call(self, function: Callable[[], Any], urgent: bool = False) -> Any:
        """Run it in the loop's thread; what it returns or raises. TimeoutError when it could not begin in time.

        Before the start and after the end it runs where it is called.
        """
        if self.state != "running" or self.is_owner:
            return function()
        future = self._queue(self._urgent if urgent else self._calls, function)
        try:
            return future.result(self.call_timeout)
        except TimeoutError:
            if future.cancel():
                what = f"the server thread is busy for {self.call_timeout:g} s: does a callback block it?"
                raise TimeoutError(what) from None
            return future.result(self.call_timeout)  # it has begun

    def hand_over(self, function: Callable[[], Any]) -> None:
        """Have it run in the loop's thread, and do not wait."""
        if self.state == "running":
            self._queue(self._calls, function)
        else:
            function()

    def _queue(self, queue: "deque[Call]", function: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        queue.append((function, future))
        self._wake()
        if self.state != "running":
            self._release_calls()  # the loop ended meanwhile, and may not have seen this one
        return future

    def ask_to_stop(self) -> None:
        """Have the loop end; from another thread, wait until it has, or twice as long as a stop takes."""
        self._stop_asked = True
        self._wake()
        if not self.is_owner:
            self._ended.wait(2 * self.stop_timeout)

    @property
    def is_owner(self) -> bool:
        return threading.get_ident() == self._owner

    def _wake(self) -> None:
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            pass  # full, so the loop wakes anyway; or closed, so it has ended

    def close_wakers(self) -> None:
        self._wake_receiver.close()
        self._wake_sender.close()
        self.selector.close()

    # The loop

    def run_loop(self) -> None:
        if self.state != "before":
            raise RuntimeError("this server has run already: make another")
        self._owner = threading.get_ident()
        restore = self._catch_interrupt()
        try:
            self.selector.register(self._wake_receiver, selectors.EVENT_READ, self)
            self.begin()
            self.state = "running"
            self._started.set()
            while not (self._stop_begun and (self.is_done() or time.monotonic() >= self._stop_deadline)):
                self._serve_batch(self.selector.select(self._pause()))
                self.look_around()
        except Exception:
            logger.critical("the server thread failed", exc_info=True)
        finally:
            self._finish()
            restore()

    def _finish(self) -> None:
        self._stop_asked = self._stop_begun = True  # also where the loop failed: the callbacks wait for no stop
        try:
            self.end()
            self._run_callbacks()
        finally:
            self.state = "ended"
            self._release_calls()
            self._started.set()
            self._ended.set()

    def _pause(self) -> float:
        """How long to wait for events: not at all while something else is to be done."""
        if self._callbacks or self._calls or self._urgent:
            return 0.0
        left = self._stop_deadline - time.monotonic() if self._stop_begun else self.housekeeping_interval
        return max(min(self._next_check - self.clock(), self.housekeeping_interval, left), 0.0)

    def _serve_batch(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        since = time.monotonic()
        for number, (key, mask) in enumerate(events, 1):
            if key.data is self:
                self._wake_receiver.recv(4096)
            else:
                self.serve(key.data, mask)
            self.look()
            if number % AT_ONCE == 0 or time.monotonic() > since + BATCH_SECONDS:
                self.look_around()
                since = time.monotonic()

    def look_around(self) -> None:
        """What must not wait for the end of a long batch."""
        self.look()
        if self._stop_asked and not self._stop_begun:
            self._stop_begun = True
            self._stop_deadline = time.monotonic() + self.stop_timeout  # real time: whatever clock was given, it ends
            self.begin_stop()
        now = self.clock()
        if now >= self._next_check:
            self._next_check = now + self.housekeeping_interval
            try:
                self.keep_house(now)
            except Exception as error:
                self.warn("housekeeping", "housekeeping failed, and goes on", error)
        self._run_callbacks()

    def _run_callbacks(self) -> None:
        for _ in range(len(self._callbacks)):
            if self._stop_asked and not self._stop_begun:
                return  # a stop goes first: the clients are told, however slow the callbacks are
            self._callbacks.popleft()()
            self.look()

    def look(self) -> None:
        """Run as many calls as are queued now. Within a publish the next one waits, within another call its like.

        Publishes go before the rest, and so does a stop.
        """
        if self._urgent and not self._in_urgent:
            for _ in range(len(self._urgent)):
                self._run_call(*self._urgent.popleft())
        if self._calls and not self._in_call and self._stop_begun == self._stop_asked:
            self._in_call = True
            for _ in range(len(self._calls)):
                self._run_call(*self._calls.popleft())
            self._in_call = False

    def _run_call(self, function: Callable[[], Any], future: "Future[Any]") -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _release_calls(self) -> None:
        """Nobody may wait for a loop that has ended. Both the loop and a caller may be here at once."""
        for queue in (self._urgent, self._calls):
            try:
                while True:
                    self._run_call(*queue.popleft())
            except IndexError:
                pass

    def _catch_interrupt(self) -> Callable[[], Any]:
        """In the main thread ^C is a stop: raised, it could end a step half-way, with a frame torn."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return lambda: None

        def stop(*_: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends the program at once
            self._stop_asked = True
            self._wake()

        signal.signal(signal.SIGINT, stop)
        return lambda: signal.signal(signal.SIGINT, signal.default_int_handler)

    def warn(self, kind: str, message: str, error: BaseException | None = None) -> None:
        """Log trouble that others can cause at will: once, and again only after a minute without it."""
        now = self.clock()
        if now - self._warned.get(kind, -WARNING_PAUSE) >= WARNING_PAUSE:
            logger.log(logging.ERROR if error else logging.WARNING, "%s", message, exc_info=error)
        self._warned[kind] = now
