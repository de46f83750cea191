"""The CoinAPI of the soak: its price is a counter of its good answers; it can fail."""

import json
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from running import ASSETS
from stand_in import OUT_OF_CREDITS, StandIn, rates_body

WITHOUT_DOT = 50  # every so many polls, DOT has no rate


class Source(StandIn):
    """Counts its good answers; `fail` makes the next ones bad."""

    def __init__(self) -> None:
        super().__init__()
        self.good = 0
        self.bad: Counter[str] = Counter()
        self.trouble = ""
        self.left = 0  # bad answers still to give
        self.answer = self.reply

    def __enter__(self) -> "Source":
        super().__enter__()
        return self

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        if self.left:
            self.left -= 1
            self.bad[self.trouble] += 1
            TROUBLES[self.trouble](self, handler)
            return
        self.good += 1
        rates = dict.fromkeys(ASSETS, float(self.good))
        if self.good % WITHOUT_DOT == 0:
            rates.pop("DOT")
        self.send(handler, rates_body(rates))

    def fail(self, trouble: str, times: int) -> None:
        self.trouble, self.left = trouble, times


def _status(status: int, body: bytes = b'{"error": "no"}', **headers: str) -> Callable[..., None]:
    return lambda source, handler: source.send(handler, body, status, **headers)


def _hang_up(source: Source, handler: BaseHTTPRequestHandler, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    handler.close_connection = True


def _drip(source: Source, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(15):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(1)
    handler.close_connection = True


def _raw(answer: bytes) -> Callable[..., None]:
    def write(source: Source, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(answer)
        handler.close_connection = True

    return write


TROUBLES: dict[str, Callable[[Source, BaseHTTPRequestHandler], None]] = {
    "503, retry after 1 s": _status(503, Retry_After="1"),
    "401": _status(401),
    "403, out of credits": _status(403, json.dumps(OUT_OF_CREDITS).encode()),
    "redirect": _status(302, Location="http://127.0.0.1:9/"),
    "not JSON": _status(200, b"<html>"),
    "no valid rate": _status(200, b'{"rates": [{"asset_id_quote": "BTC", "rate": null, "time": "x"}]}'),
    "over 1 MiB": _status(200, b" " * (1 << 20) + b"{}"),
    "no HTTP": _raw(b"\x16\x03\x01 no HTTP at all\r\n\r\n"),
    "half an answer": _raw(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"rates": ['),
    "hangs up": _hang_up,
}
SHORT = tuple(TROUBLES)
SLOW_TROUBLES: dict[str, Callable[[Source, BaseHTTPRequestHandler], None]] = {
    "silent for 12 s": lambda source, handler: _hang_up(source, handler, 12),
    "drips": _drip,
}
LONG = SHORT + tuple(SLOW_TROUBLES)
TROUBLES |= SLOW_TROUBLES | {"the end": _status(500)}
