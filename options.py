"""The command line: flags, checks, --help."""

import argparse
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from coin_api import DEFAULT_URL, one_line
from price_server.origins import check_origin
from price_server.version import __version__

ASSETS = ("BTC", "ETH", "XRP", "BCH", "ADA", "LTC", "LINK", "XLM", "DOT", "SOL")
QUOTE = "USD"
INTERVAL = 5.0  # seconds
DAY = 86_400  # seconds
LOG_LEVELS = ("debug", "info", "notice", "warning", "error")
EPILOG = f"""environment:
  COIN_API_KEY  the key from CoinAPI; without it, --demo
  COIN_API_URL  another host than {DEFAULT_URL}; plain http only to a loopback address

exit status: 0 stopped by a signal, or --once printed prices; 1 could not start, or failed: a later start may succeed;
2 something must be changed first: wrong usage, no key, key refused on the first poll, history file unusable
"""

logger = logging.getLogger("tracker")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked flags of `argv`, or of the process. Wrong usage exits with status 2 after one line in the log."""
    parser = _Parser(
        prog="tracker.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Real-time cryptocurrency prices over WebSocket.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    # fmt: off
    add("--assets", type=_assets, default=",".join(ASSETS), metavar="BTC,ETH",
        help="what to track, in this order (default: %(default)s)")
    add("--quote", type=_currency, default=QUOTE, metavar="USD", help="currency of the prices (default: %(default)s)")
    add("--interval", type=_number(float, 0.1, DAY, "a number of seconds"), default=INTERVAL, metavar="SECONDS",
        help="between two polls, 0.1 to 86,400 (default: %(default)s)")
    add("--host", type=_host, default="127.0.0.1",
        help="address to listen on; 127.0.0.1 is this machine only (default: %(default)s)")
    add("--port", type=_number(int, 0, 65_535, "a port"), default=3030,
        help="0 to 65,535; 0 takes a free one (default: %(default)s)")
    add("--demo", action="store_true", help="simulated prices, without a key")
    add("--once", action="store_true", help="print the prices of one poll and exit")
    add("--pause-when-idle", action="store_true", help="do not poll while no client is connected")
    add("--history", type=_file, metavar="FILE", help="keep the price history here (default: in memory)")
    add("--max-clients", type=_number(int, 1, 1_000_000, "a number of clients"), default=10_000, metavar="N",
        help="1 to 1,000,000; the next one gets 503 (default: %(default)s)")
    add("--allow-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
        help="origin whose pages may read: https://example.org, chrome-extension://ID, file://, null, or "
             "moz-extension://* and the like; may be repeated (default: all)")
    add("--log-level", choices=LOG_LEVELS, default="info", help="the lowest level to log (default: %(default)s)")
    add("--version", action="version", version=__version__)
    # fmt: on
    options = parser.parse_args(argv)
    if options.once and options.history:
        parser.error("--history: --once keeps no prices, leave one of them out")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print its usage before it."""
        logger.error("%s (see --help)", one_line(message))
        sys.exit(2)


def _host(text: str) -> str:
    host = text.strip()
    try:
        host.encode("idna")
    except UnicodeError:  # bind would raise a TypeError
        host = ""
    if not host:  # would mean every address of this machine
        raise argparse.ArgumentTypeError(f"{text!r} is not an address; 0.0.0.0 listens on all")
    return host


def _file(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name")
    return text


def _asset(text: str) -> str:
    if not re.fullmatch(r"[A-Z0-9][A-Z0-9._-]{0,31}", text.strip(), re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not an asset id like BTC")
    return text.strip().upper()


def _currency(text: str) -> str:
    try:
        return _asset(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a currency like USD") from None


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
    try:
        return check_origin(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
