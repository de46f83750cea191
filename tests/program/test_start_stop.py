"""tracker: what main hands on, the start-up lines, and every way to end."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Done
from running import ROOT
from stand_in import KEY, StandIn

import system
import tracker
from coin_api import PriceUpdate
from tracker import Poller, main

GOOD = [PriceUpdate("BTC", 1.0, "t"), PriceUpdate("ETH", 2.0, "t")]


class FakePriceServer:
    """Ends as soon as it has a poll's prices, so that main ends too; keeps what it was made with."""

    made: "list[FakePriceServer]" = []  # noqa: RUF012
    port = 4711
    client_count = 0
    client_connected = threading.Event()
    files_asked: "list[int]" = []  # noqa: RUF012

    def __init__(self, assets: tuple[str, ...], host: str, port: int, **options: object):
        self.assets = assets
        self.options = options | {"host": host, "port": port}
        self.last_error: str | None = None
        self.is_over = False
        self.deadline = time.monotonic() + 10  # a fault fails the test, and does not hang it
        self.calls: list[object] = []
        self.on_housekeeping: Callable[[], None] | None = None
        self.made.append(self)

    @staticmethod
    def files_needed(max_clients: int) -> int:
        return max_clients + 50

    @property
    def has_ended(self) -> bool:
        return self.is_over or time.monotonic() > self.deadline

    def publish(self, updates: list[PriceUpdate], expect_all: bool) -> list[str]:
        self.is_over = True
        return [update.asset_id for update in updates]

    def report_failure(self, reason: str, cause: str) -> None:
        self.last_error = reason
        self.is_over = True

    def note_poll(self, seconds: float, credits_used: int | None, credits_left: int | None) -> None:
        pass

    def pause(self) -> None:
        pass

    def run_forever(self, threaded: bool) -> None:
        self.calls.append(threaded)

    def shutdown_gracefully(self, status: int, reason: bytes) -> None:
        self.calls.append((status, reason))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakePriceServer]:
    """The servers that main made, in place of real ones."""
    FakePriceServer.made.clear()
    FakePriceServer.files_asked.clear()
    monkeypatch.setattr(tracker, "PriceServer", FakePriceServer)
    monkeypatch.setattr(system, "raise_file_limit", FakePriceServer.files_asked.append)
    return FakePriceServer.made


