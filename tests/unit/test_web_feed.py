"""web: the head of a request to a new client of the feed, and which pages may read."""

import json
import re

import pytest
from raw import HEADERS
from raw import request as upgrade
from sites import ALL, client, get, poll, send

from price_server.web import HttpError, NewClient, Request, Response, Site

# The upgrade


def test_the_handshake_is_responded_as_in_the_rfc(site: Site) -> None:
    assert client(site, upgrade()) == NewClient(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        "websocket",
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
        upgrade(Sec_WebSocket_Key="++//AZaz09+/AZaz09+/AA==").replace(b"\r\n", b"\n"),
        upgrade(Sec_WebSocket_Key=" dGhlIHNhbXBsZSBub25jZQ== "),
        upgrade("/%77s"),
        upgrade("http://server.example.com/ws"),
        upgrade("/ws#part"),
        upgrade(Host=""),
    ],
)
def test_a_proper_upgrade_is_accepted(site: Site, head: bytes) -> None:
    made = client(site, head)
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
        (upgrade(Upgrade="xwebsocket, h2c"), 426, WEBSOCKET),
        (upgrade(Connection=None), 426, WEBSOCKET),
        (upgrade(Connection="upgraded"), 426, WEBSOCKET),
        (upgrade(version="HTTP/1.0"), 426, WEBSOCKET),
        (upgrade(method="HEAD"), 426, WEBSOCKET),
        (upgrade(Sec_WebSocket_Version=None), 426, VERSION),
        (upgrade(Sec_WebSocket_Version="013"), 426, VERSION),
        (upgrade(Sec_WebSocket_Version="13, 13"), 426, VERSION),
        (upgrade(Host=None), 400, HOST),
        (upgrade(more="Host: another\r\n"), 400, HOST),
        (upgrade(Sec_WebSocket_Key=None), 400, KEY),
        (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ"), 400, KEY),
        (upgrade(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZSE="), 400, KEY),  # 17 bytes
        (upgrade(Sec_WebSocket_Key="!!!!IHNhbXBsZSBub25jZQ=="), 400, KEY),
        (upgrade(more=f"Sec-WebSocket-Key: {HEADERS['Sec-WebSocket-Key']}\r\n"), 400, KEY),
    ],
)
def test_an_improper_upgrade_is_refused_and_counted(site: Site, head: bytes, status: int, error: str) -> None:
    response = send(site, head)
    assert (response.status, response.refused) == (status, "handshake")
    assert response.headers.get("Upgrade") == ("websocket" if error == WEBSOCKET else None)
    assert response.headers.get("Sec-WebSocket-Version") == ("13" if error == VERSION else None)
    if not head.startswith(b"HEAD"):
        assert response.error == error


@pytest.mark.parametrize(
    ("query", "assets"),
    [
        ("", ALL),
        ("?assets=sol,eth", ("ETH", "SOL")),
        ("?assets=SOL&x=y&assets=%20eth", ("ETH", "SOL")),
        ("?ASSETS=doge", ALL),
        ("?assets=BTC,", ("BTC",)),
        ("?assets=,%20,sol,,", ("SOL",)),
        *(("?assets=", ()), ("?assets", ()), ("?assets=,", ())),
    ],
)
def test_assets_are_chosen_by_the_query_in_the_order_tracked(site: Site, query: str, assets: tuple[str, ...]) -> None:
    assert client(site, upgrade(f"/ws{query}")).assets == assets
    assert client(site, upgrade(f"/stream{query}")).assets == assets
    assert json.loads(get(site, f"/history{query}").body)["1h"] == list(assets)


def test_what_a_proxy_says_of_the_address_is_passed_on(site: Site) -> None:
    for target in ("/ws", "/stream"):
        head = upgrade(target, X_Forwarded_For="192.0.2.7, 10.0.0.1")
        assert client(site, head).forwarded_for == "192.0.2.7, 10.0.0.1"


@pytest.mark.parametrize("target", ["/ws", "/stream"])
def test_the_one_over_max_clients_gets_503_with_retry_after(site: Site, target: str) -> None:
    site.status.max_clients, site.status.clients["websocket"] = 2, 1
    assert client(site, upgrade(target))
    for site.status.clients["event_stream"] in (1, 2):
        response = send(site, upgrade(target))
        assert (response.status, response.headers["Retry-After"], response.refused) == (503, "10", "full")
        assert response.error == "full, clients connected: 2"
    assert get(site, "/prices").status == 200


def test_a_new_refusal_reason_gets_its_response_and_its_counter(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Request) -> None:
        raise HttpError(429, "too many from you", "greedy", Retry_After="7")

    monkeypatch.setattr(site, "check_admission", refuse)
    response = send(site, upgrade("/ws"))
    assert (response.status, response.error, response.headers["Retry-After"]) == (429, "too many from you", "7")
    site.status.refused[response.refused] += 1
    assert b'\nprice_tracker_clients_refused_total{reason="greedy"} 1\n' in get(site, "/metrics").body


# The event stream


def test_an_event_stream_is_one_line_before_its_first_event(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 784_111_777.0)
    made = client(site, b"GET /stream?assets=eth HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (made.format, made.assets) == ("event_stream", ("ETH",))
    head, _, rest = made.head.partition(b"\r\n\r\n")
    assert re.fullmatch(rb"retry: [12]\d{3}\n|retry: 3000\n", rest)
    assert head.decode().split("\r\n") == [
        "HTTP/1.1 200 OK",
        "Server: price-server",
        "Date: Sun, 06 Nov 1994 08:49:37 GMT",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        "Content-Type: text/event-stream",
        "X-Accel-Buffering: no",
        "Access-Control-Allow-Origin: *",
    ]
    head_only = site.respond(b"HEAD /stream HTTP/1.1\r\n\r\n")
    assert isinstance(head_only, Response)
    assert head_only == (head + b"\r\n\r\n", [], 200, "")


def test_event_streams_do_not_all_come_back_in_one_instant(site: Site) -> None:
    heads = [client(site, b"GET /stream\r\n\r\n").head for _ in range(200)]
    waits = {int(head.rpartition(b"retry: ")[2]) for head in heads}
    assert len(waits) > 50
    assert min(waits) >= 1_500
    assert 2_500 < max(waits) <= 3_000


# Origins; which of them are allowed is told in test_origins.py


def test_only_an_allowed_origin_may_read(narrowed: Site) -> None:
    poll(narrowed, BTC=1.0)
    targets = ("/", "/prices", "/prices/DOGE", "/metrics", "/nope", "/history?format=csv", "/ws", "/main.js")
    for target in targets:
        response = get(narrowed, target, Origin="HTTPS://example.org", If_None_Match="*")
        assert response.headers["Access-Control-Allow-Origin"] == "HTTPS://example.org"
        assert response.headers["Vary"] == ("Origin, Accept-Encoding" if target in ("/", "/main.js") else "Origin")
        refused = get(narrowed, target, "POST", Origin="http://here:3030")  # the page came from this server
        assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (405, "http://here:3030")
        response = get(narrowed, target, Origin="https://example.com")
        assert response.headers["Vary"].startswith("Origin")
        assert "Access-Control-Allow-Origin" not in response.headers
    for target in ("/ws", "/stream"):
        assert client(narrowed, upgrade(target, Origin="https://example.org")).assets == ALL
        refusal = send(narrowed, upgrade(target, Origin="https://example.com"))
        assert (refusal.status, refusal.refused) == (403, "origin")
        assert refusal.error == "origin https://example.com is not allowed"
    stream = client(narrowed, upgrade("/stream", Origin="https://example.org"))
    assert b"\r\nAccess-Control-Allow-Origin: https://example.org\r\n" in stream.head
    origin = "https://" + "x" * 500
    assert send(narrowed, upgrade(Origin=origin)).error == f"origin {origin[:100]} is not allowed"


@pytest.mark.parametrize("end", ["\r\n ", "\n\t", "\r"])
def test_an_origin_never_becomes_two_headers_of_the_response(narrowed: Site, end: str) -> None:
    folded = f"server.example.com{end}X-More: y"
    response = get(narrowed, "/prices", Host=folded, Origin=f"https://{folded}")
    assert response.status == 400
    assert "Access-Control-Allow-Origin" not in response.headers
    assert "X-More" not in response.headers


def test_garbage_has_no_origin(narrowed: Site) -> None:
    for head in (b"garbage\r\n\r\n", b"GET / HTTP/9.9\r\nOrigin: https://example.org\r\n\r\n"):
        response = send(narrowed, head)
        assert (response.status in (400, 505), response.headers["Vary"]) == (True, "Origin")
        assert "Access-Control-Allow-Origin" not in response.headers


def test_a_request_without_an_origin_is_not_a_browsers_and_may_read(narrowed: Site) -> None:
    assert client(narrowed, upgrade())
    response = get(narrowed, "/prices")
    assert (response.status, response.headers["Vary"]) == (200, "Origin")
    assert "Access-Control-Allow-Origin" not in response.headers


def test_by_default_every_page_may_read(site: Site) -> None:
    for target in ("/ws", "/stream"):
        assert client(site, upgrade(target, Origin="https://any.example"))
    response = get(site, "/prices", Origin="https://any.example")
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "Vary" not in response.headers


@pytest.mark.parametrize("target", ["/prices", "/ws", "/stream", "/nope", "*"])
def test_a_preflight_is_answered_for_allowed_origins_only(site: Site, narrowed: Site, target: str) -> None:
    two_lines = "x-one,x-two\r\nAccess-Control-Request-Headers: Authorization"
    asked = {"Access_Control_Request_Method": "GET", "Access_Control_Request_Headers": two_lines}
    for each, origin in ((site, "*"), (narrowed, "https://example.org")):
        response = get(each, target, "OPTIONS", Origin="https://example.org", **asked)
        assert (response.status, response.body) == (204, b"")
        assert "Content-Type" not in response.headers
        assert "Content-Length" not in response.headers
        assert response.headers["Access-Control-Allow-Origin"] == origin
        assert response.headers["Allow"] == response.headers["Access-Control-Allow-Methods"] == "GET, HEAD, OPTIONS"
        assert response.headers["Access-Control-Allow-Headers"] == "x-one,x-two, Authorization"
        assert response.headers["Access-Control-Max-Age"] == "600"
    response = get(narrowed, target, "OPTIONS", Origin="https://evil.example", **asked)
    assert (response.status, response.error) == (403, "origin https://evil.example is not allowed")
    assert (response.refused, "Access-Control-Allow-Headers" in response.headers) == ("", False)


def test_options_without_an_origin_tells_the_methods(narrowed: Site) -> None:
    response = get(narrowed, "/prices", "OPTIONS")
    assert (response.status, response.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
    assert not [name for name in response.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("names", ["", "a b", "a,,b", "x: y", "(a)", "\xe9", "a,"])
def test_only_names_of_headers_are_echoed_in_a_preflight(site: Site, names: str) -> None:
    response = get(site, "/prices", "OPTIONS", Origin="https://a.example", Access_Control_Request_Headers=names)
    assert response.status == 204
    assert "Access-Control-Allow-Headers" not in response.headers
