"""HAProxy in front of trackers, with the file of deploy/ as it is: TLS, what comes through, who gets which client."""

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browser import start_chromium
from crowd import Crowd
from proxies import (
    DEPLOY,
    Certificate,
    HAProxy,
    connect,
    deployed,
    free_port,
    get,
    listens,
    make_certificate,
    put,
    readme_block,
)
from raw import request
from running import ASSETS, Tracker, outside, wait_for
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

CLIENTS = 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


# One tracker or several fall over


class Pool:
    """Three trackers on fixed ports, which a test stops, kills and starts again, behind HAProxy."""

    def __init__(self, folder: Path, certificate: Certificate, *changes: tuple[str, object]):
        self.ports = [free_port() for _ in range(3)]
        self.trackers: list[Tracker | None] = [None] * 3
        self.proxy = HAProxy(folder, self.ports, certificate, *changes)

    def start(self, number: int) -> None:
        self.trackers[number] = Tracker("--demo", "--interval", "0.5", "--port", str(self.ports[number])).__enter__()

    def stop(self, number: int, how: int = signal.SIGTERM) -> None:
        tracker = self.trackers[number]
        assert tracker
        tracker.stop(how)
        tracker.__exit__()
        self.trackers[number] = None

    def signal(self, number: int, how: int) -> None:
        tracker = self.trackers[number]
        assert tracker
        tracker.process.send_signal(how)

    def clients(self) -> list[int]:
        """How many each tracker says it has."""
        return [json.loads(get(f"http://127.0.0.1:{port}/healthz")[1])["clients"] for port in self.ports]

    def __enter__(self) -> "Pool":
        for number in range(3):
            self.start(number)
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.proxy.__exit__()
        for tracker in filter(None, self.trackers):
            tracker.__exit__()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, certificate: Certificate) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("pool"), certificate) as running:
        yield running


@pytest.fixture(scope="module")
def everybody(pool: Pool, certificate: Certificate) -> Iterator[Crowd]:
    with Crowd(f"wss://localhost:{pool.proxy.port}/ws?assets=BTC", CLIENTS, certificate.context) as crowd:
        yield crowd


@pytest.fixture
def crowd(everybody: Crowd) -> Crowd:
    """Two hundred clients, all with current prices, and new ones all the time."""
    all_served(everybody, time.monotonic(), 20)
    everybody.refused.clear()
    everybody.unserved.clear()
    return everybody


def all_served(crowd: Crowd, since: float, seconds: float) -> None:
    wait_for(lambda: crowd.served_since(since) == CLIENTS, seconds, f"prices for all {CLIENTS} clients")


def nobody_refused(crowd: Crowd) -> None:
    came = crowd.newcomers
    wait_for(lambda: crowd.newcomers > came + 2, what="prices for new clients")
    assert (crowd.refused, crowd.unserved) == ([], [])


def test_all_clients_are_back_after_each_tracker_of_a_rolling_restart(pool: Pool, crowd: Crowd) -> None:
    for number in range(3):
        pool.stop(number)
        pool.start(number)
        all_served(crowd, time.monotonic(), 10)
    nobody_refused(crowd)


def test_all_clients_are_back_when_all_trackers_were_down_for_4_s(pool: Pool, crowd: Crowd) -> None:
    for number in range(3):
        pool.stop(number)
    time.sleep(4)  # how long they are down is the point
    for number in range(3):
        pool.start(number)
    up = time.monotonic()
    all_served(crowd, up, 10)
    crowd.refused = [(when, status) for when, status in crowd.refused if when > up + 1.5]  # the first check of all
    crowd.unserved.clear()
    nobody_refused(crowd)


def test_clients_of_a_killed_tracker_are_back_on_the_others(pool: Pool, crowd: Crowd) -> None:
    pool.stop(0, signal.SIGKILL)
    all_served(crowd, time.monotonic(), 10)
    nobody_refused(crowd)
    pool.start(0)
    wait_for(lambda: pool.clients()[0] > 0, what="new clients on the one that is back")


def test_clients_of_a_hung_tracker_are_back_on_the_others_and_it_serves_again_when_it_goes_on(
    pool: Pool, crowd: Crowd
) -> None:
    pool.signal(1, signal.SIGSTOP)
    hung = time.monotonic()
    try:
        all_served(crowd, hung + 0.5, 10)
        time.sleep(hung + 15 - time.monotonic())  # how long it hangs is the point
    finally:
        pool.signal(1, signal.SIGCONT)
    all_served(crowd, time.monotonic(), 10)
    wait_for(lambda: pool.proxy.sessions()["3032"] > 0, what="new clients on the one that hung")
    nobody_refused(crowd)


