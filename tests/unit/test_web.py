"""web: the head of a request to a response.

No socket: `respond` is called with bytes, and what it returns is parsed by `http.client`.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw import request as upgrade
from sites import ALL, client, get, make_site, poll, send

from price_server.web import NewClient, Request, Response, Site, find_end

BTC = '{"asset_id":"BTC","price":45000.0,"time":"2026-11-22T07:44:05.1234567Z"}'
DIGITS = "0123456789" * 5
NOT_FOUND = "not found: there are /, /ws, /stream, /prices, /history, /healthz and /metrics"


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
        assert find_end(bytearray(head[:end]), 0) == 0
        assert find_end(bytearray(head), searched=end) == len(head)  # its last bytes come behind a search in vain


def test_what_was_searched_is_not_searched_again() -> None:
    searched = 30_000
    assert find_end(bytearray(b"G\n\nX: " + b"x" * searched), searched) == 0
    assert find_end(bytearray(b"GET / HTTP/1.1\r\nX: " + b"x" * searched + b"\r\n\r\n"), searched) == searched + 23


# Every response


@pytest.mark.parametrize(
    ("target", "status", "more"),
    [
        ("/metrics", "200 OK", {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}),
        ("/prices", "200 OK", {}),
        ("/prices/BTC", "200 OK", {}),
        ("/healthz", "200 OK", {}),
        ("/history", "200 OK", {}),
        ("/nope", "404 Not Found", {}),
        ("/history?range=2h", "400 Bad Request", {}),
        ("/ws", "426 Upgrade Required", {"Upgrade": "websocket"}),
    ],
)
def test_every_response_has_these_headers_and_head_has_the_same(
    priced: Site, monkeypatch: pytest.MonkeyPatch, target: str, status: str, more: dict[str, str]
) -> None:
    monkeypatch.setattr("time.time", lambda: 784_111_777.0)
    response, head = get(priced, target), get(priced, target, "HEAD")
    assert response.headers == {
        "Server": "price-server",
        "Date": "Sun, 06 Nov 1994 08:49:37 GMT",  # RFC 9110's own
        "Content-Type": "application/json",
        "Content-Length": str(len(response.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        "Access-Control-Allow-Origin": "*",
        **more,
    }
    assert response.body
    assert head.body == b""
    if target != "/metrics":  # which change all the time
        assert head == response._replace(body=b"")
    responded = priced.respond(f"GET {target} HTTP/1.0\n\n".encode())
    assert responded.head.startswith(f"HTTP/1.1 {status}\r\nServer: price-server\r\n".encode())


@pytest.mark.parametrize("method", ["POST", "get", "BREW" * 20])
def test_other_methods_are_405_with_what_is_allowed(site: Site, method: str) -> None:
    for target in ("/", "/ws", "/stream", "/nope"):
        response = get(site, target, method)
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
        assert response.error == f"method {method[:20]} is not supported, only GET, HEAD and OPTIONS"


def test_what_is_not_there_is_404_with_what_is_there(priced: Site) -> None:
    for target in ("/nope", "/ws/", "/prices/BTC/", "/history/BTC", "/metrics/x", "/sub", "/../prices", "*", "prices"):
        assert (get(priced, target).status, get(priced, target).error) == (404, NOT_FOUND)
    for target in ("/../secret.txt", "/%2e%2e%2fsecret.txt", "/%252e%252e/secret.txt", "/..%5csecret.txt", "/sub%00"):
        assert (get(priced, target).status, get(priced, target).error) == (404, NOT_FOUND)


@pytest.mark.parametrize(
    ("head", "status", "error"),
    [
        ("", 400, "not a request line: ''"),
        ("GET / HTTP/one", 400, "not a request line: 'GET / HTTP/one'"),
        ("GET / x y HTTP/1.1", 400, "not a request line: 'GET / x y HTTP/1.1'"),
        ("\x16\x03\x01 \x02", 400, r"not a request line: '\x16\x03\x01 \x02'"),  # TLS
        (DIGITS, 400, f"not a request line: {DIGITS[:40]!r}"),
        (f"GET / HTTP/1.1\r\n{DIGITS}", 400, f"not a header: {DIGITS[:40]!r}"),
        ("GET / HTTP/9.9", 505, "HTTP/9.9 is not supported, only HTTP/1.1"),
        ("GET /ws HTTP/2.0", 505, "HTTP/2.0 is not supported, only HTTP/1.1"),
        ("GET http://[/ HTTP/1.1", 400, "the request target is not a URL"),
        ("GET / HTTP/1.1" + "\r\nX: y" * 101, 431, "more than 100 headers"),
    ],
)
def test_garbage_is_told_what_is_wrong_with_it(site: Site, head: str, status: int, error: str) -> None:
    response = send(site, f"{head}\r\n\r\n".encode())
    assert (response.status, response.error) == (status, error)


def test_a_request_may_be_short_or_long(site: Site) -> None:
    for head in (
        "GET /prices",
        "GET  /prices\tHTTP/1.0 \t",
        "GET http://elsewhere/prices HTTP/1.1\nHost: x",
        "GET /prices HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9",
        "GET /prices HTTP/1.1" + "\r\nX: y" * 100,
    ):
        assert send(site, f"{head}\r\n\r\n".encode()).body == b"[]"


def test_an_absolute_target_without_a_path_is_the_page(priced: Site) -> None:
    for target in ("http://elsewhere", "http://elsewhere?x=1"):
        assert get(priced, target).body == get(priced, "/").body


@pytest.mark.parametrize(
    "line", ["no colon", ": no name", "Host : x", " folded: x", "Ho\tst: x", "Hôst: x", "X: \0", "X: a\rb", "X: \x7f"]
)
def test_a_line_that_is_not_a_header_is_refused_by_name(priced: Site, line: str) -> None:
    response = send(priced, f"GET /prices HTTP/1.1\r\nHost: x\r\n{line}\r\nAccept: y\r\n\r\n".encode("latin-1"))
    assert (response.status, response.error) == (400, f"not a header: {line!r}")


def test_a_request_has_at_most_32_kib(priced: Site) -> None:
    begin, end = b"GET /prices HTTP/1.1\r\nX: ", b"\r\n\r\n"
    most = begin + b"x" * (32_768 - len(begin + end)) + end
    assert send(priced, most).status == 200
    for head in (b"x" + most, b"GET /" + b"x" * 32_764):
        assert (send(priced, head).status, send(priced, head).error) == (431, "request of more than 32768 bytes")


def test_headers_may_have_any_case_no_space_or_much_of_it_and_latin_letters(narrowed: Site) -> None:
    lines = "X-Word: naïve\r\nX-Empty:\r\norigin:https://example.org\r\nHOST:   x \t \r\nX-Tab: a\tb\r\n"
    response = send(narrowed, f"GET /prices HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
    assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, "https://example.org")


@pytest.mark.parametrize("target", ["/prices", "/ws", "/history", "/"])
def test_a_query_has_at_most_8_kib_and_100_fields(priced: Site, target: str) -> None:
    for size in (8_193, 30_000):
        response = get(priced, f"{target}?x={'x' * (size - 2)}")
        assert (response.status, response.error) == (414, f"query of {size} bytes: at most 8192 are allowed")
    for query in (f"x={'x' * 8_190}", f"{'x&' * 99}x"):
        just = priced.respond(upgrade(f"{target}?{query}"))
        assert isinstance(just, NewClient) or just.status == 200
    if target != "/":
        response = get(priced, f"{target}?{'x&' * 100}x")
        assert (response.status, response.error) == (400, "query of more than 100 fields")


def test_400_assets_fit_into_a_query(folder: Path) -> None:
    assets = tuple(f"ASSET{number:03}" for number in range(400))
    site = make_site(folder, assets=assets)
    for comma in (",", "%2C"):
        assert client(site, upgrade(f"/ws?assets={comma.join(reversed(assets))}")).assets == assets


def test_what_a_request_does_not_have_is_empty() -> None:
    request = Request(b"GET /ws?token=a&token= HTTP/1.1\r\nHost: x\r\n\r\n")
    request.parse()
    assert (request.query_values("token"), request.query_values("x")) == (["a", ""], [])
    assert (request.all("x"), request.first("x")) == ([], "")


# The prices


def test_prices_are_the_last_updates_in_the_order_tracked(site: Site) -> None:
    assert get(site, "/prices").body == b"[]"
    poll(site, SOL=177.5, BTC=45000.0)
    poll(site, SOL=178.5)
    assert get(site, "/prices").body.decode() == (
        f'[{BTC},{{"asset_id":"SOL","price":178.5,"time":"2026-11-22T07:44:05.1234567Z"}}]'
    )


@pytest.mark.parametrize("target", ["/prices/BTC", "/prices/btc", "/prices/BTC?x=1", "//prices/BTC", "/prices/%42TC"])
def test_one_price_has_a_path_of_its_own(priced: Site, target: str) -> None:
    assert get(priced, target).body.decode() == BTC


def test_prices_of_some_assets_come_in_the_order_tracked(site: Site) -> None:
    poll(site, SOL=1.0, BTC=2.0)
    assert [each["asset_id"] for each in json.loads(get(site, "/prices?assets=sol,ETH,BTC").body)] == ["BTC", "SOL"]
    assert get(site, "/prices?assets=").body == get(site, "/prices?assets=ETH").body == b"[]"


def test_an_asset_that_is_not_tracked_is_named_with_what_is_tracked(priced: Site) -> None:
    said = "unknown asset 'DOGE': this server tracks BTC, ETH, SOL"
    assert (get(priced, "/prices/doge").status, get(priced, "/prices/doge").error) == (404, said)
    for query in ("BTC,DOGE", "doge", "ETH&assets=%20doge", "X,DOGE", ",DOGE,"):
        for path in ("/history", "/prices", "/ws", "/stream"):
            response = get(priced, f"{path}?assets={query}")
            assert (response.status, response.error) == (400, said)
            assert response.refused == ("asset" if path in ("/ws", "/stream") else "")
    assert get(priced, "/prices/").error == "unknown asset '': this server tracks BTC, ETH, SOL"
    assert get(priced, f"/prices/{'x' * 500}").error == f"unknown asset '{'X' * 40}': this server tracks BTC, ETH, SOL"
    assert get(priced, "/prices/x%0D%0AX:%20y").error == r"unknown asset 'X\r\nX: Y': this server tracks BTC, ETH, SOL"


def test_an_asset_that_has_no_price_yet_is_503(site: Site) -> None:
    poll(site, ETH=1.0)
    response = get(site, "/prices/btc")
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert (response.error, response.refused) == ("no price of BTC is known yet", "")


# The past


def test_the_range_is_an_hour_unless_the_query_says_so(site: Site) -> None:
    assert json.loads(get(site, "/history").body) == {"1h": list(ALL)}
    assert json.loads(get(site, "/history?range=7d&assets=btc&format=csv&format=json").body) == {"7d": ["BTC"]}
    assert json.loads(get(site, "/history?range=7d&range=1y").body) == {"1y": list(ALL)}


def test_an_unknown_range_or_format_is_answered_with_those_there_are(site: Site) -> None:
    for name in ("2h", "", "1H", "x" * 500):
        response = get(site, f"/history?range={name}")
        assert (response.status, response.refused) == (400, "")
        assert response.error == f"unknown range '{name[:40]}': there are 1h, 24h, 7d, 30d, 1y"
        response = get(site, f"/history?format={name}")
        assert (response.status, response.error) == (400, f"unknown format '{name[:40]}': there are json, csv")


def test_the_past_is_a_csv_file_made_while_it_is_taken(site: Site) -> None:
    site.status.quote = "EUR"
    target = "/history?format=csv&range=24h&assets=SOL,BTC"
    response = site.respond(f"GET {target} HTTP/1.1\r\n\r\n".encode())
    assert isinstance(response, Response)
    assert isinstance(response.body, Iterator)
    assert list(response.body) == [b"time,asset_id,price\n", b"24h,BTC,1.0\n", b"24h,SOL,1.0\n"]
    got, head = get(site, target), get(site, target, "HEAD")
    assert got.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert got.headers["Content-Disposition"] == 'attachment; filename="prices-24h-EUR.csv"'
    assert "Content-Length" not in got.headers
    assert (head.status, {*head.headers}) == (200, {*got.headers})


# The page


def test_a_file_of_the_page_is_asked_for_again_and_sent_once(site: Site) -> None:
    response = get(site, "/main.js?v=2", Accept_Encoding="br\r\nAccept-Encoding: gzip")
    assert gzip.decompress(response.body) == b"1;" * 500
    headers = dict(response.headers)
    etag, _ = headers.pop("ETag"), headers.pop("Date")
    assert headers == {
        "Server": "price-server",
        "Content-Type": "text/javascript; charset=utf-8",
        "Content-Encoding": "gzip",
        "Content-Length": str(len(response.body)),
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        "Access-Control-Allow-Origin": "*",
    }
    for known in (etag, f'"x", {etag}', f'"x"\r\nIf-None-Match: {etag}', "*", etag.removeprefix("W/")):
        for method in ("GET", "HEAD"):
            again = get(site, "/main.js", method, Accept_Encoding="gzip", If_None_Match=known)
            assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
            assert (again.headers["Vary"], again.headers["Cache-Control"]) == ("Accept-Encoding", "no-cache")
            assert "Content-Length" not in again.headers
    other = get(site, "/main.js", If_None_Match=etag)  # not known in this encoding
    assert (other.status, other.body) == (200, b"1;" * 500)
    assert get(site, "/main.js", "HEAD").headers["Content-Length"] == "1000"
    assert get(site, "/sub/logo.png").headers["Content-Type"] == "image/png"


def test_an_empty_file_has_a_length(tmp_path: Path) -> None:
    (tmp_path / "empty.css").touch()
    assert get(make_site(tmp_path), "/empty.css").headers["Content-Length"] == "0"


def test_a_route_wins_over_a_file(priced: Site) -> None:
    assert get(priced, "/prices").body.startswith(b"[")


def test_the_page_may_run_only_its_own_scripts_and_ask_only_this_server(folder: Path) -> None:
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; manifest-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    for target in ("/", "/index.html", "/?assets=DOGE&range=nope"):
        assert get(make_site(folder), target).headers["Content-Security-Policy"] == policy
    site = make_site(folder, "https://example.org", "capacitor://localhost", "null")
    assert get(site, "/").headers["Content-Security-Policy"] == f"{policy} https://example.org capacitor:"


def test_without_its_page_the_server_says_what_is_missing(tmp_path: Path) -> None:
    site = make_site(tmp_path / "page")
    response = get(site, "/")
    assert (response.status, response.error) == (404, "no page: there is no index.html in the folder page")
    assert get(site, "/main.js").error == NOT_FOUND
    assert get(site, "/prices").status == 200


# How the server is


def test_healthz_is_503_unless_ok_or_paused(site: Site) -> None:
    response = get(site, "/healthz")
    assert response.status == 503
    assert json.loads(response.body)["status"] == "starting"
    site.status.paused = True
    assert get(site, "/healthz").status == 200
    site.status.paused = False
    poll(site, BTC=1.0)
    response = get(site, "/healthz")
    assert response.status == 200
    assert json.loads(response.body).keys() == site.status.health().keys()


def test_metrics_are_those_of_the_status(site: Site) -> None:
    site.status.messages_sent = 7
    assert b"\nprice_tracker_messages_sent_total 7\n" in get(site, "/metrics").body


# Anything

TARGETS = st.one_of(
    st.sampled_from(["/", "/ws", "/stream", "/prices", "/prices/BTC", "/history", "/healthz", "/metrics", "/main.js"]),
    st.text(st.sampled_from("/.%\\:?#[]@&=20eEfF\0x\xff"), max_size=12).map("/".__add__),
)
QUERIES = st.one_of(
    st.just(""),
    st.tuples(
        st.sampled_from(["assets", "range", "format", "x", ""]),
        st.sampled_from(["BTC", "csv", "1y", ",", "%", "%2C,eth", "\xe9", "%ff", "&" * 101, "[", "%00"]),
    ).map(lambda pair: f"?{pair[0]}={pair[1]}"),
)
LINES = st.tuples(
    st.sampled_from(
        *[["Origin", "Host", "Upgrade", "Accept-Encoding", "If-None-Match", "Access-Control-Request-Headers", "X y"]]
    ),
    st.text(st.characters(max_codepoint=255), max_size=20),
).map(": ".join)
HEADS = st.builds(
    lambda method, target, query, lines: "\r\n".join([f"{method} {target}{query} HTTP/1.1", *lines, "", ""]),
    *(st.sampled_from(["GET", "HEAD", "OPTIONS", "POST", ""]), TARGETS, QUERIES, st.lists(LINES, max_size=4)),
)


@settings(max_examples=500, deadline=None)
@given(head=st.one_of(st.binary(max_size=200), HEADS.map(lambda text: text.encode("latin-1"))), narrow=st.booleans())
def test_any_bytes_get_a_response_or_become_a_client(folder: Path, head: bytes, narrow: bool) -> None:
    site = make_site(folder, *(["moz-extension://*", "null"] if narrow else []))
    made = site.respond(head)
    start, empty_line, _ = made.head.partition(b"\r\n\r\n")
    assert re.fullmatch(rb"HTTP/1\.1 \d{3} [\w -]+(\r\n[\w-]+: [\t -~\x80-\xff]*)+", start)
    assert empty_line
    if isinstance(made, Response):
        assert b"secret" not in b"".join(made.body)
