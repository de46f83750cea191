"""The benchmark in small, so that it cannot rot. Nothing here depends on how long anything takes."""

import subprocess
import sys
from pathlib import Path

from bench_fanout import SIDES, installed


def test_the_benchmark_measures_every_installed_side_and_none_loses_a_byte():
    bench = Path(__file__).with_name("bench_fanout.py")
    command = [sys.executable, str(bench), "--clients", "100", "--rounds", "3", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("Every client got every byte.\n")
    table = result.stdout.partition("### 100 clients, 3 rounds")[2].partition("###")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    for side in SIDES:
        version = installed(side)
        if version is None:
            assert f"Left out: {side.name}," in result.stdout
        else:
            cells = rows[f"{side.name} {version}".rstrip()].split("|")[2:-1]
            assert len([float(cell.replace(",", "")) for cell in cells]) == 8