def test_every_flag_reaches_the_server(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    flags = "--demo --assets sol,btc --quote eur --interval 7.5 --host 127.0.0.2 --port 3031 --max-clients 99 "
    flags += "--allow-origin https://a.example --allow-origin https://b.example --history x.db --pause-when-idle"
    run_main(*flags.replace("--pause-when-idle", "").split())
    (server,) = made
    assert server.assets == ("SOL", "BTC")
    expected = {"host": "127.0.0.2", "port": 3031, "quote": "EUR", "source": "demo", "interval": 7.5, "max_clients": 99}
    expected |= {"allow_origins": ["https://a.example", "https://b.example"], "history_file": "x.db"}
    assert server.options == expected | {"pause_when_idle": False}
    assert server.calls == [True, (1001, b"server is stopping")]
    assert server.files_asked == [149], "before the server is made, which fits its clients into them"


def test_your_own_source_is_asked_and_named_in_place_of_coinapi(
    run_main: Callable[..., Done], made: list[FakePriceServer]
) -> None:
    class Own:
        def fetch_prices(self, asset_ids: object) -> list[PriceUpdate]:
            return GOOD

    assert "tracking BTC" in run_main("--assets", "BTC", source=Own()).log[1]
    assert made[0].options["source"] == "Own"
    run_main("--demo", source=Own())
    assert made[1].options["source"] == "demo"


def test_quote_interval_and_pause_reach_the_poller_and_coinapi(
    run_main: Callable[..., Done], made: list[FakePriceServer], coin_api: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class WatchedPoller(Poller):
        def run(self) -> None:
            asked.extend([self.interval, self.pause_when_idle, self.server])
            self.pause_when_idle = False
            super().run()

    monkeypatch.setattr(tracker, "Poller", WatchedPoller)
    monkeypatch.setattr(tracker, "DEFAULT_URL", coin_api.url)
    flags = ("--quote", "eur", "--interval", "9", "--pause-when-idle")
    run_main(*flags, COIN_API_KEY=f" {KEY} ", COIN_API_URL="")  # as without the address
    assert asked == [9.0, True, made[0]]
    assert coin_api.requests[0].path == "/v1/exchangerate/EUR"
    assert coin_api.requests[0].headers["X-CoinAPI-Key"] == KEY
    assert made[0].options["source"] == "coinapi"
    assert made[0].options["pause_when_idle"] is True


@pytest.mark.parametrize(
    ("flags", "address", "what"),
    [
        ("--assets BTC,ETH", "127.0.0.1", "tracking BTC, ETH in USD: 1 request every 5 s, 17,280 a day"),
        (
            "--host ::1 --assets BTC --interval 0.5 --quote eur --pause-when-idle",
            "[::1]",
            "tracking BTC in EUR: 1 request every 0.5 s, 172,800 a day at most",
        ),
        ("--host 0.0.0.0 --demo --assets BTC", "127.0.0.1", "DEMO, simulated prices: BTC in USD every 5 s"),
        ("--host :: --demo --assets BTC", "[::1]", "DEMO, simulated prices: BTC in USD every 5 s"),
    ],
)
def test_the_start_up_lines_name_the_addresses_and_what_the_interval_costs(
    run_main: Callable[..., Done],
    made: list[FakePriceServer],
    coin_api: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    address: str,
    what: str,
) -> None:
    monkeypatch.setattr(FakePriceServer, "run_forever", lambda server, threaded: setattr(server, "is_over", True))
    done = run_main(*flags.split(), COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
    everywhere = ", on all addresses of this machine" if "--demo" in flags else ""
    first = f"INFO page http://{address}:4711/ and WebSocket ws://{address}:4711/ws{everywhere}"
    assert done.log[:2] == [first, f"INFO {what}"]


def test_a_busy_thread_cannot_keep_the_interpreter_from_the_sending_one() -> None:
    # In a process of its own: the one of the tests has the same interval.
    program = "import sys, tracker; tracker.main(['--demo', '--once']); print(sys.getswitchinterval())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(0.0002)


def test_the_log_level_is_the_least_that_is_logged(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    assert [line.split()[0] for line in run_main("--demo", "--log-level", "error").log] == ["ERROR"]
    assert "DEBUG polled: 10 prices" in run_main("--demo", "--log-level", "debug").log


def test_a_server_that_ends_unasked_is_exit_1(run_main: Callable[..., Done], made: list[FakePriceServer]) -> None:
    done = run_main("--demo")
    assert done.status == 1
    assert done.log[-1] == "ERROR the server's thread has ended"
    pollers = [thread for thread in threading.enumerate() if thread.name == "poller"]
    for poller in pollers:
        poller.join(2)  # its interval is 5 s
        assert not poller.is_alive()


def refuse_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("name", ["log", "poller"])
def test_a_thread_that_cannot_be_started_is_exit_1_and_one_line(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run_main: Callable[..., Done],
    made: list[FakePriceServer],
    name: str,
) -> None:
    refuse_thread(monkeypatch, name)
    if name == "log":
        assert main(["--demo"]) == 1
        assert capfd.readouterr().err == "tracker.py: can't start new thread\n"
        return
    done = run_main("--demo")
    assert done.status == 1
    assert "ERROR cannot start: can't start new thread" in done.log
    assert made[0].calls == [True, (1001, b"server is stopping")]


@pytest.mark.parametrize("name", ["archive", "server"])
def test_a_server_without_one_of_its_threads_is_exit_1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., Done], tmp_path: Path, name: str
) -> None:
    refuse_thread(monkeypatch, name)
    done = run_main("--demo", "--port", "0", "--history", str(tmp_path / "past.db"))
    assert (done.status, done.log[0]) == (1, "ERROR cannot start: can't start new thread")


def test_a_port_that_is_taken_is_exit_1_and_one_line(run_main: Callable[..., Done]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_main("--demo", "--port", str(port))
    assert done.status == 1
    assert done.log == [
        f"ERROR cannot listen on 127.0.0.1 port {port}: Address already in use; choose with --host, --port"
    ]


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.1"])
def test_a_host_that_is_not_available_is_exit_1_and_one_line(run_main: Callable[..., Done], host: str) -> None:
    done = run_main("--demo", "--host", host)
    assert done.status == 1
    assert len(done.log) == 1
    assert re.fullmatch(rf"ERROR cannot listen on {host} port 3030: .+", done.log[0])
