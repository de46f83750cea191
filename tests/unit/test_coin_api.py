"""coin_api: one request for all assets, every kind of answer, and the key that shows nowhere."""

import json
import math
import re
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
import requests
import responses
from calling import error_of
from stand_in import HEADERS, KEY, OUT_OF_CREDITS, RATES, rates_body

from coin_api import CoinApi, CoinApiError, DemoApi, PriceUpdate, one_line
from price_server.prices import split_valid

URL = "https://rest.coinapi.io/v1/exchangerate/USD"
AT = "2021-10-20T21:34:13.0000000Z"


@pytest.fixture
def http() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def api() -> CoinApi:
    return CoinApi(KEY)


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


def test_no_message_holds_what_is_not_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        PriceUpdate("BTC", math.nan, "t").to_json()


def test_a_price_is_the_nearest_double_of_28_digits_and_a_whole_number_is_a_price(
    http: responses.RequestsMock, api: CoinApi
) -> None:
    rates = '{"time":"t","asset_id_quote":"BTC","rate":3258.8875417798037784035133948}'
    http.get(URL, f'{{"rates":[{rates},{{"time":"t","asset_id_quote":"ETH","rate":4166}}]}}')
    assert [update.price for update in api.fetch_prices(("BTC", "ETH"))] == [3258.887541779804, 4166.0]


@pytest.mark.parametrize("rate", ["null", "NaN", "-1", '"65980.1"', "{}", "1e999", "9" * 5000])
def test_an_invalid_rate_drops_only_its_asset(http: responses.RequestsMock, api: CoinApi, rate: str) -> None:
    body = rates_body({"BTC": 0.5, "ETH": 4166.2}).replace(b"0.5", rate.encode())
    http.get(URL, body)
    valid, faults = split_valid(api.fetch_prices(("BTC", "ETH")), ("BTC", "ETH"))
    assert valid == {"ETH": (4166.2, AT, PriceUpdate("ETH", 4166.2, AT).to_json())}
    assert faults["BTC"].startswith("price ")


def test_of_two_rates_of_an_asset_the_valid_one_is_taken(http: responses.RequestsMock, api: CoinApi) -> None:
    rates = '{"asset_id_quote":"BTC","rate":2.5,"time":"t"},{"asset_id_quote":"BTC","rate":null,"time":"t"}'
    http.get(URL, f'{{"rates":[{rates}]}}')
    assert split_valid(api.fetch_prices(("BTC",)), ("BTC",)) == (
        {"BTC": (2.5, "t", PriceUpdate("BTC", 2.5, "t").to_json())},
        {},
    )


@pytest.mark.parametrize("junk", ["null", "7", '"BTC"', "[]", "{}", '{"asset_id_quote":null,"rate":1.0,"time":"t"}'])
def test_junk_among_the_rates_is_passed_over(http: responses.RequestsMock, api: CoinApi, junk: str) -> None:
    good = '{"asset_id_quote":"ETH","rate":2.5,"time":"t"}'
    http.get(URL, f'{{"rates":[{junk},{good},{{"asset_id_quote":["BTC"],"rate":1.0,"time":"t"}}]}}')
    assert api.fetch_prices(("BTC", "ETH")) == [PriceUpdate("ETH", 2.5, "t")]


@pytest.mark.parametrize("time_text", ["null", "7", "[]", "true"])
def test_a_time_that_is_not_a_string_drops_only_its_asset(
    http: responses.RequestsMock, api: CoinApi, time_text: str
) -> None:
    bad = f'{{"asset_id_quote":"BTC","rate":1.0,"time":{time_text}}}'
    http.get(URL, f'{{"rates":[{bad},{{"asset_id_quote":"ETH","rate":2.5,"time":"t"}}]}}')
    valid, faults = split_valid(api.fetch_prices(("BTC", "ETH")), ("BTC", "ETH"))
    assert valid == {"ETH": (2.5, "t", PriceUpdate("ETH", 2.5, "t").to_json())}
    assert faults["BTC"].startswith("time ")


