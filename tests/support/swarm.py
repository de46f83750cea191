"""Clients in a process of their own, so that their work does not delay what a test measures."""

import json
import os
import subprocess
import sys
import threading
from typing import Any

from running import ROOT

TIMEOUT = 60.0  # seconds until a process that says nothing is ended


class Swarm:
    """`with Swarm(__file__, "hold", port, 8_000) as swarm:` runs `python FILE hold PORT 8000` until the block ends.

    Its connections go with it. It says lines of JSON.
    """

    def __init__(self, file: str, what: str, *numbers: int):
        self.process = subprocess.Popen(
            [sys.executable, file, what, *map(str, numbers)],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes its pipes
            self.process.kill()

    def ask(self) -> Any:
        """Send a line, and return what it says to it."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        """What it says next; `{"error": ...}` when it ends instead."""
        assert self.process.stdout
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        try:
            return json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        finally:
            timer.cancel()

    def end(self) -> None:
        """Close its stdin, and wait for it to end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(TIMEOUT)
