"""One HTTP request to one response, or to a new client.

No socket, no connection, no thread: the bytes of a request in, a `Response` or `NewClient` out. The server thread owns
a `Site`.
"""

import base64
import hashlib
import json
import random
import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import cached_property, lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .history import History
from .origins import Origins
from .pages import PAGE, Pages
from .prices import Prices
from .status import Status

MAX_REQUEST = 32 << 10  # bytes of request line and headers
MAX_HEADERS = 100
MAX_QUERY = 8 << 10  # bytes: 400 assets fit, and parsing takes less than a millisecond
MAX_FIELDS = 100  # of a query
REQUEST_LINE = re.compile(r"([!-~]+)[ \t]+(\S+)(?:[ \t]+HTTP/(\d\.\d))?[ \t]*", re.ASCII)
HEADER = re.compile(r"([!-9;-~]+):([\t -~\x80-\xff]*)")
HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(?:[ \t]*,[ \t]*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
EMPTY_LINE = re.compile(rb"\n\r?\n")
METHODS = ("GET", "HEAD", "OPTIONS")
ALLOWED = ", ".join(METHODS)
ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
JSON = "application/json"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
CSV = "text/csv; charset=utf-8"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; manifest-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)
RETRY = (1_500, 3_000)  # ms until an EventSource reconnects, at random: thousands must not return in one instant
PATHS = "/, /ws, /stream, /prices, /history, /healthz and /metrics"


class Response(NamedTuple):
    """A whole HTTP response, the last bytes of its connection."""

    head: bytes
    body: Iterable[bytes]  # a list, whose pieces many responses may share, or an iterator that makes each when read
    status: int
    refused: str = ""  # why a request for the feed was refused


class NewClient(NamedTuple):
    """A request that becomes a client once `head` is sent."""

    head: bytes
    format: str  # the name of one of formats.FORMATS
    assets: tuple[str, ...]  # that it follows
    forwarded_for: str  # the header X-Forwarded-For


