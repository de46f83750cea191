"""formats: the bytes that clients of each kind get."""

import pytest

from price_server.formats import FORMATS, EventStreamFormat, Format, WebSocketFormat

WEBSOCKET, EVENT_STREAM = WebSocketFormat(), EventStreamFormat()
PRICE = '{"asset_id":"BTC","price":45000.0,"time":"2026-11-22T07:44:05.1234567Z"}'


def test_each_format_has_a_name_of_its_own() -> None:
    assert [(each.name, each.is_two_way) for each in FORMATS] == [("websocket", True), ("event_stream", False)]


@pytest.mark.parametrize(
    ("output", "price", "heartbeat"),
    [
        (WEBSOCKET, b"\x81\x48" + PRICE.encode(), b"\x89\x00"),
        (EVENT_STREAM, b"data: " + PRICE.encode() + b"\n\n", b":\n"),
    ],
)
def test_a_price_is_one_message_and_a_heartbeat_is_none(output: Format, price: bytes, heartbeat: bytes) -> None:
    assert output.encode_price(PRICE) == price
    assert output.heartbeat == heartbeat


@pytest.mark.parametrize(
    ("message", "event"),
    [
        ("grüß", b"data: gr\xc3\xbc\xc3\x9f\n\n"),
        ("", b"data: \n\n"),
        ("one\ntwo\r\nthree\rfour\n", b"data: one\ndata: two\ndata: three\ndata: four\ndata: \n\n"),
        ("\n\r", b"data: \ndata: \ndata: \n\n"),
        ("id: 1\u2028:x", b"data: id: 1\xe2\x80\xa8:x\n\n"),
    ],
)
def test_each_line_of_a_message_is_a_data_line_of_one_event(message: str, event: bytes) -> None:
    assert EVENT_STREAM.encode_message(message) == event


def test_an_event_stream_carries_no_bytes() -> None:
    with pytest.raises(ValueError, match=r"^an event stream carries text: send a str, not bytes$"):
        EVENT_STREAM.encode_message(b"bytes")


def test_a_websocket_ends_with_a_close_frame_and_an_event_stream_with_nothing() -> None:
    assert WEBSOCKET.encode_close(1001, "bye") == b"\x88\x05\x03\xe9bye"
    assert EVENT_STREAM.encode_close(1001, "bye") == b""
    with pytest.raises(ValueError, match=r"^close reason of 124 bytes"):
        WEBSOCKET.encode_close(1000, b"x" * 124)