def test_reload_of_the_proxy_brings_all_clients_back_spread_over_all_trackers(pool: Pool, crowd: Crowd) -> None:
    (old,) = pool.proxy.workers()
    lost = crowd.lost
    pool.proxy.reload()
    wait_for(lambda: old not in pool.proxy.workers(), 15, "the old process ends")
    all_served(crowd, time.monotonic(), 10)
    assert crowd.lost - lost >= CLIENTS
    spread = pool.clients()
    assert max(spread) - min(spread) <= CLIENTS // 10, spread
    nobody_refused(crowd)


def test_new_clients_get_in_while_two_of_three_trackers_are_down_and_the_proxy_is_reloaded(
    certificate: Certificate, tmp_path: Path
) -> None:
    with Pool(tmp_path, certificate) as pool:
        pool.stop(0)
        pool.stop(1)
        pool.proxy.reload()
        wait_for(lambda: served(pool.proxy, certificate), 2, "a price")
        for _ in range(50):
            assert served(pool.proxy, certificate)


def served(proxy: HAProxy, certificate: Certificate) -> bool:
    return get(f"https://localhost:{proxy.port}/prices", certificate.context)[0] == 200


# What comes through


@pytest.fixture(scope="module")
def proxy(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """In front of one tracker which other origins may not read; its log has a line for each request."""
    folder = tmp_path_factory.mktemp("proxy")
    with Tracker("--demo", "--interval", "0.5", "--allow-origin", "https://elsewhere.example") as tracker:
        changes = ((f"    server {number} 127.0.0.1:{number}\n", "") for number in (3032, 3033))
        info = ("format raw local0 err", "format raw local0 info")
        with HAProxy(folder, [tracker.port], certificate, *changes, info) as running:
            yield running


@pytest.fixture
def https(proxy: HAProxy) -> str:
    return f"https://localhost:{proxy.port}"


def test_prices_come_through_tls(proxy: HAProxy, certificate: Certificate) -> None:
    with connect(f"wss://localhost:{proxy.port}/ws", ssl=certificate.context, max_queue=None) as client:
        messages = [json.loads(client.recv(timeout=5)) for _ in range(30)]
        assert client.ping(b"\xff").wait(5)
    assert [message["asset_id"] for message in messages] == list(ASSETS) * 3
    assert client.close_code == 1000


def test_paths_come_through_and_their_errors_are_the_trackers(https: str, certificate: Certificate) -> None:
    status, body, _ = get(f"{https}/prices", certificate.context)
    assert (status, [price["asset_id"] for price in json.loads(body)]) == (200, list(ASSETS))
    status, body, _ = get(f"{https}/healthz", certificate.context)
    assert (status, json.loads(body)["status"]) == (200, "ok")
    status, body, _ = get(f"{https}/prices/NOSUCH", certificate.context)
    assert (status, "NOSUCH" in json.loads(body)["error"]) == (404, True)
    assert get(f"{https}/ws", certificate.context)[0] == 426


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/metrics?x", "/%6detrics", "/m%65trics", "/metrics/", "//metrics", "/x/../metrics", "/metrics#x"],
)
def test_metrics_do_not_come_through_however_they_are_spelt(
    proxy: HAProxy, certificate: Certificate, path: str
) -> None:
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as plain,
        certificate.context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert answer.split()[1] in (b"400", b"403")
    assert b"price_tracker_" not in answer


def test_json_and_the_page_are_compressed_for_clients_that_take_it(https: str, certificate: Certificate) -> None:
    for path in ("/", "/prices"):
        plain, packed = (
            get(https + path, certificate.context, {"Accept-Encoding": encoding}) for encoding in ("identity", "gzip")
        )
        assert "content-encoding" not in plain[2]
        assert packed[2]["content-encoding"] == "gzip"
        assert len(packed[1]) < 0.7 * len(plain[1])
    assert gzip.decompress(packed[1])[:2] == b"[{"


def test_port_80_leads_to_https_but_for_the_certificates_questions(proxy: HAProxy) -> None:
    for host in ("127.0.0.1", "[::1]"):
        http = f"http://{host}:{proxy.http_port}"
        status, _, headers = get(f"{http}/prices?x=1", headers={"Host": "prices.example.org"})
        assert (status, headers["location"]) == (301, "https://prices.example.org/prices?x=1")
    # Nobody asks for a certificate now: that this is no redirect is what counts.
    status, body, headers = get(f"{http}/.well-known/acme-challenge/token")
    assert (status, headers["content-type"], list(json.loads(body))) == (503, "application/json", ["error"])
    assert headers["retry-after"] == "2"


