"""The units, the rules for Prometheus, and what deploy/README.md says, as they are in deploy/."""

import re
import shutil
import subprocess
import sys
import urllib.request
from decimal import Decimal
from pathlib import Path

import pytest
from running import ROOT, Tracker, outside, wait_for
from stand_in import KEY, StandIn

from price_server import PriceServer

DEPLOY = ROOT / "deploy"
UNITS = ("price-tracker.service", "price-tracker@.service")
RULES = DEPLOY / "prometheus-rules.yml"
RULE_TESTS = ROOT / "tests" / "deploy" / "prometheus-rules.test.yml"


# The units


def settings(name: str) -> dict[str, str]:
    lines = (DEPLOY / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit_and_finds_it_safe(tmp_path: Path, name: str) -> None:
    outside("systemd-analyze")
    unit = (DEPLOY / name).read_text()
    for installed, here in (("venv/bin/python", sys.executable), ("tracker.py", str(ROOT / "tracker.py"))):
        assert f"/opt/price-tracker/{installed}" in unit
        unit = unit.replace(f"/opt/price-tracker/{installed}", here)
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
    assert int(unit["TasksMax"]) > 5
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


# The rules for Prometheus


def test_the_rules_fire_where_they_should_and_not_where_not() -> None:
    outside("promtool")
    for arguments in (("check", "rules", str(RULES)), ("test", "rules", str(RULE_TESTS))):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_has_a_severity_a_summary_and_a_series_that_fires_and_one_that_does_not() -> None:
    alerts = re.split(r"^      - alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]
    tests = RULE_TESTS.read_text()
    for alert in alerts:
        name = alert.partition("\n")[0]
        assert re.search(r"severity: (critical|warning)\n", alert), name
        assert "summary: " in alert, name
        assert re.search(rf"alertname: {name}, exp_alerts: \[\]", tests), name
        assert re.search(rf"alertname: {name}\n +exp_alerts:\n +- exp_labels", tests), name
    assert len(alerts) == 11


def test_the_rules_ask_for_metrics_that_exist(coin_api: StandIn) -> None:
    asked = set(re.findall(r"\bprice_tracker_\w+", RULES.read_text()))
    with Tracker(COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as tracker:
        wait_for(lambda: coin_api.answered_at)
        wait_for(lambda: "price_tracker_price{" in get(f"{tracker.http}/metrics"))
        told = get(f"{tracker.http}/metrics")
    assert len(asked) >= 10
    assert asked <= set(re.findall(r"^price_tracker_\w+", told, re.MULTILINE))
    for label in re.findall(r'\{(?:result|reason)="\w+"\}', RULES.read_text()):
        assert label in told


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


# What deploy/README.md says

README = (DEPLOY / "README.md").read_text(encoding="utf-8")


def test_what_is_installed_with_umask_077_can_be_read_by_the_service(tmp_path: Path) -> None:
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[:2])
    for there in ("/opt/", "/etc/"):
        assert there in commands
        commands = commands.replace(there, f"{tmp_path}{there}")
    assert "pip install" in commands
    commands = commands.replace("pip install", "pip --version #")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    commands = f"chmod -R go= {source}; cd {source}\nsystemctl() {{ :; }}\njournalctl() {{ :; }}\n{commands}"
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    (tmp_path / "opt").mkdir()
    subprocess.run(["sh", "-ec", f"umask 077\n{commands}"], check=True, timeout=60, stdout=subprocess.DEVNULL)
    installed = tmp_path / "opt/price-tracker"
    for path in [installed.resolve(), *installed.rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o055 == (0o055 if path.is_dir() else path.stat().st_mode & 0o011 | 0o044), (
                path
            )
    # Everything that the program imports is there.
    program = f"import sys; sys.path.insert(0, {str(installed)!r}); import tracker; print(tracker.__file__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=20)
    assert done.stdout.strip() == f"{installed}/tracker.py"
    environment = tmp_path / "etc/price-tracker.env"
    assert environment.stat().st_mode & 0o777 == 0o600
    assert environment.read_text() == "COIN_API_KEY=your-key\nPRICE_TRACKER_FLAGS=--port 3030\n"
    for name in UNITS:
        assert (tmp_path / "etc/systemd/system" / name).stat().st_mode & 0o777 == 0o644


def test_costs_are_those_of_the_price_list() -> None:
    def cost(requests: int) -> Decimal:
        total = Decimal(0)
        for size, price in ((1_000, "5.26"), (2_000, "2.63"), (7_000, "1.73"), (20_000, "0.83")):
            total += Decimal(price) * min(requests, size) / 1_000
            requests -= min(requests, size)
        return round(total, 2)

    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| \$([\d.]+).*? \| ([\d,]+) \| \$([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 4
    for interval, all_day, all_day_cost, eight_hours, eight_hours_cost in rows:
        requests = 86_400 // int(interval)
        assert (all_day, eight_hours) == (f"{requests:,}", f"{requests // 3:,}")
        assert (Decimal(all_day_cost), Decimal(eight_hours_cost)) == (cost(requests), cost(requests // 3))
