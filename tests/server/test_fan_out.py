"""Which client gets which price, and in what order; partially sent messages.

Where the bytes fall matters, the client's socket takes just so many (`narrow`).
"""

import json
import logging
import math
import random
from collections.abc import Callable

import pytest
from raw import CLOSE, PING, PONG, TEXT, RawClient, frame, honest, parse, prices, request
from rigged import RiggedServer, in_thread, narrow, poll, sample, wait_for_value
from running import ASSETS, wait_for

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Updates = Callable[[float], list[PriceUpdate]]


def test_every_client_gets_all_known_prices_and_each_poll_in_the_order_tracked(
    server: PriceServer, updates: Updates
) -> None:
    server.publish(reversed(updates(7.0)))
    with honest(server) as first, honest(server) as second:
        server.publish(reversed(updates(8.0)))
        for client in (first, second):
            assert client.recv() == '{"asset_id":"BTC","price":7.0,"time":"2026-11-22T07:44:05.1234567Z"}'
            assert prices(client, 9) == [(asset, 7.0) for asset in ASSETS[1:]]
            assert prices(client, 10) == [(asset, 8.0) for asset in ASSETS]


def test_a_partial_publish_sends_only_what_is_new(server: PriceServer) -> None:
    server.publish([PriceUpdate("SOL", 1.0, "a"), PriceUpdate("ETH", 2.0, "b")])
    with honest(server) as client:
        assert prices(client, 2) == [("ETH", 2.0), ("SOL", 1.0)]
        server.publish([PriceUpdate("SOL", 3.0, "c")])
        server.publish([PriceUpdate("BTC", 4.0, "d")])
        assert prices(client, 2) == [("SOL", 3.0), ("BTC", 4.0)]
        with honest(server) as late:
            assert prices(late, 3) == [("BTC", 4.0), ("ETH", 2.0), ("SOL", 3.0)]


def test_what_is_not_valid_is_left_out_and_named_once_and_the_others_are_sent(
    server: PriceServer, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [PriceUpdate("DOGE", 1.0, ""), PriceUpdate("XRP", math.nan, ""), PriceUpdate("ADA", 0.0, "")]
    with honest(server) as client:
        assert server.publish([*bad, PriceUpdate("BTC", 1.0, "")]) == ["BTC"]
        assert server.publish([PriceUpdate("BTC", 2.0, ""), *bad]) == ["BTC"]
        assert server.publish(bad) == []
        assert server.publish(poll(3.0, "XRP")) == ["XRP"]
        assert server.publish(bad) == []
        assert prices(client, 3) == [("BTC", 1.0), ("BTC", 2.0), ("XRP", 3.0)]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "no valid price for DOGE: not tracked, XRP: price nan, ADA: price 0; clients keep the last one",
        "no valid price for XRP: price nan; clients keep the last one",
    ]
    assert sample(server, 'polls_total{result="success"}') == 3


def test_an_asset_that_a_poll_leaves_out_is_named_once_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "price_server")
    server = PriceServer(("BTC", "ETH"))
    both, one, invalid = poll(1.0, "BTC", "ETH"), poll(1.0, "BTC"), poll(-1.0, "ETH")
    for updates in (both, one, one, one + invalid, both, invalid):
        server.publish(updates, expect_all=True)
    server.publish(one)
    server.server_close()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no valid price for ETH: not in the response; clients keep the last one"),
        ("NOTICE", "a valid price again for ETH"),
        ("WARNING", "no valid price for BTC: not in the response, ETH: price -1; clients keep the last one"),
        ("NOTICE", "a valid price again for BTC"),
    ]


def test_a_client_that_comes_during_publishes_misses_nothing(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1))
    with RawClient(server.port) as early:
        came = [early]
        for price in range(2, 50):
            thread = in_thread(lambda: came.append(RawClient(server.port)))
            server.publish(updates(price))
            thread.join(10)
        server.disconnect_clients_gracefully()
        for each in came:
            messages = [json.loads(data) for opcode, data in parse(each.file.read()) if opcode == TEXT]
            each.__exit__()
            assert [message["asset_id"] for message in messages[:10]] == list(ASSETS)
            for asset in ASSETS:
                seen = [message["price"] for message in messages if message["asset_id"] == asset]
                assert seen == list(range(seen[0], 50)), "skipped, twice or back in time"
    assert len(came) == 49


