"""Mutation testing, started by hand: of small faults put into a room, how many do its quick tests notice?

    .venv/bin/pip install -q mutmut==3.8.1 && .venv/bin/python tests/bench/mutate.py [--all] [ROOM...]

mutmut (on Linux and macOS) puts the faults, one at a time, into a copy of the program. Without --all
it takes 200 of each room at random. Exit status 1 when under 90 of 100 are noticed in one.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 200  # faults of each room
ENOUGH = 0.9  # of them noticed
TESTS = {  # of each room that is a function of what comes in
    "coin_api.py": "tests/unit/test_coin_api.py",
    "price_server/frames.py": "tests/unit/test_frames.py",
    "price_server/outbox.py": "tests/unit/test_outbox.py",
    "price_server/connection.py": "tests/unit/test_connection.py",
    "price_server/prices.py": "tests/unit/test_prices.py",
    "price_server/commands.py": "tests/unit/test_commands.py",
    "price_server/web.py": "tests/unit/test_web.py\n    tests/unit/test_web_feed.py",
    "price_server/status.py": "tests/unit/test_status.py",
    "price_server/history.py": "tests/unit/test_history.py",
}
# mutmut runs in a directory `mutants`, where pytest must find its settings, or it tests the program beside it.
SETTINGS = """[mutmut]
source_paths =
    .
only_mutate =
    {room}
also_copy =
    .pytest.ini
pytest_add_cli_args =
    --numprocesses=0
pytest_add_cli_args_test_selection =
    {tests}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="How many faults put into a room do its tests notice?")
    parser.add_argument("rooms", nargs="*", default=list(TESTS), choices=list(TESTS), metavar="ROOM")
    parser.add_argument("--all", action="store_true", help=f"all faults, not {SAMPLE} of each room")
    options = parser.parse_args()
    shares = [put_faults(room, None if options.all else SAMPLE) for room in options.rooms]
    return 0 if min(shares) >= ENOUGH else 1


def put_faults(room: str, number: int | None) -> float:
    """Print what became of the faults and which were missed; return the share that was noticed."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for file in (*ROOT.glob("*.py"), ROOT / ".pytest.ini"):
            shutil.copy(file, copy)
        for name in ("price_server", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "setup.cfg").write_text(SETTINGS.format(room=room, tests=TESTS[room]))
        output = mutmut(copy, "run", "none of them")  # makes all and tries none
        faults = list(not_noticed(copy))
        if not faults:
            sys.exit(f"mutmut made no faults in {room}:\n{output}")
        if number is not None:
            faults = random.sample(faults, min(number, len(faults)))
        output = mutmut(copy, "run", *faults)
        statuses = not_noticed(copy)
        if "Mutant results" not in output:
            sys.exit(f"mutmut failed in {room}:\n{output}")
        missed = sorted(fault for fault in faults if statuses.get(fault, "timeout") != "timeout")
        share = 1 - len(missed) / len(faults)
        print(f"{room}: {len(faults) - len(missed)} of {len(faults)} noticed ({share:.1%})", flush=True)
        for fault in missed:
            changes = [line for line in mutmut(copy, "show", fault).splitlines() if line[:2] in ("- ", "+ ")]
            print(f"  {statuses[fault]} {fault}", *changes, sep="\n    ", flush=True)
    return share


def mutmut(directory: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(
        command, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.stdout


def not_noticed(directory: Path) -> dict[str, str]:
    """What mutmut says of each fault that no test noticed, or that was not tried yet."""
    lines = mutmut(directory, "results").splitlines()
    return dict(line.strip().split(": ", 1) for line in lines if line.startswith("    "))


if __name__ == "__main__":
    sys.exit(main())
