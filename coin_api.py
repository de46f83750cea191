"""Ask CoinAPI for the current price of several assets in one request.

HTTP and nothing else: no threads, no WebSocket. `CoinApi` asks the real service, `DemoApi` simulates prices. Any other
object with a method `fetch_prices(asset_ids)` can take their place.
"""

import io
import json
import logging
import math
import random
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException, HTTPResponse, IncompleteRead, RemoteDisconnected
from ipaddress import ip_address
from typing import Any
from urllib.parse import SplitResult, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError

DEFAULT_URL = "https://rest.coinapi.io"
CONNECT_TIMEOUT = 3.0  # seconds
RESPONSE_TIMEOUT = 10.0  # seconds for status line, headers and body together
MAX_RESPONSE = 1 << 20  # bytes, unpacked; ten rates are about 1 KiB
MAX_RETRY_AFTER = 900.0  # seconds
CAUSES = ("refused_key", "forbidden", "rate_limited", "server_error", "timeout", "connection", "bad_answer", "other")
CAUSES_BY_STATUS = {401: "refused_key", 403: "forbidden", 429: "rate_limited"}
QUOTATION_MARKS = "\"'"
ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # json.dumps would make one for each price

# urllib3's warnings show bad headers, with the key in them if a server sends it back.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class PriceUpdate:
    """One price of one asset.

    asset_id: CoinAPI's id, like "BTC".
    price: in the quote currency. CoinAPI's `rate`: a volume-weighted average of the last 24 hours,
        not the last trade. `price_server.prices.split_valid` says which prices are valid.
    time: when CoinAPI computed it, as CoinAPI wrote it: "2026-11-22T07:44:05.1234567Z".
    """

    asset_id: str
    price: float
    time: str

    def to_json(self) -> str:
        """The message that clients get: compact JSON on one line. ValueError for a price that is not finite."""
        fields = {"asset_id": self.asset_id, "price": self.price, "time": self.time}
        return ENCODER.encode(fields)


class CoinApiError(Exception):
    """A poll that brought no prices; its text is one line for the log.

    retry_after: seconds that CoinAPI asked to wait (at most 900), or None.
    cause: one of CAUSES, for the metrics; anything else counts as "other".
    """

    def __init__(self, message: str, retry_after: float | None = None, cause: str = "other"):
        super().__init__(message)
        self.retry_after = None if retry_after is None else float(retry_after)
        self.cause = cause if cause in CAUSES else "other"

    @property
    def key_refused(self) -> bool:
        """Whether CoinAPI does not know the key: trying again will not help."""
        return self.cause == "refused_key"


