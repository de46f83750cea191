"""coin_api: one request for all assets, every kind of answer, and the key that shows nowhere."""

import gzip
import json
import logging
import math
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

import psutil
import pytest
import requests
import responses
import trustme
from stand_in import HEADERS, KEY, OUT_OF_CREDITS, RATES, StandIn, rates_body

import coin_api as module
from coin_api import CoinApi, CoinApiError, DemoApi, PriceUpdate, one_line

URL = "https://rest.coinapi.io/v1/exchangerate/USD"
AT = "2021-10-20T21:34:13.0000000Z"


@pytest.fixture
def http() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def api() -> CoinApi:
    return CoinApi(KEY)


def error_of(api: CoinApi, *assets: str) -> CoinApiError:
    with pytest.raises(CoinApiError) as caught:
        api.fetch_prices(assets or ("BTC", "ETH"))
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_assets_cost_one_request_with_the_key_in_its_header(http: responses.RequestsMock, api: CoinApi) -> None:
    http.get(URL, rates_body(RATES))
    api.fetch_prices(("BTC", "ETH"))
    assert len(http.calls) == 1
    request = http.calls[0].request
    assert request.url == URL + "?filter_asset_id=BTC%2CETH&invert=true"
    assert request.headers["X-CoinAPI-Key"] == KEY
    assert request.headers["Accept"] == "application/json"
    assert "gzip" in request.headers["Accept-Encoding"]


def test_prices_come_in_the_order_asked_for_with_coinapis_own_time(http: responses.RequestsMock, api: CoinApi) -> None:
    http.get(URL, rates_body({"XLM": 0.0934, "BTC": 65980.1}, at="2026-11-22T07:44:05.1234567Z"))
    assert api.fetch_prices(("BTC", "XLM")) == [
        PriceUpdate("BTC", 65980.1, "2026-11-22T07:44:05.1234567Z"),
        PriceUpdate("XLM", 0.0934, "2026-11-22T07:44:05.1234567Z"),
    ]


def test_an_update_is_one_line_of_compact_json() -> None:
    update = PriceUpdate("BTC", 45000.0, "2026-11-22T07:44:05.1234567Z")
    assert update.to_json() == '{"asset_id":"BTC","price":45000.0,"time":"2026-11-22T07:44:05.1234567Z"}'


def test_no_message_holds_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        PriceUpdate("BTC", math.nan, "t").to_json()


def test_a_price_is_the_nearest_double_of_28_digits_and_a_whole_number_is_a_price(
    http: responses.RequestsMock, api: CoinApi
) -> None:
    rates = '{"time":"t","asset_id_quote":"BTC","rate":3258.8875417798037784035133948}'
    http.get(URL, f'{{"rates":[{rates},{{"time":"t","asset_id_quote":"ETH","rate":4166}}]}}')
    assert [update.price for update in api.fetch_prices(("BTC", "ETH"))] == [3258.887541779804, 4166.0]


@pytest.mark.parametrize(
    "rate",
    [
        "null",
        "NaN",
        "Infinity",
        "-Infinity",
        "-1",
        "0",
        "-0.0",
        '"65980.1"',
        "true",
        "[65980.1]",
        "{}",
        "1e999",
        "9" * 5000,
    ],
)
def test_a_false_rate_keeps_back_its_asset_only(http: responses.RequestsMock, api: CoinApi, rate: str) -> None:
    body = rates_body({"BTC": 0.5, "ETH": 4166.2}).replace(b"0.5", rate.encode())
    http.get(URL, body)
    assert api.fetch_prices(("BTC", "ETH")) == [PriceUpdate("ETH", 4166.2, AT)]


@pytest.mark.parametrize("junk", ["null", "7", '"BTC"', "[]", "{}", '{"asset_id_quote":null,"rate":1.0,"time":"t"}'])
def test_junk_among_the_rates_is_passed_over(http: responses.RequestsMock, api: CoinApi, junk: str) -> None:
    good = '{"asset_id_quote":"ETH","rate":2.5,"time":"t"}'
    http.get(URL, f'{{"rates":[{junk},{good},{{"asset_id_quote":["BTC"],"rate":1.0,"time":"t"}}]}}')
    assert api.fetch_prices(("BTC", "ETH")) == [PriceUpdate("ETH", 2.5, "t")]


