"""Real-time cryptocurrency prices: poll CoinAPI, send every price to every WebSocket client.

Start with `python tracker.py`, or `python tracker.py --demo` without a key. This file reads the
command line, polls, starts and stops; coin_api.py asks CoinAPI, price_server has the clients, and
service.py has what systemd and the log need.

Threads: main waits for a signal. The poller fetches, publishes and waits; it ends with `stop()`.
"log" writes to stderr. Those of the server stand in price_server. All but main are daemons: a
request that hangs in the poller must not keep the program from stopping.
"""

import argparse
import logging
import math
import os
import queue
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, Protocol

if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("tracker.py needs Python 3.11 or newer, this is {}.{}\n".format(*sys.version_info))
    sys.exit(2)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C while it loads ends it without a traceback

import service

try:
    from coin_api import DEFAULT_URL, MAX_RETRY_AFTER, CoinApi, CoinApiError, DemoApi, PriceUpdate, one_line
    from price_server import PriceServer
except ModuleNotFoundError as missing:
    service.start_log()
    logging.critical(service.explain_missing(missing.name or ""))
    sys.exit(2)

ASSETS = ("BTC", "ETH", "XRP", "BCH", "ADA", "LTC", "LINK", "XLM", "DOT", "SOL")
QUOTE = "USD"
INTERVAL = 5.0  # seconds
MAX_BACKOFF = 15.0  # seconds: an outage must not last much longer here than there; failed requests are not billed
DAY = 86_400  # seconds
READY_AFTER = 2.0  # seconds that the start-up lines wait for the first poll, which may find that the key is refused
SWITCH_INTERVAL = 0.0002  # seconds: each send gives up the interpreter, and a busy thread kept it for 5 ms each time
READY, STOP = "ready", "stop"  # what main waits for
EPILOG = f"""environment:
  COIN_API_KEY  the key from CoinAPI; without it, --demo
  COIN_API_URL  another host than {DEFAULT_URL}; plain http only to a loopback address

exit status: 0 stopped by a signal; 1 could not start, and may later; 2 needs somebody: wrong usage, no key,
key refused on the first poll, history file unusable
"""

logger = logging.getLogger("tracker")


class PriceSource(Protocol):
    """What the poller asks for prices: CoinApi, DemoApi, or your own. It may have a `name`, as they do."""

    def fetch_prices(self, asset_ids: Sequence[str]) -> list[PriceUpdate]: ...


class Poller:
    """Polls at fixed times, one interval (seconds) apart, and hands the prices to the server.

    A failure is tried again after 1, 2, 4 ... intervals, or when CoinAPI asks for it. `run` is the
    poller thread; it ends with `stop()`, or by itself when the first poll's key is refused.
    ready: called when the first poll ended otherwise, or waits for a client to come.
    """

    def __init__(
        self,
        source: PriceSource,
        server: PriceServer,
        interval: float = INTERVAL,
        pause_when_idle: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wake: threading.Event | None = None,
        ready: Callable[[], None] = lambda: None,
    ):
        self.source = source
        self.server = server
        self.interval = interval
        self.pause_when_idle = pause_when_idle
        self.clock = clock
        # Set to look again: stopped, or a client came.
        self.wake = wake or (server.client_came if pause_when_idle else threading.Event())
        self.ready = ready
        self.stopping = False
        self.key_refused = False
        self._polls = 0
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._trouble = ""  # the kind of failure last logged
        self._missing: set[str] = set()  # assets without a price, named in the log

    def run(self) -> None:
        due = self.clock()
        while not self.stopping:
            if self._wait_for_clients():
                due = self.clock()
            if self.stopping:
                return
            due += self.poll()
            if self._polls == 1 and not self.key_refused:
                self.ready()
            late = self.clock() - due
            if late > 0:  # not made up for: the next of the fixed times
                due += math.ceil(late / self.interval) * self.interval
            while not self.stopping and (delay := due - self.clock()) > 0:
                self.wake.wait(delay)
                self.wake.clear()

    def stop(self) -> None:
        self.stopping = True
        self.wake.set()

    def poll(self) -> float:
        """One poll. Seconds from its start until the next; raises nothing."""
        self._polls += 1
        started = self.clock()
        try:
            updates = list(self.source.fetch_prices(self.server.assets))
            self.server.publish(updates)
        except CoinApiError as error:
            return self._failed(error)
        except (Exception, SystemExit) as error:  # a source of one's own may raise anything
            logger.debug("unexpected", exc_info=True)
            return self._failed(CoinApiError(f"unexpected {type(error).__name__}: {error}"))
        finally:
            self.server.poll_seconds = self.clock() - started
            self.server.credits_used = getattr(self.source, "credits_used", None)
            self.server.credits_left = getattr(self.source, "credits_left", None)
            self.server.paused = False
        logger.debug("polled: %d prices", len(updates))
        if self._failures:
            logger.info(
                "prices again after %.0f s, failed polls: %d", self.clock() - self._failing_since, self._failures
            )
            self._failures, self._trouble = 0, ""
        self._note_missing(set(self.server.assets).difference(update.asset_id for update in updates))
        return self.interval

    def _failed(self, error: CoinApiError) -> float:
        if self._failures == 0:
            self._failing_since = self.clock()
        self._failures += 1
        reason = one_line(error)
        self.server.report_failure(reason)
        if error.key_refused and self._polls == 1:
            self.key_refused = True
            self.stop()
            return 0.0
        if error.retry_after is not None:
            delay = max(self.interval, min(error.retry_after, MAX_RETRY_AFTER))
        else:
            most = max(self.interval, MAX_BACKOFF)
            delay = min(self.interval * 2 ** min(self._failures - 1, 20), most) * random.uniform(0.9, 1.1)
        kind = reason.partition(":")[0]
        level = logging.DEBUG if kind == self._trouble else logging.WARNING
        logger.log(level, "no prices: %s; next try in %.3g s", reason, delay)
        self._trouble = kind
        return delay

    def _note_missing(self, missing: set[str]) -> None:
        for asset_id in self.server.assets:
            if asset_id in missing - self._missing:
                logger.warning("no sound price for %s in the answer: clients keep the last one", asset_id)
            elif asset_id in self._missing - missing:
                logger.info("%s has a price again", asset_id)
        self._missing = missing

    def _wait_for_clients(self) -> bool:
        """With `pause_when_idle`, block while there is no client; whether there was none."""
        waited = False
        while self.pause_when_idle and not self.stopping and not self.server.clients:
            self.server.paused = waited = True
            if self._polls == 0:
                self.ready()
            self.wake.wait()
            self.wake.clear()
        return waited


