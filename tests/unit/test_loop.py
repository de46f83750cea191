"""loop: when the functions of other threads run, and how the loop ends.

Most tests give it a selector and a clock that only they advance, and run it in their own thread.
"""

import logging
import selectors
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from price_server.loop import Loop, LoopState, RateLimitedLog

Step = Callable[[], Any]


class World:
    """A clock, and a selector whose `select` returns what a test says, and lets the time pass otherwise."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.selects: list[list[Any]] = []  # what is ready, one list for each select
        self.timeouts: list[float] = []
        self.closed = False

    def clock(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds

    def select(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        self.timeouts.append(timeout)
        if not self.selects:
            self.now += timeout
            return []
        return [(selectors.SelectorKey(0, 0, 1, data), 1) for data in self.selects.pop(0)]

    def register(self, *_: object) -> None: ...
    def modify(self, *_: object) -> None: ...
    def unregister(self, *_: object) -> None: ...
    def close(self) -> None:
        self.closed = True


class Handler:
    """Writes down what the loop does; what a socket was registered with is a function to run."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.drained = True
        self.at_end: Step = lambda: None

    def serve(self, data: Any, events: int) -> None:
        self.seen.append(data() if callable(data) else data)

    def after_events(self) -> None:
        self.seen.append("after")

    def begin_stop(self) -> None:
        self.seen.append("stop")

    def is_drained(self) -> bool:
        return self.drained

    def end(self) -> None:
        self.seen.append("end")
        self.at_end()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr("price_server.loop.time", SimpleNamespace(monotonic=world.clock))
    monkeypatch.setattr("price_server.loop.selectors", SimpleNamespace(DefaultSelector=lambda: world, EVENT_READ=1))
    return world


@pytest.fixture
def handler() -> Handler:
    return Handler()


def make_loop(world: World, handler: Handler, *selects: list[Any]) -> Loop:
    """A loop that is asked to stop when all these have been ready."""
    loop = Loop(world.clock)
    world.selects = [*selects, [loop.request_stop]]
    return loop


def note(handler: Handler, what: str, *then: Step) -> Step:
    def function() -> str:
        handler.seen.append(what)
        for step in then:
            step()
        return what

    return function


@contextmanager
def running(handler: Handler) -> Iterator[Loop]:
    """A real loop in a thread of its own."""
    loop = Loop()
    thread = threading.Thread(target=loop.run, args=(handler,), daemon=True)
    thread.start()
    assert loop.started.wait(10)
    try:
        yield loop
    finally:
        loop.request_stop()
        thread.join(10)
        assert not thread.is_alive()


def throw(error: type[BaseException]) -> None:
    raise error


