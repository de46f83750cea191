"""A process of its own that talks with a test in lines of JSON, so that its work does not delay what is measured."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, Self

from running import ROOT

TIMEOUT = 60.0  # seconds until a process that says nothing is ended


class Trouble(Exception):
    """A child failed; the text says how."""


class Child:
    """`with Child(*command) as child:` runs it until the block ends; environment: set on top of this process's."""

    def __init__(self, *command: str, **environment: str):
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.errors, self.process:  # closes its pipes
            self.process.kill()

    def ask(self, line: str = "", seconds: float = TIMEOUT) -> Any:
        """Send a line, and return what it says to it."""
        assert self.process.stdin
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: `receive` says so
        return self.receive(seconds)

    def receive(self, seconds: float = TIMEOUT) -> Any:
        """What it says next. Raises Trouble when that is an `error`, or nothing."""
        assert self.process.stdout
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise Trouble(f"it ended, or said nothing for {seconds:g} s; {self.last_error()}".rstrip("; "))
        said = json.loads(line)
        if isinstance(said, dict) and "error" in said:
            raise Trouble(said["error"])
        return said

    def last_error(self) -> str:
        """The last line that it wrote on stderr."""
        self.errors.seek(0)
        return next((line for line in reversed(self.errors.read().splitlines()) if line.strip("- ")), "")


class Clients(Child):
    """`Clients(__file__, "hold", port, 8_000)` runs `python FILE hold PORT 8000`: clients that go with the process."""

    def __init__(self, file: str, what: str, *numbers: int):
        path = f"{ROOT}:{ROOT / 'tests' / 'support'}"
        super().__init__(sys.executable, file, what, *map(str, numbers), PYTHONPATH=path)

    def end(self) -> None:
        """Close its stdin, and wait for it to end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(TIMEOUT)
