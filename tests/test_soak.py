"""Ten seconds of the soak, so that it works when it is wanted."""

import subprocess
import sys
from pathlib import Path


def test_ten_seconds_of_the_soak_pass() -> None:
    soak = str(Path(__file__).with_name("soak.py"))
    command = [sys.executable, soak, "--minutes", "0.17", "--clients", "150"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "polls checked" in done.stdout
