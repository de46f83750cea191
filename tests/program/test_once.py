"""tracker --once: one poll, printed."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from calling import LINE, Done
from running import ROOT
from stand_in import KEY, StandIn

from coin_api import PriceUpdate


def test_once_prints_one_json_message_a_line(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    done = run_main("--once", "--assets", "xlm,btc", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.log) == (0, [])
    assert done.out == [
        '{"asset_id":"XLM","price":0.0934,"time":"2021-10-20T21:34:13.0000000Z"}',
        '{"asset_id":"BTC","price":65980.1,"time":"2021-10-20T21:34:13.0000000Z"}',
    ]
    assert len(coin_api.requests) == 1


def test_once_without_an_answer_is_exit_1_with_the_reason(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    coin_api.say(b"", status=503)
    done = run_main("--once", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.out, done.log) == (1, [], ["ERROR CoinAPI answered 503"])


def test_once_with_a_refused_key_is_exit_2(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    coin_api.say(b"", status=401)
    done = run_main("--once", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert (done.status, done.log) == (2, ["ERROR CoinAPI refused the key (401): check COIN_API_KEY"])


class Own:
    """A source whose prices are what `fetch` returns or raises."""

    def __init__(self, fetch: Callable[[], object]):
        self.fetch = fetch

    def fetch_prices(self, asset_ids: object) -> object:
        return self.fetch()


def fail(error: BaseException) -> Iterator[PriceUpdate]:
    yield PriceUpdate("BTC", 1.0, "t")
    raise error


@pytest.mark.parametrize(
    ("fetch", "said"),
    [
        (lambda: {"": ""}["rates\nand more"], r"ERROR unexpected KeyError: 'rates\nand more'"),
        (lambda: None, "ERROR unexpected TypeError: 'NoneType' object is not iterable"),
        (lambda: fail(SystemExit("bye")), "ERROR unexpected SystemExit: bye"),
        (lambda: [], "ERROR no valid price for BTC: not in the response"),
        (lambda: [PriceUpdate("BTC", math.nan, "t")], "ERROR no valid price for BTC: price nan"),
    ],
)
def test_once_without_prices_of_your_own_source_is_exit_1_and_one_line(
    run_main: Callable[..., Done], fetch: Callable[[], object], said: str
) -> None:
    done = run_main("--once", "--assets", "BTC", source=Own(fetch))
    assert (done.status, done.out, done.log) == (1, [], [said])


@pytest.mark.parametrize("bad", [None, math.nan, -1])
def test_once_an_invalid_price_drops_only_its_asset(run_main: Callable[..., Done], bad: float) -> None:
    source = Own(lambda: [None, PriceUpdate("BTC", bad, "t"), PriceUpdate("ETH", 2, "t"), PriceUpdate("DOGE", 1, "t")])
    done = run_main("--once", "--assets", "ETH,BTC", source=source)
    assert (done.status, [json.loads(line)["asset_id"] for line in done.out]) == (0, ["ETH"])
    (line,) = done.log
    assert re.match(r"WARNING no valid price for BTC: price .*DOGE: not tracked$", line)


def test_once_names_an_asset_that_has_no_price(run_main: Callable[..., Done], coin_api: StandIn) -> None:
    done = run_main("--once", "--assets", "BTC,NOPE", COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    assert done.status == 0
    assert len(done.out) == 1
    assert done.log == ["WARNING no valid price for NOPE: not in the response"]


@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("| (exec <&-; wait)", 0, None),
        ("> /dev/full", 1, "ERROR cannot write the prices: No space left on device"),
        (">&-", 1, "ERROR cannot write the prices: stdout is closed"),
    ],
)
def test_once_that_cannot_write_prints_no_traceback(
    monkeypatch: pytest.MonkeyPatch, where: str, status: int, said: str | None
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, nothing is left for Python to write at its end
    command = f'("{sys.executable}" "{ROOT / "tracker.py"}" --demo --once; echo $? >&2) {where}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20)
    assert re.fullmatch(rf"{LINE}{said}\n{status}\n" if said else f"{status}\n", done.stderr)
