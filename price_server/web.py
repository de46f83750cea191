"""The head of one HTTP request to what is sent back: an answer, or an upgrade and the assets it follows.

Reads the server's figures and its history; no socket, no connection, no thread.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .figures import Figures
from .history import History

MAX_REQUEST = 32 << 10  # bytes of request line and headers
MAX_HEADERS = 100
REQUEST_LINE = re.compile(r"([!-~]+)[ \t]+(\S+)(?:[ \t]+HTTP/(\d\.\d))?[ \t]*", re.ASCII)
HEADER = re.compile(r"([!-9;-~]+):([\t -~\x80-\xff]*)")
MAX_QUERY = 1 << 10  # bytes, so that taking it apart is a matter of microseconds
MAX_FIELDS = 100  # of a query
DASHBOARD = Path(__file__).with_name("dashboard.html")
ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
JSON = "application/json"


class Answer(NamedTuple):
    """A whole HTTP answer, the last that its connection gets, in pieces; large ones are shared by all who take them."""

    pieces: Sequence[bytes]
    status: int = 200
    refused: str = ""  # why a request for the feed got no client


class Upgrade(NamedTuple):
    """A client: `head` makes it one, `assets` it follows, `forwarded_for` is what a proxy says of its address."""

    head: bytes
    assets: tuple[str, ...]
    forwarded_for: str


class Refusal(Exception):
    """An HTTP error answer: its status, the text of its JSON, the headers it needs."""

    def __init__(self, status: int, message: str, refused: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.refused = refused
        self.headers = headers


class Request:
    """The head of a request that is whole: RFC 9112, 2 to 5.

    The standard library's parser takes a head for an e-mail, which costs as much as all the rest of an answer, and
    where a line is no header it leaves out those behind it without a word.
    """

    def __init__(self, head: bytes):
        self.method = ""
        self._lines = head.decode("latin-1").replace("\r\n", "\n").rstrip("\n").split("\n")
        self._headers: dict[str, list[str]] = {}

    def parse(self) -> None:
        """Raises Refusal for what is no request that this server answers."""
        if not (line := REQUEST_LINE.fullmatch(self._lines[0])):
            raise Refusal(400, f"not a request line: {self._lines[0][:40]!r}")
        self.method, target, self.version = line.groups("1.1")
        if self.version >= "2":
            raise Refusal(505, f"HTTP/{self.version} is not supported, only HTTP/1.1")
        self._read_headers()
        if self.method not in ("GET", "HEAD"):
            raise Refusal(405, f"method {self.method[:20]} is not supported, only GET and HEAD", Allow="GET, HEAD")
        try:
            # Two slashes would be taken for the start of a host.
            url = urlsplit("/" + target.lstrip("/") if target.startswith("//") else target)
        except ValueError:
            raise Refusal(400, "the request target is not a URL") from None
        if len(url.query) > MAX_QUERY:
            raise Refusal(414, f"query of {len(url.query)} bytes: {MAX_QUERY} are the most")
        self.path, self.query = unquote(url.path), url.query

    def _read_headers(self) -> None:
        if len(self._lines) > MAX_HEADERS + 1:
            raise Refusal(431, f"more than {MAX_HEADERS} headers")
        for line in self._lines[1:]:
            if not (header := HEADER.fullmatch(line)):  # folded, too, or it could be sent back as two
                raise Refusal(400, f"not a header: {line[:40]!r}")
            self._headers.setdefault(header[1].lower(), []).append(header[2].strip(" \t"))

    def all(self, header: str) -> list[str]:
        """The value of each header of this name; the name is given in small letters."""
        return self._headers.get(header, [])

    def first(self, header: str) -> str:
        """The value of the first of them, or "" without one."""
        return self.all(header)[0] if header in self._headers else ""

    def tokens(self, header: str) -> list[str]:
        """The parts of a header that is a list."""
        return [token.strip().lower() for token in ",".join(self.all(header)).split(",")]

    def fields(self, name: str) -> list[str] | None:
        """The values of this field of the query; None when it does not stand there."""
        try:
            return parse_qs(self.query, keep_blank_values=True, max_num_fields=MAX_FIELDS).get(name)
        except ValueError:
            raise Refusal(400, f"query of more than {MAX_FIELDS} fields") from None


def find_end(buffer: bytearray, searched: int) -> int:
    """Where the first empty line of a head ends, CRLF or LF; -1 while it has none.

    searched: how much of it was looked at before, so that a dribbling peer costs nothing.
    """
    if buffer.startswith((b"\n", b"\r\n")):
        return buffer.index(b"\n") + 1
    start = max(searched - 3, 0)
    ends = [at + len(mark) for mark in (b"\n\r\n", b"\n\n") if (at := buffer.find(mark, start)) >= 0]
    return min(ends, default=-1)


def respond(head: bytes, figures: Figures, history: History) -> Answer | Upgrade:
    """What is to be done about a request whose head is whole."""
    request = Request(head)
    try:
        request.parse()
        return _respond(request, figures, history)
    except Refusal as refusal:
        return refuse(refusal, figures, request)


def refuse(refusal: Refusal, figures: Figures, request: Request | None = None) -> Answer:
    """An error's answer, in JSON like the rest."""
    body = json.dumps({"error": str(refusal)}).encode()
    answer = _answer(request, figures, body, status=refusal.status, **refusal.headers)
    return answer._replace(refused=refusal.refused)


