"""Real-time cryptocurrency prices: poll CoinAPI, send every price to every client.

Start with `python tracker.py`, or `python tracker.py --demo` without a key. This file has the poll loop, the start and
the stop. options.py reads the command line, coin_api.py asks CoinAPI, system.py has what the program needs from the
operating system, and price_server/ is everything that clients see.

The path of a price: once per interval, `Poller.poll` asks the source for all assets in one request
(`CoinApi.fetch_prices`) and gets a list of `PriceUpdate`. `PriceServer.publish` drops what is not a valid price and
hands the rest to the server thread. That thread remembers each price as the latest one, encodes it once per message
format, sends each client all that it follows with one non-blocking `send`, and adds it to the history.

The threads, the same at any number of clients:
- main waits for a signal, and owns nothing.
- poller waits for CoinAPI and for the time of the next poll, and owns the HTTP session.
- server waits for sockets, and owns every connection, the latest prices, the history and the counters. Other threads
  hand it functions to run; there are no locks around these.
- archive, only with --history FILE, waits for the disk, and owns the SQLite connection.
- log waits for stderr, and owns the lines that are not yet written.

All but main are daemon threads: one that hangs must not keep the program from stopping.
"""

import logging
import math
import os
import queue
import random
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("tracker.py needs Python 3.11 or newer, this is {}.{}\n".format(*sys.version_info))
    sys.exit(2)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C while it loads ends it without a traceback

import system

try:
    from coin_api import DEFAULT_URL, MAX_RETRY_AFTER, CoinApi, CoinApiError, DemoApi, one_line
    from options import DAY, INTERVAL, parse_arguments
    from price_server import PriceServer
    from price_server.clocks import boottime
    from price_server.prices import Update, split_valid
except ModuleNotFoundError as missing:
    system.start_log()
    logging.critical(system.explain_missing(missing.name or ""))
    sys.exit(2)

MAX_BACKOFF = 15.0  # seconds: an outage must not last much longer here than at CoinAPI; failed requests are not billed
MAX_WAIT = 15.0  # seconds of one Event.wait: its clock stops while the machine sleeps, and an interval may be a day
READY_TIMEOUT = 2.0  # seconds that the start-up lines wait for the first poll: it may find that the key is refused
SWITCH_INTERVAL = 0.0002  # seconds: each send releases the GIL, and a busy thread then keeps it for 5 ms by default
READY, STOP = "ready", "stop"  # events that main waits for

logger = logging.getLogger("tracker")


class PriceSource(Protocol):
    """What the poller asks for prices: CoinApi, DemoApi, or your own. It may have a `name`, as they do.

    It may have `credits_used` and `credits_left` too. It may raise anything, which is a failed poll; a CoinApiError
    says more about it.
    """

    def fetch_prices(self, asset_ids: Sequence[str]) -> Iterable[Update]: ...


