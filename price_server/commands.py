"""What a client may say: {"subscribe": ["BTC"], "unsubscribe": ["ETH"]}.

A text message that begins with `{` is a command; every other message is ignored, because some clients send a
"ping" of their own.
"""

import json

from .prices import Prices

KEYS = ("subscribe", "unsubscribe")
EXPECTED = 'send {"subscribe": ["BTC"]}, {"unsubscribe": ["BTC"]} or both in one'


def is_command(message: str | bytes) -> bool:
    return isinstance(message, str) and message.startswith("{")


def apply_command(text: str, followed: tuple[str, ...], prices: Prices) -> tuple[str, ...]:
    """The assets that a client follows after a command, in the order tracked.

    Raises ValueError for an invalid command; its text is for the client.
    """
    try:
        command = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {EXPECTED}") from None
    for key in command:
        if key not in KEYS:
            raise ValueError(f"unknown key {key[:40]!r}: {EXPECTED}")
    if not command:
        raise ValueError(f"empty command: {EXPECTED}")
    # Sets, because tuples of 400 assets would take milliseconds.
    subscribe, unsubscribe = (set(prices.choose(_read_ids(command, key))) for key in KEYS)
    for asset_id in sorted(subscribe & unsubscribe):
        raise ValueError(f"{asset_id!r} is in both lists")
    chosen = (subscribe | set(followed)) - unsubscribe
    return tuple(asset for asset in prices.assets if asset in chosen)


def _read_ids(command: dict[str, object], key: str) -> list[str]:
    ids = command.get(key, [])
    if not isinstance(ids, list) or not all(isinstance(asset_id, str) for asset_id in ids):
        raise ValueError(f'"{key}" is not a list of asset ids: {EXPECTED}')
    return ids


def encode_error(error: ValueError) -> str:
    """The message that answers an invalid command."""
    return json.dumps({"error": str(error)}, separators=(",", ":"))
