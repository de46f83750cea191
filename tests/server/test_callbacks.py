"""The library's interface: callbacks, messages to clients, denied and disconnected clients."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from raw import CLOSE, PING, PONG, TEXT, RawClient, ask, frame, get, honest, prices, request, visit
from raw import reset as hang_up
from rigged import Blocked, RiggedServer, call_soon, dropped, gone, sample, wait_for_value
from running import ASSETS, wait_for
from websockets.exceptions import ConnectionClosed, ConnectionClosedError

from coin_api import PriceUpdate
from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")

Updates = Callable[[float], list[PriceUpdate]]
Client = dict[str, Any]
ALL_AT_1 = [(asset, 1.0) for asset in ASSETS]


def test_each_client_comes_once_and_leaves_once(server: PriceServer) -> None:
    came: list[int] = []
    left: list[int] = []
    server.set_fn_new_client(lambda client, server: came.append(client["id"]))
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    for _ in range(10):
        with honest(server):
            pass
        RawClient(server.port).reset()
        with RawClient(server.port) as client:
            client.send(b"garbage" * 100)
        with RawClient(server.port, after=frame(CLOSE, b"\x03\xe8")):
            pass
        with RawClient(server.port):
            server.disconnect_clients_abruptly()
        ask(server.port, request(Upgrade=None))
    wait_for(lambda: len(left) == 50)
    assert sorted(came) == sorted(left) == list(range(1, 51))


def test_a_client_that_is_gone_before_its_response_leaves_only_if_it_came(server: PriceServer) -> None:
    came: list[int] = []
    left: list[int] = []
    server.set_fn_new_client(lambda client, server: came.append(client["id"]))
    server.set_fn_client_left(lambda client, server: left.append(client["id"]))
    with Blocked(server):
        for _ in range(10):
            hang_up(visit(server.port, request()))
    with RawClient(server.port) as client:
        client.send(frame(PING))
        assert client.read() == (PONG, b"")
    wait_for_value(lambda: len(server.clients), 0)
    wait_for_value(lambda: sorted(left), sorted(came))
    assert sample(server, "clients_accepted_total") == len(came)
    assert sorted(left) == sorted(came)


def leave(*_: object) -> None:
    sys.exit(3)


def fail(*_: object) -> None:
    raise RuntimeError


@pytest.mark.parametrize("bad", [leave, fail])
def test_a_callback_that_raises_reaches_no_client_and_no_client_is_lost(
    server: PriceServer, errors: list[str], bad: Callable[..., None]
) -> None:
    calls: list[str] = []

    def callback(name: str) -> Callable[..., None]:
        def note_and_raise(*_: object) -> None:
            calls.append(name)
            bad()

        return note_and_raise

    server.set_fn_new_client(callback("came"))
    server.set_fn_client_left(callback("left"))
    server.set_fn_message_received(callback("message"))
    with honest(server) as client:
        client.send("one")
        client.send("two")
        assert client.ping().wait(5)
    wait_for(lambda: len(errors) == 3)
    assert calls == ["came", "message", "message", "left"]
    assert errors == [f"the callback {name} failed" for name in ("new_client", "message_received", "client_left")]
    errors.clear()


def test_a_callback_may_send_to_another_publish_and_disconnect_everybody(server: PriceServer, updates: Updates) -> None:
    def obey(client: Client, server: PriceServer, message: str) -> None:
        if message == "tell":
            server.send_message(next(each for each in server.clients if each is not client), "told")
        elif message == "publish":
            server.publish(updates(1.0))
        elif message == "all":
            server.send_message_to_all("to all")
        else:
            server.disconnect_clients_gracefully(4000, b"everybody")

    server.set_fn_message_received(obey)
    with honest(server) as first, honest(server) as second:
        first.send("tell")
        assert second.recv(10) == "told"
        first.send("publish")
        assert prices(first, 10) == prices(second, 10) == ALL_AT_1
        second.send("all")
        assert first.recv(10) == second.recv(10) == "to all"
        first.send("go")
        for client in (first, second):
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=10)
            assert closed.value.rcvd
            assert closed.value.rcvd.code == 4000
    gone(server)
    with honest(server) as client:
        assert prices(client, 10) == ALL_AT_1


@pytest.mark.parametrize("act", ["send", "publish", "callback"])
def test_client_left_runs_inside_no_send_no_publish_and_no_other_callback(
    rigged: RiggedServer, updates: Updates, act: str
) -> None:
    order: list[str] = []
    rigged.set_fn_client_left(lambda client, server: order.append("left"))

    def lose() -> None:
        raise ConnectionResetError

    def drop_the_other(*_: object) -> None:
        other = rigged.clients[1]
        rigged.listener.accepted[1].before = lose
        if act == "publish":
            rigged.publish(updates(1.0))
        else:
            rigged.send_message(other, "x")
        order.append(f"clients: {len(rigged.clients)}")

    rigged.set_fn_message_received(drop_the_other)
    with RawClient(rigged.port) as client, RawClient(rigged.port):
        if act == "callback":
            client.send(frame(TEXT, b"x"))
        else:
            call_soon(rigged, drop_the_other)
        wait_for(lambda: len(order) == 2)
        assert order == ["clients: 1", "left"]


# What a client is, and what it is sent


def test_a_client_is_known_by_its_number_handler_and_address(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        (known,) = server.clients
        assert known == {"id": 1, "handler": known["handler"], "address": client.socket.getsockname()}
        assert server.handler_to_client(known["handler"]) is known
    gone(server)
    assert server.handler_to_client(known["handler"]) is None


def test_clients_are_a_snapshot_that_may_be_walked_while_they_come_and_go(server: PriceServer) -> None:
    with RawClient(server.port):
        before = server.clients
        with RawClient(server.port):
            wait_for(lambda: len(server.clients) == 2)
            assert len(before) == 1


def test_send_message_reaches_one_client_and_send_message_to_all_every_one(server: PriceServer) -> None:
    with honest(server) as first, honest(server) as second:
        server.send_message(server.clients[0], "for the first")
        server.send_message(server.clients[1], b"\xffor the second")
        server.send_message_to_all("for all")
        assert [first.recv(5), first.recv(5)] == ["for the first", "for all"]
        assert [second.recv(5), second.recv(5)] == [b"\xffor the second", "for all"]


def test_what_cannot_be_sent_is_raised_where_it_was_asked_and_nothing_is_sent(server: PriceServer) -> None:
    with RawClient(server.port) as client:
        (known,) = server.clients
        for wrong in (
            lambda: server.send_message(known, 5),
            lambda: server.send_message_to_all(None),
            lambda: server.send_message_to_all("\ud800"),
        ):
            with pytest.raises((TypeError, AttributeError, UnicodeError)):
                wrong()
        for too_long in (
            lambda: known["handler"].send_close(1000, "é" * 62),
            lambda: server.disconnect_clients_gracefully(1000, b"x" * 124),
            lambda: server.shutdown_gracefully(1000, "x" * 124),
            lambda: server.deny_new_connections(1000, b"x" * 124),
        ):
            with pytest.raises(ValueError, match="close reason of 124 bytes: at most 123 are allowed"):
                too_long()
        assert client.has_nothing_to_read()
        with RawClient(server.port) as other:
            assert other.has_nothing_to_read()
        known["handler"].send_close(1000, b"x" * 123)
        assert client.read() == (CLOSE, b"\x03\xe8" + b"x" * 123)


def test_a_message_for_a_client_that_has_left_is_ignored(server: PriceServer) -> None:
    with RawClient(server.port):
        (known,) = server.clients
    gone(server)
    server.send_message(known, "x")
    known["handler"].send_message("x")
    known["handler"].send_close()
    server.follow(known, ["BTC"])


def test_what_a_callback_notes_in_its_client_is_there_in_the_next(server: PriceServer) -> None:
    found: list[object] = []
    server.set_fn_new_client(lambda client, server: client.update(note="mine"))
    server.set_fn_message_received(lambda client, server, message: found.append(client.get("note")))
    server.set_fn_client_left(lambda client, server: found.append(client.get("note")))
    with honest(server) as client:
        client.send("one")
        wait_for(lambda: found == ["mine"])
        assert [each.get("note") for each in server.clients] == ["mine"]
    wait_for(lambda: found == ["mine", "mine"])


def test_a_greeting_sent_from_new_client_comes_after_the_known_prices(server: PriceServer, updates: Updates) -> None:
    server.publish(updates(1.0))
    server.set_fn_new_client(lambda client, server: server.send_message(client, "welcome"))
    with RawClient(server.port, after=frame(PING)) as client:
        assert client.prices(10) == ALL_AT_1
        assert client.read() == (TEXT, b"welcome")
        assert client.read() == (PONG, b""), "what it had sent already is read later"


def test_new_connections_are_denied_with_the_given_close_and_allowed_again(server: PriceServer) -> None:
    came: list[int] = []
    server.set_fn_new_client(lambda client, server: came.append(client["id"]))
    with honest(server) as old:
        server.deny_new_connections(status=4001, reason=b"maintenance")
        with honest(server) as denied, pytest.raises(ConnectionClosedError) as closed:
            denied.recv(timeout=5)
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "maintenance")
        assert old.ping().wait(5)
        assert sample(server, 'clients_refused_total{reason="denied"}') == 1
        server.allow_new_connections()
        with honest(server) as new:
            assert new.ping().wait(5)
    assert came == [1, 2]


@pytest.mark.parametrize("code", [4002, None])
def test_clients_are_disconnected_gracefully_or_abruptly_and_the_server_goes_on(
    server: PriceServer, code: int | None
) -> None:
    with honest(server) as client:
        if code:
            server.disconnect_clients_gracefully(code, b"come again")
        else:
            server.disconnect_clients_abruptly()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=5)
        assert (closed.value.rcvd and (closed.value.rcvd.code, closed.value.rcvd.reason)) == (
            (code, "come again") if code else None
        )
    gone(server)
    assert dropped(server) == ({} if code else {"disconnected": 1})
    with honest(server) as client:
        assert client.ping().wait(5)


def test_a_new_client_wakes_a_poller_that_pauses_when_it_is_counted(server: PriceServer) -> None:
    counts: list[tuple[int, int]] = []
    server.client_connected.set = lambda: counts.append((server.client_count, len(server.clients)))  # type: ignore[method-assign]
    ask(server.port, get("/healthz"))
    with RawClient(server.port), visit(server.port, get("/stream")):
        wait_for_value(lambda: counts, [(1, 1), (2, 2)])
