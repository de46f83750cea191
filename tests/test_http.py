"""price_server's answers to HTTP: each path, status and header, over real HTTP."""

import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from running import ASSETS, ROOT, wait_for
from websockets.sync.client import connect

import price_server.web
from coin_api import PriceUpdate
from price_server import PriceServer

Updates = Callable[[float], list[PriceUpdate]]
PATHS = ("/", "/prices", "/prices/BTC", "/history", "/healthz", "/metrics")


def get(server: PriceServer, path: str, method: str = "GET", **headers: str) -> requests.Response:
    return requests.request(method, f"http://127.0.0.1:{server.port}{path}", headers=headers, timeout=5)


def raw(server: PriceServer, request: bytes) -> bytes:
    """The whole answer to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


class FakeClock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_000_000 + self.now


@pytest.fixture
def priced(server: PriceServer, updates: Updates) -> PriceServer:
    server.publish(updates(45000.0))
    return server


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8"),
        *[(path, "application/json") for path in ("/prices", "/prices/BTC", "/history", "/healthz", "/nope")],
    ],
)
def test_every_answer_has_its_headers_and_head_has_the_same(priced: PriceServer, path: str, content_type: str) -> None:
    answer, head = get(priced, path), get(priced, path, "HEAD")
    assert answer.headers["Content-Type"] == content_type
    assert answer.headers["Content-Length"] == str(len(answer.content))
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Server"] == "price-server"
    assert head.content == b""
    if path != "/healthz":  # it tells an age
        assert {**head.headers, "Date": ""} == {**answer.headers, "Date": ""}


def test_prices_are_the_last_updates_in_the_order_tracked(server: PriceServer) -> None:
    assert get(server, "/prices").json() == []
    server.publish([PriceUpdate("SOL", 177.5, "t1"), PriceUpdate("BTC", 45000.0, "t1")])
    server.publish([PriceUpdate("SOL", 178.5, "t2")])
    assert get(server, "/prices").text == (
        '[{"asset_id":"BTC","price":45000.0,"time":"t1"},{"asset_id":"SOL","price":178.5,"time":"t2"}]'
    )


@pytest.mark.parametrize("path", ["/prices/BTC", "/prices/btc", "/prices/BTC?x=1", "//prices/BTC", "/prices/%42TC"])
def test_one_price_has_a_path_of_its_own(priced: PriceServer, path: str) -> None:
    assert get(priced, path).text == '{"asset_id":"BTC","price":45000.0,"time":"2026-11-22T07:44:05.1234567Z"}'


@pytest.mark.parametrize("path", ["/prices/DOGE", "/nope", "/prices/", "/prices/BTC/", "/ws/", "/tracker.py", "/%"])
def test_what_is_not_there_is_404_in_json(priced: PriceServer, path: str) -> None:
    answer = get(priced, path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]


def test_an_asset_that_is_not_tracked_is_named_with_what_is_tracked(start_server: Callable[..., PriceServer]) -> None:
    server = start_server(("BTC", "ETH"))
    said = {"error": "unknown asset 'DOGE': this server tracks BTC, ETH"}
    assert (get(server, "/prices/doge").status_code, get(server, "/prices/doge").json()) == (404, said)
    for path in ("/history?assets=BTC,DOGE", "/ws?assets=doge"):
        assert (get(server, path).status_code, get(server, path).json()) == (400, said)
    assert get(server, "/history?assets=").status_code == 400


def test_an_asset_that_has_no_price_yet_is_503(server: PriceServer) -> None:
    answer = get(server, "/prices/BTC")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json() == {"error": "no price of BTC is known yet"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/ws", "/prices", "/nope"])
def test_other_methods_are_405_with_what_is_allowed(server: PriceServer, method: str, path: str) -> None:
    answer = get(server, path, method)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert "error" in answer.json()


@pytest.mark.parametrize("path", ["/", "/prices", "/metrics", "/nope"])
def test_an_answer_to_head_has_no_body(priced: PriceServer, path: str) -> None:
    answer = raw(priced, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.endswith(b"\r\n\r\n")


def test_an_answer_reaches_a_client_that_is_still_sending(server: PriceServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"POST /prices HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        client.recv(1, socket.MSG_PEEK)  # it has been answered
        for _ in range(10):
            client.sendall(b"x" * 100_000)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"}")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"505"),
        (b"GET / HTTP/one\r\n\r\n", b"400"),
        (b"GET / x y HTTP/1.1\r\n\r\n", b"400"),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 5_000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 \xff\xfe\r\n\r\n", b"400"),
        (b"GET /prices\r\n\r\n", b"200"),
        (b"GET /prices HTTP/1.0\n\n", b"200"),
        (b"GET http://elsewhere/prices HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    ],
)
def test_garbage_gets_a_status_line_and_json(server: PriceServer, request_bytes: bytes, status: bytes) -> None:
    answer = raw(server, request_bytes)
    assert answer.startswith(b"HTTP/1.1 " + status)
    json.loads(answer.partition(b"\r\n\r\n")[2])


def test_random_bytes_bring_no_traceback(
    server: PriceServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(100):
        raw(server, bytes((seed * 7919 + n * n * 31) % 256 for n in range(seed * 5)) + b"\r\n\r\n")
    assert get(server, "/prices").status_code == 200
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_history_is_pairs_of_epoch_seconds_and_price(server: PriceServer, updates: Updates) -> None:
    before = time.time()
    server.publish(updates(1.5))
    server.publish(updates(2.5))
    history = get(server, "/history").json()
    assert list(history) == list(ASSETS)
    assert [price for _, price in history["BTC"]] == [1.5, 2.5]
    assert before - 0.001 <= history["BTC"][0][0] <= history["BTC"][1][0] <= time.time()
    assert list(get(server, "/history?assets=sol,BTC").json()) == ["BTC", "SOL"]


def test_history_is_an_hour_thinned_to_about_a_point_every_4_s(
    monkeypatch: pytest.MonkeyPatch, updates: Updates
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(price_server, "time", clock)
    with PriceServer(ASSETS) as server:
        for step in range(8_000):  # 4,000 s at half a second
            clock.now = step / 2
            server.publish(updates(float(step)))
        points = json.loads(server.history_json(("BTC",)))["BTC"]
    assert points[-1] == [1_003_999.5, 7999.0]  # the current price is always the last point
    assert points[0][0] >= 1_000_399.5
    gaps = {later[0] - earlier[0] for earlier, later in itertools.pairwise(points[:-1])}
    assert gaps == {3.5}  # the last one before 4 s
    assert len(points) == 3600 / 3.5 // 1 + 1


def test_history_keeps_every_poll_of_the_default_interval(monkeypatch: pytest.MonkeyPatch, updates: Updates) -> None:
    clock = FakeClock()
    monkeypatch.setattr(price_server, "time", clock)
    with PriceServer(ASSETS) as server:
        for step in range(100):
            clock.now = step * 5 + (step % 3) * 0.2  # polls do not take equally long
            server.publish(updates(float(step)))
        assert len(json.loads(server.history_json(("BTC",)))["BTC"]) == 100


def test_healthz_tells_starting_ok_stale_and_paused(
    server: PriceServer, updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.report_failure("CoinAPI answered 503")
    answer = get(server, "/healthz")
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "starting",
        "age_seconds": None,
        "stale_after_seconds": 60.0,
        "interval_seconds": 5.0,
        "clients": 0,
        "source": "coinapi",
        "quote": "USD",
        "assets": list(ASSETS),
        "last_error": "CoinAPI answered 503",
    }
    server.publish(updates(1.0))
    with connect(f"ws://127.0.0.1:{server.port}/ws"):
        answer = get(server, "/healthz")
        health = answer.json()
        assert (answer.status_code, health["status"], health["clients"]) == (200, "ok", 1)
        assert health["last_error"] is None
        assert 0 <= health["age_seconds"] < 5
    monkeypatch.setattr(price_server, "STALE_AFTER", 0.0)
    server.interval = 0.0
    answer = get(server, "/healthz")
    assert (answer.status_code, answer.json()["status"]) == (503, "stale")
    server.paused = True
    answer = get(server, "/healthz")
    assert (answer.status_code, answer.json()["status"]) == (200, "paused")


@pytest.mark.parametrize(("interval", "seconds"), [(0.1, 60), (5, 60), (20, 60), (21, 63), (300, 900)])
def test_prices_are_stale_after_3_intervals_but_not_within_a_minute(
    start_server: Callable[..., PriceServer], interval: float, seconds: float
) -> None:
    assert start_server(interval=interval).stale_after == seconds


def test_stale_prices_are_one_line_in_the_log(
    priced: PriceServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(price_server, "STALE_AFTER", 0.1)
    priced.interval = 0.0
    wait_for(lambda: caplog.messages)
    checks = price_server.time.monotonic() + 1.2  # two more rounds of housekeeping
    wait_for(lambda: time.monotonic() > checks)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("prices are stale: no successful poll for ")


def test_metrics_pass_prometheus_own_parser(priced: PriceServer) -> None:
    priced.report_failure("x")
    priced.credits_used, priced.credits_left = 166181, -66181
    with connect(f"ws://127.0.0.1:{priced.port}/ws") as client:
        for _ in ASSETS:
            client.recv(5)
        families = {family.name: family for family in text_string_to_metric_families(get(priced, "/metrics").text)}
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples[("tracker_clients",)] == 1
    assert samples[("tracker_polls_total", "success")] == 1
    assert samples[("tracker_polls_total", "failure")] == 1
    assert samples[("tracker_messages_sent_total",)] == 10
    assert samples[("tracker_price", "SOL", "USD")] == 45000.0
    assert samples[("tracker_credits_used",)] == 166181
    assert samples[("tracker_credits_left",)] == -66181
    assert samples[("tracker_clients_dropped_total", "behind")] == 0
    assert samples[("tracker_last_success_timestamp_seconds",)] == pytest.approx(time.time(), abs=5)
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families.values())


def test_metrics_leave_out_what_is_not_known(server: PriceServer) -> None:
    text = get(server, "/metrics").text
    assert "credits" not in text
    assert "tracker_price" not in text
    list(text_string_to_metric_families(text))


def test_by_default_every_page_may_read_and_allow_origin_narrows_it(start_server: Callable[..., PriceServer]) -> None:
    everyone, narrowed = start_server(), start_server(allow_origins=["https://Example.org/"])
    assert get(everyone, "/prices", Origin="https://any.example").headers["Access-Control-Allow-Origin"] == "*"
    for origin in ("https://example.org", "https://EXAMPLE.org", f"http://127.0.0.1:{narrowed.port}"):
        answer = get(narrowed, "/prices", Origin=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Vary"] == "Origin"
    for origin in ("https://any.example", "http://example.org", "null", "https://example.org.evil"):
        assert "Access-Control-Allow-Origin" not in get(narrowed, "/prices", Origin=origin).headers
    assert "Access-Control-Allow-Origin" not in get(narrowed, "/prices").headers


def test_the_page_may_run_its_own_script_only_and_ask_this_server_only(priced: PriceServer) -> None:
    policy = get(priced, "/").headers["Content-Security-Policy"]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert directives["script-src"].startswith("'sha256-")
    assert "unsafe" not in policy


def test_a_page_with_windows_line_ends_is_sent_as_the_browser_hashes_it(
    priced: PriceServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "dashboard.html"
    page.write_bytes(price_server.DASHBOARD.read_bytes().replace(b"\n", b"\r\n"))
    expected = get(priced, "/")
    monkeypatch.setattr(price_server, "DASHBOARD", page)
    answer = get(priced, "/")
    assert answer.content == expected.content
    assert answer.headers["Content-Security-Policy"] == expected.headers["Content-Security-Policy"]


def test_without_its_page_the_server_says_what_is_missing(
    priced: PriceServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(price_server, "DASHBOARD", tmp_path / "dashboard.html")
    answer = get(priced, "/")
    assert answer.status_code == 404
    assert answer.json() == {"error": "no page: dashboard.html beside price_server.py: No such file or directory"}
    assert get(priced, "/prices").status_code == 200


def test_one_connection_carries_one_request(priced: PriceServer) -> None:
    client = http.client.HTTPConnection("127.0.0.1", priced.port, timeout=5)
    for _ in range(3):  # http.client connects again when it is told to close
        client.request("GET", "/prices/BTC")
        assert client.getresponse().read()
    client.close()
    assert raw(priced, b"GET /prices HTTP/1.1\r\nHost: x\r\n\r\n" * 2).count(b"HTTP/1.1 ") == 1


def test_history_fetched_a_hundred_times_a_second_delays_no_poll(priced: PriceServer, updates: Updates) -> None:
    for asset, points in priced.history.items():
        points.extendleft((time.monotonic() - n, f"[{1795430404.888 - n * 4},{n}.5]") for n in range(900) if asset)
    stop = threading.Event()
    fetched: list[int] = []

    def fetch() -> None:
        while not stop.wait(0.04):  # four threads: 100 a second
            fetched.append(len(get(priced, "/history").content))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    delays = []
    with connect(f"ws://127.0.0.1:{priced.port}/ws", max_queue=None) as client:
        for _ in ASSETS:
            client.recv(5)
        for poll in range(12):
            started = time.monotonic()
            priced.publish(updates(float(poll)))
            received: list[Any] = [json.loads(client.recv(5))["price"] for _ in ASSETS]
            assert received == [float(poll)] * 10
            delays.append(time.monotonic() - started)
            stop.wait(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(fetched) > 50
    assert min(fetched) > 100_000
    assert max(delays) < 0.5


def test_the_rooms_are_the_program() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"tracker.py", "coin_api.py"}
