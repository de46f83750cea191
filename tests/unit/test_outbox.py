"""outbox: what a connection that is behind still has to be sent, and in which order."""

from collections.abc import Iterator

import pytest

from price_server.outbox import Outbox

OLD = {"BTC": b"btc1,", "ETH": b"eth--1,", "XRP": b"x1,"}
NEW = {"BTC": b"btc2,", "ETH": b"eth--2,", "XRP": b"x2,"}
ALL = ("BTC", "ETH", "XRP")


def drain(outbox: Outbox, messages: dict[str, bytes], at_once: int = 1 << 20) -> bytes:
    """All that goes out when the socket takes so many bytes at once."""
    out = b""
    while data := bytes(outbox.data_to_send(messages)[:at_once]):
        out += data
        outbox.advance(len(data), messages)
    assert not outbox
    return out


def test_nothing_is_pending_at_first() -> None:
    outbox = Outbox()
    assert not outbox
    assert outbox.data_to_send(OLD) == b""
    assert outbox.advance(0, OLD) == 0
    assert (outbox.size, outbox.enqueued, outbox.take_uncounted()) == (0, 0, 0)
    outbox.enqueue(b"")
    assert not outbox


def test_pieces_go_out_as_they_are_and_before_prices() -> None:
    outbox = Outbox()
    outbox.mark_stale(("ETH",))
    outbox.enqueue(b"one")
    outbox.enqueue(b"")
    outbox.enqueue(b"three")
    assert list(outbox.pieces) == [b"one", b"three"]
    assert outbox.data_to_send(OLD) == b"onethreeeth--1,"
    for sent, rest in ((4, b"hreeeth--1,"), (3, b"eeth--1,")):
        assert outbox.advance(sent, OLD) == 0
        assert outbox.data_to_send(OLD) == rest
    assert outbox.advance(1, OLD) == 0
    assert outbox.data_to_send(OLD) == b"eth--1,"
    assert outbox
    assert outbox.advance(7, OLD) == 1
    assert not outbox


def test_bytes_are_counted_while_they_wait_and_ever() -> None:
    outbox = Outbox()
    outbox.split_unsent(("BTC",), 4, {"BTC": b"x" * 10})
    outbox.enqueue(b"y" * 20)
    assert (outbox.size, outbox.enqueued, outbox.take_uncounted(), outbox.take_uncounted()) == (30, 30, 30, 0)
    assert outbox.data_to_send({}) == b"x" * 6 + b"y" * 20
    outbox.advance(6, {})
    outbox.enqueue(b"z")
    assert (outbox.size, outbox.enqueued, outbox.take_uncounted()) == (21, 31, 1)
    outbox.advance(20, {})
    assert (outbox.size, outbox.enqueued) == (1, 31)
    outbox.advance(1, {})
    assert (outbox.size, outbox.enqueued, bool(outbox)) == (0, 31, False)


@pytest.mark.parametrize(
    ("sent", "begun", "goes_out"),
    [
        (0, 0, b"btc2,eth--2,x2,"),
        (4, 1, b",eth--2,x2,"),
        (5, 1, b"eth--2,x2,"),
        (6, 2, b"th--1,x2,"),
        (12, 2, b"x2,"),
        (14, 3, b","),
        (15, 3, b""),
    ],
)
def test_the_message_that_is_partially_sent_is_completed_and_the_others_are_current(
    sent: int, begun: int, goes_out: bytes
) -> None:
    for at_once in (1, 2, 100):
        outbox = Outbox()
        assert outbox.split_unsent(ALL, sent, OLD) == begun
        assert drain(outbox, NEW, at_once) == goes_out


def test_prices_that_wait_for_the_first_time_follow_those_that_wait_already() -> None:
    outbox = Outbox()
    outbox.mark_stale(("XRP", "BTC"))
    outbox.mark_stale(ALL)
    assert outbox.stale_assets == ("XRP", "BTC", "ETH")
    assert outbox.data_to_send(OLD) == b"x1,btc1,eth--1,"
    assert outbox.advance(4, OLD) == 2  # and one byte of the second
    outbox.mark_stale(ALL)
    assert outbox.stale_assets == ("ETH", "BTC", "XRP")
    assert drain(outbox, NEW) == b"tc1,eth--2,btc2,x2,"


