"""RFC 6455 over real sockets: one case of each kind. All of Autobahn|Testsuite's are bytes in tests/unit."""

from collections.abc import Iterator

import pytest
from raw import CLOSE, PING, PONG, TEXT, RawClient, frame
from rigged import RiggedServer

from price_server import PriceServer

pytestmark = pytest.mark.usefixtures("quick_stops", "errors")


@pytest.fixture
def echo(rigged: RiggedServer) -> RiggedServer:
    """A server without prices that sends every message back, as Autobahn|Testsuite wants it."""
    rigged.set_fn_message_received(lambda client, server, message: server.send_message(client, message))
    return rigged


@pytest.fixture
def client(echo: PriceServer) -> Iterator[RawClient]:
    with RawClient(echo.port) as client:
        yield client


def test_frames_in_the_segment_of_the_upgrade_request_are_answered(echo: PriceServer) -> None:
    after = frame(PING, b"early") + frame(TEXT, b"x" * 60_000) + frame(CLOSE, b"\x03\xe8")
    with RawClient(echo.port, after=after) as client:
        assert client.read() == (PONG, b"early")
        assert client.read() == (TEXT, b"x" * 60_000)
        assert client.read_close() == 1000


def test_one_send_answers_all_the_pings_of_a_turn(rigged: RiggedServer) -> None:
    with RawClient(rigged.port) as client:
        sizes = rigged.listener.accepted[-1].sizes
        sizes.clear()
        client.send(b"".join([frame(PING, b"%d" % number) for number in range(50)]))
        assert [client.read() for _ in range(50)] == [(PONG, b"%d" % number) for number in range(50)]
    assert sizes == [10 * 3 + 40 * 4]


def test_messages_that_come_together_are_received_one_by_one_in_their_order(client: RawClient) -> None:
    client.send(b"".join([frame(TEXT, b"%d" % number) + frame(PING, b"%d" % number) for number in range(50)]))
    both = [(opcode, b"%d" % number) for number in range(50) for opcode in (TEXT, PONG)]
    assert [client.read() for _ in range(100)] == both


@pytest.mark.parametrize(
    ("sent", "chop", "last"),
    [
        (frame(TEXT, b"x" * 65_537), 0, b"\x03\xf1message is over 65536 bytes"),
        (frame(CLOSE, b"\x03\xe8bye"), 1, b"\x03\xe8"),
    ],
    ids=["too long", "close"],
)
def test_a_violation_or_a_close_is_answered_with_a_close_frame_and_never_a_reset(
    client: RawClient, sent: bytes, chop: int, last: bytes
) -> None:
    client.send(frame(TEXT, b"BAsd7&jh23" * 6_553))
    client.send(sent, chop)
    client.send(frame(PING) + frame(TEXT, b"more") + b"\xff" * 99)
    assert client.read() == (TEXT, b"BAsd7&jh23" * 6_553), "what came before is not cut off"
    assert client.read() == (CLOSE, last)
    assert client.file.read() == b"", "nothing follows"
