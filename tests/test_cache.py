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
from proxies import DEPLOY, Certificate, HAProxy, Nameserver, Nginx, deployed, free_port, get, make_certificate, put
from running import Tracker, outside, wait_for
from stand_in import KEY, StandIn, rates_body
from websockets.sync.client import connect

# The five seconds of the file, and what takes its place in most tests here.
FIVE_SECONDS = r'(    "~\^\(\?<start>\.\{18\}\).*\n)+'
ONE_SECOND = r"# For 1 s: (.*?;)"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"), "DNS:rest.coinapi.io")


@pytest.fixture
def nameserver() -> Iterator[Nameserver]:
    with Nameserver("rest.coinapi.io") as running:
        yield running


def readme_block(mark: str) -> str:
    """The one fenced block of deploy/README.md that holds this text."""
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE) if mark in text]
    return str(block)


def local_settings(folder: Path, resolv_conf: str, key: str = KEY) -> Path:
    """What the README's commands make of this /etc/resolv.conf and this key."""
    (folder / "resolv.conf").write_text(resolv_conf)
    file = folder / "price-tracker.local"
    (commands,) = re.findall(r"^(install -m 600 .*?)^nginx -t", readme_block("nginx-cache.conf"), re.DOTALL | re.M)
    changes = (("/etc/resolv.conf", folder / "resolv.conf"), ("/etc/nginx/price-tracker.local", file))
    subprocess.run(["sh", "-euc", put(commands, *changes, ("your-key", key))], check=True)
    return file


def start_cache(
    folder: Path, coin_api: StandIn, certificate: Certificate, nameserver: Nameserver, *changes: tuple[str, object]
) -> Nginx:
    """The cache; behind it rest.coinapi.io, which is the stand-in with TLS."""
    port, tls_port = free_port(), free_port()
    local = local_settings(folder, "nameserver 127.0.0.1\n")
    local.write_text(put(local.read_text(), ("127.0.0.1", f"127.0.0.1:{nameserver.port} ipv6=off")))
    cache = deployed(
        "nginx-cache.conf",
        ("127.0.0.1:3040", f"127.0.0.1:{port}"),
        ("/var/cache/nginx-coinapi", folder / "cache"),
        ("/etc/nginx/price-tracker.local", local),
        ("set $coinapi rest.coinapi.io;", f"set $coinapi rest.coinapi.io:{tls_port};"),
        *changes,
    )
    stand_in_with_tls = (
        f"server {{ listen 127.0.0.1:{tls_port} ssl; server_name rest.coinapi.io;"
        f" ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key};"
        f" location / {{ proxy_pass {coin_api.url}; proxy_set_header Host $http_host; }} }}"
    )
    # The five seconds of the file under another name, to be looked at.
    intervals = re.search(r"^map .*?^\}\n", deployed("nginx-cache.conf"), re.DOTALL | re.MULTILINE)
    assert intervals
    show = f'server {{ listen 127.0.0.1:{port}; server_name show; return 200 "$time_iso8601 $five_seconds"; }}'
    return Nginx(
        folder, port, cache, stand_in_with_tls, put(intervals[0], ("$coinapi_interval", "$five_seconds")), show
    )


@pytest.fixture
def cache(coin_api: StandIn, certificate: Certificate, nameserver: Nameserver, tmp_path: Path) -> Iterator[Nginx]:
    """With intervals of 1 s."""
    five_seconds = re.search(FIVE_SECONDS, deployed("nginx-cache.conf"))
    one_second = re.search(ONE_SECOND, deployed("nginx-cache.conf"))
    assert five_seconds
    assert one_second
    changes = (
        (five_seconds[0], f"    {one_second[1]}\n"),
        ("/etc/ssl/certs/ca-certificates.crt", certificate.chain),
    )
    with start_cache(tmp_path, coin_api, certificate, nameserver, *changes) as nginx:
        yield nginx


def health(tracker: Tracker) -> tuple[int, dict[str, object]]:
    status, body, _ = get(f"{tracker.http}/healthz")
    return status, json.loads(body)


def polls(tracker: Tracker) -> int:
    """How many succeeded, from /metrics."""
    found = re.search(r'polls_total{result="success"} (\d+)', get(f"{tracker.http}/metrics")[1].decode())
    assert found
    return int(found[1])


def start_trackers(stack: ExitStack, cache: Nginx) -> list[Tracker]:
    """Three as the README has them, but stale after 3 s, not after 60."""
    lines = re.sub(r":3040$", f":{cache.port}", readme_block("COIN_API_URL=http:"), flags=re.MULTILINE)
    environment = dict(line.split("=", 1) for line in lines.splitlines())
    program = cache.folder / "soon_stale.py"
    program.write_text("import sys\nimport tracker\ntracker.PriceServer.stale_floor = 3.0\nsys.exit(tracker.main())\n")
    environment["PYTHONPATH"] = str(DEPLOY.parent)
    return [stack.enter_context(Tracker("--interval", "1", program=str(program), **environment)) for _ in range(3)]


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
    assert len(intervals) > 1
    # The last interval may be seen by some of them only.
    assert len(requests) in (10, 11), cache.errors()
    for request in requests:
        assert request.path == "/v1/exchangerate/USD"
        assert request.headers.get_all("X-CoinAPI-Key") == [KEY]
        assert request.headers["Host"] == "rest.coinapi.io"
        assert request.headers["Accept-Encoding"] is None


def test_while_coinapi_fails_trackers_say_stale_and_nobody_is_disconnected_or_kept_out(
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


def test_cache_asks_once_for_all_who_wait_and_keeps_no_error(coin_api: StandIn, cache: Nginx) -> None:
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


def test_cache_does_not_give_the_key_to_a_host_without_the_right_certificate(
    coin_api: StandIn, certificate: Certificate, nameserver: Nameserver, tmp_path: Path
) -> None:
    if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
        pytest.skip("this machine keeps its certificates elsewhere")
    with start_cache(tmp_path, coin_api, certificate, nameserver) as nginx:
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


def test_what_is_no_request_for_prices_is_answered_in_json_too(coin_api: StandIn, cache: Nginx) -> None:
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
    )
    assert file.read_text() == f'resolver 192.0.2.1 [2001:db8::1] valid=60s;\nset $coin_api_key "{KEY}";\n'
    assert file.stat().st_mode & 0o777 == 0o600
    configuration = f"server {{ listen 127.0.0.1:{free_port()}; location / {{ include {file}; }} }}"
    nginx = Nginx(tmp_path, 0, configuration)
    check = subprocess.run([*nginx.command, "-t"], capture_output=True, text=True, env=os.environ)
    assert check.returncode == 0, check.stderr