class CoinApi:
    """CoinAPI's exchange rates, one request for all assets.

    quote: the currency of the prices, like "USD".
    url: another CoinAPI host; plain http only to a loopback address, because the key travels along.
    credits_used, credits_left: as CoinAPI last said, or None; credits_left can be negative.

    Raises ValueError for a key or url that cannot be used, without showing the key.
    Source: GET /v1/exchangerate/{quote} of https://docs.coinapi.io.
    """

    name = "coinapi"  # shown at /healthz; in a history file, prices of two names never mix

    def __init__(self, key: str, quote: str = "USD", url: str = DEFAULT_URL):
        # Checked here because requests would show a bad header's value in its error.
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError("COIN_API_KEY must be printable ASCII without spaces: copy it again from CoinAPI")
        if key[0] in QUOTATION_MARKS or key[-1] in QUOTATION_MARKS:
            raise ValueError("COIN_API_KEY has quotes around it, which some readers of env files keep: remove them")
        self._key = key
        parts = _split_url(url)
        if parts is None:
            raise ValueError(f"COIN_API_URL is {self._clean(url)!r}: it must be https://HOST[:PORT][/PATH]")
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise ValueError(
                f"COIN_API_URL is {self._clean(url)!r}: http would send the key unencrypted, "
                "so only a loopback address may have it; use https"
            )
        self._url = f"{url.rstrip('/')}/v1/exchangerate/{quote}"
        self.credits_used: int | None = None
        self.credits_left: int | None = None
        self._session = requests.Session()
        self._session.mount("https://", _DeadlineAdapter())
        self._session.mount("http://", _DeadlineAdapter())
        # A proxy named in the environment must not see the key that is sent to a loopback address.
        self._session.trust_env = parts.scheme == "https"
        self._session.headers["X-CoinAPI-Key"] = key
        self._session.headers["Accept"] = "application/json"

    def fetch_prices(self, asset_ids: Sequence[str]) -> list[PriceUpdate]:
        """The current price of each asset, in the order asked for.

        Blocks for up to 10 s once the connection is made. Before that: 3 s for each of the host's addresses, and 3 s
        each for TLS and for a proxy's response; looking up the host's name has no timeout here.

        An asset that CoinAPI leaves out is not in the list. A rate that is null, NaN or not a number is passed on as
        it came. Raises CoinApiError, and nothing else, when there is no usable response.
        """
        query = {"filter_asset_id": ",".join(asset_ids), "invert": "true"}
        try:
            # A redirect would carry the key to another host: requests drops only Authorization.
            with self._session.get(
                self._url, params=query, timeout=(CONNECT_TIMEOUT, RESPONSE_TIMEOUT), allow_redirects=False, stream=True
            ) as response:
                self._read_credits(response)
                body = _read_body(response)
        except CoinApiError:
            raise
        except Exception as error:  # requests lets some of urllib3's and OSError through
            reason = self._clean(_reason(error))
            raise CoinApiError(f"no response from CoinAPI: {reason}", cause=_cause(error)) from None
        if response.status_code != 200:
            raise self._error_of(response, body)
        return self._parse(body, asset_ids)

    def _parse(self, body: bytes, asset_ids: Sequence[str]) -> list[PriceUpdate]:
        try:
            # parse_int=float: an integer of thousands of digits becomes infinite, and does not fail the whole response.
            content = json.loads(body, parse_int=float)
        except (ValueError, RecursionError):
            raise _bad_response(f"CoinAPI's response is not JSON: {self._clean(body) or '(empty)'}") from None
        rates = content.get("rates") if isinstance(content, dict) else None
        if not isinstance(rates, list):
            raise _bad_response(f"CoinAPI's response has no list of rates: {self._clean(body)}")
        position = {asset_id: number for number, asset_id in enumerate(asset_ids)}
        updates: list[PriceUpdate] = []
        for rate in rates:
            match rate:
                case {"asset_id_quote": str(asset_id), "rate": price, "time": at} if asset_id in position:
                    updates.append(PriceUpdate(asset_id, price, at))
        if not updates:
            raise _bad_response(f"CoinAPI's response has no price for {', '.join(asset_ids)}: {self._clean(body)}")
        return sorted(updates, key=lambda update: position[update.asset_id])

    def _error_of(self, response: requests.Response, body: bytes) -> CoinApiError:
        try:
            fields = json.loads(body)
            said = fields.get("detail") or fields.get("error") or fields.get("message") or ""
        except (ValueError, RecursionError, AttributeError):
            said = body
        said = self._clean(said)
        status = response.status_code
        message = "CoinAPI refused the key (401)" if status == 401 else f"CoinAPI answered {status}"
        if response.is_redirect:
            said = "a redirect, which is not followed: check COIN_API_URL"
        cause = CAUSES_BY_STATUS.get(status, "server_error" if status >= 500 else "other")
        return CoinApiError(f"{message}: {said}" if said else message, _retry_after(response), cause)

    def _read_credits(self, response: requests.Response) -> None:
        # CoinAPI renamed these headers and leaves them out at times: the last known numbers stay.
        used = _read_integer(response, "X-RateLimit-Used")
        left = _read_integer(response, "X-RateLimit-Remaining")
        if left is None:
            left = _read_integer(response, "X-RateLimit-Quota-Remaining")
        allocated = _read_integer(response, "X-RateLimit-Quota-Allocated")
        if used is None and allocated is not None and left is not None:
            used = allocated - left
        self.credits_used = self.credits_used if used is None else used
        self.credits_left = self.credits_left if left is None else left

    def _clean(self, text: object) -> str:
        """Text from outside, made fit for a log: one short line, printable, without the key."""
        line = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        # Before one_line cuts, which could leave a part of the key. A server may change its case.
        line = re.sub(re.escape(self._key), "[key]", line, flags=re.IGNORECASE)
        line = re.sub(r"//[^/@\s]*@", "//", line)  # a proxy's password
        return one_line(line)


class DemoApi:
    """Simulated prices, for trying the server out without a key: a random walk for each asset."""

    name = "demo"

    def __init__(self) -> None:
        self.credits_used: int | None = None
        self.credits_left: int | None = None
        self._prices = {"BTC": 45000.0, "ETH": 3000.0, "XRP": 0.6, "BCH": 300.0, "ADA": 0.5, "LTC": 75.0}
        self._prices |= {"LINK": 15.0, "XLM": 0.12, "DOT": 7.0, "SOL": 100.0}

    def fetch_prices(self, asset_ids: Sequence[str]) -> list[PriceUpdate]:
        """The next step of each asset's walk, about 0.1 %; an asset not named above starts at 10."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f0Z")
        for asset_id in asset_ids:
            price = self._prices.get(asset_id, 10.0) * math.exp(random.gauss(0, 0.001))
            self._prices[asset_id] = float(f"{price:.7g}")
        return [PriceUpdate(asset_id, self._prices[asset_id], now) for asset_id in asset_ids]


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until one deadline for the whole response: a plain timeout starts again with each byte."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: float):
        self._sock = sock
        self._raw = raw
        self._deadline = deadline
        self._has_begun = False  # whether a read has returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        try:
            count = self._raw.readinto(buffer)
        except ConnectionError as error:
            if self._has_begun:
                raise
            # Reset before the first byte: raise what http.client raises for a connection closed there.
            raise RemoteDisconnected(str(error)) from error
        self._has_begun = True
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _DeadlineResponse(HTTPResponse):
    """deadline: called when the request was sent; returns the monotonic time when the whole response must be here."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: Callable[[], float], **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp.detach(), deadline()))