def _respond(request: Request, figures: Figures, history: History) -> Answer | Upgrade:
    match request.path.split("/")[1:]:
        case ["ws"]:
            return _upgrade(request, figures)
        case [""]:
            return _dashboard(request, figures)
        case ["history"]:
            return _past(request, figures, history)
        case ["prices"]:
            updates = ",".join([update.to_json() for update in figures.updates.values()])
            return _answer(request, figures, f"[{updates}]".encode())
        case ["prices", asset_id]:
            return _answer(request, figures, _price(asset_id.upper(), figures))
        case ["healthz"]:
            status = 200 if figures.status() in ("ok", "paused") else 503
            return _answer(request, figures, json.dumps(figures.health(history.describe())).encode(), status=status)
        case ["metrics"]:
            text = figures.metrics().encode()
            return _answer(request, figures, text, content_type="text/plain; version=0.0.4; charset=utf-8")
    raise Refusal(404, "not found: there are /, /ws, /prices, /history, /healthz and /metrics")


def _upgrade(request: Request, figures: Figures) -> Upgrade:
    """The opening handshake (RFC 6455, 4.2)."""
    assets = _wanted(request, figures, refused="asset")
    key = _checked_key(request)
    if not _origin_is_allowed(request, figures):
        raise Refusal(403, f"origin {request.first('origin')[:100]} is not allowed", "origin")
    if figures.client_count >= figures.max_clients:
        raise Refusal(503, f"full, clients connected: {figures.max_clients}", "full", Retry_After="10")
    accept = base64.b64encode(hashlib.sha1(key.encode() + ACCEPT_GUID).digest())  # noqa: S324 - the RFC's
    head = (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
    )
    return Upgrade(head, assets, request.first("x-forwarded-for"))


def _checked_key(request: Request) -> str:
    """The Sec-WebSocket-Key of a proper upgrade."""
    if (
        request.method != "GET"
        or request.version < "1.1"
        or "websocket" not in request.tokens("upgrade")
        or "upgrade" not in request.tokens("connection")
    ):
        message = "this path speaks WebSocket: connect to it with a WebSocket client"
        raise Refusal(426, message, "handshake", Upgrade="websocket")
    if request.tokens("sec-websocket-version") != ["13"]:
        raise Refusal(426, "Sec-WebSocket-Version must be 13", "handshake", Sec_WebSocket_Version="13")
    if len(request.all("host")) != 1:
        raise Refusal(400, "there must be one Host header", "handshake")
    match request.all("sec-websocket-key"):
        case [key] if re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
            return key
    raise Refusal(400, "Sec-WebSocket-Key must be 16 bytes in base64", "handshake")


