"""What a client follows, changed by its own commands and by user code, over real sockets."""

import json
from collections.abc import Callable

import pytest
from raw import BINARY, PING, PONG, TEXT, RawClient, fragments, frame, get, request, visit
from rigged import THREE, RiggedServer, in_thread, poll, wait_for_value
from running import wait_for

from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., RiggedServer]


def command(**lists: list[str]) -> bytes:
    return frame(TEXT, json.dumps(lists).encode())


@pytest.fixture
def three(start_server: Start) -> RiggedServer:
    """A server for three assets at 1.0."""
    server = start_server(THREE, RiggedServer)
    server.publish(poll(1.0))
    return server


def follows_none(server: PriceServer) -> RawClient:
    return RawClient(server.port, request("/ws?assets="))


def test_a_client_that_follows_none_gets_nothing_until_it_subscribes(three: RiggedServer) -> None:
    with follows_none(three) as client:
        three.publish(poll(2.0))
        client.send(command(subscribe=["eth"]) + frame(PING))
        assert client.prices(1) == [("ETH", 2.0)], "the last price comes immediately"
        assert client.read() == (PONG, b""), "otherwise success is silent"
        three.publish(poll(3.0))
        client.send(command(subscribe=["XRP", "BTC", "ETH"], unsubscribe=[]))
        assert client.prices(3) == [("ETH", 3.0), ("BTC", 3.0), ("XRP", 3.0)]
        three.publish(poll(4.0))
        assert client.prices(3) == [("BTC", 4.0), ("ETH", 4.0), ("XRP", 4.0)], "in the order tracked"


def test_what_is_wrong_is_answered_and_changes_nothing(three: RiggedServer) -> None:
    with RawClient(three.port, request("/ws?assets=ETH")) as client:
        client.send(command(subscribe=["BTC", "DOGE"]))
        assert client.read() == (TEXT, b'{"asset_id":"ETH","price":1.0,"time":"t"}')
        answer = json.loads(client.read()[1])
        assert answer == {"error": "unknown asset 'DOGE': this server tracks BTC, ETH, XRP"}
        three.publish(poll(2.0))
        assert client.prices(1) == [("ETH", 2.0)]


def test_what_is_not_a_command_is_ignored(three: RiggedServer) -> None:
    with follows_none(three) as client:
        client.send(frame(TEXT, b"ping") + frame(BINARY, b'{"subscribe":["BTC"]}') + frame(PING))
        assert client.read() == (PONG, b"")
        client.send(fragments(TEXT, b'{"subscribe"', b':["BTC"]}'))
        assert client.prices(1) == [("BTC", 1.0)]


def test_the_answers_of_an_event_stream_s_follow_are_events(three: RiggedServer) -> None:
    with visit(three.port, get("/stream?assets=")) as sock, sock.makefile("rb") as file:
        wait_for(lambda: three.clients)
        three.follow(three.clients[0], ["BTC"])
        while (line := file.readline()) and not line.startswith(b"data"):
            pass
        assert line == b'data: {"asset_id":"BTC","price":1.0,"time":"t"}\n'


# follow, for user code


def test_follow_sets_what_a_client_gets_from_any_thread(three: RiggedServer) -> None:
    with follows_none(three) as client:
        (known,) = three.clients
        in_thread(lambda: three.follow(known, ["xrp", "BTC"])).join(10)
        assert client.prices(2) == [("BTC", 1.0), ("XRP", 1.0)]
        three.follow(known, ["BTC", "ETH"])
        assert client.prices(1) == [("ETH", 1.0)], "only what is new"
        with pytest.raises(ValueError, match="unknown asset 'DOGE': this server tracks BTC, ETH, XRP"):
            three.follow(known, ["DOGE"])
        three.publish(poll(2.0))
        assert client.prices(2) == [("BTC", 2.0), ("ETH", 2.0)]
        three.follow(known, [])
        three.publish(poll(3.0))
        three.send_message_to_all("end")
        assert client.read() == (TEXT, b"end")


def test_follow_in_callbacks(three: RiggedServer) -> None:
    three.set_fn_new_client(lambda client, server: server.follow(client, ["ETH"]))
    three.set_fn_message_received(lambda client, server, message: server.follow(client, [message]))
    three.set_fn_client_left(lambda client, server: server.follow(client, ["BTC"]))
    with follows_none(three) as client:
        assert client.prices(1) == [("ETH", 1.0)]
        client.send(frame(TEXT, b"XRP") + frame(TEXT, b"BTC"))
        assert client.prices(2) == [("XRP", 1.0), ("BTC", 1.0)]
        three.publish(poll(2.0))
        assert client.prices(1) == [("BTC", 2.0)]
    wait_for_value(lambda: len(three.clients), 0)


def test_a_function_for_messages_replaces_the_commands(three: RiggedServer) -> None:
    received: list[str] = []
    three.set_fn_message_received(lambda client, server, message: received.append(message))
    with follows_none(three) as client:
        client.send(command(subscribe=["BTC"]) + frame(TEXT, b"{") + frame(PING))
        assert client.read() == (PONG, b""), "the server answers nothing by itself"
    assert received == ['{"subscribe": ["BTC"]}', "{"]