def in_thread(function: Step) -> Callable[[], Any]:
    """Run it in another thread now; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(10)
        return results[0]

    return wait


# When functions run


def test_functions_run_between_batches_and_those_that_they_add_the_next_time(world: World, handler: Handler) -> None:
    def soon(what: str, *then: Step) -> Step:
        return lambda: loop.call_soon(note(handler, what, *then))

    first = soon("first", soon("second", soon("fourth")), soon("third"))
    loop: Loop = make_loop(world, handler, [first, "event"], ["next"])
    loop.run(handler)
    assert handler.seen == [
        *(None, "event", "after", "first", "next", "after", "second", "third", None, "after"),
        *("stop", "fourth", "after", "end"),
    ]


def test_functions_and_timers_have_their_turn_after_256_events(world: World, handler: Handler) -> None:
    events = [*(["event"] * 100), lambda: loop.call_soon(note(handler, "call")), *(["event"] * 500)]
    loop: Loop = make_loop(world, handler, events)
    loop.run(handler)
    assert (handler.seen.index("call"), handler.seen.index("after")) == (256, 602)


def test_functions_and_timers_have_their_turn_after_50_ms(world: World, handler: Handler) -> None:
    short, long = lambda: world.work(0.02), lambda: world.work(0.04)
    loop: Loop = make_loop(world, handler, [long, "a", short, "b", long, "c", short, "d"])
    loop.call_later(0.03, note(handler, "first"))
    loop.call_later(0.09, note(handler, "second"))
    loop.run(handler)
    assert [each for each in handler.seen if each][:7] == ["a", "first", "b", "c", "second", "d", "after"]


def test_before_the_start_and_after_the_end_functions_run_where_they_are_called(world: World, handler: Handler) -> None:
    loop: Loop = make_loop(world, handler)
    for state in (LoopState.BEFORE, LoopState.ENDED):
        assert loop.state is state
        assert loop.call(threading.get_ident) == threading.get_ident()
        assert in_thread(lambda: loop.call(lambda: "elsewhere"))() == "elsewhere"
        loop.call_soon(note(handler, "soon"))
        assert handler.seen.pop() == "soon"
        with pytest.raises(ZeroDivisionError):
            loop.call(lambda: 1 // 0)
        if state is LoopState.BEFORE:
            loop.run(handler)
            assert (loop.started.is_set(), loop.ended.is_set(), world.closed) == (True, True, True)


def test_what_another_thread_hands_over_before_the_start_waits_for_it(world: World, handler: Handler) -> None:
    loop = make_loop(world, handler)
    in_thread(lambda: loop.call_soon(note(handler, "handed over")))()
    assert handler.seen == []
    loop.run(handler)
    assert handler.seen[0] == "handed over"
    assert world.timeouts[0] == 0.0


def test_timers_run_in_the_order_of_their_time_and_never_early(world: World, handler: Handler) -> None:
    def at(name: str) -> Step:
        return lambda: handler.seen.append((name, world.now))

    loop = Loop(world.clock)
    for seconds, name in ((2.25, "c"), (0.75, "a"), (2.25, "d"), (1.0, "b"), (3.0, "end")):
        loop.call_later(seconds, loop.request_stop if name == "end" else at(name))
    loop.call_later(0.75, lambda: loop.call_later(0, at("added")))
    loop.run(handler)
    assert [each for each in handler.seen if each != "after"] == [
        *(("a", 1000.75), ("added", 1000.75), ("b", 1001.0), ("c", 1002.25), ("d", 1002.25), "stop", "end")
    ]
    assert world.timeouts == [0.5, 0.25, 0.0, 0.25, 0.5, 0.5, 0.25, 0.5, 0.25, 0.0]


def test_what_a_function_raises_goes_to_its_caller_or_to_the_log(
    world: World, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    loop: Loop = make_loop(world, handler, [lambda: loop.call_soon(lambda: 1 // 0)], ["next"])
    loop.call_later(0, lambda: [][1])
    loop.run(handler)
    assert handler.seen[-2:] == ["after", "end"]
    assert [record.message for record in caplog.records] == ["a function handed over to the server thread failed"] * 2


def test_other_threads_get_what_their_function_returns_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("price_server.loop.MAX_SELECT", 60)  # each function wakes the loop
    with running(Handler()) as loop:
        assert loop.call(threading.get_ident) != threading.get_ident()
        assert loop.call(loop.in_loop_thread)
        assert not loop.in_loop_thread()
        for error in (ZeroDivisionError, TimeoutError, SystemExit):
            with pytest.raises(error):
                loop.call(partial(throw, error))
        done = threading.Event()
        loop.call_soon(done.set)
        assert done.wait(10)


def test_a_function_that_has_not_begun_in_time_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("price_server.loop.CALL_TIMEOUT", 0.05)
    begun, go_on, handler = threading.Event(), threading.Event(), Handler()

    def block() -> None:
        begun.set()
        go_on.wait(10)

    with running(handler) as loop:
        loop.call_soon(block)
        assert begun.wait(10)
        with pytest.raises(TimeoutError, match=r"^the server thread has been busy for 0\.05 s: does a callback block"):
            loop.call(note(handler, "withdrawn"))
        go_on.set()
        monkeypatch.setattr("price_server.loop.CALL_TIMEOUT", 10)
        loop.call(lambda: None)
    assert "withdrawn" not in handler.seen


def test_a_function_that_has_begun_in_time_is_waited_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowFuture(Future[str]):
        def result(self, timeout: float | None = None) -> str:
            if not begun.is_set():
                assert begun.wait(10)
                raise TimeoutError
            go_on.set()
            return super().result(timeout)

    def slow() -> str:
        begun.set()
        go_on.wait(10)
        return "done"

    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr("price_server.loop.Future", SlowFuture)
    with running(Handler()) as loop:
        assert loop.call(slow) == "done"


# The stop and the end


def test_a_stop_goes_before_the_functions_that_wait(world: World, handler: Handler) -> None:
    steps = [lambda: loop.call_soon(note(handler, "a", loop.request_stop)), lambda: loop.call_soon(note(handler, "b"))]
    loop: Loop = make_loop(world, handler, steps)
    loop.run(handler)
    assert handler.seen == [None, None, "after", "a", "stop", "b", None, "after", "end"]


def test_a_stop_and_a_call_in_the_loops_own_thread_return_at_once(
    world: World, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop: Loop = make_loop(world, handler, [lambda: loop.stop(), lambda: loop.call(lambda: "call")])
    monkeypatch.setattr(loop.ended, "wait", lambda _: 1 // 0)  # which would wait for itself
    loop.run(handler)
    assert handler.seen == [None, "call", "after", "stop", None, "after", "end"]


def test_a_stop_from_outside_waits_for_the_end(handler: Handler) -> None:
    handler.at_end = lambda: threading.Event().wait(0.05)
    with running(handler) as loop:
        loop.stop()
        assert (loop.state, loop.ended.is_set()) == (LoopState.ENDED, True)


def test_a_loop_ends_when_its_handler_is_drained(world: World, handler: Handler) -> None:
    handler.drained = False
    loop = make_loop(world, handler)
    loop.call_later(0.25, lambda: setattr(handler, "drained", True))
    loop.run(handler)
    assert (world.now, handler.seen[-1]) == (1000.25, "end")


def test_a_loop_ends_a_second_after_the_stop_whatever_its_handler_and_clock_say(world: World, handler: Handler) -> None:
    handler.drained = False
    loop = Loop(clock=lambda: 5.0)
    loop.request_stop()
    world.selects = [[lambda: world.work(0.75)]]
    loop.run(handler)
    assert (world.now, handler.seen[-1]) == (1001.0, "end")


def test_an_error_in_the_handler_ends_the_loop_and_releases_everybody(
    world: World, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    loop: Loop = make_loop(world, handler, [lambda: loop.call_soon(note(handler, "released")), lambda: 1 // 0, "never"])
    loop.run(handler)
    assert handler.seen == [None, "end", "released"]
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.CRITICAL, "the server thread failed")
    ]
    assert (loop.state, loop.ended.is_set(), world.closed) == (LoopState.ENDED, True, True)


def test_a_call_while_the_loop_ends_is_released_even_if_the_handlers_end_fails() -> None:
    handler, waiters = Handler(), list[Callable[[], Any]]()

    def fail() -> None:
        waiters.extend(in_thread(lambda: loop.call(lambda: "released")) for _ in range(10))
        queued.wait(0.05)
        raise ZeroDivisionError

    handler.at_end, queued = fail, threading.Event()
    loop = Loop()
    loop.request_stop()
    with pytest.raises(ZeroDivisionError):
        loop.run(handler)
    assert [wait() for wait in waiters] == ["released"] * 10
    assert (loop.state, loop.ended.is_set()) == (LoopState.ENDED, True)


def test_a_call_in_the_very_moment_of_the_end_is_released(monkeypatch: pytest.MonkeyPatch, handler: Handler) -> None:
    def in_loop_thread() -> bool:
        loop.state = LoopState.ENDED  # it has released the functions that waited
        return False

    loop = Loop()
    monkeypatch.setattr(loop, "in_loop_thread", in_loop_thread)
    for call in (loop.call, loop.call_soon):
        loop.state = LoopState.RUNNING
        in_thread(partial(call, note(handler, "released")))()
    assert handler.seen == ["released", "released"]
    loop.close(handler)


def test_a_loop_runs_once(world: World, handler: Handler) -> None:
    loop: Loop = make_loop(world, handler)
    loop.run(handler)
    with pytest.raises(RuntimeError, match=r"^this server has run already: make another one$"):
        loop.run(handler)
    loop.close(handler)
    assert handler.seen.count("end") == 1
    never_run = Loop(world.clock)
    never_run.close(handler)
    assert (handler.seen.count("end"), never_run.state, never_run.ended.is_set()) == (2, LoopState.ENDED, True)


# What it tells


def test_a_loop_that_is_being_closed_does_not_start(world: World, handler: Handler) -> None:
    loop: Loop = make_loop(world, handler)
    world.selects = [["must not be served"]]

    def start() -> None:
        handler.at_end = lambda: None
        with pytest.raises(RuntimeError, match="run already"):
            loop.run(handler)

    handler.at_end = start
    loop.close(handler)
    assert handler.seen == ["end"]
    assert loop.state is LoopState.ENDED


def test_a_loop_that_another_thread_starts_in_the_same_moment_is_stopped(world: World, handler: Handler) -> None:
    loop: Loop = make_loop(world, handler)
    world.selects = [[lambda: loop.close(handler)]]
    loop.run(handler)
    assert handler.seen == [None, "after", "stop", "after", "end"]


def test_the_longest_batch_of_the_last_60_seconds_is_known(world: World, handler: Handler) -> None:
    loop: Loop = make_loop(world, handler, [lambda: world.work(2), lambda: world.work(5), lambda: world.work(3)])
    assert loop.longest_batch() == 0.0
    loop.run(handler)
    assert (world.now, loop.longest_batch()) == (1010.0, 5.0)
    world.now = 1067.0
    assert loop.longest_batch() == 5.0
    world.now = 1067.5
    assert loop.longest_batch() == 3.0
    world.now = 1080.0
    assert loop.longest_batch() == 0.0


@pytest.mark.parametrize("kind", ["call", "timer", "after_events", "event"])
def test_each_kind_of_step_counts_as_a_batch(
    world: World, handler: Handler, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def work() -> None:
        world.work(0.03125)

    def call_twice() -> None:
        loop.call_soon(work)
        loop.call_soon(work)

    loop = make_loop(world, handler, [{"call": call_twice, "event": work}.get(kind, "event")])
    if kind == "timer":
        loop.call_later(0, work)
    if kind == "after_events":
        monkeypatch.setattr(handler, "after_events", work)
    loop.run(handler)
    assert loop.longest_batch() == 0.03125


def test_trouble_is_logged_once_and_again_after_a_minute_without_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    log = RateLimitedLog(world.clock)
    for seconds in (0, 59.5, 59.5, 60):
        world.now += seconds
        log.warn("full", f"full at {world.now:g}")
        log.warn("failed", "failed", ZeroDivisionError("why"))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        *((logging.WARNING, "full at 1000"), (logging.ERROR, "failed")),
        *((logging.WARNING, "full at 1179"), (logging.ERROR, "failed")),
    ]
    assert caplog.records[1].exc_text == "ZeroDivisionError: why"
