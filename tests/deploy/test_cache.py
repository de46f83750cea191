"""nginx's cache between trackers and CoinAPI, with the files of deploy/ as they are and its README's commands."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from caching import Nameserver, every_second, local_settings, soon_stale, start_cache
from proxies import Certificate, HAProxy, Nginx, connect, deployed, free_port, get, make_certificate, put, readme_block
from running import Tracker, outside, wait_for
from stand_in import KEY, StandIn, rates_body

from coin_api import RESPONSE_TIMEOUT


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "DNS:rest.coinapi.io")


@pytest.fixture
def nameserver() -> Iterator[Nameserver]:
    with Nameserver("rest.coinapi.io") as running:
        yield running


@pytest.fixture
def cache(coin_api: StandIn, certificate: Certificate, nameserver: Nameserver, tmp_path: Path) -> Iterator[Nginx]:
    """With intervals of 1 s, and under the name `show` those of the file, to be looked at."""
    port = free_port()
    (intervals,) = re.findall(r"^map .*?^\}\n", deployed("nginx-cache.conf"), re.DOTALL | re.MULTILINE)
    show = f'server {{ listen 127.0.0.1:{port}; server_name show; return 200 "$time_iso8601 $five_seconds"; }}'
    more = (put(intervals, ("$coinapi_interval", "$five_seconds")), show)
    changes = (*every_second(), ("/etc/ssl/certs/ca-certificates.crt", certificate.chain))
    with start_cache(tmp_path, port, coin_api, certificate, nameserver, changes, more) as nginx:
        yield nginx


def start_trackers(stack: ExitStack, cache: Nginx) -> list[Tracker]:
    """Three as the README has them."""
    lines = re.sub(r":3040$", f":{cache.port}", readme_block("COIN_API_URL=http:"), flags=re.MULTILINE)
    environment = dict(line.split("=", 1) for line in lines.splitlines())
    return [stack.enter_context(soon_stale(cache.folder, **environment)) for _ in range(3)]


def health(tracker: Tracker) -> tuple[int, dict[str, object]]:
    status, body, _ = get(f"{tracker.http}/healthz")
    return status, json.loads(body)


def polls(tracker: Tracker) -> int:
    """How many succeeded, from /metrics."""
    found = re.search(r'polls_total{result="success"} (\d+)', get(f"{tracker.http}/metrics")[1].decode())
    assert found
    return int(found[1])


def test_three_trackers_cost_one_request_per_interval(coin_api: StandIn, cache: Nginx) -> None:
    with ExitStack() as stack:
        trackers = start_trackers(stack, cache)
        wait_for(lambda: all(polls(tracker) for tracker in trackers))
        wait_for(lambda: time.time() % 1 < 0.05)  # the start of an interval
        start = time.monotonic()
        earlier, before = len(coin_api.requests), [polls(tracker) for tracker in trackers]
        intervals = set()
        while not all(polls(tracker) >= first + 10 for tracker, first in zip(trackers, before, strict=True)):
            now, interval = get(f"http://127.0.0.1:{cache.port}", headers={"Host": "show"})[1].decode().split()
            assert interval == now[:18] + ("0" if now[18] < "5" else "5")
            intervals.add(interval)
            time.sleep(0.1)
            assert time.monotonic() - start < 20, "ten polls by each"
        requests = coin_api.requests[earlier:]
        seconds = time.monotonic() - start
    assert len(intervals) > 1
    # One a second, however late the trackers ask; the first and the last interval may be seen by some of them only.
    assert 10 <= len(requests) <= seconds + 2, cache.errors()
    for request in requests:
        assert request.path == "/v1/exchangerate/USD"
        assert request.headers.get_all("X-CoinAPI-Key") == [KEY]
        assert request.headers["Host"] == "rest.coinapi.io"
        assert request.headers["Accept-Encoding"] is None


def test_while_coinapi_fails_trackers_say_stale_and_no_client_is_disconnected_or_refused(
    coin_api: StandIn, cache: Nginx, certificate: Certificate, tmp_path: Path
) -> None:
    (tmp_path / "haproxy").mkdir()
    with ExitStack() as stack:
        trackers = start_trackers(stack, cache)
        proxy = HAProxy(tmp_path / "haproxy", [tracker.port for tracker in trackers], certificate)
        stack.enter_context(proxy)
        uri = f"wss://localhost:{proxy.port}/ws"
        clients = [stack.enter_context(connect(uri, ssl=certificate.context, max_queue=None)) for _ in range(6)]
        wait_for(lambda: all(polls(tracker) for tracker in trackers))
        coin_api.say(b'{"error": "out of order"}', 503)
        wait_for(lambda: all(health(tracker)[1]["last_error"] for tracker in trackers), what="they note the error")
        good = [polls(tracker) for tracker in trackers]
        wait_for(lambda: all(health(tracker)[1]["status"] == "stale" for tracker in trackers), what="they say stale")
        assert [polls(tracker) for tracker in trackers] == good, "an old price was taken for a new one"
        for tracker in trackers:
            status, told = health(tracker)
            assert (status, told["last_error"], told["clients"]) == (503, "CoinAPI answered 503: out of order", 2)
            assert KEY not in tracker.text
        with connect(uri, ssl=certificate.context) as newcomer:
            assert "BTC" in str(newcomer.recv(timeout=5)), "the last known prices"
        coin_api.recover()
        wait_for(lambda: all(health(tracker)[0] == 200 for tracker in trackers), 20, "prices are current again")
        for client in clients:
            assert client.ping().wait(5)


def test_cache_asks_once_for_all_trackers_that_wait_and_keeps_no_error(coin_api: StandIn, cache: Nginx) -> None:
    url = f"http://127.0.0.1:{cache.port}/v1/exchangerate/USD?invert=true&filter_asset_id="

    def answer_late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        # None of these may keep the cache from keeping it.
        coin_api.send(handler, rates_body({"BTC": 1.5}), Cache_Control="no-store", Vary="*", Set_Cookie="a=b")

    wait_for(lambda: time.time() % 1 < 0.1)  # the start of an interval
    coin_api.say(b"{}", 503)
    assert get(url + "BTC")[0] == 503
    coin_api.answer = answer_late
    with ThreadPoolExecutor(9) as threads:
        answers = list(threads.map(get, [url + "BTC"] * 9))
    assert [(status, b"1.5" in body) for status, body, _ in answers] == [(200, True)] * 9
    assert len(coin_api.requests) == 2
    wait_for(lambda: time.time() % 1 < 0.1)
    assert get(url + "BTC")[0] == 200
    assert len(coin_api.requests) == 3, "an answer of the last interval"


def test_trackers_that_follow_other_assets_or_another_currency_get_their_own_prices(
    coin_api: StandIn, cache: Nginx
) -> None:
    url = f"http://127.0.0.1:{cache.port}/v1/exchangerate/"
    wait_for(lambda: time.time() % 1 < 0.1)  # the start of an interval
    wanted = ("BTC", "USD"), ("ETH", "USD"), ("ETH", "EUR")
    for asset_id, quote in wanted:
        answer = json.loads(get(f"{url}{quote}?filter_asset_id={asset_id}&invert=true")[1])
        assert [rate["asset_id_quote"] for rate in answer["rates"]] == [asset_id]
        assert answer["asset_id_base"] == quote


def test_cache_gives_up_on_coinapi_before_a_tracker_gives_up_on_the_cache() -> None:
    text = deployed("nginx-cache.conf")
    most = [
        re.findall(rf"^ +{name}_timeout (\d+)s;", text, re.M) for name in ("resolver", "proxy_connect", "proxy_read")
    ]
    assert sum(int(seconds) for (seconds,) in most) < RESPONSE_TIMEOUT


def test_cache_does_not_give_the_key_to_a_host_without_the_right_certificate(
    coin_api: StandIn, certificate: Certificate, nameserver: Nameserver, tmp_path: Path
) -> None:
    if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
        pytest.skip("this machine keeps its certificates elsewhere")
    with start_cache(tmp_path, free_port(), coin_api, certificate, nameserver) as nginx:
        assert get(f"http://127.0.0.1:{nginx.port}/v1/exchangerate/USD?filter_asset_id=BTC&invert=true")[0] == 502
        assert "certificate verify error" in nginx.errors()
    assert coin_api.requests == []


@pytest.mark.parametrize("silent", [False, True])
def test_trackers_are_told_fast_by_the_cache_that_the_name_does_not_resolve(
    coin_api: StandIn, cache: Nginx, nameserver: Nameserver, silent: bool
) -> None:
    nameserver.name, nameserver.silent = "elsewhere.example", silent
    start = time.monotonic()
    with Tracker(COIN_API_URL=f"http://127.0.0.1:{cache.port}", COIN_API_KEY="added-by-the-cache") as tracker:
        line = tracker.wait_for_log("no prices: ")[0]
        tracker.wait_for_log(r"502: this is the cache: no answer from CoinAPI, see the error log of nginx; next try")
    assert time.monotonic() - start < 5, line
    assert coin_api.requests == []
    assert "rest.coinapi.io could not be resolved" in cache.errors()


def test_other_requests_than_for_prices_get_json_too(coin_api: StandIn, cache: Nginx) -> None:
    status, body, headers = get(f"http://127.0.0.1:{cache.port}/v1/other")
    assert (status, list(json.loads(body)), headers["content-type"]) == (404, ["error"], "application/json")
    coin_api.server.shutdown()
    coin_api.server.server_close()
    status, body, headers = get(f"http://127.0.0.1:{cache.port}/v1/exchangerate/USD")
    assert status == 502  # of the stand-in's own nginx, for CoinAPI: it passes as it is
    assert b"<html>" in body


def test_nameservers_and_key_of_the_machine_are_found_and_only_root_reads_them(tmp_path: Path) -> None:
    outside("nginx")
    file = local_settings(
        tmp_path,
        "# Made by something.\nsearch example.org\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n"
        "nameserver fe80::1%eth0\noptions edns0 trust-ad\n",
        KEY,
    )
    assert file.read_text() == f'resolver 192.0.2.1 [2001:db8::1] valid=60s;\nset $coin_api_key "{KEY}";\n'
    assert file.stat().st_mode & 0o777 == 0o600
    configuration = f"server {{ listen 127.0.0.1:{free_port()}; location / {{ include {file}; }} }}"
    nginx = Nginx(tmp_path, 0, configuration)
    check = subprocess.run([*nginx.command, "-t"], capture_output=True, text=True, env=os.environ)
    assert check.returncode == 0, check.stderr