class Poller:
    """Polls at fixed times, one interval (seconds) apart, and hands the prices to the server.

    A failed poll is tried again after 1, 2, 4 ... intervals, at most 15 s, or when CoinAPI says; the first success
    starts new fixed times. `run` is the poller thread; it ends after `stop()`, or when the first poll finds that the
    key is refused.
    clock: seconds that go on while the machine sleeps.
    ready: called when the first poll has ended (unless the key was refused), and while it waits for the first client.
    """

    def __init__(
        self,
        source: PriceSource,
        server: PriceServer,
        interval: float = INTERVAL,
        pause_when_idle: bool = False,
        clock: Callable[[], float] = boottime,
        wake: threading.Event | None = None,
        ready: Callable[[], None] = lambda: None,
    ):
        self.source = source
        self.server = server
        self.interval = interval
        self.pause_when_idle = pause_when_idle
        self.clock = clock
        # Set by `stop`, and by the server when a client connects: `run` then checks both.
        self.wake = wake or (server.client_connected if pause_when_idle else threading.Event())
        self.ready = ready
        self.stopping = False
        self.key_refused = False
        self._polls = 0
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._logged_prefix = ""  # of the reason last logged, up to its colon

    def run(self) -> None:
        due = self.clock()
        while not self.stopping:
            if self._wait_for_clients():
                due = self.clock()
            if self.stopping:
                return
            started = self.clock()
            if self._failures:  # a retry: if it succeeds, the fixed times start here
                due = started
            try:
                delay = self.poll()
            except Exception:
                logger.exception("the poll loop failed, and goes on")
                delay = min(self.interval, MAX_BACKOFF)
            if self._polls == 1 and not self.key_refused:
                self.ready()
            due = self._next_fixed_time(due) if delay is None else started + delay
            self._wait_until(due)

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()

    def poll(self) -> float | None:
        """One poll: None when it succeeded, otherwise the seconds from its start until the next try."""
        self._polls += 1
        started = self.clock()
        try:
            sent = self.server.publish(self.source.fetch_prices(self.server.assets), expect_all=True)
            if not sent:
                raise CoinApiError("no valid price for any asset", cause="bad_answer")
        except BaseException as error:  # your own source may raise anything, even SystemExit
            return self._fail(error, started)
        finally:
            credits_used = getattr(self.source, "credits_used", None)
            credits_left = getattr(self.source, "credits_left", None)
            self.server.note_poll(self.clock() - started, credits_used, credits_left)
        logger.debug("polled: %d prices", len(sent))
        if self._failures:
            outage = self.clock() - self._failing_since
            logger.log(system.NOTICE, "prices again after %.0f s, failed polls: %d", outage, self._failures)
            self._failures, self._logged_prefix = 0, ""
        return None

    def _fail(self, error: BaseException, started: float) -> float:
        if not isinstance(error, CoinApiError):
            logger.debug("unexpected", exc_info=True)
            error = CoinApiError(f"unexpected {type(error).__name__}: {error}")
        if self._failures == 0:
            self._failing_since = started
        self._failures += 1
        reason = one_line(error)
        self.server.report_failure(reason, error.cause)
        if error.key_refused and self._polls == 1:
            self.key_refused = True
            self.stop()
            return 0.0
        took = self.clock() - started
        delay = self._retry_delay(error, took)
        prefix = reason.partition(":")[0]
        level = logging.DEBUG if prefix == self._logged_prefix else logging.WARNING
        logger.log(level, "no prices: %s; next try in %.3g s", reason, max(delay - took, 0.0))
        self._logged_prefix = prefix
        return delay

    def _retry_delay(self, error: CoinApiError, took: float) -> float:
        """Seconds from the start of a failed poll, which took `took` seconds, until the next try."""
        if error.retry_after is not None:  # counted from the end of the poll
            return took + max(min(self.interval, MAX_BACKOFF), min(error.retry_after, MAX_RETRY_AFTER))
        delay = min(self.interval * 2 ** min(self._failures - 1, 20), MAX_BACKOFF)
        return delay * random.uniform(0.9, min(1.1, MAX_BACKOFF / delay))

    def _next_fixed_time(self, due: float) -> float:
        """One interval after `due`, or more where that has passed: missed polls are not made up for."""
        due += self.interval
        missed = math.ceil((self.clock() - due) / self.interval)
        return due + max(missed, 0) * self.interval

    def _wait_until(self, due: float) -> None:
        while not self.stopping and (left := due - self.clock()) > 0:
            self.wake.wait(min(left, MAX_WAIT))
            self.wake.clear()

    def _wait_for_clients(self) -> bool:
        """With `pause_when_idle`, block while no client is connected. Returns whether it did."""
        waited, began = False, self.clock()
        while self.pause_when_idle and not self.stopping and not self.server.client_count:
            self.server.pause()
            waited = True
            if self._polls == 0:
                self.ready()
            self.wake.wait()
            self.wake.clear()
        self._failing_since += self.clock() - began  # a pause is not part of an outage
        return waited