def test_messages_are_counted_exactly_also_those_that_had_to_wait(rigged: RiggedServer, updates: Updates) -> None:
    def sent() -> float:
        return sample(rigged, "messages_sent_total")

    rigged.publish(updates(1.0))
    assert sent() == 0
    with RawClient(rigged.port) as client, RawClient(rigged.port, request("/ws?assets=BTC,ETH")) as other:
        assert sent() == 12, "the known prices"
        rigged.publish(updates(2.0))
        assert sent() == 24
        rigged.publish(poll(3.0, "ETH", "XRP"))
        assert sent() == 27
        rigged.send_message(rigged.clients[1], "x")
        rigged.send_message_to_all("x")
        assert sent() == 30
        client.send(frame(PING))
        assert client.prices(22)[-1] == ("XRP", 3.0)
        assert other.prices(5)[-1] == ("ETH", 3.0)
        narrowed = narrow(rigged, 100)  # the other: one and a half frames
        rigged.publish(updates(4.0))
        rigged.publish(updates(5.0))
        assert sent() == 30 + 10 + 10 + 2
        narrowed.room = math.inf
        assert other.prices(4) == [("BTC", 4.0), ("ETH", 4.0), ("BTC", 5.0), ("ETH", 5.0)]
        wait_for_value(sent, 30 + 10 + 10 + 2 + 2)


# A full socket


def test_200_publishes_to_ragged_sockets_split_no_frame_and_end_with_the_last_price(
    timed: RiggedServer, updates: Updates
) -> None:
    chance = random.Random(3)
    clients = [RawClient(timed.port) for _ in range(6)]
    streams: dict[int, bytes] = {}
    for number, (client, sock) in enumerate(zip(clients, timed.listener.accepted, strict=True)):
        sock.before = lambda sock=sock: setattr(sock, "room", chance.choice((0, 1, 50, 700, 5_000)))  # type: ignore
        in_thread(lambda number=number, client=client: streams.update({number: client.file.read()}))  # type: ignore
    for price in range(1, 201):
        timed.publish(updates(float(price)))
        if price % 50 == 0:
            timed.send_message_to_all(f"note {price} " + "x" * price)
            for client in clients:
                client.send(frame(PING, b"ping %d" % price))
    heard: list[int] = []  # after the last pings
    timed.set_fn_message_received(lambda client, *_: heard.append(client["id"]))
    for client in clients:
        client.send(frame(TEXT, b"these were all the pings"))
    wait_for(lambda: len(heard) == 6)
    connected = [client["handler"].connection for client in timed.clients]
    wait_for(lambda: not any(each.outbox for each in connected), what="all sent")
    timed.disconnect_clients_gracefully()
    wait_for(lambda: len(streams) == 6)
    for client in clients:
        client.__exit__()
    wait_for(lambda: not timed.clients)
    for stream in streams.values():
        check_stream(stream)


def check_stream(stream: bytes) -> None:
    last: dict[str, float] = {}
    others: dict[int, list[bytes]] = {TEXT: [], PONG: [], CLOSE: []}
    for opcode, payload in parse(stream):
        if opcode == TEXT and payload.startswith(b"{"):
            update = json.loads(payload)
            assert update["price"] > last.get(update["asset_id"], 0), "twice, or back in time"
            last[update["asset_id"]] = update["price"]
        else:
            others[opcode].append(payload)
    assert last == dict.fromkeys(ASSETS, 200.0)
    assert others[TEXT] == [b"note %d " % price + b"x" * price for price in range(50, 201, 50)]
    assert others[PONG] == [b"ping %d" % price for price in range(50, 201, 50)]
    assert others[CLOSE] == [b"\x03\xe8"]
