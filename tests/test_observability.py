"""What Prometheus gets and what is made of it: a real one scrapes a real Ray, and evaluates the alerts."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from deltaray.generate.metrics import METRICS
from deltaray.runtime.metrics import STUDY_METRICS, StudyMetrics

FOLDER = ROOT / "cluster" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
EXPORTED = {
    f"ray_{name}" + ("_total" if metric.kind == "counter" else "") for name, metric in (METRICS | STUDY_METRICS).items()
}
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="Prometheus is not installed"
)


def named_in(text: str) -> set[str]:
    return set(re.findall(r"ray_deltaray_\w+", text))


def test_the_dashboard_shows_every_series_and_no_other() -> None:
    assert named_in(" ".join(EXPRESSIONS)) == EXPORTED
    places = [tuple(panel["gridPos"][key] for key in ("x", "y")) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_alerts_ask_for_series_that_exist_and_all_are_tried() -> None:
    rules = YAML(typ="safe").load(FOLDER / "alerts.yml")["groups"][0]["rules"]
    assert all(named_in(rule["expr"]) and named_in(rule["expr"]) <= EXPORTED for rule in rules)
    tried = (FOLDER / "alerts_test.yml").read_text()
    assert all(f"alertname: {rule['alert']}\n        exp_alerts:" in tried for rule in rules)


@needs_prometheus
def test_prometheus_accepts_the_files_and_the_alerts_fire_when_they_should() -> None:
    for arguments in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def address(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with our configuration, but for where the list of nodes lies and how often it asks."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    node = ray_session.nodes()[0]
    nodes = [{"targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}]
    (folder / "nodes.json").write_text(json.dumps(nodes))
    text = (FOLDER / "prometheus.yml").read_text().replace("10s", "1s")
    text = text.replace("/tmp/ray/prom_metrics_service_discovery.json", str(folder / "nodes.json"))
    (folder / "prometheus.yml").write_text(text.replace("alerts.yml", str(FOLDER / "alerts.yml")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["prometheus", *files, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait()


def ask(address: str, expression: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as response:
        return list(json.load(response)["data"]["result"])


def until(look: Any, seconds: float = 180) -> Any:
    """The first answer that is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("nothing came")


@needs_prometheus
def test_a_studys_numbers_arrive_and_its_alarm_is_raised(address: str, ray_session: Any) -> None:
    told = StudyMetrics("observed", gpu_hour_price=3.0)
    told.stage("generate", "teacher …", 3, 12)
    told.funnel("delta", [{"stage": "tied", "in": 9, "out": 5, "removed": 4}])
    told.training("run", 7, {"loss": 0.25, "rewards_accuracy": None, "signatures": ["collapse"]})
    told.trials({"running": 2, "failed": 0})
    told.spent(gpus=8, working=True)
    study = '{study="observed"}'

    def value(expression: str) -> float:
        return float(until(lambda: ask(address, expression))[0]["value"][1])

    assert value(f"ray_deltaray_stage_done{study} / ray_deltaray_stage_total{study}") == 0.25
    assert (value(f"ray_deltaray_pairs{study}"), value(f"ray_deltaray_pairs_removed{study}")) == (5, 4)
    assert (value(f"ray_deltaray_training_loss{study}"), value(f"ray_deltaray_training_step{study}")) == (0.25, 7)
    assert value('sum by (state) (ray_deltaray_trials{study="observed"} > 0)') == 2
    assert not ask(address, f"ray_deltaray_training_rewards_accuracy{study}")
    assert value(f"ray_deltaray_cost{study}") == pytest.approx(3 * value(f"ray_deltaray_gpu_hours{study}"), rel=1e-6)
    alert = 'ALERTS{alertname="TrainingAlarm", run="run", signature="collapse", alertstate="firing"}'
    assert until(lambda: ask(address, alert))
    for expression in EXPRESSIONS:  # Grafana puts the chosen studies in the place of $study
        ask(address, expression.replace("$study", ".*"))
