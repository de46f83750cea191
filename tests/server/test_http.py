"""HTTP over real sockets: what is on the wire, how a connection ends, and who may take how long.

What each path answers is in test_web.py, without a socket.
"""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from raw import Clock, pass_time
from running import ASSETS, wait_for
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from coin_api import PriceUpdate
from price_server import PriceServer

Start = Callable[..., PriceServer]
Updates = Callable[[float], list[PriceUpdate]]


def get(server: PriceServer, path: str, method: str = "GET") -> requests.Response:
    return requests.request(method, f"http://127.0.0.1:{server.port}{path}", timeout=5)


def visit(server: PriceServer, request: bytes, receive_buffer: int = 0) -> socket.socket:
    """A visitor that has sent this."""
    visitor = socket.socket()
    if receive_buffer:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    visitor.settimeout(5)
    visitor.connect(("127.0.0.1", server.port))
    visitor.sendall(request)
    return visitor


def read(visitor: socket.socket) -> bytes:
    """All until the server hangs up."""
    return b"".join(iter(lambda: visitor.recv(65_536), b""))


def raw(server: PriceServer, request: bytes) -> bytes:
    """The whole answer to these bytes, from a visitor that sends no more."""
    with visit(server, request) as visitor:
        visitor.shutdown(socket.SHUT_WR)
        return read(visitor)


@pytest.fixture
def priced(server: PriceServer, updates: Updates) -> PriceServer:
    server.publish(updates(45000.0))
    return server


@pytest.mark.parametrize("path", ["/", "/prices", "/prices/BTC", "/history", "/healthz", "/metrics", "/nope", "/ws"])
def test_each_path_answers_a_real_http_client(priced: PriceServer, path: str) -> None:
    answer, head = get(priced, path), get(priced, path, "HEAD")
    assert answer.status_code == head.status_code == {"/nope": 404, "/ws": 426}.get(path, 200)
    assert answer.headers["Content-Length"] == str(len(answer.content)) != "0"
    assert answer.headers["Connection"] == "close"
    assert {*answer.headers} == {*head.headers}
    assert raw(priced, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).endswith(b"\r\n\r\n")


def test_one_connection_carries_one_request(priced: PriceServer) -> None:
    client = http.client.HTTPConnection("127.0.0.1", priced.port, timeout=5)
    for _ in range(3):  # http.client connects again when it is told to close
        client.request("GET", "/prices/BTC")
        assert client.getresponse().read()
    client.close()
    assert raw(priced, b"GET /prices HTTP/1.1\r\nHost: x\r\n\r\n" * 2).count(b"HTTP/1.1 ") == 1


def test_an_answer_reaches_a_visitor_that_is_still_sending(server: PriceServer) -> None:
    with visit(server, b"POST /prices HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n") as visitor:
        visitor.recv(1, socket.MSG_PEEK)  # it has been answered
        for _ in range(10):
            visitor.sendall(b"x" * 100_000)
        visitor.shutdown(socket.SHUT_WR)
        answer = read(visitor)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"}")


def test_the_server_ends_an_answer_first_and_hangs_up_when_the_visitor_does_not(start_server: Start) -> None:
    server = start_server(clock=Clock())
    with visit(server, b"GET /prices HTTP/1.1\r\nHost: x\r\n\r\n") as visitor:
        assert read(visitor).endswith(b"[]")  # FIN has come, though this side goes on
        pass_time(server, 1.9)
        visitor.sendall(b"x")
        assert server.call(lambda: len(server._answered)) == 1
        pass_time(server, 0.6)
        assert server.call(lambda: len(server._answered)) == 0
        with pytest.raises(ConnectionError):
            visitor.sendall(b"x" * 10_000_000)


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
def test_a_request_has_32_kib_at_the_most(server: PriceServer, line_end: bytes) -> None:
    def head(size: int) -> bytes:
        start = b"GET /prices HTTP/1.1" + line_end + b"X: "
        return start + b"x" * (size - len(start) - 2 * len(line_end)) + line_end * 2

    with visit(server, head(32_768)[:-1]) as visitor:
        wait_for(lambda: [len(each.inbox or b"") for each in list(server._visitors)] == [32_767])
        visitor.sendall(b"\nwhat comes behind does not count")
        visitor.shutdown(socket.SHUT_WR)
        assert read(visitor).startswith(b"HTTP/1.1 200 ")
    for request in (head(32_769), head(40_000), b"GET /" + b"x" * 32_768, b"X: y\r\n" * 6_000):
        answer = raw(server, request)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": "request of more than 32768 bytes"}


def test_a_request_cut_off_before_its_end_gets_no_answer(server: PriceServer) -> None:
    for request in (b"", b"GET /prices", b"GET /prices HTTP/1.1\r\n", b"GET /prices HTTP/1.1\r\nHost: x\r\n"):
        assert raw(server, request) == b""