@pytest.mark.parametrize("time_text", ["null", "7", "[]", "true"])
def test_a_time_that_is_no_string_keeps_back_its_asset_only(
    http: responses.RequestsMock, api: CoinApi, time_text: str
) -> None:
    bad = f'{{"asset_id_quote":"BTC","rate":1.0,"time":{time_text}}}'
    http.get(URL, f'{{"rates":[{bad},{{"asset_id_quote":"ETH","rate":2.5,"time":"t"}}]}}')
    assert api.fetch_prices(("BTC", "ETH")) == [PriceUpdate("ETH", 2.5, "t")]


BAD_BODIES = {
    "empty": (b"", "is not JSON: (empty)"),
    "null": (b"null", "has no list of rates: null"),
    "a list": (b"[1, 2]", "has no list of rates: [1, 2]"),
    "a number": (b"17", "has no list of rates: 17"),
    "no rates": (b'{"asset_id_base":"USD"}', 'has no list of rates: {"asset_id_base":"USD"}'),
    "rates null": (b'{"rates":null}', "has no list of rates"),
    "rates a string": (b'{"rates":"BTC"}', "has no list of rates"),
    "rates an object": (b'{"rates":{"BTC":1}}', "has no list of rates"),
    "rates junk": (b'{"rates":[1,null,"x",[]]}', "has no price for BTC, ETH"),
    "rates empty": (b'{"rates":[]}', 'has no price for BTC, ETH: {"rates":[]}'),
    "not UTF-8": (b'{"rates":[{"asset_id_quote":"\xff\xfe\xfd"}]}', "is not JSON"),
    "nested": (b"[" * 200_000, "is not JSON"),
    "nested rates": (b'{"rates":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "is not JSON"),
    "cut off": (rates_body(RATES)[:200], "is not JSON"),
    "HTML": (b"<html>\r\n<b>Bad\x1b[31m gateway</b>", "is not JSON: <html> <b>Bad [31m gateway</b>"),
}


@pytest.mark.parametrize(("body", "said"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_an_answer_that_is_none_is_one_line_that_says_what_came(
    http: responses.RequestsMock, api: CoinApi, body: bytes, said: str
) -> None:
    http.get(URL, body)
    assert said in str(error_of(api))
    assert len(str(error_of(api))) < 300


REFUSALS = {
    "400 error": (400, {"error": "Bad filter"}, "CoinAPI answered 400: Bad filter"),
    "400 message": (400, {"message": "Bad filter"}, "CoinAPI answered 400: Bad filter"),
    "401": (401, {"error": "Invalid API key"}, "CoinAPI refused the key (401): Invalid API key"),
    "403": (403, OUT_OF_CREDITS, "CoinAPI answered 403: Quota exceeded: Insufficient Usage Credits or Subscription."),
    "429": (429, {"error": "Too many requests"}, "CoinAPI answered 429: Too many requests"),
    "500": (500, "<h1>Oops</h1>", "CoinAPI answered 500: <h1>Oops</h1>"),
    "503 empty": (503, "", "CoinAPI answered 503"),
    "550": (
        550,
        {"error": "You requested specific single item that we don't have"},
        "CoinAPI answered 550: You requested specific single item that we don't have",
    ),
    "204": (204, "", "CoinAPI answered 204"),
    "error a list": (500, [1], "CoinAPI answered 500: [1]"),
    "error nested": (500, "[" * 200_000, f"CoinAPI answered 500: {'[' * 200}…"),
    "says nothing": (500, {"status": 500}, "CoinAPI answered 500"),
    "shows the key": (400, {"error": f"no key {KEY.lower()}, {KEY}"}, "CoinAPI answered 400: no key [key], [key]"),
}


@pytest.mark.parametrize(("status", "body", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_carries_the_status_and_what_coinapi_said(
    http: responses.RequestsMock, api: CoinApi, status: int, body: object, said: str
) -> None:
    http.get(URL, status=status, body=body if isinstance(body, str) else json.dumps(body))
    error = error_of(api)
    assert str(error) == said
    assert error.key_refused == (status == 401)
    assert error.retry_after is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("30", 30.0), ("0", 0.0), ("86400", 900.0), ("9" * 400, 900.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)]
    + [
        (junk, None)
        for junk in ("soon", "-5", "inf", "nan", "1.5", "", "Thu, 99 Jan 2099", f"Thu, 01 Jan {'9' * 20} 00:00:00 GMT")
    ],
)
def test_retry_after_is_honoured_up_to_15_minutes(
    http: responses.RequestsMock, api: CoinApi, header: str, seconds: float | None
) -> None:
    http.get(URL, status=429, headers={"Retry-After": header})
    assert error_of(api).retry_after == seconds


def test_retry_after_may_be_a_date(http: responses.RequestsMock, api: CoinApi) -> None:
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    http.get(URL, status=429, headers={"Retry-After": in_a_minute})
    assert error_of(api).retry_after == pytest.approx(60, abs=3)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(coin_api: StandIn, status: int) -> None:
    with StandIn() as elsewhere:
        coin_api.say(b"", status=status, Location=f"{elsewhere.url}/v1/exchangerate/USD")
        error = error_of(CoinApi(KEY, url=coin_api.url))
        assert str(error) == f"CoinAPI answered {status}: a redirect, which is not followed: check COIN_API_URL"
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("headers", "used", "left"),
    [
        (HEADERS, 166181, -66181),
        ({"X-RateLimit-Quota-Allocated": "1000", "X-RateLimit-Quota-Remaining": "400"}, 600, 400),
        ({"X-RateLimit-Quota-Remaining": "-3", "X-RateLimit-Quota-Overage": "3"}, None, -3),
        ({"X-RateLimit-Used": "many", "X-RateLimit-Remaining": "1e5"}, None, None),
        ({}, None, None),
    ],
)
def test_credits_are_read_from_old_and_new_headers(
    http: responses.RequestsMock, api: CoinApi, headers: dict[str, str], used: int | None, left: int | None
) -> None:
    http.get(URL, rates_body(RATES), headers={name: value for name, value in headers.items() if name != "Content-Type"})
    api.fetch_prices(("BTC",))
    assert (api.credits_used, api.credits_left) == (used, left)


def test_credits_stay_known_when_an_answer_does_not_say(http: responses.RequestsMock, api: CoinApi) -> None:
    http.get(URL, rates_body(RATES), headers={"X-RateLimit-Used": "5", "X-RateLimit-Remaining": "95"})
    http.get(URL, json.dumps(OUT_OF_CREDITS), status=403)
    api.fetch_prices(("BTC",))
    error_of(api)
    assert (api.credits_used, api.credits_left) == (5, 95)


def drip(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """A byte every 20 ms, so each single read is quick, for up to 2 s."""
    for byte in data[:100]:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.02)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n")
    drip(handler, b" " * 100)


def drip_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    drip(handler, b"1\r\n[\r\n" * 17)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    drip(handler, b"x" * 100)


def say_nothing(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(2)


@pytest.mark.parametrize("answer", [drip_body, drip_chunks, drip_headers, say_nothing])
def test_the_deadline_holds_for_the_whole_answer(
    coin_api: StandIn, monkeypatch: pytest.MonkeyPatch, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.2)
    coin_api.answer = answer
    started = time.monotonic()
    assert str(error_of(CoinApi(KEY, url=coin_api.url))) == "no answer from CoinAPI: not whole within 0.2 s"
    assert time.monotonic() - started < 1.2


def test_the_limits_are_3_s_to_connect_10_s_to_answer_and_1_mib() -> None:
    assert (module.CONNECT_TIMEOUT, module.ANSWER_TIMEOUT, module.MAX_ANSWER) == (3.0, 10.0, 1 << 20)


def test_the_next_request_has_a_deadline_of_its_own(coin_api: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.2)
    api = CoinApi(KEY, url=coin_api.url)
    started = time.monotonic()
    while time.monotonic() - started < 0.5:  # on one connection, kept alive
        assert len(api.fetch_prices(("BTC", "ETH"))) == 2


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(1000):  # 64 MiB
        handler.wfile.write(b"[" * 65536)


def bomb(handler: BaseHTTPRequestHandler) -> None:
    body = gzip.compress(b" " * (32 << 20), compresslevel=1)
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


@pytest.mark.parametrize("answer", [endless, bomb])
def test_an_answer_over_1_mib_is_not_taken_in(
    coin_api: StandIn, answer: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    coin_api.answer = answer
    memory = psutil.Process().memory_info().rss
    assert str(error_of(CoinApi(KEY, url=coin_api.url))) == "CoinAPI's answer is larger than 1048576 bytes"
    if answer is endless:  # the bomb is made in this process too
        assert psutil.Process().memory_info().rss - memory < 20 << 20


def test_what_is_wrong_with_the_connection_is_named(coin_api: StandIn) -> None:
    api = CoinApi(KEY, url=coin_api.url)
    coin_api.say(b"no gzip", Content_Encoding="gzip")
    assert "Error -3 while decompressing data: incorrect header check" in str(error_of(api))
    coin_api.answer = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    assert str(error_of(api)).startswith("no answer from CoinAPI: ")


def test_an_answer_cut_off_half_way_is_no_answer(coin_api: StandIn) -> None:
    def cut_off(handler: BaseHTTPRequestHandler) -> None:
        body = rates_body(RATES)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body[:-9]))
        handler.close_connection = True

    coin_api.answer = cut_off
    assert "IncompleteRead" in str(error_of(CoinApi(KEY, url=coin_api.url)))


def test_a_refused_connection_is_named_without_addresses_that_change(coin_api: StandIn) -> None:
    api = CoinApi(KEY, url=coin_api.url)
    coin_api.server.shutdown()
    coin_api.server.server_close()
    assert str(error_of(api)) == "no answer from CoinAPI: Connection refused"


def test_a_host_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(8)]
        for client in waiting:  # fill the queue of a server that never accepts
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        error = error_of(CoinApi(KEY, url=f"http://127.0.0.1:{full.getsockname()[1]}"))
        for client in waiting:
            client.close()
    assert str(error) == "no answer from CoinAPI: no connection within 0.2 s"


def test_the_key_shows_in_no_error_repr_traceback_or_log(coin_api: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    api = CoinApi(KEY, url=coin_api.url)
    shown = [repr(api), str(api)]
    for status, body in [(401, {"error": f"Invalid key {KEY}"}), (403, {"detail": KEY}), (500, KEY), (200, f"x{KEY}")]:
        coin_api.say((body if isinstance(body, str) else json.dumps(body)).encode(), status=status)
        error = error_of(api)
        shown += ["".join(traceback.format_exception(error)), repr(error)]
    coin_api.server.shutdown()
    coin_api.server.server_close()
    shown.append("".join(traceback.format_exception(error_of(CoinApi(KEY, url=coin_api.url)))))
    assert KEY not in "".join(shown) + caplog.text
    assert "[key]" in shown[2]


# Where the key, or what a terminal would obey, could come from: all that a server or a proxy says.
RUDE = f"\x1b[31m{KEY}\x07\x00"


def rude_status_line(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(f"HTTP/1.1 abc {RUDE}\r\n\r\n".encode())
    handler.close_connection = True


def rude_first_line(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(f"{RUDE}\r\n\r\n".encode())
    handler.close_connection = True


def rude_headers(handler: BaseHTTPRequestHandler) -> None:
    lines = f"Retry-After: {RUDE}\r\nLocation: //{RUDE}\r\nX-RateLimit-Remaining: {RUDE}\r\n{RUDE}\r\n"
    handler.wfile.write(f"HTTP/1.1 302 {RUDE}\r\n{lines}Content-Length: 0\r\n\r\n".encode())
    handler.close_connection = True


def rude_length(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(f"HTTP/1.1 500 x\r\nContent-Length: {RUDE}\r\n\r\n{RUDE}".encode())
    handler.close_connection = True


def rude_encoding(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(f"HTTP/1.1 500 x\r\nTransfer-Encoding: chunked\r\n\r\n{RUDE}\r\n".encode())
    handler.close_connection = True


def endless_header(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n")


def too_many_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + f"{RUDE}: x\r\n".encode() * 200 + b"\r\n")


def rude_body(handler: BaseHTTPRequestHandler) -> None:
    body = f'"{RUDE.lower()}'.encode() + b"x" * 500
    handler.wfile.write(b"HTTP/1.1 500 x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize(
    "answer",
    [
        *(rude_status_line, rude_first_line, rude_headers, rude_length, rude_encoding, endless_header),
        *(too_many_headers, rude_body),
    ],
)
def test_no_error_shows_the_key_or_control_characters_wherever_they_come_from(
    coin_api: StandIn, answer: Callable[[BaseHTTPRequestHandler], None], caplog: pytest.LogCaptureFixture
) -> None:
    coin_api.answer = answer
    error = error_of(CoinApi(KEY, url=coin_api.url))
    assert str(error).startswith(("no answer from CoinAPI: ", "CoinAPI answered "))
    assert str(error).isprintable()
    assert len(str(error)) < 300
    shown = "".join(traceback.format_exception(error)) + caplog.text
    assert KEY.lower() not in shown.lower()


def test_a_line_for_the_log_costs_no_more_for_a_long_text() -> None:
    text = "x" * 50_000_000
    started = time.thread_time()
    assert one_line(text) == "x" * 200 + "…"
    assert time.thread_time() - started < 0.5


def test_a_body_of_1_mib_makes_a_short_line_quickly(coin_api: StandIn) -> None:
    coin_api.say(b"\x1b" * 500_000 + KEY.encode() * 19_000, status=500)
    api = CoinApi(KEY, url=coin_api.url)
    started = time.thread_time()
    error = error_of(api)
    assert time.thread_time() - started < 0.3
    assert len(str(error)) < 300
    assert str(error).isprintable()


def test_a_cut_does_not_leave_a_part_of_the_key(coin_api: StandIn) -> None:
    coin_api.say(b"x" * 190 + KEY.encode(), status=500)
    assert KEY[:8] not in str(error_of(CoinApi(KEY, url=coin_api.url)))


@pytest.mark.parametrize("key", ["two words", "tab\t", "new\nline", "ключ", "\x00", ""])
def test_a_key_that_no_header_can_carry_is_refused_unshown(key: str) -> None:
    with pytest.raises(ValueError, match=r"^COIN_API_KEY must be printable ASCII") as caught:
        CoinApi(key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org", "http://10.0.0.1:80", "http://127.0.0.1.example.org", "http://localhost.example.org"),
        *("ftp://127.0.0.1", "rest.coinapi.io", "https://", "https://host:port", "https://[::1", "", "https://a b"),
        *("https://user:secret@host", "https://host/?a=b", "https://host/#x", f"https://{KEY}@host", "http://127.1/\n"),
    ],
)
def test_an_address_that_the_key_must_not_go_to_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^COIN_API_URL is '") as caught:
        CoinApi(KEY, url=url)
    assert KEY not in str(caught.value)


def test_a_refused_address_is_shown_with_the_way_out() -> None:
    for url, way_out in (
        ("ftp://host", "it must be https://HOST[:PORT][/PATH]"),
        ("http://host", "http would send the key unencrypted, so only a loopback address may have it; use https"),
    ):
        with pytest.raises(ValueError, match="COIN_API_URL") as caught:
            CoinApi(KEY, url=url)
        assert str(caught.value) == f"COIN_API_URL is {url!r}: {way_out}"


@pytest.mark.parametrize(
    "url",
    [
        "https://host",
        "https://host:8443/path/",
        "http://127.0.0.1:8080",
        "http://localhost",
        "http://[::1]:1/x",
        "HTTPS://host",
    ],
)
def test_other_hosts_over_https_and_loopback_over_http_are_accepted(http: responses.RequestsMock, url: str) -> None:
    http.get(f"{url.rstrip('/')}/v1/exchangerate/EUR", rates_body({"BTC": 2.5}))
    assert CoinApi(KEY, "EUR", url).fetch_prices(("BTC",))[0].price == 2.5


def test_a_proxy_of_the_environment_does_not_get_the_key_of_a_loopback_address(
    coin_api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandIn() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert CoinApi(KEY, url=coin_api.url).fetch_prices(("BTC",))
        assert proxy.requests == []


# Over TLS, with certificates made for the tests


class Authority(NamedTuple):
    ca: trustme.CA
    bundle: str  # its certificate's file, for REQUESTS_CA_BUNDLE

    def context(self, name: str = "127.0.0.1") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(name).configure_cert(context)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    ca, bundle = trustme.CA(), tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(bundle))
    return Authority(ca, str(bundle))


@pytest.fixture
def over_tls(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in over TLS whose certificate the environment's bundle makes good."""
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority.bundle)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.5)
    with StandIn(tls=authority.context()) as stand_in:
        yield stand_in


class Proxy:
    """`with Proxy() as proxy:` a proxy for HTTPS; `asked` has what it was told.

    says: the answer instead of a tunnel. drips: a byte every 20 ms behind it.
    """

    def __init__(self, says: bytes | None = None, drips: bool = False):
        self.says, self.drips = says, drips
        self.asked: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:secret@127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def accept(self) -> None:
        try:
            while True:
                threading.Thread(target=self.serve, args=self.listener.accept()[:1], daemon=True).start()
        except OSError:
            pass  # closed

    def serve(self, client: socket.socket) -> None:
        with client:
            head = client.recv(4096)
            self.asked.append(head)
            if self.says is not None:
                client.sendall(self.says)
                try:
                    while self.drips:
                        client.sendall(b" ")
                        time.sleep(0.02)
                except OSError:
                    pass  # it gave up
                return
            host, _, port = head.split()[1].decode().partition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(4096):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_certificate_that_the_environments_bundle_makes_good_is_good(over_tls: StandIn) -> None:
    assert CoinApi(KEY, url=over_tls.url).fetch_prices(("BTC",))[0].price == RATES["BTC"]
    assert over_tls.requests[0].headers["X-CoinAPI-Key"] == KEY


@pytest.mark.parametrize(
    ("name", "issuer", "said"),
    [
        ("example.org", "known", "certificate is not valid for '127.0.0.1'"),
        ("127.0.0.1", "unknown", "certificate verify failed: unable to get local issuer certificate"),
    ],
)
def test_a_wrong_certificate_gets_no_key_and_is_named(
    over_tls: StandIn, authority: Authority, name: str, issuer: str, said: str
) -> None:
    other = authority if issuer == "known" else Authority(trustme.CA(), "")
    with StandIn(tls=other.context(name)) as stand_in:
        error = error_of(CoinApi(KEY, url=stand_in.url))
        assert str(error).startswith("no answer from CoinAPI: [SSL: CERTIFICATE_VERIFY_FAILED]")
        assert said in str(error)
        assert stand_in.requests == []


def test_a_bundle_that_is_not_there_is_a_failed_poll(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    assert "invalid path: /nonexistent.pem" in str(error_of(CoinApi(KEY, url=over_tls.url)))


@pytest.mark.parametrize("answer", [drip_body, drip_headers])
@pytest.mark.parametrize("proxied", [False, True])
def test_the_deadline_holds_over_tls_and_through_a_proxy(
    over_tls: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    proxied: bool,
    answer: Callable[[BaseHTTPRequestHandler], None],
) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 0.2)
    over_tls.answer = answer
    with Proxy() as proxy:
        if proxied:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        started = time.monotonic()
        assert str(error_of(CoinApi(KEY, url=over_tls.url))) == "no answer from CoinAPI: not whole within 0.2 s"
        assert time.monotonic() - started < 1.2
        assert len(proxy.asked) == proxied


def test_a_proxy_of_the_environment_is_asked_and_does_not_see_the_key(
    over_tls: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        api = CoinApi(KEY, url=over_tls.url)
        assert [update.price for _ in range(2) for update in api.fetch_prices(("BTC",))] == [RATES["BTC"]] * 2
        (asked,) = proxy.asked  # one connection, kept alive
        assert asked.startswith(f"CONNECT {over_tls.url.removeprefix('https://')} HTTP/1.".encode())
        assert KEY.encode() not in asked
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert CoinApi(KEY, url=over_tls.url).fetch_prices(("BTC",))
        assert len(proxy.asked) == 1


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (f"HTTP/1.1 407 {RUDE}\r\n\r\n", "Tunnel connection failed: 407"),
        (f"{RUDE}\r\n\r\n", "BadStatusLine"),
        ("HTTP/1.1 200 " + "x" * 70_000, "LineTooLong"),
        ("", "closed connection without response"),
    ],
)
def test_a_proxy_that_refuses_is_named_without_key_password_or_control_characters(
    over_tls: StandIn, monkeypatch: pytest.MonkeyPatch, says: str, said: str
) -> None:
    with Proxy(says.encode()) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        text = str(error_of(CoinApi(KEY, url=over_tls.url)))
    assert said in text
    assert text.isprintable()
    assert KEY not in text
    assert "secret" not in text


@pytest.mark.parametrize("proxy", ["http://user:secret@[bad", "http://user:secret@/", "socks9://user:secret@host"])
def test_a_proxy_that_cannot_be_one_is_a_failed_poll_without_its_password(
    over_tls: StandIn, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    assert "secret" not in str(error_of(CoinApi(KEY, url=over_tls.url)))


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: "])
def test_a_proxy_that_drips_is_no_connection(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT", 3.0)
    with Proxy(says, drips=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        started = time.monotonic()
        assert str(error_of(CoinApi(KEY, url=over_tls.url))) == "no answer from CoinAPI: no connection within 0.2 s"
        assert time.monotonic() - started < 1.5


def test_a_tls_handshake_that_does_not_end_is_no_connection(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = CoinApi(KEY, url=f"https://127.0.0.1:{silent.getsockname()[1]}")
        assert str(error_of(api)) == "no answer from CoinAPI: no connection within 0.2 s"


def test_every_error_of_requests_is_a_coinapierror(http: responses.RequestsMock, api: CoinApi) -> None:
    for error in (requests.ConnectionError(), requests.exceptions.SSLError("bad cert"), requests.ReadTimeout("slow")):
        http.get(URL, body=error)
        assert str(error_of(api)).startswith("no answer from CoinAPI: ")


def test_demo_prices_have_the_same_shape_and_move() -> None:
    demo = DemoApi()
    first, second = demo.fetch_prices(("BTC", "DOGE")), demo.fetch_prices(("BTC", "DOGE"))
    assert [update.asset_id for update in first] == ["BTC", "DOGE"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", first[0].time)
    assert first[0].price != second[0].price
    assert all(len(str(update.price)) <= 8 for update in second), "seven digits, and not sixteen"
    assert first[0].price == pytest.approx(45000, rel=0.01)


def test_demo_prices_begin_near_real_ones_and_cost_nothing() -> None:
    near = {"BTC": 45000, "ETH": 3000, "XRP": 0.6, "BCH": 300, "ADA": 0.5, "LTC": 75}
    near |= {"LINK": 15, "XLM": 0.12, "DOT": 7, "SOL": 100, "ANY": 10}
    demo = DemoApi()
    first = {update.asset_id: update.price for update in demo.fetch_prices(tuple(near))}
    assert first == pytest.approx(near, rel=0.01)  # ten times the usual step
    assert (demo.credits_used, demo.credits_left) == (None, None)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
def test_the_demos_time_is_utc_now_wherever_the_machine_is(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        at = DemoApi().fetch_prices(("BTC",))[0].time
    finally:
        monkeypatch.undo()
        time.tzset()
    assert datetime.fromisoformat(at).timestamp() == pytest.approx(time.time(), abs=5)
    assert at.endswith("Z")