BAD_BODIES = {
    "empty": (b"", "is not JSON: (empty)"),
    "null": (b"null", "has no list of rates: null"),
    "a list": (b"[1, 2]", "has no list of rates: [1, 2]"),
    "no rates": (b'{"asset_id_base":"USD"}', 'has no list of rates: {"asset_id_base":"USD"}'),
    "rates null": (b'{"rates":null}', "has no list of rates"),
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
    assert error_of(api).cause == "bad_answer"


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
    causes = {401: "refused_key", 403: "forbidden", 429: "rate_limited", 400: "other", 204: "other"}
    assert error.cause == causes.get(status, "server_error")


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
    http.get(URL, status=503, headers={"Retry-After": in_a_minute})
    assert error_of(api).retry_after == pytest.approx(60, abs=3)


@pytest.mark.parametrize(
    ("headers", "used", "left"),
    [
        (HEADERS, 166181, -66181),
        ({"X-RateLimit-Quota-Allocated": "1000", "X-RateLimit-Quota-Remaining": "400"}, 600, 400),
        (
            {"X-RateLimit-Used": "5", "X-RateLimit-Quota-Allocated": "1000", "X-RateLimit-Quota-Remaining": "400"},
            5,  # what it says, and not what can be computed
            400,
        ),
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


def test_credits_are_read_from_an_error_too(http: responses.RequestsMock, api: CoinApi) -> None:
    http.get(URL, b" " * (2 << 20), status=429, headers={"X-RateLimit-Used": "1000", "X-RateLimit-Remaining": "-7"})
    error_of(api)
    assert (api.credits_used, api.credits_left) == (1000, -7)


def test_credits_stay_known_when_an_answer_does_not_say(http: responses.RequestsMock, api: CoinApi) -> None:
    http.get(URL, rates_body(RATES), headers={"X-RateLimit-Used": "5", "X-RateLimit-Remaining": "95"})
    http.get(URL, json.dumps(OUT_OF_CREDITS), status=403)
    api.fetch_prices(("BTC",))
    error_of(api)
    assert (api.credits_used, api.credits_left) == (5, 95)


def test_a_line_for_the_log_is_as_quick_for_a_long_text() -> None:
    text = "x" * 50_000_000
    started = time.thread_time()
    assert one_line(text) == "x" * 200 + "…"
    assert time.thread_time() - started < 0.5


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
    "url", ["https://host:8443/path/", "http://127.0.1.1:8080", "http://localhost", "http://[::1]:1/x", "HTTPS://host"]
)
def test_other_hosts_over_https_and_loopback_over_http_are_accepted(http: responses.RequestsMock, url: str) -> None:
    http.get(f"{url.rstrip('/')}/v1/exchangerate/EUR", rates_body({"BTC": 2.5}))
    assert CoinApi(KEY, "EUR", url).fetch_prices(("BTC",))[0].price == 2.5


def test_a_cause_that_the_metrics_do_not_know_is_other_and_a_retry_after_is_a_number() -> None:
    assert CoinApiError("x", cause="full moon").cause == "other"
    assert CoinApiError("x", retry_after="30").retry_after == 30.0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="soon"):
        CoinApiError("x", retry_after="soon")  # type: ignore[arg-type]


def test_every_error_of_requests_is_a_coinapierror(http: responses.RequestsMock, api: CoinApi) -> None:
    for error in (requests.ConnectionError(), requests.exceptions.SSLError("bad cert"), requests.ReadTimeout("slow")):
        http.get(URL, body=error)
        assert str(error_of(api)).startswith("no response from CoinAPI: ")
        assert error_of(api).cause == "connection"


def test_demo_prices_have_the_same_shape_and_move() -> None:
    demo = DemoApi()
    first, second = demo.fetch_prices(("BTC", "DOGE")), demo.fetch_prices(("BTC", "DOGE"))
    assert [update.asset_id for update in first] == ["BTC", "DOGE"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", first[0].time)
    assert first[0].price != second[0].price
    assert all(len(str(update.price)) <= 8 for update in second), "seven digits, and not sixteen"
    assert first[0].price == pytest.approx(45000, rel=0.01)


@pytest.mark.parametrize(("asset", "digits_after_the_point"), [("XLM", 5), ("XRP", 5), ("SOL", 4), ("BTC", 2)])
def test_demo_prices_keep_seven_digits_whatever_their_size(asset: str, digits_after_the_point: int) -> None:
    demo = DemoApi()
    prices = [demo.fetch_prices((asset,))[0].price for _ in range(100)]
    assert all(price == float(f"{price:.7g}") for price in prices)
    assert any(price != round(price, digits_after_the_point - 1) for price in prices)
    demo._prices |= {"TINY": 1.234567e-9, "HUGE": 1.234567e12}
    for update in demo.fetch_prices(("TINY", "HUGE")):
        assert update.price == pytest.approx(demo._prices[update.asset_id])
        assert update.price == float(f"{update.price:.7g}") > 0


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
