"""HTTP over real sockets: what is on the wire, how a connection ends, and who may take how long.

What each path answers is in tests/unit, without a socket.
"""

import http.client
import json
import re
import socket
from collections.abc import Callable

import pytest
import requests
from raw import RawClient, ask, get, honest, prices, read_all, request, visit
from rigged import RiggedServer, connections, held, pass_time, wait_for_value, with_an_hour
from running import ASSETS

from coin_api import PriceUpdate
from price_server import PriceServer

Start = Callable[..., RiggedServer]
Updates = Callable[[float], list[PriceUpdate]]


def fetch(server: PriceServer, path: str, method: str = "GET") -> requests.Response:
    return requests.request(method, f"http://127.0.0.1:{server.port}{path}", timeout=5)


def exchange(server: PriceServer, data: bytes) -> bytes:
    """The whole response to these bytes, for a visitor that sends no more."""
    with visit(server.port, data) as visitor:
        visitor.shutdown(socket.SHUT_WR)
        return read_all(visitor)


def test_a_real_http_client_gets_whole_responses(server: PriceServer) -> None:
    for path, status in (("/", 200), ("/history", 200), ("/nope", 404)):
        response, head = fetch(server, path), fetch(server, path, "HEAD")
        assert response.status_code == head.status_code == status
        assert response.content
        assert exchange(server, get(path).replace(b"GET", b"HEAD")).endswith(b"\r\n\r\n")


def test_one_connection_carries_one_request(server: PriceServer) -> None:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    for _ in range(3):  # http.client connects again when it is told to close
        client.request("GET", "/prices/BTC")
        assert client.getresponse().read()
    client.close()
    assert exchange(server, get("/prices") * 2).count(b"HTTP/1.1 ") == 1


def test_a_response_reaches_a_visitor_that_is_still_sending(server: PriceServer) -> None:
    with visit(server.port, b"POST /prices HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n") as visitor:
        visitor.recv(1, socket.MSG_PEEK)  # it has been answered
        for _ in range(10):
            visitor.sendall(b"x" * 100_000)
        visitor.shutdown(socket.SHUT_WR)
        response = read_all(visitor)
    assert response.startswith(b"HTTP/1.1 405 ")
    assert response.endswith(b"}")


def test_a_request_cut_off_before_its_end_gets_no_response(server: PriceServer) -> None:
    for data in (b"", b"G", b"GET /prices HTTP/1.1\r\n", get("/prices")[:-2], request()[:-2]):
        assert exchange(server, data) == b""


def test_random_bytes_bring_no_traceback(
    server: PriceServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed in range(100):
        exchange(server, bytes((seed * 7919 + n * n * 31) % 256 for n in range(seed * 5)) + b"\r\n\r\n")
    assert fetch(server, "/prices").status_code == 200
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


# The past


def test_history_is_pairs_of_epoch_seconds_and_price(start_server: Start, updates: Updates) -> None:
    now = 1_800_000_000.5
    server = start_server(wall_clock=lambda: now)
    server.publish(updates(1.5))
    now += 10
    server.publish(updates(2.5))
    history = fetch(server, "/history").json()
    assert list(history) == list(ASSETS)
    assert history["SOL"] == [[1_800_000_000.5, 1.5], [1_800_000_010.5, 2.5]]
    assert fetch(server, "/history?assets=sol&range=24h").json() == {"SOL": [[1_800_000_010.5, 2.5]]}


@pytest.fixture
def filled(start_server: Start) -> RiggedServer:
    """A server whose /history is large."""
    return with_an_hour(start_server)


def test_a_large_response_arrives_whole_however_slowly_it_is_taken(filled: RiggedServer) -> None:
    for data in (get("/history"), get("/history") + b"what follows is discarded" * 300):
        with visit(filled.port, data, receive_buffer=2_048) as visitor:
            response = b""
            for _ in range(25):
                response += visitor.recv(1_000)
                pass_time(filled, 1)
            response += read_all(visitor)
        head, _, body = response.partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}\r\n".encode() in head
        assert [len(points) for points in json.loads(body).values()] == [360] * 10
    wait_for_value(lambda: connections(filled), 0)
    assert held(filled) == 0


def test_a_response_that_is_not_taken_ends_after_30_s(timed: RiggedServer) -> None:
    timed.listener.room = 10
    with visit(timed.port, get("/prices")) as visitor:
        assert visitor.recv(10)
        pass_time(timed, 29.5)
        assert connections(timed) == 1
        pass_time(timed, 1.0)
        assert connections(timed) == 0


def test_history_fetched_by_four_at_a_time_delays_no_price(filled: RiggedServer, updates: Updates) -> None:
    with honest(filled) as client:
        prices(client, 10)
        for poll in range(1, 13):
            visitors = [visit(filled.port, get("/history")) for _ in range(4)]
            filled.publish(updates(float(poll)))
            assert prices(client, 10) == [(asset, float(poll)) for asset in ASSETS]
            assert min(len(read_all(visitor)) for visitor in visitors) > 80_000


# What the server says of itself


def test_metrics_count_what_happened(start_server: Start, updates: Updates) -> None:
    server = start_server(max_clients=1, allow_origins=["https://example.org"])
    server.publish(updates(1.0))
    with RawClient(server.port, request("/ws?assets=BTC,ETH")) as client:
        server.publish(updates(2.0))
        server.send_message_to_all("hello")
        client.prices(4)
        for path in ("/ws", "/stream", "/ws?assets=DOGE", "/nothing"):
            ask(server.port, request(path))
        ask(server.port, request(Origin="https://example.com"))
    fetch(server, "/ws")
    server.report_failure("x", "timeout")
    server.note_poll(0.3, 5, 95)
    wait_for_value(lambda: connections(server), 0)  # those that asked before may be counted for a moment longer
    text = fetch(server, "/metrics").text
    assert dict(re.findall(r"(?m)^price_tracker_(\w+_total\S*) ([1-9]\d*)$", text)) == {
        "clients_accepted_total": "1",
        'clients_refused_total{reason="asset"}': "1",
        'clients_refused_total{reason="full"}': "2",
        'clients_refused_total{reason="handshake"}': "1",
        'clients_refused_total{reason="origin"}': "1",
        'http_responses_total{status="400"}': "1",
        'http_responses_total{status="403"}': "1",
        'http_responses_total{status="404"}': "1",
        'http_responses_total{status="426"}': "1",
        'http_responses_total{status="503"}': "2",
        "messages_sent_total": "5",
        'poll_failures_total{cause="timeout"}': "1",
        'polls_total{result="failure"}': "1",
        'polls_total{result="success"}': "2",
    }
    assert "\nprice_tracker_visitors 1\n" in text, "the one that asks"
    assert "\nprice_tracker_credits_left 95\n" in text
    assert "\nprice_tracker_batch_seconds_max 0.0\n" not in text
