"""options: each kind of wrong usage, its exit status and one plain line."""

from collections.abc import Callable

import pytest
from calling import Done
from running import ASSETS
from stand_in import KEY

from options import parse_arguments
from price_server import __version__


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[
            (("--interval", bad), f"{bad!r} is not a number of seconds from 0.1 to 86,400")
            for bad in ("0", "-1", "NaN", "soon", "1e9", "", "0.05")
        ],
        *[
            (("--assets", bad), "is not an asset id like BTC")
            for bad in ("", "BTC,,ETH", "B C", "BTC;ETH", "ſ", "A" * 33, "..", "BTC/USD", "BTC?x=1", "BTC\nETH", "бтц")
        ],
        *[(("--quote", bad), "is not a currency like USD") for bad in ("", "US D", "../x", "USD,EUR")],
        *[(("--port", bad), "is not a port from 0 to 65,535") for bad in ("-1", "65536", "http", "1.5")],
        *[(("--max-clients", bad), "is not a number of clients from 1 to 1,000,000") for bad in ("0", "1000001", "x")],
        *[
            (("--allow-origin", bad), f"{bad!r} is not an origin like https://example.org")
            for bad in ("example.org", "https://a/b", "*", "")
        ],
        *[(("--host", bad), f"{bad!r} is not an address") for bad in ("", " ", "ö" * 70, "x" * 70, "a..b", "\udcff")],
        (("--history", ""), "'' is not a file name"),
        (("--history", "prices.db", "--once"), "--history: --once keeps no prices"),
        (("--log-level", "loud"), "invalid choice: 'loud'"),
        (("--wat\nline",), "unrecognized arguments: --wat line"),
        (("--int", "5"), "unrecognized arguments"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    run_main: Callable[..., Done], arguments: tuple[str, ...], said: str
) -> None:
    done = run_main("--demo", "--once", *arguments)
    assert (done.status, done.out) == (2, [])
    assert len(done.log) == 1
    assert done.log[0].startswith("ERROR ")
    assert said in done.log[0]
    assert done.log[0].endswith("(see --help)")


@pytest.mark.parametrize("environment", [{}, {"COIN_API_KEY": ""}, {"COIN_API_KEY": "  "}])
def test_no_key_says_what_to_set_and_does_not_start_the_demo(
    run_main: Callable[..., Done], environment: dict[str, str]
) -> None:
    done = run_main("--once", **environment)
    assert (done.status, done.out) == (2, [])
    assert done.log == [
        "ERROR COIN_API_KEY is not set: set it to your key from CoinAPI, or try --demo, which needs none"
    ]


def test_http_to_another_machine_is_wrong_usage(run_main: Callable[..., Done]) -> None:
    done = run_main("--once", COIN_API_KEY=KEY, COIN_API_URL="http://example.org")
    assert done.status == 2
    (line,) = done.log
    assert "'http://example.org'" in line
    assert "use https" in line
    assert KEY not in line


def test_a_key_that_no_header_can_carry_is_wrong_usage(run_main: Callable[..., Done]) -> None:
    done = run_main("--once", COIN_API_KEY="my secret")
    assert done.status == 2
    assert "secret" not in done.log[0]


def test_asset_ids_are_upper_cased_and_taken_once() -> None:
    options = parse_arguments(["--assets", "btc, Eth,BTC,usdt_x", "--quote", "eur"])
    assert options.assets == ("BTC", "ETH", "USDT_X")
    assert options.quote == "EUR"


def test_several_origins_can_be_allowed() -> None:
    arguments = ["--allow-origin", "HTTPS://Example.org:443/", "--allow-origin", "null"]
    assert parse_arguments(arguments).allow_origin == ["https://example.org", "null"]


def test_version_prints_the_version_and_nothing_else(run_main: Callable[..., Done]) -> None:
    done = run_main("--version")
    assert (done.status, done.out, done.log) == (0, [__version__], [])


@pytest.mark.parametrize("key", [f'"{KEY}"', f"'{KEY}'", f' "{KEY}" ', f'{KEY}"', '""'])
def test_quotes_around_the_key_are_named(run_main: Callable[..., Done], key: str) -> None:
    done = run_main("--once", COIN_API_KEY=key)
    assert done.status == 2
    (line,) = done.log
    assert line.startswith("ERROR COIN_API_KEY has quotes around it")
    assert KEY not in line


def test_the_defaults_are_ten_assets_in_usd_every_5_s_on_port_3030() -> None:
    options = parse_arguments([])
    assert options.assets == ASSETS
    assert (options.quote, options.interval, options.host, options.port) == ("USD", 5.0, "127.0.0.1", 3030)
    assert (options.max_clients, options.log_level, options.demo) == (10_000, "info", False)
    assert (options.history, options.once, options.pause_when_idle, options.allow_origin) == (None, False, False, [])


def test_help_names_the_environment_every_range_and_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("COIN_API_KEY", "COIN_API_URL", "0.1 to 86,400", "0 to 65,535", "1 to 1,000,000", "https://rest.coin"):
        assert part in said
    for status in ("0 stopped by a signal", "1 could not start", "2 something must be changed first"):
        assert status in said