class _LostWhileIdle(RemoteDisconnected):
    """A kept-alive connection was reset or closed before the first byte of the response to its next request."""


class _DeadlineConnection:
    """A mixin for urllib3's connection classes: their own timeouts start again with each byte."""

    adapter: "_DeadlineAdapter"
    responses = 0  # over this connection so far

    def connect(self) -> None:
        self.responses = 0
        # For a proxy's response to CONNECT.
        self.response_class: Any = partial(_DeadlineResponse, deadline=lambda: time.monotonic() + CONNECT_TIMEOUT)
        try:
            super().connect()  # type: ignore[misc]
        except TimeoutError as error:  # in the proxy's response, or in the TLS handshake
            raise ConnectTimeoutError(f"no connection within {CONNECT_TIMEOUT:g} s") from error
        self.response_class = partial(_DeadlineResponse, deadline=self.adapter.response_deadline)

    def getresponse(self) -> Any:
        try:
            response = super().getresponse()  # type: ignore[misc]
        except RemoteDisconnected as error:
            raise _LostWhileIdle(*error.args) if self.responses else error from None
        self.responses += 1
        return response


class _DeadlineAdapter(HTTPAdapter):
    """Gives each connection its deadlines, with a proxy or without; sends a request again after a _LostWhileIdle."""

    def __init__(self) -> None:
        super().__init__()
        self._deadline = 0.0  # for the response to the current request, monotonic; 0 until the request was sent

    def response_deadline(self) -> float:
        self._deadline = self._deadline or time.monotonic() + RESPONSE_TIMEOUT
        return self._deadline

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        self._deadline = 0.0
        try:
            return super().send(*args, **kwargs)
        except requests.ConnectionError as error:
            left = self._deadline - time.monotonic()
            if left <= 0 or not any(isinstance(each, _LostWhileIdle) for each in _chain(error)):
                raise
        kwargs["timeout"] = (min(CONNECT_TIMEOUT, left), RESPONSE_TIMEOUT)
        return super().send(*args, **kwargs)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _DeadlineConnection):
            pool.ConnectionCls = type(
                "DeadlineConnection", (_DeadlineConnection, pool.ConnectionCls), {"adapter": self}
            )
        return pool


def _read_body(response: requests.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_content(1 << 16):
        body += chunk
        if len(body) > MAX_RESPONSE:
            raise _bad_response(f"CoinAPI's response is larger than {MAX_RESPONSE} bytes")
    return bytes(body)


def _bad_response(message: str) -> CoinApiError:
    return CoinApiError(message, cause="bad_answer")


def one_line(text: object) -> str:
    """Fit for a log: one short line, and printable."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)[:1000]).split())
    return line if len(line) <= 200 else line[:200] + "…"


def _split_url(url: str) -> SplitResult | None:
    """The parts of a URL that requests can be sent to, or None."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for one that is not a number
    except ValueError:
        return None
    plain = re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w.~/-]*)?", url, re.ASCII | re.IGNORECASE)
    return parts if plain and parts.hostname else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, the innermost last."""
    each: BaseException | None = error
    while each:
        yield each
        each = each.__cause__ or each.__context__


def _reason(error: Exception) -> str:
    """The innermost error of requests' nested ones: the texts of the outer ones hold memory addresses."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, requests.exceptions.InvalidSchema) and "SOCKS" in str(error):
        return "the environment names a SOCKS proxy, which needs one more package: pip install pysocks"
    *_, innermost = _chain(error)
    if isinstance(innermost, TimeoutError):
        return f"not complete within {RESPONSE_TIMEOUT:g} s"
    return getattr(innermost, "strerror", None) or f"{type(innermost).__name__}: {innermost}"


def _cause(error: Exception) -> str:
    """Which of CAUSES an error is."""
    *_, innermost = _chain(error)
    if isinstance(error, requests.ConnectTimeout) or isinstance(innermost, TimeoutError):
        return "timeout"
    lost = isinstance(innermost, RemoteDisconnected | IncompleteRead)
    return "bad_answer" if isinstance(innermost, HTTPException | zlib.error) and not lost else "connection"


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _read_integer(response: requests.Response, header: str) -> int | None:
    value = response.headers.get(header, "").strip()
    return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else None
