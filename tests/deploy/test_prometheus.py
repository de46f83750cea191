"""A real Prometheus with the files of deploy/: its rules, what the README adds to its configuration, the dashboard."""

import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from proxies import DEPLOY, free_port, get, readme_block
from running import ROOT, Tracker, outside, wait_for
from stand_in import KEY, StandIn
from websockets.sync.client import connect

RULES = DEPLOY / "prometheus-rules.yml"
RULE_TESTS = ROOT / "tests" / "deploy" / "prometheus-rules.test.yml"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))


def metrics(tracker: Tracker) -> str:
    return get(f"{tracker.http}/metrics")[1].decode()


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
    assert len(alerts) == 15


def test_the_rules_ask_for_metrics_that_exist(coin_api: StandIn, tmp_path: Path) -> None:
    asked = set(re.findall(r"\bprice_tracker_\w+", RULES.read_text()))
    options = ("--history", str(tmp_path / "history.db"))
    with Tracker(*options, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url) as tracker:
        wait_for(lambda: coin_api.answered_at)
        wait_for(lambda: "price_tracker_price{" in metrics(tracker))
        told = metrics(tracker)
    assert len(asked) >= 10
    assert asked <= set(re.findall(r"^price_tracker_\w+", told, re.MULTILINE))
    for label in re.findall(r'\{(?:result|reason)="\w+"\}', RULES.read_text()):
        assert label in told


# What deploy/README.md adds to the configuration that Debian installs


def test_readme_adds_rules_and_tracker_to_debians_configuration(tmp_path: Path) -> None:
    outside("promtool")
    debians = Path("/etc/prometheus/prometheus.yml")
    if not debians.exists():
        pytest.skip("not Debian's Prometheus")
    shutil.copy(debians, tmp_path)
    stubs = "apt() { :; }; systemctl() { :; }\n"
    block = readme_block("promtool check").replace("/etc/prometheus/", f"{tmp_path}/")
    done = subprocess.run(["sh", "-c", stubs + block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS: 15 rules found" in done.stdout
    configuration = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert configuration["rule_files"] == [f"{tmp_path}/prometheus-rules.yml"]
    assert [job["job_name"] for job in configuration["scrape_configs"]][-1] == "price-tracker"


# The dashboard for Grafana


class Prometheus:
    """`with Prometheus(folder, *targets) as prometheus:` scrapes them once a second."""

    def __init__(self, folder: Path, *targets: str):
        outside("prometheus")
        self.port = free_port()
        job = {"job_name": "price-tracker", "static_configs": [{"targets": targets}]}
        configuration = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "scrape_configs": [job]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self.command = [
            *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
            *(f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"),
        ]

    def __enter__(self) -> "Prometheus":
        self.process = subprocess.Popen(self.command)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, query: str) -> list[Any]:
        """The instant query's result."""
        status, body, _ = get(f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
        assert status == 200, f"{query}: {body.decode()}"
        return list(json.loads(body)["data"]["result"])

    def is_ready(self) -> bool:
        try:
            return get(f"http://127.0.0.1:{self.port}/-/ready")[0] == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped two trackers with all that they can tell: credits, a client, a history file, polls."""
    folder = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as stack:
        coin_api = stack.enter_context(StandIn())
        trackers = []
        for number in range(2):
            options = ("--interval", "0.5", "--history", str(folder / f"{number}.db"))
            tracker = Tracker(*options, COIN_API_KEY=KEY, COIN_API_URL=coin_api.url)
            trackers.append(stack.enter_context(tracker))
            stack.enter_context(connect(tracker.ws, max_queue=None))
        running = stack.enter_context(Prometheus(folder, *(f"127.0.0.1:{tracker.port}" for tracker in trackers)))
        wait_for(running.is_ready, what="Prometheus is ready")
        # A rate needs two samples.
        wait_for(lambda: scraped(running) == 2, what="three scrapes of both trackers")
        yield running


def scraped(prometheus: Prometheus) -> int:
    return len(prometheus.ask("count_over_time(price_tracker_credits_left[1m]) > 2"))


def queries() -> list[str]:
    """Of all panels, with Grafana's variables as it sets them."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [expr.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$job", ".*") for expr in found]


def test_each_query_of_the_dashboard_has_an_answer(prometheus: Prometheus) -> None:
    assert len(queries()) > 15
    empty = [query for query in queries() if not prometheus.ask(query)]
    assert empty == []


def test_each_panel_shows_any_number_of_trackers() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert 10 <= len(panels) <= 16
    for panel in panels:
        for target in panel["targets"]:
            selectors = re.findall(r"\b(?:price_tracker|process)_\w+(\{)?", target["expr"])
            assert selectors, panel["title"]
            assert all(selectors), f"{panel['title']}: {target['expr']}"
            assert target["expr"].count('instance=~"$instance"') == len(selectors), panel["title"]
            assert "{{instance}}" in target["legendFormat"]


def test_dashboard_follows_grafanas_schema_and_its_panels_do_not_overlap() -> None:
    schema = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert lost(DASHBOARD, schema) == []
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(at["x"] + x, at["y"] + y) for at in places for x in range(at["w"]) for y in range(at["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def lost(written: Any, understood: Any, path: str = "") -> list[str]:
    """Where the schema's classes did not take over what is written."""
    if isinstance(written, dict) and isinstance(understood, dict):
        return [at for key, value in written.items() for at in lost(value, understood.get(key), f"{path}.{key}")]
    if isinstance(written, list) and isinstance(understood, list) and len(written) == len(understood):
        return [at for n, value in enumerate(written) for at in lost(value, understood[n], f"{path}[{n}]")]
    return [] if written == understood else [path]