def test_page_of_the_same_origin_is_let_in_and_others_are_not(
    proxy: HAProxy, https: str, certificate: Certificate
) -> None:
    uri = f"wss://localhost:{proxy.port}/ws"
    with connect(uri, ssl=certificate.context, origin=Origin(https)) as client:
        assert "BTC" in str(client.recv(timeout=5))
    with pytest.raises(InvalidStatus, match="403"):
        connect(uri, ssl=certificate.context, origin=Origin("https://evil.example"))


def test_tracker_learns_the_clients_address_from_the_proxy_and_not_from_the_client(
    certificate: Certificate, tmp_path: Path
) -> None:
    heads: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as tracker:
        tracker.settimeout(0.2)
        ports = [tracker.getsockname()[1]] * 3
        with HAProxy(tmp_path, ports, certificate) as proxy, ThreadPoolExecutor(1) as thread:
            lies = {"X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4", "X-Forwarded-Proto": "http"}
            answer = thread.submit(get, f"https://localhost:{proxy.port}/asked", certificate.context, lies)
            while not answer.done():
                with contextlib.suppress(TimeoutError), tracker.accept()[0] as sock:
                    heads.append(sock.recv(4096))
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    (head,) = [head.decode().lower() for head in heads if b"/asked" in head]
    assert re.findall(r"^(?:x-)?forwarded.*?: (.*)\r$", head, re.MULTILINE) == ["127.0.0.1", "https"]


def test_address_with_200_connections_gets_no_more_and_others_do(proxy: HAProxy, certificate: Certificate) -> None:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 5, ("127.0.0.77", 0)))
            for _ in range(201)
        ]
        # HAProxy's threads take them in any order: one of them is too many, not always the last.
        wait_for(lambda: any(map(is_hung_up_on, clients)), 8, "one of 201 hung up on")
        assert list(map(is_hung_up_on, clients)).count(True) == 1
        assert served(proxy, certificate)


def is_hung_up_on(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_address_with_too_many_websockets_on_its_connections_is_told_so(
    certificate: Certificate, tmp_path: Path
) -> None:
    """Over HTTP/2 a connection carries many; here the limit is 2 instead of 200, and each has its own."""
    with Tracker("--demo") as tracker, ExitStack() as stack:
        proxy = stack.enter_context(
            HAProxy(tmp_path, [tracker.port] * 3, certificate, ("sc1_conn_cur gt 200", "sc1_conn_cur gt 2"))
        )
        uri = f"wss://localhost:{proxy.port}/ws"
        for _ in range(2):
            stack.enter_context(connect(uri, ssl=certificate.context))
        with pytest.raises(InvalidStatus, match="429"):
            connect(uri, ssl=certificate.context)


def test_all_of_an_ipv6_network_counts_as_one_address(certificate: Certificate, tmp_path: Path) -> None:
    """The addresses stand in a line before the TLS; here too the limit is 2 instead of 200."""
    changes = (("v6only ssl", "v6only accept-proxy ssl"), ("sc1_conn_cur gt 200", "sc1_conn_cur gt 2"))
    with Tracker("--demo") as tracker, ExitStack() as stack:
        proxy = stack.enter_context(HAProxy(tmp_path, [tracker.port] * 3, certificate, *changes))
        statuses = []
        for address in ("2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1:ffff::3", "2001:db8:0:2::1"):
            plain = stack.enter_context(socket.create_connection(("::1", proxy.port), timeout=5))
            plain.sendall(f"PROXY TCP6 {address} 2001:db8::9 40000 443\r\n".encode())
            sock = stack.enter_context(certificate.context.wrap_socket(plain, server_hostname="localhost"))
            sock.sendall(request())
            statuses.append(sock.recv(100).split()[1])
        assert statuses == [b"101", b"101", b"429", b"101"]


def test_clients_that_send_no_request_are_disconnected(certificate: Certificate, tmp_path: Path) -> None:
    """Here after 1 s instead of 10."""
    change = ("timeout http-request 10s", "timeout http-request 1s")
    with HAProxy(tmp_path, [free_port()] * 3, certificate, change) as proxy:
        for half in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "):
            with socket.create_connection(("127.0.0.1", proxy.http_port), timeout=5) as sock:
                sock.sendall(half)
                assert sock.recv(100)[:13] in (b"", b"HTTP/1.1 408 ")


def test_proxys_own_metrics_are_for_this_machine_alone(proxy: HAProxy) -> None:
    at = f"http://127.0.0.1:{proxy.metrics_port}"
    metrics = get(f"{at}/metrics")[1].decode()
    assert re.search(r'^haproxy_server_status\{proxy="trackers",server="3031",state="UP"\} 1', metrics, re.MULTILINE)
    assert get(f"{at}/prices")[0] == 404
    assert not listens(proxy.metrics_port, "127.0.0.2")


def test_client_that_stopped_reading_gets_no_backlog_of_old_prices(certificate: Certificate, tmp_path: Path) -> None:
    """Without the limits of the proxy's socket buffers it gets all of them."""
    assets = ",".join(f"ASSET{number}" for number in range(350))
    with Tracker("--demo", "--interval", "0.1", "--assets", assets) as tracker, ExitStack() as stack:
        proxy = stack.enter_context(HAProxy(tmp_path, [tracker.port] * 3, certificate))
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port), timeout=5))
        sock = stack.enter_context(certificate.context.wrap_socket(plain, server_hostname="localhost"))
        sock.sendall(request())
        assert sock.recv(1)
        time.sleep(6)  # 2 MB of prices
        woken = datetime.now(UTC).isoformat()
        old, last = 0, b""
        while not (times := re.findall(rb'"time":"([^"]+)"', last)) or times[-1].decode() < woken:
            last = last[-100:] + (data := sock.recv(1 << 14))
            old += len(data)
    assert old < 600_000