def test_what_is_not_followed_any_more_does_not_go_out() -> None:
    outbox = Outbox()
    outbox.split_unsent(ALL, 1, OLD)
    outbox.keep_only(["XRP"])
    assert outbox.stale_assets == ("XRP",)
    assert drain(outbox, OLD) == b"tc1,x1,"


def test_small_pieces_are_joined_for_one_send_up_to_32_kib() -> None:
    outbox = Outbox()
    for size in (20_000, 12_768, 1):
        outbox.enqueue(b"x" * size)
    assert len(outbox.data_to_send({})) == 32_768
    outbox.advance(1, {})
    assert len(outbox.data_to_send({})) == 32_768
    outbox.advance(32_767, {})
    outbox.enqueue(b"y" * 32_768)
    assert outbox.data_to_send({}) == b"x"


def test_a_large_piece_is_not_copied() -> None:
    outbox, piece = Outbox(), b"x" * 32_769
    outbox.enqueue(piece)
    outbox.enqueue(b"y")
    data = outbox.data_to_send({})
    assert isinstance(data, memoryview)
    assert data.obj is piece
    outbox.advance(2, {})
    assert outbox.data_to_send({}) == b"x" * 32_767 + b"y"


def test_256_prices_are_joined_for_one_send() -> None:
    assets = tuple(f"A{number}" for number in range(600))
    messages = {asset: f"{asset},".encode() for asset in assets}
    outbox = Outbox()
    outbox.mark_stale(assets)
    first = bytes(outbox.data_to_send(messages))
    assert (first[:6], first[-5:], first.count(b",")) == (b"A0,A1,", b"A255,", 256)
    assert outbox.advance(4, messages) == 2
    assert bytes(outbox.data_to_send(messages)).startswith(b"1,A2,")
    outbox.advance(2, messages)
    assert bytes(outbox.data_to_send(messages)).endswith(b"A256,A257,")
    assert drain(outbox, messages) == b"".join(messages.values())[6:]


# The last bytes


def test_after_the_last_bytes_no_price_follows() -> None:
    outbox = Outbox()
    outbox.split_unsent(ALL, 1, OLD)
    outbox.enqueue(b"pong,")
    outbox.finish_with([b"bye"])
    assert drain(outbox, NEW) == b"tc1,pong,bye"


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b""]])
def test_last_bytes_of_nothing_are_not_pending(pieces: list[bytes]) -> None:
    outbox = Outbox()
    outbox.mark_stale(ALL)
    outbox.finish_with(pieces)
    assert not outbox


def test_a_body_is_made_as_it_is_taken() -> None:
    def body() -> Iterator[bytes]:
        for size in (10, 0, 40_000, 40_000, 10_000, 0, 10_000, 5):
            made.append(size)
            yield b"x" * size

    made: list[int] = []
    outbox = Outbox()
    outbox.finish_with(body())
    assert made == [10]
    assert len(outbox.data_to_send({})) == 10  # the next would be over 32 KiB
    assert made == [10, 0, 40_000]
    outbox.advance(10, {})
    assert len(outbox.data_to_send({})) == 40_000
    outbox.advance(39_999, {})
    assert len(outbox.data_to_send({})) == 1
    assert made == [10, 0, 40_000, 40_000]
    outbox.advance(1, {})
    outbox.advance(40_000, {})
    assert made == [10, 0, 40_000, 40_000, 10_000]
    assert len(outbox.data_to_send({})) == 20_005
    assert made[5:] == [0, 10_000, 5]
    assert outbox.enqueued == 100_015
    outbox.advance(20_005, {})
    assert not outbox


@pytest.mark.parametrize("at_once", [97, 4_096, 100_000])
def test_a_body_goes_out_whole_however_it_is_taken(at_once: int) -> None:
    pieces = [b"head\r\n\r\n", b"", b"[", b"1," * 20_000, b"", b"2]"]
    outbox = Outbox()
    outbox.finish_with(iter(pieces))
    assert drain(outbox, {}, at_once) == b"".join(pieces)
