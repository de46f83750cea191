"""Server-Sent Events over real sockets: the same feed as over WebSocket, in another format."""

import json
import math
import re
import socket
from collections.abc import Callable

import pytest
from raw import RawClient, get, read_all, read_head, visit
from rigged import RiggedServer, connections, dropped, gone, held, in_thread, narrow, pass_time, sample, wait_for_value
from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer
from price_server.connection import State

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Updates = Callable[[float], list[PriceUpdate]]
FIRST_LINE = re.compile(rb"retry: (\d+)\n")


class Stream:
    """`with Stream(port) as stream:` has read the response's head and its first line."""

    def __init__(self, port: int, path: str = "/stream"):
        self.socket = visit(port, get(path))
        self.file = self.socket.makefile("rb")
        self.head = read_head(self.file).decode()
        retry = FIRST_LINE.fullmatch(self.file.readline())
        self.retry = int(retry[1]) if retry else 0

    def __enter__(self) -> "Stream":
        assert self.head.startswith("HTTP/1.1 200 OK\r\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def read(self) -> str:
        """The data of the next event, or a comment line."""
        data: list[str] = []
        while (line := self.file.readline()) != b"\n":
            if line.startswith(b":"):
                assert not data, "a comment inside an event"
                return line.decode()
            assert line.startswith(b"data: "), line
            assert line.endswith(b"\n")
            data.append(line[6:-1].decode())
        return "\n".join(data)

    def prices(self, number: int) -> list[tuple[str, float]]:
        updates = [json.loads(self.read()) for _ in range(number)]
        return [(update["asset_id"], update["price"]) for update in updates]


def test_a_stream_is_the_known_prices_and_each_poll_in_the_order_tracked(server: PriceServer, updates: Updates) -> None:
    server.publish(reversed(updates(1.0)))
    with Stream(server.port) as stream:
        assert stream.read() == '{"asset_id":"BTC","price":1.0,"time":"2026-11-22T07:44:05.1234567Z"}'
        assert stream.prices(9) == [(asset, 1.0) for asset in ASSETS[1:]]
        server.publish(updates(2.0))
        assert stream.prices(10) == [(asset, 2.0) for asset in ASSETS]
        server.publish([PriceUpdate("SOL", 3.0, "t")])
        assert stream.prices(1) == [("SOL", 3.0)]


def test_streams_are_counted_among_the_clients_and_each_gets_its_format(server: PriceServer, updates: Updates) -> None:
    left: list[int] = []
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with Stream(server.port) as stream, RawClient(server.port) as other:
        assert len(server.clients) == server.client_count == 2
        assert server.client_connected.is_set()
        assert server.clients[0]["address"] == stream.socket.getsockname()
        server.publish(updates(1.0))
        assert stream.prices(10) == other.prices(10) == [(asset, 1.0) for asset in ASSETS]
        assert sample(server, 'clients_by_format{format="event_stream"}') == 1
        assert sample(server, 'clients_by_format{format="websocket"}') == 1
        assert sample(server, "clients") == 2
        assert sample(server, "messages_sent_total") == 20
    wait_for_value(lambda: sorted(left), [1, 2])
    assert sample(server, 'clients_by_format{format="event_stream"}') == 0


def test_a_comment_every_20_s_that_needs_no_reply(timed: RiggedServer) -> None:
    with Stream(timed.port) as stream:
        for _ in range(10):
            pass_time(timed, 20.0)
            assert stream.read() == ":\n"
        assert len(timed.clients) == 1
    assert sample(timed, "messages_sent_total") == 0


def test_what_it_sends_is_discarded_and_when_it_hangs_up_it_is_gone(server: PriceServer) -> None:
    received: list[str] = []
    server.set_fn_message_received(lambda client, server, message: received.append(message))
    with Stream(server.port) as stream:
        stream.socket.sendall(b'{"subscribe":["BTC"]}\x81' * 5_000)
        server.send_message(server.clients[0], "still here")
        assert stream.read() == "still here"
        wait_for_value(lambda: held(server), 0)
        stream.socket.shutdown(socket.SHUT_WR)
        gone(server)
    assert received == []


def test_messages_of_user_code_have_a_data_line_for_each_of_theirs_and_are_text(server: PriceServer) -> None:
    with Stream(server.port) as stream, RawClient(server.port) as other:
        server.send_message(server.clients[0], "κόσμε\r\ntwo\rthree\n")
        assert stream.read() == "κόσμε\ntwo\nthree\n"
        with pytest.raises(ValueError, match="an event stream carries text"):
            server.send_message(server.clients[0], b"bytes")
        server.send_message_to_all(b"bytes")
        server.send_message_to_all("text")
        assert [other.read()[1], other.read()[1]] == [b"bytes", b"text"]
        assert stream.read() == "text"


@pytest.mark.parametrize(
    "end",
    [
        lambda server: server.shutdown_gracefully(1001, b"server is stopping"),
        lambda server: server.disconnect_clients_gracefully(),
        lambda server: server.clients[0]["handler"].send_close(),
    ],
    ids=["stop", "disconnect", "send_close"],
)
def test_a_stream_ends_with_its_connection_after_what_is_pending(
    rigged: RiggedServer, monkeypatch: pytest.MonkeyPatch, end: Callable[[PriceServer], None]
) -> None:
    monkeypatch.setattr("price_server.loop.STOP_TIMEOUT", 20.0)
    with Stream(rigged.port) as stream:
        (client,) = rigged.clients
        narrowed = narrow(rigged, 10)
        rigged.publish([PriceUpdate("BTC", 1.0, "t")])
        thread = in_thread(lambda: end(rigged))
        wait_for(lambda: client["handler"].connection.state is State.CLOSING)
        narrowed.room = math.inf
        assert stream.prices(1) == [("BTC", 1.0)]
        assert stream.file.read() == b"", "ended with FIN"
    thread.join(10)
    wait_for_value(lambda: connections(rigged), 0)


def test_a_denied_stream_has_its_head_and_ends(server: PriceServer) -> None:
    server.deny_new_connections()
    with visit(server.port, get("/stream")) as sock:
        assert FIRST_LINE.fullmatch(read_all(sock).partition(b"\r\n\r\n")[2])
    assert sample(server, "clients_accepted_total") == 0


def test_a_slow_client_gets_no_partial_event_and_no_backlog_and_is_dropped_after_30_s(
    timed: RiggedServer, updates: Updates
) -> None:
    with Stream(timed.port) as other, Stream(timed.port) as slow:
        narrowed = narrow(timed, 10)
        for price in range(1, 4):
            timed.publish(updates(price))
        pass_time(timed, 20.0)
        narrowed.room = math.inf
        assert slow.prices(1) == [("BTC", 1.0)]
        assert slow.read() == ":\n"
        assert slow.prices(10) == [(asset, 3.0) for asset in (*ASSETS[1:], ASSETS[0])]
        narrow(timed)
        timed.publish(updates(4.0))
        pass_time(timed, 29.5)
        assert len(timed.clients) == 2
        pass_time(timed, 1.0)
        assert [client["address"] for client in timed.clients] == [other.socket.getsockname()]
    assert dropped(timed) == {"behind": 1}