def test_page_shows_moving_prices_over_http_2_its_websocket_included(
    proxy: HAProxy, https: str, tmp_path: Path
) -> None:
    browser = start_chromium("--ignore-certificate-errors", f"--user-data-dir={tmp_path}")

    def row(asset_id: str) -> str:
        try:
            texts = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "tbody tr")]
        except StaleElementReferenceException:
            return ""
        return next((text for text in texts if asset_id in text and re.search(r"\d", text)), "")

    try:
        browser.get(f"{https}/")
        wait_for(lambda: all(row(asset_id) for asset_id in ASSETS), what="a price of each asset in the page")
        before = row("BTC")
        wait_for(lambda: row("BTC") not in ("", before), what="another price in the page")
    finally:
        browser.quit()
    # HAProxy tells a request when it ends: the WebSocket's now.
    wait_for(lambda: re.search(r'"GET https://\S+/ws\S* HTTP/2.0"', proxy.log.read_text()), what="/ws over HTTP/2")


def test_haproxy_takes_the_file_with_the_certificate_that_the_readme_makes_for_the_start(tmp_path: Path) -> None:
    outside("haproxy", "openssl")
    pem = tmp_path / "price-tracker.pem"
    (command,) = re.findall(r"^openssl .*\n.*\n", readme_block("certbot certonly"), re.MULTILINE)
    command = put(command, ("/etc/haproxy/price-tracker.pem", pem))
    subprocess.run(["sh", "-euc", command], check=True, capture_output=True)
    assert pem.stat().st_mode & 0o777 == 0o600
    (tmp_path / "haproxy.cfg").write_text(deployed("haproxy.cfg", ("/etc/haproxy/price-tracker.pem", pem)))
    checked = subprocess.run(["haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def run_certbot_hook(folder: Path, pem: Path, lineage: Path, systemctl: str) -> int:
    """Its exit status, after a renewal of the certificate in `lineage`; systemctl: what that command does."""
    (folder / "systemctl").write_text(f"#!/bin/sh\n{systemctl}\n")
    (folder / "systemctl").chmod(0o755)
    hook = folder / "hook.sh"
    hook.write_text(deployed("certbot-hook.sh", ("/etc/haproxy/price-tracker.pem", pem)))
    environment = {"RENEWED_LINEAGE": str(lineage), "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["sh", hook], env=environment, capture_output=True).returncode


def test_certbot_hook_joins_chain_and_key_and_the_new_certificate_is_served(
    certificate: Certificate, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    old = make_certificate(tmp_path / "old")
    with HAProxy(tmp_path, [free_port()] * 3, old) as proxy:
        assert ssl.get_server_certificate(("127.0.0.1", proxy.port)) == old.chain.read_text()
        systemctl = f'test "$*" = "reload haproxy" && kill -USR2 {proxy.process.pid}'
        assert run_certbot_hook(tmp_path, proxy.pem, certificate.chain.parent, systemctl) == 0
        new = certificate.chain.read_text()
        wait_for(lambda: ssl.get_server_certificate(("127.0.0.1", proxy.port)) == new, what="the new certificate")
        assert proxy.pem.stat().st_mode & 0o777 == 0o600
    assert os.access(DEPLOY / "certbot-hook.sh", os.X_OK)


def test_certbot_hook_without_a_key_leaves_the_certificate_that_is_served(tmp_path: Path) -> None:
    pem, reloaded = tmp_path / "price-tracker.pem", tmp_path / "reloaded"
    pem.write_text("what is served")
    (tmp_path / "fullchain.pem").write_text("a chain without its key")
    assert run_certbot_hook(tmp_path, pem, tmp_path, f'touch "{reloaded}"') != 0
    assert pem.read_text() == "what is served"
    assert not reloaded.exists()
