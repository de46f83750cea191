"""commands: what a client may say, and what it then follows."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from price_server.commands import apply_command, encode_error, is_command
from price_server.prices import Prices

ASSETS = ("BTC", "ETH", "XRP", "ADA")
PRICES = Prices(ASSETS)
EXPECTED = 'send {"subscribe": ["BTC"]}, {"unsubscribe": ["BTC"]} or both in one'


def apply(text: str, followed: Sequence[str] = ("BTC", "ETH")) -> tuple[str, ...] | str:
    """What a client follows after a command, or the error that it gets."""
    try:
        return apply_command(text, tuple(followed), PRICES)
    except ValueError as error:
        return str(error)


def test_a_text_that_begins_with_a_brace_is_a_command() -> None:
    assert [is_command(each) for each in ("{", '{"subscribe":[]}', "", " {}", "ping", "[]", b"{}")] == [
        *(True, True, False, False, False, False, False)
    ]


@pytest.mark.parametrize(
    ("command", "followed"),
    [
        ('{"subscribe":["XRP"]}', ("BTC", "ETH", "XRP")),
        ('{"subscribe":["ADA"," xrp","Btc"]}', ASSETS),
        ('{"unsubscribe":["BTC"]}', ("ETH",)),
        ('{"unsubscribe":["ADA","eth","BTC"]}', ()),
        ('{"unsubscribe":["BTC"],"subscribe":["ADA"]}', ("ETH", "ADA")),
        ('{"subscribe":["BTC","BTC"]}', ("BTC", "ETH")),
        ('{"subscribe":[],"unsubscribe":[]}', ("BTC", "ETH")),
        ('{"subscribe":[]} \n', ("BTC", "ETH")),
    ],
)
def test_a_command_changes_what_is_followed_in_the_order_tracked(command: str, followed: tuple[str, ...]) -> None:
    assert apply(command) == followed


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("{", f"not JSON: {EXPECTED}"),
        ('{"subscribe":["BTC"]}{}', f"not JSON: {EXPECTED}"),
        ('{"subscribe":' + "[" * 60_000, f"not JSON: {EXPECTED}"),
        ('{"subscribe":' + "1" * 60_000 + "}", f"not JSON: {EXPECTED}"),
        ("{}", f"empty command: {EXPECTED}"),
        ('{"subscribe":["XRP"],"op":1}', f"unknown key 'op': {EXPECTED}"),
        ('{"' + "k" * 99 + '":[]}', f"unknown key '{'k' * 40}': {EXPECTED}"),
        ('{"Subscribe":["BTC"]}', f"unknown key 'Subscribe': {EXPECTED}"),
        ('{"subscribe":"BTC"}', f'"subscribe" is not a list of asset ids: {EXPECTED}'),
        ('{"subscribe":["XRP",1]}', f'"subscribe" is not a list of asset ids: {EXPECTED}'),
        ('{"subscribe":["XRP"],"unsubscribe":null}', f'"unsubscribe" is not a list of asset ids: {EXPECTED}'),
        ('{"subscribe":["BTC","doge","CAT"]}', "unknown asset 'CAT': this server tracks BTC, ETH, XRP, ADA"),
        ('{"unsubscribe":["DOGE"]}', "unknown asset 'DOGE': this server tracks BTC, ETH, XRP, ADA"),
        ('{"subscribe":[""]}', "unknown asset '': this server tracks BTC, ETH, XRP, ADA"),
        ('{"subscribe":["XRP","BTC","ETH"],"unsubscribe":["eth","btc"]}', "'BTC' is in both lists"),
    ],
)
def test_any_other_command_is_an_error_that_says_what_there_is(command: str, error: str) -> None:
    assert apply(command) == error


def test_an_error_is_answered_in_json_that_any_client_can_read() -> None:
    assert encode_error(ValueError("unknown asset 'ä\ud800\"'")) == (
        '{"error":"unknown asset \'\\u00e4\\ud800\\"\'"}'  # ASCII: half a surrogate pair is no UTF-8
    )


SAID = [  # (key, item) of a list, mostly valid ones
    *((key, asset) for key in ("subscribe", "unsubscribe") for asset in (*ASSETS, *ASSETS, "btc", " Eth ")),
    *(("subscribe", "DOGE"), ("unsubscribe", ""), ("subscribe", None), ("unsubscribe", ["BTC"]), ("op", "BTC")),
]
TOKENS = [*'{}[]":,\\', '"subscribe":', '"unsubscribe":', '["BTC"]', '"DOGE"', "ä\ud800", "\\ud800", "1e999", "\n"]


@settings(max_examples=800, deadline=None, database=None)
@given(st.binary(max_size=20))  # a byte for each item, because strategies for lists take twice the time
def test_what_is_followed_is_always_what_the_commands_say(data: bytes) -> None:
    followed: tuple[str, ...] = ASSETS
    for start in range(4):  # commands
        command: dict[str, list[Any]] = {}
        for byte in data[start::4]:
            key, item = SAID[byte % len(SAID)]
            command.setdefault(key, []).append(item)
        result, expected = apply(json.dumps(command), followed), model(command, followed)
        assert (None if isinstance(result, str) else result) == expected
        followed = followed if expected is None else expected


def model(command: dict[str, list[Any]], followed: tuple[str, ...]) -> tuple[str, ...] | None:
    """What is followed after a command by the plainest rules; None for one that changes nothing but is an error."""
    wanted, named = set(followed), list[str]()
    for key, items in command.items():
        assets = [str(item).strip().upper() for item in items]
        if key == "op" or any(asset not in ASSETS or asset in named for asset in assets):
            return None
        named += assets
        wanted = wanted | set(assets) if key == "subscribe" else wanted - set(assets)
    return tuple(asset for asset in ASSETS if asset in wanted) if command else None


@settings(max_examples=800, deadline=None, database=None)
@given(st.binary(max_size=32))
def test_no_text_does_more_than_raise_a_value_error(data: bytes) -> None:
    for start in range(4):
        result = apply("{" + "".join([TOKENS[byte % len(TOKENS)] for byte in data[start::4]]))
        assert len(encode_error(ValueError(result)).encode("ascii")) < 300