def _past(request: Request, figures: Figures, history: History) -> Answer:
    range_name = (request.fields("range") or history.names[:1])[-1]
    if range_name not in history.names:
        raise Refusal(400, f"unknown range {range_name[:40]!r}: there are {', '.join(history.names)}")
    return _answer(request, figures, *history.answer(range_name, _wanted(request, figures)))


def _wanted(request: Request, figures: Figures, refused: str = "") -> tuple[str, ...]:
    """The assets of `?assets=`, in the order tracked; all when it does not say."""
    values = request.fields("assets")
    if values is None:
        return figures.assets
    ids = {asset_id.strip().upper() for asset_id in ",".join(values).split(",")}
    for asset_id in sorted(ids.difference(figures.assets)):
        raise Refusal(400, figures.unknown(asset_id), refused)
    return tuple(asset for asset in figures.assets if asset in ids)


def _price(asset_id: str, figures: Figures) -> bytes:
    if asset_id not in figures.assets:
        raise Refusal(404, figures.unknown(asset_id))
    if asset_id not in figures.updates:
        raise Refusal(503, f"no price of {asset_id} is known yet", Retry_After="5")
    return figures.updates[asset_id].to_json().encode()


def _dashboard(request: Request, figures: Figures) -> Answer:
    try:
        page, policy = _read_dashboard(DASHBOARD, DASHBOARD.stat().st_mtime_ns)
    except OSError as error:
        raise Refusal(404, f"no page: {DASHBOARD.name} beside {Path(__file__).name}: {error.strerror}") from None
    return _answer(request, figures, page, content_type="text/html; charset=utf-8", Content_Security_Policy=policy)


@lru_cache(maxsize=1)
def _read_dashboard(path: Path, _: int) -> tuple[bytes, str]:
    """The page and its Content-Security-Policy: read anew when it has changed, and held once for all who take it."""
    page = path.read_bytes().replace(b"\r\n", b"\n")  # as a browser reads it before it hashes
    # Only the script and the style that stand in the page may run, and only this server may be asked.
    hashes = {tag: _hashes(rb"<%b>(.*?)</%b>" % (tag, tag), page) for tag in (b"script", b"style")}
    policy = (
        f"default-src 'none'; script-src {hashes[b'script']}; style-src {hashes[b'style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    return page, policy


def _hashes(pattern: bytes, page: bytes) -> str:
    digests = [hashlib.sha256(part).digest() for part in re.findall(pattern, page, re.DOTALL)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _answer(
    request: Request | None,
    figures: Figures,
    *body: bytes,
    content_type: str = JSON,
    status: int = 200,
    **headers: str,
) -> Answer:
    """A whole answer; HEAD gets all but the body."""
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Server: price-server",
        f"Date: {_date(int(time.time()))}",
        f"Content-Type: {content_type}",
        f"Content-Length: {sum(map(len, body))}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if not figures.allow_origins:
        lines.append("Access-Control-Allow-Origin: *")
    else:
        lines.append("Vary: Origin")
        if request and request.all("origin") and _origin_is_allowed(request, figures):
            lines.append(f"Access-Control-Allow-Origin: {request.first('origin')}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return Answer([head] if request and request.method == "HEAD" else [head, *body], status)


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def _origin_is_allowed(request: Request, figures: Figures) -> bool:
    """A browser's page may read if it came from here, or from an allowed origin; the rest are no browsers."""
    if not request.all("origin") or not figures.allow_origins:
        return True
    origin, host = request.first("origin").lower(), request.first("host").lower()
    return origin in figures.allow_origins or origin in (f"http://{host}", f"https://{host}")