class HttpError(Exception):
    """An error response: its status, the text of its JSON, the headers it needs (Retry_After for Retry-After).

    refused: why a request for the feed is refused; it is counted under this word, which may be a new one.
    """

    def __init__(self, status: int, message: str, refused: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.refused = refused
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Request:
    """The head of a request: RFC 9112, 2 to 5.

    The standard library parses a head as an e-mail: that takes as long as all else that a response needs, and silently
    drops what follows a malformed line.
    """

    def __init__(self, head: bytes):
        self.method = ""
        self._size = len(head)
        self._lines = head.decode("latin-1").replace("\r\n", "\n").rstrip("\n").split("\n")
        self._headers: dict[str, list[str]] = {}

    def parse(self) -> None:
        """Set `method`, `version`, `path` and `query`. Raises HttpError for a malformed or unsupported request."""
        if self._size > MAX_REQUEST:
            raise HttpError(431, f"request of more than {MAX_REQUEST} bytes")
        if not (line := REQUEST_LINE.fullmatch(self._lines[0])):
            raise HttpError(400, f"not a request line: {self._lines[0][:40]!r}")
        self.method, target, self.version = line.groups("1.1")
        if self.version >= "2":
            raise HttpError(505, f"HTTP/{self.version} is not supported, only HTTP/1.1")
        self._read_headers()
        if self.method not in METHODS:
            message = f"method {self.method[:20]} is not supported, only GET, HEAD and OPTIONS"
            raise HttpError(405, message, Allow=ALLOWED)
        try:
            # urlsplit would take what follows two slashes for a host.
            url = urlsplit("/" + target.lstrip("/") if target.startswith("//") else target)
        except ValueError:
            raise HttpError(400, "the request target is not a URL") from None
        if len(url.query) > MAX_QUERY:
            raise HttpError(414, f"query of {len(url.query)} bytes: at most {MAX_QUERY} are allowed")
        self.path, self.query = unquote(url.path) or "/", url.query

    def _read_headers(self) -> None:
        if len(self._lines) > MAX_HEADERS + 1:
            raise HttpError(431, f"more than {MAX_HEADERS} headers")
        for line in self._lines[1:]:
            if not (header := HEADER.fullmatch(line)):  # a folded one too, because it could be echoed as two
                raise HttpError(400, f"not a header: {line[:40]!r}")
            self._headers.setdefault(header[1].lower(), []).append(header[2].strip(" \t"))

    def all(self, header: str) -> list[str]:
        """The values of the headers of this name, which is given in lower case."""
        return self._headers.get(header, [])

    def first(self, header: str) -> str:
        """The value of the first header of this name; "" without one."""
        return self._headers[header][0] if header in self._headers else ""

    def tokens(self, header: str) -> list[str]:
        """The items, in lower case, of a header whose value is a list."""
        return [token.strip().lower() for token in ",".join(self.all(header)).split(",")]

    @cached_property
    def _query_values(self) -> dict[str, list[str]]:
        try:
            return parse_qs(self.query, keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError:
            raise HttpError(400, f"query of more than {MAX_FIELDS} fields") from None

    def query_values(self, name: str) -> list[str]:
        """The values of this field of the query."""
        return self._query_values.get(name, []) if self.query else []


def find_end(buffer: bytearray, searched: int) -> int:
    """Where the first empty line of a head ends, CRLF or LF; 0 while it has none.

    searched: how many bytes were searched before, so that a peer that dribbles costs nothing.
    """
    if buffer.startswith((b"\n", b"\r\n")):
        return buffer.index(b"\n") + 1
    found = EMPTY_LINE.search(buffer, max(searched - 3, 0))
    return found.end() if found else 0


class Site:
    """The paths of one server, and the response at each.

    allow_origins: the web origins that may read; without any, all may. Raises ValueError for what is not an origin.
    folder: the page's files.
    """

    def __init__(
        self,
        prices: Prices,
        history: History,
        status: Status,
        *,
        allow_origins: Iterable[str] = (),
        folder: Path = PAGE,
    ):
        self.prices = prices
        self.history = history
        self.status = status
        self.origins = Origins(allow_origins)
        self.pages = Pages(folder)

    def respond(self, head: bytes) -> Response | NewClient:
        """The response to a request, given its complete head, or more of it than is allowed."""
        request = Request(head)
        try:
            request.parse()
            if request.method == "OPTIONS":
                return self._options(request)
            return self._route(request)
        except HttpError as error:
            body = json.dumps({"error": str(error)}).encode()
            response = self._make_response(request, body, status=error.status, headers=error.headers)
            return response._replace(refused=error.refused)

    def _route(self, request: Request) -> Response | NewClient:
        match request.path.split("/"):
            case ["", "ws"]:
                return self._websocket(request)
            case ["", "stream"]:
                return self._event_stream(request)
            case ["", "prices"]:
                return self._prices_response(request)
            case ["", "prices", asset_id]:
                return self._make_response(request, self._price(asset_id))
            case ["", "history"]:
                return self._history_response(request)
            case ["", "healthz"]:
                status = 200 if self.status.state() in ("ok", "paused") else 503
                return self._make_response(request, json.dumps(self.status.health()).encode(), status=status)
            case ["", "metrics"]:
                return self._make_response(request, self.status.metrics().encode(), headers={"Content-Type": METRICS})
        return self._page(request)

    # The feed

    def _websocket(self, request: Request) -> NewClient:
        """The opening handshake (RFC 6455, 4.2)."""
        assets = self._requested_assets(request, refused="asset")
        key = _checked_key(request)
        self.check_admission(request)
        accept = base64.b64encode(hashlib.sha1(key.encode() + ACCEPT_GUID).digest())  # noqa: S324 - the RFC's
        head = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
        return NewClient(head, "websocket", assets, request.first("x-forwarded-for"))

    def _event_stream(self, request: Request) -> Response | NewClient:
        """Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
        assets = self._requested_assets(request, refused="asset")
        self.check_admission(request)
        # Not chunked, it ends when the connection closes: HAProxy cuts a chunked one after `timeout server`.
        head = self._head(request, 200, {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        if request.method == "HEAD":
            return Response(head, [], 200)
        retry = b"retry: %d\n" % random.randint(*RETRY)
        return NewClient(head + retry, "event_stream", assets, request.first("x-forwarded-for"))

    def check_admission(self, request: Request) -> None:
        """Raises HttpError for a request on the feed's paths that may not become a client."""
        self._check_origin(request, refused="origin")
        if self.status.client_count >= self.status.max_clients:
            raise HttpError(503, f"full, clients connected: {self.status.max_clients}", "full", Retry_After="10")

    # The prices

    def _prices_response(self, request: Request) -> Response:
        latest = self.prices.latest
        messages = [latest[asset].text for asset in self._requested_assets(request) if asset in latest]
        return self._make_response(request, f"[{','.join(messages)}]".encode())

    def _price(self, asset_id: str) -> bytes:
        latest = self.prices.latest
        if asset_id not in latest:
            try:
                (asset_id,) = self.prices.choose([asset_id])
            except ValueError as error:
                raise HttpError(404, str(error)) from None
        if asset_id not in latest:
            raise HttpError(503, f"no price of {asset_id} is known yet", Retry_After="5")
        return latest[asset_id].text.encode()

    def _history_response(self, request: Request) -> Response:
        ranges = self.history.names
        range_name = (request.query_values("range") or ranges[:1])[-1]
        if range_name not in ranges:
            raise HttpError(400, f"unknown range {range_name[:40]!r}: there are {', '.join(ranges)}")
        assets = self._requested_assets(request)
        match (request.query_values("format") or ["json"])[-1]:
            case "json":
                return self._make_response(request, *self.history.json_pieces(range_name, assets))
            case "csv":
                name = f"prices-{range_name}-{self.status.quote}.csv"
                headers = {"Content-Type": CSV, "Content-Disposition": f'attachment; filename="{name}"'}
                body = [] if request.method == "HEAD" else self.history.csv(range_name, assets)
                return Response(self._head(request, 200, headers), body, 200)
            case other:
                raise HttpError(400, f"unknown format {other[:40]!r}: there are json, csv")

    def _requested_assets(self, request: Request, refused: str = "") -> tuple[str, ...]:
        """The assets of `?assets=` in tracked order; all without it. refused: as in HttpError."""
        values = request.query_values("assets")
        if not values:
            return self.prices.assets
        try:
            return self.prices.choose([each for each in ",".join(values).split(",") if each.strip()])
        except ValueError as error:
            raise HttpError(400, str(error), refused) from None

    # The page, and requests from pages of other servers

    def _page(self, request: Request) -> Response:
        file = self.pages.find(request.path, ",".join(request.tokens("accept-encoding")))
        if file is None:
            if request.path == "/":
                raise HttpError(404, f"no page: there is no index.html in the folder {self.pages.folder.name}")
            raise HttpError(404, f"not found: there are {PATHS}")
        headers = {"ETag": file.etag, "Vary": "Accept-Encoding"}
        if file.encoding:
            headers["Content-Encoding"] = file.encoding
        if file.content_type.startswith("text/html"):
            headers["Content-Security-Policy"] = f"{PAGE_POLICY}; {self.origins.frame_ancestors}"
        known = [tag.removeprefix("w/") for tag in request.tokens("if-none-match")]
        if "*" in known or file.etag.removeprefix("W/") in known:
            return Response(self._head(request, 304, headers), [], 304)
        return self._make_response(request, file.body, headers={"Content-Type": file.content_type} | headers)

    def _options(self, request: Request) -> Response:
        """CORS preflight: https://fetch.spec.whatwg.org/#cors-preflight-fetch."""
        headers = {"Allow": ALLOWED}
        if request.all("origin"):
            self._check_origin(request)
            headers |= {"Access-Control-Allow-Methods": ALLOWED, "Access-Control-Max-Age": "600"}
            asked = ", ".join(request.all("access-control-request-headers"))
            if HEADER_NAMES.fullmatch(asked):
                headers["Access-Control-Allow-Headers"] = asked
        return Response(self._head(request, 204, headers), [], 204)

    def _may_read(self, request: Request) -> bool:
        """Whether the request's origin may read. Without that header it is not a browser's, and may."""
        return not request.all("origin") or self.origins.allow(request.first("origin"), request.first("host"))

    def _check_origin(self, request: Request, refused: str = "") -> None:
        if not self._may_read(request):
            raise HttpError(403, f"origin {request.first('origin')[:100]} is not allowed", refused)

    # HTTP

    def _make_response(
        self, request: Request, *body: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> Response:
        """A response of known length, JSON unless a header says otherwise; HEAD gets the same without its body."""
        fields = {"Content-Type": JSON, "Content-Length": str(sum(map(len, body)))}
        head = self._head(request, status, fields | (headers or {}))
        return Response(head, [] if request.method == "HEAD" else list(body), status)

    def _head(self, request: Request, status: int, headers: dict[str, str]) -> bytes:
        """headers: those of this response; what every response has is added."""
        if not self.origins.is_restricted:
            headers["Access-Control-Allow-Origin"] = "*"
        else:
            headers["Vary"] = f"Origin, {headers['Vary']}" if "Vary" in headers else "Origin"
            if request.all("origin") and self._may_read(request):
                headers["Access-Control-Allow-Origin"] = request.first("origin")
        caching = "no-cache" if "ETag" in headers else "no-store"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"{_head_start(status, int(time.time()), caching)}{lines}\r\n".encode("latin-1")


def _checked_key(request: Request) -> str:
    """The Sec-WebSocket-Key of a proper upgrade."""
    if (
        request.method != "GET"
        or request.version < "1.1"
        or "websocket" not in request.tokens("upgrade")
        or "upgrade" not in request.tokens("connection")
    ):
        message = "this path speaks WebSocket: connect to it with a WebSocket client"
        raise HttpError(426, message, "handshake", Upgrade="websocket")
    if request.tokens("sec-websocket-version") != ["13"]:
        raise HttpError(426, "Sec-WebSocket-Version must be 13", "handshake", Sec_WebSocket_Version="13")
    if len(request.all("host")) != 1:
        raise HttpError(400, "there must be one Host header", "handshake")
    match request.all("sec-websocket-key"):
        case [key] if re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
            return key
    raise HttpError(400, "Sec-WebSocket-Key must be 16 bytes in base64", "handshake")


@lru_cache
def _head_start(status: int, second: int, caching: str) -> str:
    """The lines that all responses of this status have in common within one second."""
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "Server: price-server\r\n"
        f"Date: {formatdate(second, usegmt=True)}\r\n"
        f"Cache-Control: {caching}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n"
    )
