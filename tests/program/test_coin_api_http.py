"""coin_api over real connections: deadlines, TLS, proxies, lost connections, and the key that shows nowhere."""

import gzip
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from unittest.mock import Mock

import psutil
import pytest
import trustme
import urllib3
from calling import error_of
from raw import reset
from running import ROOT
from stand_in import KEY, RATES, Peer, StandIn, rates_body

import coin_api as module
from coin_api import CoinApi


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(coin_api: StandIn, status: int) -> None:
    with StandIn() as elsewhere:
        coin_api.say(b"", status=status, Location=f"{elsewhere.url}/v1/exchangerate/USD")
        error = error_of(CoinApi(KEY, url=coin_api.url))
        assert str(error) == f"CoinAPI answered {status}: a redirect, which is not followed: check COIN_API_URL"
        assert elsewhere.requests == []


# What is sent at once, and what follows it a byte every 20 ms, so that each single read is quick, for up to 2 s.
DRIPS = {
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n", b" " * 100),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n" * 16),
    "headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x" * 100),
    "nothing": (b"", b""),
}


def drip(kind: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        start, rest = DRIPS[kind]
        handler.wfile.write(start)
        for number in range(100):
            handler.wfile.write(rest[number : number + 1])
            handler.wfile.flush()
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize("kind", DRIPS)
def test_the_deadline_holds_for_the_whole_answer(coin_api: StandIn, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 0.2)
    coin_api.answer = drip(kind)
    started = time.monotonic()
    error = error_of(CoinApi(KEY, url=coin_api.url))
    assert (str(error), error.cause) == ("no response from CoinAPI: not complete within 0.2 s", "timeout")
    assert time.monotonic() - started < 1.8, "when the last byte had come"


def test_the_limits_are_3_s_to_connect_10_s_to_answer_and_1_mib() -> None:
    assert (module.CONNECT_TIMEOUT, module.RESPONSE_TIMEOUT, module.MAX_RESPONSE) == (3.0, 10.0, 1 << 20)


def test_the_next_request_has_a_deadline_of_its_own(coin_api: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 0.2)
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
    assert str(error_of(CoinApi(KEY, url=coin_api.url))) == "CoinAPI's response is larger than 1048576 bytes"
    if answer is endless:  # the bomb is made in this process too
        assert psutil.Process().memory_info().rss - memory < 20 << 20


def test_what_is_wrong_with_the_connection_is_named(coin_api: StandIn) -> None:
    api = CoinApi(KEY, url=coin_api.url)
    coin_api.say(b"no gzip", Content_Encoding="gzip")
    assert "Error -3 while decompressing data: incorrect header check" in str(error_of(api))
    assert error_of(api).cause == "bad_answer"
    coin_api.say(rates_body(RATES), Connection="close")
    assert api.fetch_prices(("BTC",))
    coin_api.answer = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    assert str(error_of(api)).startswith("no response from CoinAPI: ")
    assert len(coin_api.requests) == 4, "the last one's connection was new, so it is not sent again"


def test_a_response_cut_off_half_way_is_a_failed_poll(coin_api: StandIn) -> None:
    def cut_off(handler: BaseHTTPRequestHandler) -> None:
        body = rates_body(RATES)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body[:-9]))
        handler.close_connection = True

    coin_api.answer = cut_off
    error = error_of(CoinApi(KEY, url=coin_api.url))
    assert "IncompleteRead" in str(error)
    assert error.cause == "connection"


# A connection that died while it was idle


class LosesConnections(Peer):
    """A CoinAPI that answers the first request of each connection, and ends each at its next request.

    end: what it does with a connection then. first: how many are ended at their first request too.
    """

    def __init__(self, end: Callable[[socket.socket], None], first: int = 0):
        super().__init__()
        self.end, self.first = end, first
        self.requests = 0

    def serve(self, client: socket.socket) -> None:
        body = rates_body({"BTC": 2.5})
        for number in range(2):
            if not client.recv(4096):
                return
            self.requests += 1
            if number or self.requests <= self.first:
                self.end(client)
                return
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RDWR)