def test_random_bytes_bring_no_traceback(
    server: PriceServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(100):
        raw(server, bytes((seed * 7919 + n * n * 31) % 256 for n in range(seed * 5)) + b"\r\n\r\n")
    assert get(server, "/prices").status_code == 200
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


# The past


def test_history_is_pairs_of_epoch_seconds_and_price(start_server: Start, updates: Updates) -> None:
    now = 1_800_000_000.5
    server = start_server(wall_clock=lambda: now)
    server.publish(updates(1.5))
    now += 10
    server.publish(updates(2.5))
    history = get(server, "/history").json()
    assert list(history) == list(ASSETS)
    assert history["SOL"] == [[1_800_000_000.5, 1.5], [1_800_000_010.5, 2.5]]
    assert get(server, "/history?assets=sol,BTC&range=24h").json() == {
        "BTC": [[1_800_000_010.5, 2.5]],
        "SOL": [[1_800_000_010.5, 2.5]],
    }


@pytest.fixture
def filled(start_server: Start, updates: Updates) -> PriceServer:
    """A server with an hour in its past, so that /history is large."""
    now = 1_800_000_000.0
    server = start_server(clock=Clock(), wall_clock=lambda: now)
    for poll in range(360):
        now += 10
        server.publish(updates(poll + 0.123))
    return server


ASK = b"GET /history HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_large_answer_arrives_whole_however_slowly_it_is_taken(filled: PriceServer) -> None:
    with visit(filled, ASK, receive_buffer=2_048) as visitor:
        answer = b""
        for _ in range(25):
            answer += visitor.recv(1_000)
            pass_time(filled, 1)
        answer += read(visitor)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert [len(points) for points in json.loads(body).values()] == [360] * 10


def test_taking_an_answer_has_30_s_and_one_more_for_each_8_kib(filled: PriceServer) -> None:
    size = len(raw(filled, ASK))
    assert size > 80_000
    wait_for(lambda: not filled._answered)
    with visit(filled, ASK, receive_buffer=2_048) as visitor:
        visitor.recv(1)  # it is being answered
        pass_time(filled, 30 + size // 8_192)
        assert len(filled._answered) == 1
        pass_time(filled, 2)
        assert len(filled._answered) == 0
        received = 1
        try:
            received += len(read(visitor))
        except ConnectionResetError:
            pass
        assert received < size


def test_history_fetched_a_hundred_times_a_second_delays_no_poll(filled: PriceServer, updates: Updates) -> None:
    stop, fetched = threading.Event(), list[int]()

    def fetch() -> None:
        while not stop.wait(0.04):  # four threads: 100 a second
            fetched.append(len(get(filled, "/history").content))

    threads = [threading.Thread(target=fetch, daemon=True) for _ in range(4)]
    with connect(f"ws://127.0.0.1:{filled.port}/ws", proxy=None, max_queue=None) as client:
        for _ in ASSETS:
            client.recv(5)
        for thread in threads:
            thread.start()
        longest = 0.0
        for poll in range(1, 13):
            wait_for(lambda poll=poll: len(fetched) > poll * 4)  # type: ignore[misc]
            started = time.monotonic()
            filled.publish(updates(float(poll)))
            assert [json.loads(client.recv(5))["price"] for _ in ASSETS] == [float(poll)] * 10
            longest = max(longest, time.monotonic() - started)
        stop.set()
    for thread in threads:
        thread.join()
    assert min(fetched) > 80_000
    assert longest < 1.0


# What the server says of itself


def test_healthz_counts_the_clients_and_tells_the_five_ranges(priced: PriceServer) -> None:
    with connect(f"ws://127.0.0.1:{priced.port}/ws", proxy=None):
        health = get(priced, "/healthz").json()
    assert (health["status"], health["clients"], health["without_price"]) == ("ok", 1, [])
    assert [(each["name"], each["seconds"], each["step"]) for each in health["ranges"]] == [
        ("1h", 3_600, 10),
        ("24h", 86_400, 300),
        ("7d", 604_800, 1_800),
        ("30d", 2_592_000, 7_200),
        ("1y", 31_536_000, 86_400),
    ]
    wait_for(lambda: get(priced, "/healthz").json()["clients"] == 0)


def test_metrics_count_what_happened(start_server: Start, updates: Updates) -> None:
    server = start_server(max_clients=1)
    url = f"ws://127.0.0.1:{server.port}/ws"
    server.publish(updates(1.0))
    with connect(url + "?assets=BTC,ETH", proxy=None) as client:
        server.publish(updates(2.0))
        server.send_message_to_all("hello")
        for _ in range(5):
            client.recv(5)
        for query in ("", "", "?assets=DOGE"):
            with pytest.raises(InvalidStatus), connect(url + query, proxy=None):
                pass
    get(server, "/ws")
    server.report_failure("x")
    families = text_string_to_metric_families(get(server, "/metrics").text)
    counted = {
        " ".join((sample.name.removeprefix("price_tracker_"), *sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if family.type == "counter" and sample.value
    }
    assert counted == {
        "clients_refused_total asset": 1,
        "clients_refused_total full": 2,
        "clients_refused_total handshake": 1,
        "messages_sent_total": 5,
        "polls_total success": 2,
        "polls_total failure": 1,
    }


def test_stale_prices_are_one_line_in_the_log(
    start_server: Start, updates: Updates, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(clock=Clock())
    server.publish(updates(1.0))
    pass_time(server, 60.0)
    assert caplog.messages == []
    for seconds in (1.0, 1.0, 100.0):
        pass_time(server, seconds)
        assert caplog.messages == ["prices are stale: no successful poll for 61 s"]
    server.publish(updates(1.0))
    pass_time(server, 1.0)
    pass_time(server, 100.0)
    assert caplog.messages[1:] == ["prices are stale: no successful poll for 101 s"]
