"""What comes of a call in the test's own process: of `main` (the fixture `run_main`), and of a poll that fails."""

import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import system
from coin_api import CoinApi, CoinApiError
from tracker import main

LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d "  # how a line of the log begins


class Done:
    """What came of main: its status, and what it wrote."""

    def __init__(self, status: int, out: str, err: str):
        self.status = status
        self.out = out.splitlines()
        lines = [re.fullmatch(rf"{LINE}(.*)", line) for line in err.splitlines()]
        assert all(lines), err
        self.log = [line[1] for line in lines if line]


@pytest.fixture
def run_main(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Done]]:
    """Calls main in this process; keywords are its environment."""
    handlers = {number: signal.getsignal(number) for number in system.SIGNALS}
    monkeypatch.setattr(system, "FLUSH_TIMEOUT", 10.0)  # whatever else this machine does
    for name in ("COIN_API_KEY", "COIN_API_URL", "NOTIFY_SOCKET", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)

    def run_it(*arguments: str, source: Any = None, **environment: str) -> Done:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        try:
            status = main(arguments, source)
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Done(status, *capfd.readouterr())

    yield run_it
    for number, handler in handlers.items():
        signal.signal(number, handler)


def error_of(api: CoinApi, *assets: str) -> CoinApiError:
    with pytest.raises(CoinApiError) as caught:
        api.fetch_prices(assets or ("BTC", "ETH"))
    assert "\n" not in str(caught.value)
    return caught.value
