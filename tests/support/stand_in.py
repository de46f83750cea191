"""A stand-in for CoinAPI over real HTTP, on loopback: recorded bodies and headers, and whatever a test wants."""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

KEY = "73034021-THIS-IS-SAMPLE-KEY"
# As recorded from the real service, in another order than asked for.
RATES = {
    "SOL": 177.53412345678901,
    "BTC": 65980.1,
    "ETH": 4166.207274778093436220194944,
    "XRP": 1.1234,
    "BCH": 634.5,
    "ADA": 2.2093,
    "LTC": 207.43,
    "LINK": 27.81,
    "XLM": 0.0934,
    "DOT": 44.4,
}
HEADERS = {
    "Content-Type": "application/json; charset=utf-8",
    "x-concurrencylimit-limit": "10",
    "x-concurrencylimit-remaining": "10",
    "x-ratelimit-used": "166181",
    "x-ratelimit-overage": "enabled",
    "x-ratelimit-limit": "100000",
    "x-ratelimit-remaining": "-66181",
    "x-ratelimit-reset": "2021-10-21T21:34:47.2685710Z",
    "x-ratelimit-request-cost": "1",
}
OUT_OF_CREDITS = {
    "title": "Forbidden",
    "status": 403,
    "detail": "Quota exceeded: Insufficient Usage Credits or Subscription.",
    "error": "Forbidden (Quota exceeded: Insufficient Usage Credits or Subscription.)",
    "QuotaKey": "BA",
}


def rates_body(rates: dict[str, Any], quote: str = "USD", at: str = "2021-10-20T21:34:13.0000000Z") -> bytes:
    """The body of a batched answer with these rates."""
    items = [{"time": at, "asset_id_quote": asset_id, "rate": rate} for asset_id, rate in rates.items()]
    return json.dumps({"asset_id_base": quote, "rates": items}).encode()


class Request(NamedTuple):
    at: float  # monotonic seconds
    path: str
    query: dict[str, list[str]]
    headers: Message


class StandIn:
    """`with StandIn() as coin_api:` serves at `coin_api.url` until the block ends.

    tls: a server's context; with it the address is https.
    answer: called with the request's handler for each request; the default sends `rates`.
    requests: what was asked, in order.
    """

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None):
        self.rates: dict[str, Any] = dict(RATES)
        self.requests: list[Request] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self.send_rates
        self.answered_at = 0.0  # monotonic seconds when the last byte of the last answer was sent
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                stand_in.requests.append(Request(time.monotonic(), url.path, parse_qs(url.query), self.headers))
                stand_in.answer(self)
                self.wfile.flush()
                stand_in.answered_at = time.monotonic()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up in the middle are what the tests are about

        self.server = Server(("127.0.0.1", port), Handler)
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_address[1]}"

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
        handler.send_response(status)
        for name, value in (HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def send_rates(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path)
        wanted = parse_qs(path.query)["filter_asset_id"][0].split(",")
        rates = {asset_id: rate for asset_id, rate in self.rates.items() if asset_id in wanted}
        self.send(handler, rates_body(rates, quote=path.path.rpartition("/")[2]))

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        """From now on answer each request with this."""
        self.answer = lambda handler: self.send(handler, body, status, **headers)

    def recover(self) -> None:
        """From now on answer with the rates again."""
        self.answer = self.send_rates

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Peer:
    """`with Peer() as peer:` each connection to `peer.address` is served, in a thread of its own, until it is lost."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self.serve(client)


class EventStream(Peer):
    """Answers each request as `/stream` does, and sends events when it is told to.

    asked: set when somebody follows the stream. HAProxy's checks get an empty answer.
    """

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Accel-Buffering: no\r\nConnection: close\r\n\r\n"

    def __init__(self) -> None:
        super().__init__()
        self.port = self.listener.getsockname()[1]
        self.asked = threading.Event()
        self._followers: list[socket.socket] = []

    def serve(self, client: socket.socket) -> None:
        if b"/stream" not in client.recv(4096):
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        client.sendall(self.HEAD)
        self._followers.append(client)
        self.asked.set()
        client.recv(1)  # until the other side hangs up

    def send(self, text: str) -> None:
        for follower in self._followers:
            follower.sendall(f"data: {text}\n\n".encode())
