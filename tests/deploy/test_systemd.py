"""The units of deploy/, and its README's commands for installing, upgrading and backing up."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from proxies import DEPLOY, deployed, get, put, readme_block
from running import ROOT, Tracker, outside, wait_for

from price_server import PriceServer

UNITS = ("price-tracker.service", "price-tracker@.service")
INSTALL, KEY, UPGRADE_EACH, CLEAN, BACKUP, RESTORE = map(
    readme_block, ("pip install", "your-key\nPRICE", "list-units", "xargs", "VACUUM", "backup=")
)


# The units


def settings(name: str) -> dict[str, str]:
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit_and_finds_it_safe(tmp_path: Path, name: str) -> None:
    outside("systemd-analyze")
    here = (("venv/bin/python", sys.executable), ("tracker.py", ROOT / "tracker.py"))
    unit = deployed(name, *((f"/opt/price-tracker/{installed}", path) for installed, path in here))
    (tmp_path / name).write_text(unit)
    instance = tmp_path / name.replace("@", "@3031")
    verify = subprocess.run(["systemd-analyze", "verify", instance], capture_output=True, text=True)
    # An unknown setting is only a warning, and other units of this machine may have some too.
    assert [line for line in verify.stderr.splitlines() if "price-tracker" in line] == []
    assert verify.returncode == 0, verify.stderr
    security = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager"]
    assert subprocess.run([*security, tmp_path / name], capture_output=True).returncode == 0, "over 2.0 of 10 exposed"


@pytest.mark.parametrize("name", UNITS)
def test_the_unit_has_room_and_starts_again_whatever_ended_it_but_for_status_2(name: str) -> None:
    unit = settings(name)
    assert int(unit["LimitNOFILE"]) > PriceServer.files_needed(10_000)
    assert int(unit["TasksMax"]) > 5 + ThreadPoolExecutor()._max_workers  # what the README recommends
    assert (unit["Restart"], unit["RestartPreventExitStatus"]) == ("always", "2")
    assert (unit["Type"], unit["WatchdogSec"], unit["LimitCORE"]) == ("notify", "30", "0")
    assert unit["EnvironmentFile"] == "/etc/price-tracker.env"
    assert "SyslogIdentifier" in unit


def test_each_instance_has_its_own_port_name_and_history() -> None:
    one, instance = (settings(name) for name in UNITS)
    changes = {
        "Description": one["Description"] + ", port %i",
        "ExecStart": one["ExecStart"].replace("/price-tracker/history", "/price-tracker-%i/history") + " --port %i",
        "StateDirectory": "price-tracker-%i",
        "SyslogIdentifier": "price-tracker-%i",
    }
    assert instance == one | changes
    assert f"%S/{one['StateDirectory']}/history.db" in one["ExecStart"]


@pytest.mark.parametrize("name", UNITS)
def test_what_the_unit_runs_is_a_command_that_the_program_takes(name: str, tmp_path: Path) -> None:
    command = settings(name)["ExecStart"].replace("$PRICE_TRACKER_FLAGS", "--demo --interval 1").replace("%i", "0")
    python, program, *arguments = command.replace("%S/", f"{tmp_path}/").split()
    assert (python, program) == ("/opt/price-tracker/venv/bin/python", "/opt/price-tracker/tracker.py")
    history = Path(arguments[arguments.index("--history") + 1])
    history.parent.mkdir()
    with Tracker(*arguments) as tracker:
        tracker.wait_for_log("DEMO, simulated prices: .* every 1 s")
        assert history.is_file()


# What deploy/README.md says


class Machine:
    """A folder with what the README's blocks change: /opt, /etc, /var/lib and /root; pasted as by a careful root."""

    STUBS = """
        umask 077
        cd "$FOLDER/source"
        apt() { :; }
        date() { echo "20261126-00000$(ls "$FOLDER/opt" | wc -l)"; }
        journalctl() { :; }
        systemctl() { echo "systemctl $*" >> "$FOLDER/done"; }
    """
    # What pip installs here: the packages that run this test.
    PIP = "import pathlib, sys; lib, = pathlib.Path(sys.prefix).glob('lib/*/site-packages'); " + (
        f"(lib / 'test.pth').write_text({os.fspath(Path(pytest.__file__).parents[1])!r})"
    )

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "__pycache__", "tests"))
        subprocess.run(["chmod", "-R", "go=", folder / "source"], check=True)
        for name in ("opt", "etc/systemd/system", "var/lib/price-tracker", "root"):
            (folder / name).mkdir(parents=True)

    def paste(self, block: str, *changes: tuple[str, object], stubs: str = "") -> int:
        """Run a block of the README; its exit status."""
        for there in ("/opt/", "/etc/", "/var/lib/", "/root/"):
            block = block.replace(there, f"{self.folder}{there}")
        block = put(block, *changes)
        environment = os.environ | {"FOLDER": str(self.folder)}
        return subprocess.run(
            ["sh", "-c", self.STUBS + stubs + block], env=environment, stdout=subprocess.DEVNULL, timeout=60
        ).returncode

    def install(self, pip: str = PIP) -> int:
        """Without a real pip, which takes long to install."""
        changes = (("-m venv", "-m venv --without-pip"), ("-m pip install -q -r", f'-c "{pip}"'))
        return self.paste(INSTALL, *changes)

    @property
    def done(self) -> list[str]:
        """What systemctl was asked for."""
        return (self.folder / "done").read_text().splitlines()

    @property
    def current(self) -> Path:
        return (self.folder / "opt/price-tracker").readlink()

    def versions(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "opt").glob("price-tracker-*"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_is_installed_with_umask_077_can_be_read_by_the_service(machine: Machine) -> None:
    assert (machine.install(), machine.paste(KEY)) == (0, 0)
    for path in [machine.current, *machine.current.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            assert mode & 0o055 == (0o055 if path.is_dir() else mode & 0o011 | 0o044), path
    # Everything that the program imports is there.
    program = f"import sys; sys.path.insert(0, {str(machine.current)!r}); import tracker; print(tracker.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", timeout=20)
    assert done.stdout.strip() == f"{machine.current}/tracker.py"
    environment = machine.folder / "etc/price-tracker.env"
    assert environment.stat().st_mode & 0o777 == 0o600
    assert environment.read_text() == "COIN_API_KEY=your-key\nPRICE_TRACKER_FLAGS=--port 3030\n"
    for name in UNITS:
        assert (machine.folder / "etc/systemd/system" / name).stat().st_mode & 0o777 == 0o644
    assert machine.done == ["systemctl daemon-reload", "systemctl enable --now price-tracker"]


def test_upgrade_without_pypi_or_that_does_not_start_leaves_the_version_that_runs_and_nothing_else(
    machine: Machine,
) -> None:
    assert machine.install() == 0
    current = machine.current
    assert machine.install(pip="raise SystemExit('no PyPI')") == 1
    (machine.folder / "source/price_server/__init__.py").write_text("import no_such_module\n")
    assert machine.install() == 2
    assert (machine.current, machine.versions()) == (current, [current.name])


def test_all_but_the_current_version_and_the_one_before_are_removed(machine: Machine) -> None:
    for number in range(1, 5):
        (machine.folder / f"opt/price-tracker-2026112{number}-120000").mkdir()
    (machine.folder / "opt/price-tracker").symlink_to(machine.folder / "opt/price-tracker-20261124-120000")
    for _ in range(2):
        assert machine.paste(CLEAN) == 0
        assert machine.versions() == ["price-tracker-20261123-120000", "price-tracker-20261124-120000"]


def test_instances_are_upgraded_one_after_the_other_until_one_has_no_prices(machine: Machine) -> None:
    stubs = """
        systemctl() {
          test $1 = list-units || echo $* >> "$FOLDER/done"
          for each in 3031 3032 3033; do echo "price-tracker@$each.service loaded active running Prices"; done
        }
        curl() {
          for url; do :; done
          echo $url >> "$FOLDER/done"
          test $url != http://127.0.0.1:3032/healthz
        }
    """
    assert machine.paste(UPGRADE_EACH, stubs=stubs) == 1
    assert machine.done == [
        "restart price-tracker@3031.service",
        "http://127.0.0.1:3031/healthz",
        "restart price-tracker@3032.service",
        "http://127.0.0.1:3032/healthz",
    ]


def test_backup_of_a_running_program_is_restored_for_the_services_user(machine: Machine) -> None:
    history = machine.folder / "var/lib/price-tracker/history.db"
    python = (f"{machine.folder}/opt/price-tracker/venv/bin/python", sys.executable)
    options = ("--demo", "--interval", "0.5", "--history", str(history))

    def points(tracker: Tracker) -> list[list[float]]:
        return list(json.loads(get(f"{tracker.http}/history?assets=BTC")[1])["BTC"])

    def is_written() -> bool:
        with sqlite3.connect(history) as file:
            tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return all(file.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables)

    with Tracker(*options) as tracker:
        wait_for(lambda: points(tracker) and is_written(), what="a poll in the file")
        assert machine.paste(BACKUP, python) == 0
        first = points(tracker)[0]
        tracker.stop()
    history.write_bytes(b"lost")
    owner = 12_345 if os.geteuid() == 0 else os.geteuid()
    os.chown(history.parent, owner, -1)
    assert machine.paste(RESTORE) == 0
    assert machine.done == ["systemctl stop price-tracker", "systemctl start price-tracker"]
    assert (history.stat().st_uid, history.stat().st_mode & 0o777) == (owner, 0o600)
    with Tracker(*options) as tracker:
        wait_for(lambda: points(tracker), what="the past")
        assert points(tracker)[0][0] // 10 == first[0] // 10


def test_without_a_backup_nothing_is_stopped_or_removed(machine: Machine) -> None:
    history = machine.folder / "var/lib/price-tracker/history.db"
    history.write_bytes(b"the past")
    assert machine.paste(RESTORE) != 0
    assert history.read_bytes() == b"the past"
    assert not (machine.folder / "done").exists()


def test_readme_is_short_and_each_of_its_blocks_stops_at_its_first_error() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 260
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    commands = [block for block in blocks if not re.match(r"[A-Z_]+=", block)]  # the others are files
    assert len(commands) > 8
    for block in commands:
        one_command = subprocess.run(["sh", "-nc", block]).returncode == 0 and block.count("\n\n") == 0
        assert block.startswith("(set -e\n") or (one_command and block.count("\n") <= 2), block


def test_costs_are_those_of_the_price_list() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")

    def cost(requests: int) -> Decimal:
        total = Decimal(0)
        for size, price in ((1_000, "5.26"), (2_000, "2.63"), (7_000, "1.73"), (20_000, "0.83")):
            total += Decimal(price) * min(requests, size) / 1_000
            requests -= min(requests, size)
        return round(total, 2)

    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| \$([\d.]+).*? \| ([\d,]+) \| \$([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) >= 4
    for interval, all_day, all_day_cost, eight_hours, eight_hours_cost in rows:
        requests = 86_400 // int(interval)
        assert (all_day, eight_hours) == (f"{requests:,}", f"{requests // 3:,}")
        assert (Decimal(all_day_cost), Decimal(eight_hours_cost)) == (cost(requests), cost(requests // 3))
