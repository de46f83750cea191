"""web and figures: the head of a request to an answer or an upgrade; what the server says of itself.

No socket: `respond` is called with bytes, and what it answers is taken apart by `http.client`.
"""

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from raw import HEADERS, Clock
from raw import request as upgrade

from coin_api import PriceUpdate
from price_server import web
from price_server.figures import Figures
from price_server.history import History
from price_server.web import Answer, Upgrade, find_end, respond

ALL = ("BTC", "ETH", "SOL")
PAST = History(ALL)  # without prices
AT = "2026-11-22T07:44:05.1234567Z"
BTC = '{"asset_id":"BTC","price":45000.0,"time":"2026-11-22T07:44:05.1234567Z"}'


class Got(NamedTuple):
    """An answer as a client understands it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    refused: str

    @property
    def error(self) -> str:
        """What its JSON says, and nothing else."""
        assert self.headers["Content-Type"] == "application/json"
        (field,) = json.loads(self.body).items()
        assert field[0] == "error"
        return field[1]


def took(answer: Answer, method: str = "GET") -> Got:
    class Wire:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(b"".join(answer.pieces))

    parsed = HTTPResponse(Wire(), method=method)  # type: ignore[arg-type]
    parsed.begin()
    headers = dict(parsed.getheaders())
    assert len(headers) == len(parsed.getheaders()), "a header comes twice"
    assert parsed.status == answer.status
    body = b"".join(answer.pieces).partition(b"\r\n\r\n")[2]
    assert len(body) == (0 if method == "HEAD" else int(headers["Content-Length"]))
    return Got(parsed.status, headers, body, answer.refused)


def send(figures: Figures, head: bytes) -> Got:
    """The answer to this head."""
    answer = respond(head, figures, PAST)
    assert isinstance(answer, Answer)
    return took(answer, head.partition(b" ")[0].decode("latin-1"))


def get(figures: Figures, target: str, method: str = "GET", **headers: str) -> Got:
    lines = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "here:3030"} | headers).items())
    return send(figures, f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))


def upgraded(figures: Figures, head: bytes) -> Upgrade:
    made = respond(head, figures, PAST)
    assert isinstance(made, Upgrade)
    return made


def poll(figures: Figures, **prices: float) -> None:
    figures.remember(*figures.encode(PriceUpdate(asset, price, AT) for asset, price in prices.items()))


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now = 0.0
    return clock


@pytest.fixture
def figures(clock: Clock) -> Figures:
    """Of a server without prices, made at 1,800,000,000.25 s."""
    return Figures(ALL, clock=clock, wall_clock=lambda: 1_800_000_000.25 + clock.now)


@pytest.fixture
def priced(figures: Figures) -> Figures:
    poll(figures, BTC=45000.0, ETH=2500.5, SOL=177.25)
    return figures


@pytest.fixture
def narrowed() -> Figures:
    """Of a server that only some pages may read."""
    return Figures(ALL, allow_origins=["https://Example.org/", "http://localhost:8080"])


# Where a head ends


@pytest.mark.parametrize(
    "head",
    [
        *(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\nHost: x\n\n"),
        *(b"GET /\r\nHost: x\n\r\n", b"GET /\r\n\n", b"\n", b"\r\n", b"G\n\n", b"\r\r\n\r\n"),
    ],
)
def test_a_head_ends_at_its_first_empty_line_however_it_is_cut(head: bytes) -> None:
    for behind in (b"", b"x", b"\n", b"\r\n\r\nGET / HTTP/1.1\n\n\r\n\r\n"):
        assert find_end(bytearray(head + behind), 0) == len(head)
    for end in range(len(head)):
        assert find_end(bytearray(head[:end]), 0) == -1
        assert find_end(bytearray(head), searched=end) == len(head)  # its last bytes come behind a search in vain


def test_what_was_searched_is_not_searched_again() -> None:
    searched = 30_000
    assert find_end(bytearray(b"G\n\nX: " + b"x" * searched), searched) == -1
    assert find_end(bytearray(b"GET / HTTP/1.1\r\nX: " + b"x" * searched + b"\r\n\r\n"), searched) == searched + 23


# Every answer


@pytest.mark.parametrize(
    ("target", "status", "content_type"),
    [
        ("/", "200 OK", "text/html; charset=utf-8"),
        ("/metrics", "200 OK", "text/plain; version=0.0.4; charset=utf-8"),
        ("/prices", "200 OK", "application/json"),
        ("/prices/BTC", "200 OK", "application/json"),
        ("/healthz", "200 OK", "application/json"),
        ("/nope", "404 Not Found", "application/json"),
        ("/history?range=2h", "400 Bad Request", "application/json"),
    ],
)
def test_every_answer_has_these_headers_and_head_has_the_same(
    priced: Figures, target: str, status: str, content_type: str
) -> None:
    answer, head = get(priced, target), get(priced, target, "HEAD")
    assert answer.body
    assert head.status == answer.status
    for each in (answer, head):
        headers = dict(each.headers)
        at = parsedate_to_datetime(headers.pop("Date"))
        assert at.tzinfo is not None
        if target == "/":
            headers.pop("Content-Security-Policy")
        assert headers == {
            "Server": "price-server",
            "Content-Type": content_type,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
            "Access-Control-Allow-Origin": "*",
        }
    answered = respond(f"GET {target} HTTP/1.0\n\n".encode(), priced, PAST)
    assert isinstance(answered, Answer)
    assert answered.pieces[0].startswith(f"HTTP/1.1 {status}\r\nServer: price-server\r\n".encode())


def test_the_date_is_that_of_the_answer(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 784_111_777.0)
    assert get(figures, "/prices").headers["Date"] == "Sun, 06 Nov 1994 08:49:37 GMT"  # RFC 9110's own


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "BREW" * 20])
def test_other_methods_are_405_with_what_is_allowed(figures: Figures, method: str) -> None:
    for target in ("/", "/ws", "/prices", "/nope"):
        answer = get(figures, target, method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        assert answer.error == f"method {method[:20]} is not supported, only GET and HEAD"


@pytest.mark.parametrize(
    "target", ["/nope", "/ws/", "/prices/BTC/", "/history/BTC", "/tracker.py", "/%", "/../prices", "*", "/metrics/x"]
)
def test_what_is_not_there_is_404_with_what_is_there(priced: Figures, target: str) -> None:
    answer = get(priced, target)
    assert answer.status == 404
    assert answer.error == "not found: there are /, /ws, /prices, /history, /healthz and /metrics"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\r\n", 400),
        (b"garbage\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /ws HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/one\r\n\r\n", 400),
        (b"GET / x y HTTP/1.1\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \xff\xfe\r\n\r\n", 400),
        (b"GET /prices\r\n\r\n", 200),
        (b"GET /prices HTTP/1.0\n\n", 200),
        (b"GET  /prices\tHTTP/1.1 \t\r\n\r\n", 200),
        (b"GET http://elsewhere/prices HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /prices HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n", 200),
        (b"GET /prices HTTP/1.1\r\n" + b"X: y\r\n" * 100 + b"\r\n", 200),
    ],
)
def test_garbage_gets_a_status_line_and_json(figures: Figures, head: bytes, status: int) -> None:
    answer = respond(head, figures, PAST)
    assert isinstance(answer, Answer)
    got = took(answer)
    assert got.status == status
    assert got.error if status != 200 else got.body == b"[]"


def test_a_request_line_that_says_nothing_is_told_so(figures: Figures) -> None:
    assert send(figures, b"\r\n").error == "not a request line: ''"
    assert send(figures, b"GET http://[/ HTTP/1.1\r\n\r\n").error == "the request target is not a URL"
    assert send(figures, b"GET / x y HTTP/1.1\r\n\r\n").error == "not a request line: 'GET / x y HTTP/1.1'"
    assert send(figures, b"GET / HTTP/2.0\r\n\r\n").error == "HTTP/2.0 is not supported, only HTTP/1.1"
    assert send(figures, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n").error == "more than 100 headers"


def test_what_is_sent_back_of_a_line_that_is_wrong_has_40_characters_at_the_most(figures: Figures) -> None:
    line = "0123456789" * 3_000
    assert send(figures, f"{line}\r\n\r\n".encode()).error == f"not a request line: {line[:40]!r}"
    assert send(figures, f"GET / HTTP/1.1\r\n{line}\r\n\r\n".encode()).error == f"not a header: {line[:40]!r}"


@pytest.mark.parametrize(
    "line", ["no colon", ": no name", "Host : x", " folded: x", "Ho\tst: x", "Hôst: x", "X: \0", "X: a\rb", "X: \x7f"]
)
def test_a_line_that_is_no_header_is_refused_by_name(priced: Figures, line: str) -> None:
    answer = send(priced, f"GET /prices HTTP/1.1\r\nHost: x\r\n{line}\r\nAccept: y\r\n\r\n".encode("latin-1"))
    assert (answer.status, answer.error) == (400, f"not a header: {line!r}")


def test_headers_may_have_any_case_no_space_or_much_of_it_and_latin_letters(narrowed: Figures) -> None:
    lines = "X-Word: naïve\r\nX-Empty:\r\norigin:https://example.org\r\nHOST:   x \t \r\nX-Tab: a\tb\r\n"
    answer = send(narrowed, f"GET /prices HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://example.org")


@pytest.mark.parametrize("target", ["/prices", "/ws", "/history", "/"])
def test_a_query_has_1_kib_at_the_most(priced: Figures, target: str) -> None:
    for size in (1_025, 30_000):
        answer = get(priced, f"{target}?x={'x' * (size - 2)}")
        assert answer.status == 414
        assert answer.error == f"query of {size} bytes: 1024 are the most"
    just = respond(upgrade(f"{target}?x={'x' * 1_022}"), priced, PAST)
    assert not isinstance(just, Answer) or just.status == 200


@pytest.mark.parametrize("target", ["/history", "/ws"])
def test_a_query_has_100_fields_at_the_most(priced: Figures, target: str) -> None:
    just = respond(upgrade(f"{target}?{'x&' * 99}x"), priced, PAST)
    assert not isinstance(just, Answer) or just.status == 200
    answer = get(priced, f"{target}?{'x&' * 100}x")
    assert (answer.status, answer.error) == (400, "query of more than 100 fields")


# The prices


def test_prices_are_the_last_updates_in_the_order_tracked(figures: Figures) -> None:
    assert get(figures, "/prices").body == b"[]"
    poll(figures, SOL=177.5, BTC=45000.0)
    poll(figures, SOL=178.5)
    assert get(figures, "/prices").body.decode() == (
        f'[{BTC},{{"asset_id":"SOL","price":178.5,"time":"2026-11-22T07:44:05.1234567Z"}}]'
    )


@pytest.mark.parametrize("target", ["/prices/BTC", "/prices/btc", "/prices/BTC?x=1", "//prices/BTC", "/prices/%42TC"])
def test_one_price_has_a_path_of_its_own(priced: Figures, target: str) -> None:
    assert get(priced, target).body.decode() == BTC


def test_an_asset_that_is_not_tracked_is_named_with_what_is_tracked(priced: Figures) -> None:
    said = "unknown asset 'DOGE': this server tracks BTC, ETH, SOL"
    assert (get(priced, "/prices/doge").status, get(priced, "/prices/doge").error) == (404, said)
    for target in ("/history?assets=BTC,DOGE", "/ws?assets=doge", "/ws?assets=ETH&assets=%20doge", "/ws?assets=X,DOGE"):
        answer = get(priced, target)
        assert (answer.status, answer.error) == (400, said)
        assert answer.refused == ("asset" if target.startswith("/ws") else "")
    for target in ("/prices/", "/history?assets=", "/ws?assets"):
        assert get(priced, target).error == "unknown asset '': this server tracks BTC, ETH, SOL"
    assert get(priced, f"/prices/{'x' * 500}").error == f"unknown asset '{'X' * 40}': this server tracks BTC, ETH, SOL"
    assert get(priced, "/prices/%0D%0AX:%20y").error == r"unknown asset '\r\nX: Y': this server tracks BTC, ETH, SOL"


def test_an_asset_that_has_no_price_yet_is_503(figures: Figures) -> None:
    poll(figures, ETH=1.0)
    answer = get(figures, "/prices/btc")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    assert (answer.error, answer.refused) == ("no price of BTC is known yet", "")


# The upgrade


def test_the_handshake_is_answered_as_in_the_rfc(figures: Figures) -> None:
    assert upgraded(figures, upgrade()) == Upgrade(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        ALL,
        "",
    )


@pytest.mark.parametrize(
    "head",
    [
        upgrade(Connection="keep-alive, Upgrade"),  # as Firefox sends it
        upgrade(Connection=None, more="Connection: keep-alive\r\nConnection: upgrade\r\n"),
        upgrade(Upgrade="h2c, WebSocket"),
        upgrade(Upgrade="h2c,\twebsocket ,x"),
        upgrade(more="Origin: https://example.org\r\n"),
        upgrade(more="Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: chat\r\n"),
        upgrade(more=f"X-Long: {'x' * 30_000}\r\n"),
        upgrade(Sec_WebSocket_Key="++//AZaz09+/AZaz09+/AA==").replace(b"\r\n", b"\n"),
        upgrade(Sec_WebSocket_Key=" dGhlIHNhbXBsZSBub25jZQ== "),
        upgrade("/ws?"),
        upgrade("/ws?x=assets&range=2h"),
        upgrade("/%77s"),
        upgrade("http://server.example.com/ws"),
        upgrade("/ws#part"),
        upgrade(Host=""),
    ],
)
def test_a_proper_upgrade_is_accepted(figures: Figures, head: bytes) -> None:
    made = upgraded(figures, head)
    assert made.head.startswith(b"HTTP/1.1 101 ")
    assert made.assets == ALL


WEBSOCKET = "this path speaks WebSocket: connect to it with a WebSocket client"
VERSION = "Sec-WebSocket-Version must be 13"
HOST = "there must be one Host header"
KEY = "Sec-WebSocket-Key must be 16 bytes in base64"


@pytest.mark.parametrize(
    ("head", "status", "error"),
    [
        (upgrade(Upgrade=None), 426, WEBSOCKET),
        (upgrade(Upgrade="websockets"), 426, WEBSOCKET),
        (upgrade(Upgrade="xwebsocket, h2c"), 426, WEBSOCKET),
        (upgrade(Connection=None), 426, WEBSOCKET),
        (upgrade(Connection="keep-alive"), 426, WEBSOCKET),
        (upgrade(Connection="upgraded"), 426, WEBSOCKET),
        (upgrade(version="HTTP/1.0"), 426, WEBSOCKET),
        (upgrade(method="HEAD"), 426, WEBSOCKET),
        (upgrade(Sec_WebSocket_Version=None), 426, VERSION),
        (upgrade(Sec_WebSocket_Version="8"), 426, VERSION),
        (upgrade(Sec_WebSocket_Version="013"), 426, VERSION),
        (upgrade(Sec_WebSocket_Version="13, 13"), 426, VERSION),
        (upgrade(Host=None), 400, HOST),
        (upgrade(more="Host: another\r\n"), 400, HOST),
        (upgrade(Sec_WebSocket_Key=None), 400, KEY),
        (upgrade(Sec_WebSocket_Key=""), 400, KEY),
        (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZQ=="), 400, KEY),
        (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ"), 400, KEY),
        (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZSE="), 400, KEY),  # 17 bytes
        (upgrade(Sec_WebSocket_Key="!!!!IHNhbXBsZSBub25jZQ=="), 400, KEY),
        (upgrade(Sec_WebSocket_Key="\xe9\xe9\xe9\xe9IHNhbXBsZSBub25jZQ=="), 400, KEY),
        (upgrade(more=f"Sec-WebSocket-Key: {HEADERS['Sec-WebSocket-Key']}\r\n"), 400, KEY),
    ],
)
def test_what_is_no_proper_upgrade_is_refused_and_counted(
    figures: Figures, head: bytes, status: int, error: str
) -> None:
    answer = send(figures, head)
    assert (answer.status, answer.refused) == (status, "handshake")
    assert answer.headers.get("Upgrade") == ("websocket" if error == WEBSOCKET else None)
    assert answer.headers.get("Sec-WebSocket-Version") == ("13" if error == VERSION else None)
    if not head.startswith(b"HEAD"):
        assert answer.error == error


@pytest.mark.parametrize(
    ("query", "assets"),
    [
        ("", ALL),
        ("?assets=sol,eth", ("ETH", "SOL")),
        ("?assets=SOL&x=y&assets=%20eth", ("ETH", "SOL")),
        ("?assets=ETH,SOL,ETH", ("ETH", "SOL")),
        ("?ASSETS=doge", ALL),
    ],
)
def test_assets_are_chosen_by_the_query_in_the_order_tracked(
    figures: Figures, query: str, assets: tuple[str, ...]
) -> None:
    assert upgraded(figures, upgrade(f"/ws{query}")).assets == assets
    assert tuple(json.loads(get(figures, f"/history{query}").body)) == assets


def test_what_a_proxy_says_of_the_address_is_passed_on(figures: Figures) -> None:
    assert upgraded(figures, upgrade(X_Forwarded_For="192.0.2.7, 10.0.0.1")).forwarded_for == "192.0.2.7, 10.0.0.1"


def test_the_one_over_max_clients_gets_503_with_retry_after() -> None:
    figures = Figures(ALL, max_clients=2)
    figures.client_count = 1
    assert upgraded(figures, upgrade())
    for figures.client_count in (2, 3):
        answer = send(figures, upgrade())
        assert (answer.status, answer.headers["Retry-After"], answer.refused) == (503, "10", "full")
        assert answer.error == "full, clients connected: 2"
    assert get(figures, "/prices").status == 200


# Origins


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://example.org", True),
        ("HTTPS://Example.ORG", True),
        ("http://localhost:8080", True),
        ("http://server.example.com", True),  # the page came from this server
        ("https://SERVER.example.com", True),
        ("http://server.example.com:8080", False),
        ("http://localhost", False),
        ("http://localhost:80800", False),
        ("https://example.org:8443", False),
        ("http://example.org", False),
        ("https://example.com", False),
        ("https://example.org.evil.net", False),
        ("https://evil.net/https://example.org", False),
        ("ftp://server.example.com", False),
        ("example.org", False),
        ("null", False),
        ("", False),
    ],
)
def test_only_the_allowed_origins_may_read(narrowed: Figures, origin: str, allowed: bool) -> None:
    answer = get(narrowed, "/prices", Host="Server.Example.com", Origin=origin)
    assert (answer.status, answer.headers["Vary"]) == (200, "Origin")
    assert answer.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
    if allowed:
        assert upgraded(narrowed, upgrade(Origin=origin))
    else:
        refusal = send(narrowed, upgrade(Origin=origin))
        assert (refusal.status, refusal.refused) == (403, "origin")
        assert refusal.error == f"origin {origin} is not allowed"


@pytest.mark.parametrize("end", ["\r\n ", "\n\t", "\r"])
def test_an_origin_never_becomes_two_headers_of_the_answer(narrowed: Figures, end: str) -> None:
    folded = f"server.example.com{end}X-More: y"
    answer = get(narrowed, "/prices", Host=folded, Origin=f"https://{folded}")
    assert answer.status == 400
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "X-More" not in answer.headers


@pytest.mark.parametrize(
    "target",
    ["/", "/prices", "/prices/BTC", "/prices/DOGE", "/healthz", "/metrics", "/nope", "/history?range=2h", "/ws"],
)
def test_an_allowed_origin_may_read_every_path_and_every_error(narrowed: Figures, target: str) -> None:
    poll(narrowed, BTC=1.0)
    answer = get(narrowed, target, Origin="https://example.org")
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    refused = get(narrowed, target, "POST", Origin="https://example.org")
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (405, "https://example.org")


@pytest.mark.parametrize(
    "head", [b"\r\n", b"garbage\r\n\r\n", b"GET / HTTP/9.9\r\nOrigin: https://example.org\r\n\r\n"]
)
def test_garbage_has_no_origin(narrowed: Figures, head: bytes) -> None:
    answer = send(narrowed, head)
    assert answer.status in (400, 505)
    assert answer.headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_what_is_no_browser_sends_no_origin_and_may_read(narrowed: Figures) -> None:
    assert upgraded(narrowed, upgrade())
    answer = get(narrowed, "/prices")
    assert (answer.status, answer.headers["Vary"]) == (200, "Origin")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_by_default_every_page_may_read(figures: Figures) -> None:
    assert upgraded(figures, upgrade(Origin="https://any.example"))
    answer = get(figures, "/prices", Origin="https://any.example")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Vary" not in answer.headers


def test_an_origin_is_not_taken_for_this_server_because_neither_has_a_host(narrowed: Figures) -> None:
    for origin in ("null", "x://", ""):
        assert send(narrowed, upgrade(Host="", Origin=origin)).status == 403
        answer = send(narrowed, f"GET /prices HTTP/1.1\r\nOrigin: {origin}\r\n\r\n".encode())
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_refused_origin_is_named_in_100_characters_at_the_most(narrowed: Figures) -> None:
    origin = "https://" + "x" * 500
    assert send(narrowed, upgrade(Origin=origin)).error == f"origin {origin[:100]} is not allowed"


# The past


@pytest.fixture
def past() -> History:
    """The past of these assets, with BTC at 1 two hours ago and at 2.5 now."""
    past = History(ALL, lambda: 1_800_007_200.0)
    past.add({"BTC": "1"}, 1_800_000_000.0)
    past.add({"BTC": "2.5"}, 1_800_007_200.0)
    return past


@pytest.mark.parametrize(
    ("query", "prices"),
    [("", [2.5]), ("?range=24h", [1, 2.5]), ("?range=24h&range=1h", [2.5]), ("?range=7d&assets=btc", [1, 2.5])],
)
def test_the_range_is_an_hour_unless_the_query_says_so(
    figures: Figures, past: History, query: str, prices: list[float]
) -> None:
    answer = respond(f"GET /history{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), figures, past)
    assert isinstance(answer, Answer)
    assert [price for _, price in json.loads(took(answer).body)["BTC"]] == prices


@pytest.mark.parametrize("name", ["2h", "", "1H", "x" * 500])
def test_an_unknown_range_is_answered_with_the_five(figures: Figures, name: str) -> None:
    answer = get(figures, f"/history?range={name}")
    assert (answer.status, answer.refused) == (400, "")
    assert answer.error == f"unknown range '{name[:40]}': there are 1h, 24h, 7d, 30d, 1y"


def test_the_pieces_of_the_past_are_sent_as_they_are_and_copied_by_nobody(figures: Figures, past: History) -> None:
    whole, head = (
        respond(f"{method} /history?assets=BTC HTTP/1.1\r\nHost: x\r\n\r\n".encode(), figures, past)
        for method in ("GET", "HEAD")
    )
    assert isinstance(whole, Answer)
    assert isinstance(head, Answer)
    assert whole.pieces[2] is past.answer("1h", ["BTC"])[1]
    got = took(whole)
    assert (got.status, got.headers["Content-Type"], got.body) == (
        *(200, "application/json", b'{"BTC":[[1800007200.000,2.5]]}'),
    )
    assert took(head, "HEAD").headers["Content-Length"] == str(len(got.body))


# The page


class Page(HTMLParser):
    """What stands in each script and style, as a browser sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inside, self.found = "", {"script": list[str](), "style": list[str]()}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside in self.found:
            self.found[self.inside].append(data)
        self.inside = ""

    def hashes(self, tag: str) -> str:
        digests = [hashlib.sha256(text.encode()).digest() for text in self.found[tag]]
        assert digests
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def test_the_page_may_run_its_own_script_only_and_ask_this_server_only(figures: Figures) -> None:
    answer = get(figures, "/?assets=DOGE&range=nope")  # which the page reads itself
    page = Page(answer.body.decode())
    assert answer.headers["Content-Security-Policy"] == (
        f"default-src 'none'; script-src {page.hashes('script')}; style-src {page.hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )


def test_every_script_and_style_of_a_page_is_hashed_as_the_browser_reads_it(
    figures: Figures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "dashboard.html"
    page.write_bytes(
        b"<style>\r\na\r\n</style><style>b</style><script>\r\n1 < 2;\r\n</script><p>p</p><script>2</script>"
    )
    monkeypatch.setattr(web, "DASHBOARD", page)
    answer = get(figures, "/")
    assert answer.body == b"<style>\na\n</style><style>b</style><script>\n1 < 2;\n</script><p>p</p><script>2</script>"
    read = Page(answer.body.decode())
    assert read.found == {"script": ["\n1 < 2;\n", "2"], "style": ["\na\n", "b"]}
    for tag in read.found:
        assert f"{tag}-src {read.hashes(tag)};" in answer.headers["Content-Security-Policy"]


def test_a_page_that_was_changed_is_sent_and_hashed_anew(
    figures: Figures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "dashboard.html"
    monkeypatch.setattr(web, "DASHBOARD", page)
    for number, text in enumerate(("<script>1</script><style>a</style>", "<script>2</script><style>b</style>"), 1):
        page.write_text(text)
        os.utime(page, (number, number))
        answer = get(figures, "/")
        assert answer.body.decode() == text
        assert Page(text).hashes("script") in answer.headers["Content-Security-Policy"]


def test_all_who_take_the_page_hold_it_once(figures: Figures) -> None:
    first, second = (respond(b"GET / HTTP/1.1\r\n\r\n", figures, PAST) for _ in range(2))
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert first.pieces[1] is second.pieces[1]


def test_without_its_page_the_server_says_what_is_missing(
    priced: Figures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(web, "DASHBOARD", tmp_path / "dashboard.html")
    answer = get(priced, "/")
    assert (answer.status, answer.error) == (404, "no page: dashboard.html beside web.py: No such file or directory")
    assert get(priced, "/prices").status == 200


# How the server is


def test_healthz_has_exactly_these_fields(figures: Figures, clock: Clock) -> None:
    assert figures.health([])["last_error"] is None
    assert not figures.client_came.is_set()
    figures.last_error = "CoinAPI answered 503"
    answer = get(figures, "/healthz")
    assert answer.status == 503
    expected: dict[str, Any] = {
        "status": "starting",
        "time": 1_800_000_000.25,
        "age_seconds": None,
        "stale_after_seconds": 60.0,
        "interval_seconds": 5.0,
        "pause_when_idle": False,
        "clients": 0,
        "max_clients": 10_000,
        "source": "coinapi",
        "quote": "USD",
        "assets": ["BTC", "ETH", "SOL"],
        "without_price": ["BTC", "ETH", "SOL"],
        "ranges": PAST.describe(),
        "last_error": "CoinAPI answered 503",
    }
    assert list(json.loads(answer.body).items()) == list(expected.items())
    poll(figures, ETH=2.0)
    clock.now, figures.client_count = 1.23456, 3
    answer = get(figures, "/healthz")
    assert answer.status == 200
    assert json.loads(answer.body) == expected | {
        "status": "ok",
        "time": 1_800_000_001.485,
        "age_seconds": 1.235,
        "clients": 3,
        "without_price": ["BTC", "SOL"],
        "last_error": None,
    }


def test_healthz_tells_how_the_server_was_started() -> None:
    figures = Figures(
        ("ADA",), quote="EUR", source="demo", interval=30.0, max_clients=7, allow_origins=["x"], pause_when_idle=True
    )
    health = json.loads(get(figures, "/healthz").body)
    assert (health["assets"], health["quote"], health["source"]) == (["ADA"], "EUR", "demo")
    assert (health["interval_seconds"], health["stale_after_seconds"]) == (30.0, 90.0)
    assert (health["max_clients"], health["pause_when_idle"]) == (7, True)


def test_healthz_is_503_unless_ok_or_paused(figures: Figures, clock: Clock) -> None:
    def health() -> tuple[int, str]:
        answer = get(figures, "/healthz")
        assert figures.status() == json.loads(answer.body)["status"]
        return answer.status, json.loads(answer.body)["status"]

    assert health() == (503, "starting")
    figures.paused = True
    assert health() == (200, "paused")
    figures.paused = False
    poll(figures, BTC=1.0)
    assert health() == (200, "ok")
    clock.now = 60.0
    figures.last_error = "x"
    figures.polls['{result="failure"}'] += 1
    assert health() == (200, "ok")
    clock.now = 60.001
    assert health() == (503, "stale")
    figures.paused = True
    assert health() == (200, "paused")
    figures.paused = False
    poll(figures, BTC=1.0)
    assert health() == (200, "ok")


@pytest.mark.parametrize(("interval", "seconds"), [(0.1, 60), (5, 60), (20, 60), (21, 63), (300, 900)])
def test_prices_are_stale_after_3_intervals_but_not_within_a_minute(interval: float, seconds: float) -> None:
    assert Figures(ALL, interval=interval).stale_after == seconds


def metrics(figures: Figures) -> dict[str, float]:
    """Every sample, as Prometheus' own parser reads it."""
    answer = get(figures, "/metrics")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.type in ("gauge", "counter")
        assert family.documentation
        for sample in family.samples:
            name = sample.name.removeprefix("price_tracker_")
            assert name != sample.name
            key = name + "".join(f" {label}={value}" for label, value in sample.labels.items())
            assert key not in samples
            assert (family.type == "counter") == name.endswith("_total")
            samples[key] = sample.value
    return samples


AT_THE_START = {
    "clients": 0,
    "max_clients": 10_000,
    "clients_refused_total reason=asset": 0,
    "clients_refused_total reason=denied": 0,
    "clients_refused_total reason=full": 0,
    "clients_refused_total reason=handshake": 0,
    "clients_refused_total reason=origin": 0,
    "clients_dropped_total reason=behind": 0,
    "clients_dropped_total reason=disconnected": 0,
    "clients_dropped_total reason=failed": 0,
    "clients_dropped_total reason=memory": 0,
    "clients_dropped_total reason=no_close": 0,
    "clients_dropped_total reason=no_pong": 0,
    "clients_dropped_total reason=queue_full": 0,
    "clients_dropped_total reason=unfinished": 0,
    "messages_sent_total": 0,
    "polls_total result=success": 0,
    "polls_total result=failure": 0,
    "last_success_timestamp_seconds": 0,
    "interval_seconds": 5,
    "stale_after_seconds": 60,
    "start_timestamp_seconds": 1_800_000_000.25,
    "paused": 0,
    "assets_without_price": 3,
}


def test_metrics_leave_out_what_is_not_known(figures: Figures, clock: Clock) -> None:
    clock.now = 99.0
    assert metrics(figures) == AT_THE_START
    assert b"# HELP price_tracker_credits" not in get(figures, "/metrics").body


def test_metrics_are_exactly_these(figures: Figures, clock: Clock) -> None:
    clock.now = 1.5
    poll(figures, BTC=45000.0, SOL=1e-7)
    poll(figures, BTC=45000.25)
    clock.now = 3.0
    figures.last_error = "x"
    figures.polls['{result="failure"}'] += 3
    for reason in ("full", "origin", "full"):
        figures.refused[f'{{reason="{reason}"}}'] += 1
    for reason in ("behind", "no_pong", "behind"):
        figures.dropped[f'{{reason="{reason}"}}'] += 1
    figures.messages_sent += 123_456_789
    figures.client_count, figures.paused, figures.poll_seconds = 7, True, 0.0
    figures.credits_used, figures.credits_left = 0, -66_181
    moment = 1_795_333_445.123456
    assert metrics(figures) == AT_THE_START | {
        "clients": 7,
        "clients_refused_total reason=full": 2,
        "clients_refused_total reason=origin": 1,
        "clients_dropped_total reason=behind": 2,
        "clients_dropped_total reason=no_pong": 1,
        "messages_sent_total": 123_456_789,
        "polls_total result=success": 2,
        "polls_total result=failure": 3,
        "poll_duration_seconds": 0,
        "last_success_timestamp_seconds": 1_800_000_001.75,
        "paused": 1,
        "price asset_id=BTC quote=USD": 45000.25,
        "price asset_id=SOL quote=USD": 1e-7,
        "price_timestamp_seconds asset_id=BTC quote=USD": moment,
        "price_timestamp_seconds asset_id=SOL quote=USD": moment,
        "assets_without_price": 1,
        "credits_used": 0,
        "credits_left": -66_181,
    }


def test_each_metric_says_once_what_it_is(priced: Figures) -> None:
    priced.poll_seconds, priced.credits_used, priced.credits_left = 0.25, 1, 1
    text = get(priced, "/metrics").body.decode()
    assert text.startswith("# HELP price_tracker_clients Open WebSocket clients.\n# TYPE price_tracker_clients gauge\n")
    assert "\nprice_tracker_poll_duration_seconds 0.25\n" in text
    said = [line.removeprefix("# HELP price_tracker_") for line in text.splitlines() if line.startswith("# HELP")]
    assert said == [
        "clients Open WebSocket clients.",
        "max_clients Clients allowed; the next one is refused.",
        "clients_refused_total Requests for the feed that got no client.",
        "clients_dropped_total Clients that the server hung up on.",
        "messages_sent_total Messages handed to the network.",
        "polls_total Polls of the price source.",
        "poll_duration_seconds How long the last poll took.",
        "last_success_timestamp_seconds Last successful poll; 0 for none.",
        "interval_seconds From one poll to the next.",
        "stale_after_seconds Age from which on prices count as stale.",
        "start_timestamp_seconds When the server was made.",
        "paused 1 while polls are left out because nobody listens.",
        "price Last price of one asset, in the quote currency.",
        "price_timestamp_seconds The source's own time of that price.",
        "assets_without_price Tracked assets that never had a price.",
        "credits_used Credits used, as CoinAPI last said.",
        "credits_left Credits left, as CoinAPI last said; billed below 0.",
    ]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("2026-11-22T07:44:05.1234567Z", 1_795_333_445.123456),
        ("2026-11-22T08:44:05+01:00", 1_795_333_445.0),
        ("2026-11-22T07:44:05", None),  # of which zone?
        ("now", None),
        ("", None),
    ],
)
def test_a_price_without_a_time_that_can_be_read_has_no_timestamp(
    figures: Figures, time: str, seconds: float | None
) -> None:
    figures.remember(*figures.encode([PriceUpdate("BTC", 1.0, time)]))
    assert metrics(figures).get("price_timestamp_seconds asset_id=BTC quote=USD") == seconds
    assert metrics(figures)["price asset_id=BTC quote=USD"] == 1.0


# What goes out to clients


def test_an_update_is_one_text_frame_of_compact_json(figures: Figures) -> None:
    updates, frames = figures.encode([PriceUpdate("BTC", 45000.0, AT)])
    assert updates == {"BTC": PriceUpdate("BTC", 45000.0, AT)}
    assert frames == {"BTC": b"\x81" + bytes([len(BTC)]) + BTC.encode()}


def test_an_asset_that_is_not_tracked_is_no_update(figures: Figures) -> None:
    with pytest.raises(ValueError, match=r"^unknown asset 'DOGE': this server tracks BTC, ETH, SOL$"):
        figures.encode([PriceUpdate("BTC", 1.0, AT), PriceUpdate("DOGE", 1.0, AT)])


def test_a_snapshot_has_the_last_price_of_each_asset_that_is_followed(figures: Figures) -> None:
    def snapshot(*assets: str) -> list[float]:
        frames = figures.snapshot(assets)
        assert figures.snapshot(assets) is frames  # made once
        return [json.loads(each.rpartition(b"{")[1] + each.rpartition(b"{")[2])["price"] for each in split(frames)]

    def split(frames: bytes) -> list[bytes]:
        parts = []
        while frames:
            parts.append(frames[: 2 + frames[1]])
            frames = frames[2 + frames[1] :]
        return parts

    assert snapshot(*ALL) == []
    poll(figures, SOL=3.0, BTC=1.0)
    assert (snapshot(*ALL), snapshot("SOL"), snapshot("ETH", "SOL")) == ([1.0, 3.0], [3.0], [3.0])
    poll(figures, ETH=2.0, BTC=1.5)
    assert (snapshot(*ALL), snapshot("SOL"), snapshot("ETH", "SOL")) == ([1.5, 2.0, 3.0], [3.0], [2.0, 3.0])
    assert list(figures.frames) == list(figures.updates) == list(ALL)
