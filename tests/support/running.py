"""A tracker that runs in a process of its own, as users run it, and what tests need around it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ("BTC", "ETH", "XRP", "BCH", "ADA", "LTC", "LINK", "XLM", "DOT", "SOL")


def wait_for(condition: Callable[[], object], seconds: float = 30.0, what: str = "") -> None:
    """Return as soon as the condition holds; AssertionError when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.01)


def outside(*programs: str) -> None:
    """Skip the test where these programs are not installed; in CI they have to be."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@contextlib.contextmanager
def run_script(script: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs this; it is killed at the end, and after half a minute in any case."""
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job of a shell ignores it
    command = [sys.executable, "-u", "-c", heard + script]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        alarm = threading.Timer(30, process.kill)
        alarm.start()
        stack.callback(process.kill)
        stack.callback(alarm.cancel)
        yield process


class Tracker:
    """`with Tracker("--demo") as tracker:` runs `python tracker.py --port 0 --demo` until the block ends.

    program: what runs in its place. before: what stands before the command, like nohup.
    environment: set on top of one without COIN_API_KEY and COIN_API_URL.
    """

    def __init__(self, *arguments: str, program: str = "tracker.py", before: tuple[str, ...] = (), **environment: str):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("COIN_API_")}
        if "--port" not in arguments:
            arguments = ("--port", "0", *arguments)
        self.process = subprocess.Popen(
            [*before, sys.executable, str(ROOT / program), *arguments],
            env=inherited | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []  # lines of stderr so far
        self.port = 0
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def __enter__(self) -> "Tracker":
        wait_for(lambda: self.find(r"ws://\S+:(\d+)/ws") or self.process.poll() is not None, what="the address line")
        found = self.find(r"ws://\S+:(\d+)/ws")
        assert found, f"did not start: {self.log}"
        self.port = int(found[1])
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr
        self.process.stderr.close()

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def text(self) -> str:
        """The whole log so far."""
        return "\n".join(self.log)

    def find(self, pattern: str) -> re.Match[str] | None:
        """The first match in the log so far."""
        return next((match for line in list(self.log) if (match := re.search(pattern, line))), None)

    def wait_for_log(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        wait_for(lambda: self.find(pattern), seconds, f"{pattern!r} in the log")
        match = self.find(pattern)
        assert match
        return match

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        """Send the signal, wait, and return the exit status."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 20.0) -> int:
        status = self.process.wait(seconds)
        self._reader.join(seconds)
        return status

    def usage(self) -> tuple[int, int, int, float]:
        """Of the process now: threads, open files, bytes of memory, seconds of CPU."""
        process = psutil.Process(self.process.pid)
        times = process.cpu_times()
        return process.num_threads(), process.num_fds(), process.memory_info().rss, times.user + times.system
