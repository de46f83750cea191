"""Some seconds of the soak and of the storm, so that they work when they are wanted."""

import subprocess
import sys
from pathlib import Path


def run(*arguments: str) -> str:
    """What the soak prints; it must pass."""
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ten_seconds_of_the_soak_pass() -> None:
    assert "polls checked" in run("--minutes", "0.17", "--clients", "150")


def test_a_small_storm_passes_however_slow_the_machine_is() -> None:
    output = run("--storm", "--scale", "0.02", "--seconds", "2", "--wait", "60")
    assert "100 dribbler connections, 20 historyreader connections, 1 pinger connections" in output