def main(argv: Sequence[str] | None = None, source: PriceSource | None = None) -> int:
    """Run the program until a signal; the exit status, as --help says. source: one of your own, in place of CoinAPI."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        with service.signals_held():
            log = service.start_log()
    except RuntimeError as error:
        print(f"tracker.py: {error}", file=sys.stderr)
        return 1
    try:
        options = parse_arguments(argv)
        logging.getLogger().setLevel(options.log_level.upper())
        try:
            source = DemoApi() if options.demo else source or _coin_api(options.quote)
        except ValueError as error:
            return _fail(2, str(error))
        return poll_once(source, options.assets) if options.once else serve(source, options)
    finally:
        log.close()


def serve(source: PriceSource, options: argparse.Namespace) -> int:
    """Poll and serve until a signal comes, the key is refused, or the server ends."""
    events: queue.SimpleQueue[str] = queue.SimpleQueue()  # put may interrupt get; an Event's set hangs in its wait
    service.stop_on_signals(partial(events.put, STOP))
    systemd = service.Systemd()
    try:
        server = _make_server(source, options)
    except OSError as error:
        reason = error.strerror or error
        return _fail(1, f"cannot listen on {options.host} port {options.port}: {reason}; choose with --host, --port")
    except ValueError as error:
        return _fail(2, str(error))
    except RuntimeError as error:  # no thread to be had
        return _fail(1, f"cannot start: {error}")
    server.on_housekeeping = systemd.feed_watchdog
    poller = Poller(source, server, options.interval, options.pause_when_idle, ready=partial(events.put, READY))

    def poll() -> None:
        poller.run()
        events.put(STOP)  # it ended by itself: the key was refused

    try:
        with service.signals_held():
            server.run_forever(threaded=True)
            threading.Thread(target=poll, name="poller", daemon=True).start()
        event = _next(events, READY_AFTER)
        if event != STOP:
            _announce(options, server)
            systemd.tell("READY=1")
        while event != STOP and server.state != "ended":
            event = _next(events, 1.0)
    except RuntimeError as error:
        return _fail(1, f"cannot start: {error}")
    finally:
        systemd.tell("STOPPING=1")
        ended = server.state == "ended"
        poller.stop()
        logger.info("stopping, clients connected: %d", len(server.clients))
        server.shutdown_gracefully(1001, b"server is stopping")
        logger.info("stopped")
    if ended:
        return _fail(1, "the server's thread has ended")
    return _fail(2, f"{server.last_error}: check COIN_API_KEY") if poller.key_refused else 0


def _make_server(source: PriceSource, options: argparse.Namespace) -> PriceServer:
    service.raise_file_limit(options.max_clients + PriceServer.own_files + PriceServer.spare_visitors)
    with service.signals_held():
        return PriceServer(
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


def _next(events: queue.SimpleQueue[str], seconds: float) -> str | None:
    try:
        return events.get(timeout=seconds)  # without a timeout, Windows would deliver no signal here
    except queue.Empty:
        return None


def poll_once(source: PriceSource, assets: Sequence[str]) -> int:
    """Print the prices of one poll, one JSON message a line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ^C ends it without a traceback
    if sys.stdout is None:
        return _fail(1, "cannot write the prices: stdout is closed")
    try:
        updates = source.fetch_prices(assets)
    except CoinApiError as error:
        return _fail(2, f"{error}: check COIN_API_KEY") if error.key_refused else _fail(1, one_line(error))
    except Exception as error:
        return _fail(1, one_line(f"unexpected {type(error).__name__}: {error}"))
    missing = [asset_id for asset_id in assets if asset_id not in {update.asset_id for update in updates}]
    if missing:
        logger.warning("no sound price for %s in the answer", ", ".join(missing))
    try:
        print("\n".join(update.to_json() for update in updates), flush=True)
    except OSError as error:
        # At exit Python would write once more what it could not write now.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head -1`: nobody reads any more
            return _fail(1, f"cannot write the prices: {error.strerror}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="tracker.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Real-time cryptocurrency prices over WebSocket.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    # fmt: off
    add("--assets", type=_assets, default=ASSETS, metavar="BTC,ETH", help="what to track, in this order (default: ten)")
    add("--quote", type=_asset, default=QUOTE, metavar="USD", help="currency of the prices (default: %(default)s)")
    add("--interval", type=_number(float, 0.1, DAY, "a number of seconds"), default=INTERVAL, metavar="SECONDS",
        help="between two polls, 0.1 to 86,400 (default: %(default)s)")
    add("--host", type=_host, default="127.0.0.1",
        help="address to listen on; 127.0.0.1 is this machine only (default: %(default)s)")
    add("--port", type=_number(int, 0, 65_535, "a port"), default=3030,
        help="0 to 65,535; 0 takes a free one (default: %(default)s)")
    add("--demo", action="store_true", help="simulated prices, without a key")
    add("--once", action="store_true", help="print the prices of one poll and exit")
    add("--pause-when-idle", action="store_true", help="do not poll while no client is connected")
    add("--history", type=_file, metavar="FILE", help="keep the prices of the past here (default: in memory)")
    add("--max-clients", type=_number(int, 1, 1_000_000, "a number of clients"), default=10_000, metavar="N",
        help="1 to 1,000,000; the next one gets 503 (default: %(default)s)")
    add("--allow-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
        help="web origin whose pages may read, like https://example.org; may be repeated (default: all)")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="the least that is logged (default: %(default)s)")
    # fmt: on
    options = parser.parse_args(argv)
    if options.once and options.history:
        parser.error("--history: --once keeps no prices, leave one of them out")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print its usage before it."""
        self.exit(_fail(2, f"{one_line(message)} (see --help)"))


def _host(text: str) -> str:
    host = text.strip()
    try:
        host.encode("idna")
    except UnicodeError:  # bind would raise a TypeError
        host = ""
    if not host:  # would mean every address of this machine
        raise argparse.ArgumentTypeError(f"{text!r} is no address; 0.0.0.0 listens on all")
    return host


def _file(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no file name")
    return text


def _asset(text: str) -> str:
    if not re.fullmatch(r"[A-Z0-9][A-Z0-9._-]{0,31}", text.strip(), re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not an asset id like BTC")
    return text.strip().upper()


def _assets(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_asset(part) for part in text.split(",")))


def _number(kind: Callable[[str], float], lowest: float, highest: float, what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not lowest <= number <= highest:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {lowest:,} to {highest:,}")
        return number

    return convert


def _origin(text: str) -> str:
    if not re.fullmatch(r"https?://[\w.:\[\]-]+/?|null", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin like https://example.org")
    return text


def _coin_api(quote: str) -> CoinApi:
    key = os.environ.get("COIN_API_KEY", "").strip()
    if not key:
        raise ValueError("COIN_API_KEY is not set: set it to your key from CoinAPI, or try --demo, which needs none")
    return CoinApi(key, quote, os.environ.get("COIN_API_URL") or DEFAULT_URL)


def _announce(options: argparse.Namespace, server: PriceServer) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # noqa: S104
    address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
    everywhere = "" if host == options.host else ", on all addresses of this machine"
    logger.info("dashboard http://%s/ and WebSocket ws://%s/ws%s", address, address, everywhere)
    names = f"{', '.join(options.assets)} in {options.quote}"
    if options.demo:
        logger.info("DEMO, simulated prices: %s every %g s", names, options.interval)
    else:
        cost = f"1 request every {options.interval:g} s, {DAY / options.interval:,.0f} a day"
        cost += " at the most" if options.pause_when_idle else ""
        logger.info("tracking %s: %s", names, cost)


def _fail(status: int, message: str) -> int:
    logger.error(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
