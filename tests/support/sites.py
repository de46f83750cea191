"""A web.Site without a socket: what tests ask it, its responses as a client understands them, and fixtures."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPResponse
from pathlib import Path
from typing import NamedTuple

import pytest

from coin_api import PriceUpdate
from price_server.history import History
from price_server.prices import Prices, split_valid
from price_server.status import Status
from price_server.web import NewClient, Response, Site

ALL = ("BTC", "ETH", "SOL")
AT = "2026-11-22T07:44:05.1234567Z"


class Past(History):
    """A history that answers with what it was asked."""

    def json_pieces(self, range_name: str, assets: tuple[str, ...]) -> list[bytes]:
        return [json.dumps({range_name: assets}, separators=(", ", ":")).encode()]

    def csv(self, range_name: str, assets: Iterable[str]) -> Iterator[bytes]:
        yield b"time,asset_id,price\n"
        yield from (f"{range_name},{asset},1.0\n".encode() for asset in assets)


class Got(NamedTuple):
    """A response as a client understands it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    refused: str

    @property
    def error(self) -> str:
        """What its JSON says, and nothing else."""
        assert self.headers["Content-Type"] == "application/json"
        (field,) = json.loads(self.body).items()
        assert field[0] == "error"
        return field[1]


def read(response: Response, method: str = "GET") -> Got:
    body = b"".join(response.body)

    class Wire:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(response.head + body)

    parsed = HTTPResponse(Wire(), method=method)  # type: ignore[arg-type]
    parsed.begin()
    headers = dict(parsed.getheaders())
    assert len(headers) == len(parsed.getheaders()), "a header comes twice"
    assert parsed.status == response.status
    if method == "HEAD" or parsed.status in (204, 304):
        assert body == b""
    elif "Content-Disposition" not in headers:
        assert len(body) == int(headers["Content-Length"])
    return Got(parsed.status, headers, body, response.refused)


def send(site: Site, head: bytes) -> Got:
    """The response to this head."""
    response = site.respond(head)
    assert isinstance(response, Response)
    return read(response, head.partition(b" ")[0].decode("latin-1"))


def get(site: Site, target: str, method: str = "GET", **headers: str) -> Got:
    fields = {"Host": "here:3030"} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return send(site, f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))


def client(site: Site, head: bytes) -> NewClient:
    made = site.respond(head)
    assert isinstance(made, NewClient)
    return made


def poll(site: Site, **prices: float) -> None:
    updates = [PriceUpdate(asset, price, AT) for asset, price in prices.items()]
    site.prices.remember(split_valid(updates, prices)[0])
    site.status.note_success()


def make_site(folder: Path, *allow_origins: str, assets: tuple[str, ...] = ALL) -> Site:
    prices, past = Prices(assets), Past(assets)
    status = Status(prices, past, age_clock=lambda: 0.0, wall_clock=lambda: 1_800_000_000.25)
    return Site(prices, past, status, allow_origins=allow_origins, folder=folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "page"
    (folder / "sub").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>" + " " * 500)
    (folder / "main.js").write_text("1;" * 500)
    (folder / "sub" / "logo.png").write_bytes(b"png")
    (folder / "prices").write_text("a route wins")
    (folder.parent / "secret.txt").write_text("secret")
    return folder


@pytest.fixture
def site(folder: Path) -> Site:
    """Of a server without prices."""
    return make_site(folder)


@pytest.fixture
def priced(site: Site) -> Site:
    poll(site, BTC=45000.0, ETH=2500.5, SOL=177.25)
    return site


@pytest.fixture
def narrowed(folder: Path) -> Site:
    """Of a server that only some pages may read."""
    return make_site(folder, "https://Example.org/", "http://localhost:8080")
