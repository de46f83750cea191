"""What a client follows, changed by its own commands and by user code, over real sockets."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from raw import BINARY, PING, PONG, TEXT, RawClient, fragments, frame, get, request, visit
from rigged import Blocked, RiggedServer, in_thread, narrow, pass_time, wait_for_value
from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Start = Callable[..., RiggedServer]
Updates = Callable[[float], list[PriceUpdate]]
Client = dict[str, Any]
THREE = ("BTC", "ETH", "XRP")


def command(**lists: list[str]) -> bytes:
    return frame(TEXT, json.dumps(lists).encode())


def poll(price: float, *assets: str) -> list[PriceUpdate]:
    return [PriceUpdate(asset, price, "t") for asset in assets or THREE]


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


def test_both_lists_at_once(three: RiggedServer) -> None:
    with RawClient(three.port, request("/ws?assets=BTC,ETH")) as client:
        client.send(command(subscribe=["XRP"], unsubscribe=["BTC"]))
        assert client.prices(3) == [("BTC", 1.0), ("ETH", 1.0), ("XRP", 1.0)]
        three.publish(poll(2.0))
        client.send(command(unsubscribe=["XRP", "ETH"]) + frame(PING))
        assert client.prices(2) == [("ETH", 2.0), ("XRP", 2.0)]
        assert client.read() == (PONG, b"")
        three.publish(poll(3.0))
        three.send_message_to_all("end")
        assert client.read() == (TEXT, b"end")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ("{", 'not JSON: send {"subscribe": ["BTC"]}, {"unsubscribe": ["BTC"]} or both in one'),
        ('{"subscribe":["BTC","DOGE"]}', "unknown asset 'DOGE': this server tracks BTC, ETH, XRP"),
        ('{"subscribe":["BTC"],"unsubscribe":["btc"]}', "'BTC' is in both lists"),
        ('{"subscribe":"BTC"}', '"subscribe" is not a list of asset ids'),
        ('{"subscribe":["BTC"],"op":1}', "unknown key 'op'"),
        ("{}", "empty command"),
    ],
)
def test_what_is_wrong_is_answered_and_changes_nothing(three: RiggedServer, sent: str, error: str) -> None:
    with RawClient(three.port, request("/ws?assets=ETH")) as client:
        client.send(frame(TEXT, sent.encode()))
        assert client.read() == (TEXT, b'{"asset_id":"ETH","price":1.0,"time":"t"}')
        answer = json.loads(client.read()[1])
        assert list(answer) == ["error"]
        assert answer["error"].startswith(error)
        three.publish(poll(2.0))
        assert client.prices(1) == [("ETH", 2.0)]


def test_what_is_no_command_is_ignored(three: RiggedServer) -> None:
    with follows_none(three) as client:
        for opcode, data in (
            (TEXT, b"ping"),
            (TEXT, b'["subscribe"]'),
            (TEXT, b""),
            (BINARY, b'{"subscribe":["BTC"]}'),
        ):
            client.send(frame(opcode, data))
        client.send(frame(PING))
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


# While a client is behind


def test_a_client_behind_gets_nothing_that_it_no_longer_follows_and_no_torn_frame(three: RiggedServer) -> None:
    with RawClient(three.port) as client:
        assert client.prices(3)
        (known,) = three.clients
        narrowed = narrow(three, 10)
        three.publish(poll(2.0))
        three.follow(known, ["XRP"])
        three.publish(poll(3.0))
        narrowed.room = math.inf
        assert client.prices(2) == [("BTC", 2.0), ("XRP", 3.0)], "what is begun is sent to its end"
        three.publish(poll(4.0))
        assert client.prices(1) == [("XRP", 4.0)]


def test_a_client_behind_gets_the_current_price_of_what_is_new(three: RiggedServer) -> None:
    with follows_none(three) as client:
        (known,) = three.clients
        narrowed = narrow(three)
        three.follow(known, ["ETH"])
        three.follow(known, ["BTC", "ETH"])
        three.publish(poll(2.0))
        narrowed.room = math.inf
        assert client.prices(2) == [("ETH", 2.0), ("BTC", 2.0)]


def test_commands_are_read_when_the_client_has_caught_up(three: RiggedServer) -> None:
    with RawClient(three.port, request("/ws?assets=BTC")) as client:
        assert client.prices(1)
        narrowed = narrow(three, 10)
        three.publish(poll(2.0))
        client.send(command(subscribe=["ETH"], unsubscribe=["BTC"]) + frame(PING))
        three.publish(poll(3.0))
        narrowed.room = math.inf
        assert client.prices(3) == [("BTC", 2.0), ("BTC", 3.0), ("ETH", 3.0)]
        assert client.read() == (PONG, b"")


def test_a_client_that_follows_while_behind_is_dropped_after_30_s_all_the_same(
    timed: RiggedServer, updates: Updates
) -> None:
    timed.publish(updates(1.0))
    with RawClient(timed.port):
        (known,) = timed.clients
        narrow(timed)
        timed.publish(updates(2.0))
        for assets in (["BTC"], ASSETS, ["ETH"]):
            pass_time(timed, 10.0)
            timed.follow(known, assets)
        assert len(timed.clients) == 1
        pass_time(timed, 1.0)
        assert timed.clients == []


# Many


def test_2000_commands_in_a_row_take_no_turn_from_another_client(rigged: RiggedServer, updates: Updates) -> None:
    rigged.publish(updates(1.0))
    order: list[str] = []
    sent = command(subscribe=["BTC"]) + command(unsubscribe=["BTC"])
    with follows_none(rigged) as flooding, follows_none(rigged) as client:
        flooding.socket.settimeout(60)  # of the whole send
        for sock, name in zip(rigged.listener.accepted, ("flood", "client"), strict=True):
            sock.before = lambda name=name: order.append(name)  # type: ignore[misc]
        with Blocked(rigged):
            thread = in_thread(lambda: flooding.send(sent * 1_000))
            client.send(frame(PING))
        assert client.read() == (PONG, b"")
        assert flooding.prices(1_000) == [("BTC", 1.0)] * 1_000
        thread.join(10)
        rigged.publish(updates(2.0))
        assert client.has_nothing_to_read()
        assert flooding.has_nothing_to_read()
    assert "client" in order[:20], "one turn of 512 bytes goes before it"
    assert order.count("flood") > 100


@pytest.mark.parametrize(
    "sent",
    [
        json.dumps({"subscribe": [f"X{number}" for number in range(6_000)]}),
        json.dumps({"subscribe": ["BTC"] * 8_000}),
        '{"subscribe":' + "[" * 60_000,
        '{"subscribe":[' + "9" * 60_000 + "]}",
        '{"' + "k" * 60_000 + '":[]}',
    ],
    ids=["unknown ids", "the same id", "brackets", "a number", "a key"],
)
def test_a_huge_command_gets_at_most_a_short_error(server: PriceServer, sent: str) -> None:
    with follows_none(server) as client:
        client.send(frame(TEXT, sent.encode()) + frame(PING))
        opcode, payload = client.read()
        while opcode == TEXT:
            assert len(payload) < 300, "an error names no more than it must"
            opcode, payload = client.read()
        assert (opcode, payload) == (PONG, b"")
