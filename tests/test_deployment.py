"""The README's configurations, taken out of it word for word: systemd's own checker, a real nginx, real
trackers, a real browser. And what befalls a program that is left running: kills, clocks, sleep."""

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

import pytest
from running import ASSETS, ROOT, Tracker, outside, wait_for
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from stand_in import KEY, StandIn, rates_body
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

import price_server

UNIT = "/etc/systemd/system/price-tracker.service"
ALERTS = "/etc/prometheus/rules/price-tracker.yml"
TLS = "/etc/nginx/conf.d/price-tracker-tls.conf"
POOL = "/etc/nginx/conf.d/price-tracker-pool.conf"
CACHE = "/etc/nginx/conf.d/price-tracker-cache.conf"


def block(language: str, first_line: str) -> str:
    """The README's fenced block of this language with this first line."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if text.partition("\n")[0] == first_line]
    return str(found)


def put(text: str, *changes: tuple[str, object]) -> str:
    """The text with each first string replaced; each must be in it."""
    for old, new in changes:
        assert old in text, f"not in the README's configuration: {old}"
        text = text.replace(old, str(new))
    return text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(url: str, context: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def health(tracker: Tracker) -> dict[str, object]:
    answer = json.loads(get(f"{tracker.http}/healthz")[1])
    assert isinstance(answer, dict)
    return answer


def polls(tracker: Tracker, result: str = "success") -> int:
    """How many polls ended so, from /metrics."""
    found = re.search(rf'polls_total{{result="{result}"}} (\d+)', get(f"{tracker.http}/metrics")[1].decode())
    assert found
    return int(found[1])


class Certificate(NamedTuple):
    file: Path
    key: Path
    context: ssl.SSLContext  # of a client that trusts it


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    outside("nginx", "openssl")
    folder = tmp_path_factory.mktemp("certificate")
    file, key = folder / "fullchain.pem", folder / "privkey.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=DNS:localhost,DNS:rest.coinapi.io"
    subprocess.run([*command.split(), "-addext", names, "-keyout", key, "-out", file], check=True, capture_output=True)
    return Certificate(file, key, ssl.create_default_context(cafile=str(file)))


class Nginx:
    """`with Nginx(folder, port, configuration, ...)` runs nginx with these files as its conf.d until the block ends."""

    def __init__(self, folder: Path, port: int, *configurations: str):
        self.folder = folder
        self.port = port
        (folder / "conf.d").mkdir()
        for number, configuration in enumerate(configurations):
            (folder / "conf.d" / f"{number}.conf").write_text(configuration)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        user = "user root;" if os.geteuid() == 0 else ""  # or its workers could not enter pytest's folder
        (folder / "nginx.conf").write_text(
            f"{user} daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"events {{ worker_connections 1000; }}\n"
            f"http {{ access_log {folder}/access.log; {paths} include {folder}/conf.d/*.conf; }}\n"
        )

    def __enter__(self) -> "Nginx":
        command = f"nginx -p {self.folder} -e {self.folder}/error.log -c {self.folder}/nginx.conf"
        self.process = subprocess.Popen(command.split(), stderr=subprocess.DEVNULL)
        wait_for(lambda: self.listens() or self.process.poll() is not None, what="nginx listens")
        assert self.process.poll() is None, self.errors()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def errors(self) -> str:
        return (self.folder / "error.log").read_text()


def tls_configuration(port: int, certificate: Certificate) -> str:
    return put(
        block("nginx", f"# {TLS}"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("server_name prices.example.org;", "server_name localhost;"),
        ("/etc/letsencrypt/live/prices.example.org/fullchain.pem", certificate.file),
        ("/etc/letsencrypt/live/prices.example.org/privkey.pem", certificate.key),
    )


# TLS


@pytest.fixture(scope="module")
def behind_tls(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """localhost:PORT of a nginx that ends TLS for a tracker which other origins may not read."""
    port = free_port()
    with Tracker("--demo", "--interval", "0.5", "--allow-origin", "https://elsewhere.example") as tracker:
        configuration = put(tls_configuration(port, certificate), ("127.0.0.1:3030", f"127.0.0.1:{tracker.port}"))
        with Nginx(tmp_path_factory.mktemp("tls"), port, configuration):
            yield f"localhost:{port}"


def test_prices_come_through_tls(behind_tls: str, certificate: Certificate) -> None:
    with connect(f"wss://{behind_tls}/ws", ssl=certificate.context, max_queue=None) as client:
        messages = [json.loads(client.recv(timeout=5)) for _ in range(30)]
        assert client.ping(b"\xff").wait(5)
    assert [message["asset_id"] for message in messages] == list(ASSETS) * 3
    assert client.close_code == 1000


def test_paths_come_through_tls_but_metrics_do_not(behind_tls: str, certificate: Certificate) -> None:
    status, body = get(f"https://{behind_tls}/prices", certificate.context)
    assert (status, [price["asset_id"] for price in json.loads(body)]) == (200, list(ASSETS))
    status, body = get(f"https://{behind_tls}/healthz", certificate.context)
    assert (status, json.loads(body)["status"]) == (200, "ok")
    assert get(f"https://{behind_tls}/prices/NOSUCH", certificate.context)[0] == 404
    assert get(f"https://{behind_tls}/ws", certificate.context)[0] == 426
    assert get(f"https://{behind_tls}/metrics", certificate.context)[0] == 403


def test_page_of_the_same_origin_is_let_in_through_tls_and_others_are_not(
    behind_tls: str, certificate: Certificate
) -> None:
    with connect(f"wss://{behind_tls}/ws", ssl=certificate.context, origin=Origin(f"https://{behind_tls}")) as client:
        assert "BTC" in str(client.recv(timeout=5))
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"wss://{behind_tls}/ws", ssl=certificate.context, origin=Origin("https://evil.example"))


def test_proxy_waits_longer_than_the_pings_are_apart() -> None:
    found = re.search(r"proxy_read_timeout (\d+)s;", block("nginx", f"# {TLS}"))
    assert found
    assert int(found[1]) >= 2 * price_server.PING_INTERVAL


def test_page_shows_moving_prices_through_tls(behind_tls: str, tmp_path: Path) -> None:
    outside("chromium", "chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync ignore-certificate-errors user-data-dir={tmp_path}"
    ).split():
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def row(asset_id: str) -> str:
        try:
            texts = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "tbody tr")]
        except StaleElementReferenceException:
            return ""
        return next((text for text in texts if asset_id in text and re.search(r"\d", text)), "")

    try:
        browser.get(f"https://{behind_tls}/")
        wait_for(lambda: all(row(asset_id) for asset_id in ASSETS), what="a price of each asset in the page")
        before = row("BTC")
        wait_for(lambda: row("BTC") not in ("", before), what="another price in the page")
    finally:
        browser.quit()


# More than one


async def follow(uri: str, seen: list[float], context: ssl.SSLContext | None = None) -> None:
    """A client that reconnects; `seen` gets when each message came."""
    async for client in connect_async(uri, ssl=context):
        try:
            async for message in client:
                assert json.loads(message)["price"] > 0
                seen.append(time.monotonic())
        except ConnectionClosed:
            continue


async def until(condition: Callable[[], object], seconds: float = 10.0, what: str = "") -> None:
    await asyncio.to_thread(wait_for, condition, seconds, what)


@pytest.fixture
def quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("websockets.asyncio.client.BACKOFF_INITIAL_DELAY", 0.2, raising=False)
    monkeypatch.setattr("websockets.client.BACKOFF_INITIAL_DELAY", 0.2)
    monkeypatch.setattr("websockets.client.BACKOFF_MIN_DELAY", 0.2)


@pytest.mark.usefixtures("quick_reconnects")
def test_clients_of_a_killed_tracker_come_back_on_the_others(certificate: Certificate, tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as stack:
        trackers = [stack.enter_context(Tracker("--demo", "--interval", "0.3")) for _ in range(3)]
        pool = block("nginx", f"# {POOL}")
        for number, tracker in enumerate(trackers):
            pool = put(pool, (f"127.0.0.1:{3031 + number}", f"127.0.0.1:{tracker.port}"))
        tls = tls_configuration(port, certificate)
        alone = re.search(r"^upstream price_trackers \{.*?^\}\n", tls, re.DOTALL | re.MULTILINE)
        assert alone
        stack.enter_context(Nginx(tmp_path, port, put(tls, (alone[0], "")), pool))

        async def run() -> None:
            seen: list[list[float]] = [[] for _ in range(12)]
            tasks = []
            for one in seen:  # one after the other, so that each finds the tracker with the fewest
                tasks.append(asyncio.create_task(follow(f"wss://localhost:{port}/ws", one, certificate.context)))
                await until(lambda one=one: one, what="a price for the new client")  # type: ignore[misc]
            assert [health(tracker)["clients"] for tracker in trackers] == [4, 4, 4]
            trackers[0].process.kill()
            await until(
                lambda: [health(tracker)["clients"] for tracker in trackers[1:]] == [6, 6], what="all are on the others"
            )
            back = time.monotonic()
            await until(lambda: all(one[-1] > back for one in seen), what="prices for all")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(run())


@pytest.fixture
def behind_cache(coin_api: StandIn, certificate: Certificate, tmp_path: Path) -> Iterator[Nginx]:
    """The cache with intervals of 1 s, behind it the stand-in for CoinAPI, with TLS and the right name."""
    five_seconds = re.search(r'(    "~\^\(\?<start>\.\{18\}\).*\n)+', block("nginx", f"# {CACHE}"))
    one_second = re.search(r"# For 1 s: (.*?;)", block("nginx", f"# {CACHE}"))
    assert five_seconds
    assert one_second
    changes = (
        (five_seconds[0], f"    {one_second[1]}\n"),
        ("/etc/ssl/certs/ca-certificates.crt", certificate.file),
        ('"your-key"', f'"{KEY}"'),
    )
    with start_cache(tmp_path, coin_api, certificate, *changes) as nginx:
        yield nginx


def start_cache(folder: Path, coin_api: StandIn, certificate: Certificate, *changes: tuple[str, object]) -> Nginx:
    port, tls_port = free_port(), free_port()
    cache = put(
        block("nginx", f"# {CACHE}"),
        ("127.0.0.1:3040", f"127.0.0.1:{port}"),
        ("/var/cache/nginx-coinapi", folder / "cache"),
        ("set $coinapi rest.coinapi.io;", f"set $coinapi 127.0.0.1:{tls_port};"),
        *changes,
    )
    stand_in_with_tls = (
        f"server {{ listen 127.0.0.1:{tls_port} ssl; server_name rest.coinapi.io;"
        f" ssl_certificate {certificate.file}; ssl_certificate_key {certificate.key};"
        f" location / {{ proxy_pass {coin_api.url}; proxy_set_header Host $http_host; }} }}"
    )
    # The five seconds of the README under another name, to be looked at.
    intervals = re.search(r"^map .*?^\}\n", block("nginx", f"# {CACHE}"), re.DOTALL | re.MULTILINE)
    assert intervals
    show = f'server {{ listen 127.0.0.1:{port}; server_name show; return 200 "$time_iso8601 $five_seconds"; }}'
    return Nginx(
        folder, port, cache, stand_in_with_tls, put(intervals[0], ("$coinapi_interval", "$five_seconds")), show
    )


def test_three_trackers_cost_one_request_per_interval_and_say_when_coinapi_is_gone(
    coin_api: StandIn, behind_cache: Nginx, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^COIN_API_URL=http://127.0.0.1:3040\nCOIN_API_KEY=\S+$", readme, re.MULTILINE)
    environment = dict(line.split("=", 1) for line in put(lines, ("3040", behind_cache.port)).splitlines())
    # Python runs this at its start: stale after 3 s, not after 60.
    (tmp_path / "sitecustomize.py").write_text("import price_server\nprice_server.STALE_AFTER = 3.0\n")
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    with ExitStack() as stack:
        start = time.monotonic()
        trackers = [stack.enter_context(Tracker("--interval", "1", **environment)) for _ in range(3)]
        intervals = set()
        while not all(polls(tracker) >= 10 for tracker in trackers):
            question = urllib.request.Request(f"http://127.0.0.1:{behind_cache.port}", headers={"Host": "show"})
            with urllib.request.urlopen(question, timeout=5) as answer:
                now, interval = answer.read().decode().split()
            assert interval == now[:18] + ("0" if now[18] < "5" else "5")
            intervals.add(interval)
            time.sleep(0.1)
            assert time.monotonic() - start < 20, "ten polls by each"
        assert len(intervals) > 1
        requests = list(coin_api.requests)
        # The first and the last interval may be seen by some of them only.
        assert len(requests) in (10, 11), behind_cache.errors()
        for request in requests:
            assert request.path == "/v1/exchangerate/USD"
            assert request.headers.get_all("X-CoinAPI-Key") == [KEY]
            assert request.headers["Host"] == "rest.coinapi.io"
            assert request.headers["Accept-Encoding"] is None

        coin_api.say(b'{"error": "out of order"}', 503)
        wait_for(lambda: all(health(tracker)["last_error"] for tracker in trackers), what="they note the error")
        good = [polls(tracker) for tracker in trackers]
        wait_for(lambda: all(health(tracker)["status"] == "stale" for tracker in trackers), what="they say stale")
        assert [polls(tracker) for tracker in trackers] == good, "an old price was taken for a new one"
        assert [get(f"{tracker.http}/healthz")[0] for tracker in trackers] == [503] * 3
        for tracker in trackers:
            assert health(tracker)["last_error"] == "CoinAPI answered 503: out of order"
            tracker.wait_for_log("WARNING prices are stale")
            assert KEY not in tracker.text


def test_cache_asks_once_for_all_who_wait_and_keeps_no_error(coin_api: StandIn, behind_cache: Nginx) -> None:
    url = f"http://127.0.0.1:{behind_cache.port}/v1/exchangerate/USD?invert=true&filter_asset_id="

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
    assert [(status, b"1.5" in body) for status, body in answers] == [(200, True)] * 9
    assert len(coin_api.requests) == 2
    wait_for(lambda: time.time() % 1 < 0.1)
    assert get(url + "BTC")[0] == 200
    assert len(coin_api.requests) == 3, "an answer of the last interval"


def test_cache_does_not_give_the_key_to_a_host_without_the_right_certificate(
    coin_api: StandIn, certificate: Certificate, tmp_path: Path
) -> None:
    if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
        pytest.skip("this machine keeps its certificates elsewhere")
    with start_cache(tmp_path, coin_api, certificate) as nginx:
        assert get(f"http://127.0.0.1:{nginx.port}/v1/exchangerate/USD?filter_asset_id=BTC&invert=true")[0] == 502
        assert "certificate verify error" in nginx.errors()
    assert coin_api.requests == []