def main(argv: Sequence[str] | None = None, source: PriceSource | None = None) -> int:
    """Run the program until a signal comes. Returns the exit status. source: your own, instead of CoinAPI."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        with system.signals_blocked():
            log = system.start_log()
    except RuntimeError as error:
        print(f"tracker.py: {error}", file=sys.stderr)
        return 1
    try:
        options = parse_arguments(argv)
        logging.getLogger().setLevel(options.log_level.upper())
        try:
            source = DemoApi() if options.demo else source or _coin_api(options.quote)
        except ValueError as error:
            return _report(2, str(error))
        return poll_once(source, options.assets) if options.once else run(source, options)
    finally:
        log.close()


def run(source: PriceSource, options: Namespace) -> int:
    """Poll and serve clients until a signal comes, the key is refused, or the server ends."""
    # A signal handler may interrupt `get` and call `put`; with a threading.Event that could deadlock.
    events: queue.SimpleQueue[str] = queue.SimpleQueue()
    system.stop_on_signals(partial(events.put, STOP))
    try:
        server = make_server(source, options)
    except OSError as error:
        reason = error.strerror or error
        return _report(1, f"cannot listen on {options.host} port {options.port}: {reason}; choose with --host, --port")
    except ValueError as error:
        return _report(2, str(error))
    except RuntimeError as error:  # a thread could not be started
        return _report(1, f"cannot start: {error}")
    systemd = system.Systemd()
    server.on_housekeeping = systemd.notify_watchdog
    poller = Poller(source, server, options.interval, options.pause_when_idle, ready=partial(events.put, READY))
    try:
        _start_threads(server, poller, events)
        event = _wait_for_event(events, READY_TIMEOUT)
        if event != STOP:
            _announce(options, server)
            systemd.notify("READY=1")
        while event != STOP and not server.has_ended:
            event = _wait_for_event(events, 1.0)
    except RuntimeError as error:
        return _report(1, f"cannot start: {error}")
    finally:
        systemd.notify("STOPPING=1")
        has_ended = server.has_ended
        poller.stop()
        logger.info("stopping, clients connected: %d", server.client_count)
        server.shutdown_gracefully(1001, b"server is stopping")
        logger.info("stopped")
    if has_ended:
        return _report(1, "the server's thread has ended")
    return _report(2, f"{server.last_error}: check COIN_API_KEY") if poller.key_refused else 0


def make_server(source: PriceSource, options: Namespace) -> PriceServer:
    """The server, not yet running. Raises OSError, ValueError, RuntimeError."""
    system.raise_file_limit(PriceServer.files_needed(options.max_clients))
    with system.signals_blocked():
        server = PriceServer(
            options.assets,
            options.host,
            options.port,
            quote=options.quote,
            source=getattr(source, "name", type(source).__name__),
            interval=options.interval,
            max_clients=options.max_clients,
            allow_origins=options.allow_origin,
            history_file=options.history,
            pause_when_idle=options.pause_when_idle,
        )
    # Your own callbacks go here.
    return server  # noqa: RET504


def _start_threads(server: PriceServer, poller: Poller, events: queue.SimpleQueue[str]) -> None:
    def poll() -> None:
        poller.run()
        events.put(STOP)  # after a refused key nothing else stops main

    with system.signals_blocked():
        server.run_forever(threaded=True)
        threading.Thread(target=poll, name="poller", daemon=True).start()


def _wait_for_event(events: queue.SimpleQueue[str], seconds: float) -> str | None:
    try:
        return events.get(timeout=seconds)  # without a timeout, Windows would deliver no signal here
    except queue.Empty:
        return None


def poll_once(source: PriceSource, assets: Sequence[str]) -> int:
    """Print the prices of one poll, one JSON message per line. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C ends it without a traceback
    if sys.stdout is None:
        return _report(1, "cannot write the prices: stdout is closed")
    try:
        valid, faults = split_valid(source.fetch_prices(assets), assets, expect_all=True)
    except CoinApiError as error:
        return _report(2, f"{error}: check COIN_API_KEY") if error.key_refused else _report(1, one_line(error))
    except BaseException as error:
        return _report(1, one_line(f"unexpected {type(error).__name__}: {error}"))
    if faults:
        named = ", ".join(f"{asset_id}: {fault}" for asset_id, fault in faults.items())
        logger.log(logging.WARNING if valid else logging.ERROR, "no valid price for %s", named[:1000])
    if not valid:
        return 1
    try:
        print("\n".join(valid[asset_id].text for asset_id in assets if asset_id in valid), flush=True)
    except OSError as error:
        # Otherwise Python would try at its exit to write the rest again, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # with `| head -1` the reader has all that it wants
            return _report(1, f"cannot write the prices: {error.strerror}")
    return 0


def _coin_api(quote: str) -> CoinApi:
    key = os.environ.get("COIN_API_KEY", "").strip()
    if not key:
        raise ValueError("COIN_API_KEY is not set: set it to your key from CoinAPI, or try --demo, which needs none")
    return CoinApi(key, quote, os.environ.get("COIN_API_URL") or DEFAULT_URL)


def _announce(options: Namespace, server: PriceServer) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # noqa: S104
    address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
    everywhere = "" if host == options.host else ", on all addresses of this machine"
    logger.info("page http://%s/ and WebSocket ws://%s/ws%s", address, address, everywhere)
    names = f"{', '.join(options.assets)} in {options.quote}"
    if options.demo:
        logger.info("DEMO, simulated prices: %s every %g s", names, options.interval)
    else:
        cost = f"1 request every {options.interval:g} s, {DAY / options.interval:,.0f} a day"
        logger.info("tracking %s: %s%s", names, cost, " at most" if options.pause_when_idle else "")


def _report(status: int, message: str) -> int:
    """Log why the program ends. Returns its exit status."""
    logger.error(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