def close_after_the_first_byte(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 2")


def reset_after_the_first_byte(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 2")
    time.sleep(0.1)  # so that the byte is read before the reset discards it
    reset(client)


@pytest.mark.parametrize("end", [reset, close])
def test_a_kept_connection_that_is_lost_at_the_next_request_loses_no_poll(end: Callable[[socket.socket], None]) -> None:
    with LosesConnections(end) as server:
        api = CoinApi(KEY, url=f"http://{server.address}")
        assert [api.fetch_prices(("BTC",))[0].price for _ in range(4)] == [2.5] * 4
        assert server.requests == 7  # each but the first was sent twice


@pytest.mark.parametrize("end", [close_after_the_first_byte, reset_after_the_first_byte])
def test_a_connection_that_is_lost_within_the_answer_is_not_asked_again(end: Callable[[socket.socket], None]) -> None:
    with LosesConnections(end) as server:
        api = CoinApi(KEY, url=f"http://{server.address}")
        assert api.fetch_prices(("BTC",))
        error_of(api)
        assert server.requests == 2


@pytest.mark.parametrize("end", [reset, close])
def test_a_new_connection_that_is_lost_is_a_failed_poll_and_so_is_a_second_loss(
    end: Callable[[socket.socket], None],
) -> None:
    with LosesConnections(end, first=1) as server:
        api = CoinApi(KEY, url=f"http://{server.address}")
        assert error_of(api).cause == "connection"
        assert server.requests == 1
        assert api.fetch_prices(("BTC",))
        server.first = 4
        error_of(api)
        assert server.requests == 4


def test_what_is_sent_again_has_the_rest_of_the_same_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 2.0)
    connect = Mock(wraps=urllib3.util.connection.create_connection)
    monkeypatch.setattr(urllib3.util.connection, "create_connection", connect)

    def close_late(client: socket.socket) -> None:
        time.sleep(1.4)

    with LosesConnections(close_late, first=0) as server:
        api = CoinApi(KEY, url=f"http://{server.address}")
        assert api.fetch_prices(("BTC",))
        server.first = 3
        assert error_of(api).cause == "timeout"
        assert server.requests == 3
    first, again = (call.args[1] for call in connect.call_args_list)
    assert (first, again < 0.7) == (3.0, True), "connecting again has no more than that rest either"


def test_a_socks_proxy_without_its_package_names_the_remedy() -> None:
    program = (
        "import sys; sys.modules['socks'] = None; from coin_api import CoinApi; CoinApi('key').fetch_prices(['BTC'])"
    )
    environment = os.environ | {"HTTPS_PROXY": "socks5://user:secret@127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )
    assert "a SOCKS proxy, which needs one more package: pip install pysocks" in done.stderr.splitlines()[-1]
    assert "secret" not in done.stderr


def test_a_refused_connection_is_named_without_addresses_that_change(coin_api: StandIn) -> None:
    api = CoinApi(KEY, url=coin_api.url)
    coin_api.server.shutdown()
    coin_api.server.server_close()
    assert str(error_of(api)) == "no response from CoinAPI: Connection refused"


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
    assert (str(error), error.cause) == ("no response from CoinAPI: no connection within 0.2 s", "timeout")


# Where the key, or what a terminal would obey, could come from: all that a server or a proxy says.
RUDE = f"\x1b[31m{KEY}\x07\x00"


RUDE_ANSWERS = {
    "status line": f"HTTP/1.1 abc {RUDE}\r\n\r\n",
    "first line": f"{RUDE}\r\n\r\n",
    "headers": f"HTTP/1.1 302 {RUDE}\r\nRetry-After: {RUDE}\r\nLocation: //{RUDE}\r\n"
    f"X-RateLimit-Remaining: {RUDE}\r\n{RUDE}\r\nContent-Length: 0\r\n\r\n",
    "length": f"HTTP/1.1 500 x\r\nContent-Length: {RUDE}\r\n\r\n{RUDE}",
    "encoding": f"HTTP/1.1 500 x\r\nTransfer-Encoding: chunked\r\n\r\n{RUDE}\r\n",
    "endless header": f"HTTP/1.1 200 OK\r\nX-Long: {'x' * 70_000}\r\n\r\n",
    "too many headers": "HTTP/1.1 200 OK\r\n" + f"{RUDE}: x\r\n" * 200 + "\r\n",
    "body": f'HTTP/1.1 500 x\r\nContent-Length: 500\r\n\r\n"{RUDE.lower()}' + "x" * 500,
}


@pytest.mark.parametrize("answer", RUDE_ANSWERS.values(), ids=RUDE_ANSWERS)
def test_no_error_shows_the_key_or_control_characters_wherever_they_come_from(
    coin_api: StandIn, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(answer.encode())
        handler.close_connection = True

    caplog.set_level(logging.DEBUG)
    coin_api.answer = send
    api = CoinApi(KEY, url=coin_api.url)
    error = error_of(api)
    assert str(error).startswith(("no response from CoinAPI: ", "CoinAPI answered "))
    assert str(error).isprintable()
    assert len(str(error)) < 300
    shown = "".join(traceback.format_exception(error)) + caplog.text + repr(error) + repr(api)
    assert KEY.lower() not in shown.lower()


def test_a_cut_does_not_leave_a_part_of_the_key(coin_api: StandIn) -> None:
    coin_api.say(b"x" * 190 + KEY.encode(), status=500)
    assert KEY[:8] not in str(error_of(CoinApi(KEY, url=coin_api.url)))


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
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 0.5)
    with StandIn(tls=authority.context()) as stand_in:
        yield stand_in


class Proxy(Peer):
    """`with Proxy() as proxy:` a proxy for HTTPS; `asked` has what it was told.

    says: the answer instead of a tunnel. drips: a byte every 20 ms after it, for up to 2 s.
    """

    def __init__(self, says: bytes | None = None, drips: bool = False):
        super().__init__()
        self.says, self.drips = says, drips
        self.asked: list[bytes] = []
        self.url = f"http://user:secret@{self.address}"

    def serve(self, client: socket.socket) -> None:
        head = client.recv(4096)
        self.asked.append(head)
        if self.says is not None:
            client.sendall(self.says)
            for _ in range(100 if self.drips else 0):
                client.sendall(b" ")
                time.sleep(0.02)
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
        assert str(error).startswith("no response from CoinAPI: [SSL: CERTIFICATE_VERIFY_FAILED]")
        assert said in str(error)
        assert stand_in.requests == []


def test_a_bundle_that_is_not_there_is_a_failed_poll(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    assert "invalid path: /nonexistent.pem" in str(error_of(CoinApi(KEY, url=over_tls.url)))


@pytest.mark.parametrize("kind", ["body", "headers"])
@pytest.mark.parametrize("proxied", [False, True])
def test_the_deadline_holds_over_tls_and_through_a_proxy(
    over_tls: StandIn, monkeypatch: pytest.MonkeyPatch, proxied: bool, kind: str
) -> None:
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 0.2)
    over_tls.answer = drip(kind)
    with Proxy() as proxy:
        if proxied:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert str(error_of(CoinApi(KEY, url=over_tls.url))) == "no response from CoinAPI: not complete within 0.2 s"
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
def test_a_proxy_that_drips_times_out(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(module, "RESPONSE_TIMEOUT", 30.0)
    with Proxy(says, drips=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert str(error_of(CoinApi(KEY, url=over_tls.url))) == "no response from CoinAPI: no connection within 0.2 s"


def test_a_tls_handshake_that_does_not_end_times_out(over_tls: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = CoinApi(KEY, url=f"https://127.0.0.1:{silent.getsockname()[1]}")
        assert str(error_of(api)) == "no response from CoinAPI: no connection within 0.2 s"
