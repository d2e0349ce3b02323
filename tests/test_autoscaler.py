"""A cluster that has no GPU until somebody asks: Ray's autoscaler on nodes that are raylets of this machine."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fake_engine import Behaviour
from job_server import PATIENT, _end, _free
from prompt_files import write
from ray.exceptions import RpcError
from ruamel.yaml import YAML
from tiny_model import save_tiny

from deltaray.data.contracts import RESPONSES
from deltaray.data.store import Store

PROMPTS, UNIT, MOST = 80, 4, 3
COMMANDS = (
    "cluster_synced_files", "file_mounts_sync_continuously", "initialization_commands", "setup_commands",
    "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip
"""What a file of `ray up` has and raylets of this machine do not need."""
SECONDS = 120
"""Until a node must have come or gone."""


@dataclass(frozen=True)
class Growing:
    address: str
    folder: Path
    head: "subprocess.Popen[bytes]"

    def gpu_nodes(self) -> int:
        """Nodes with a GPU that are alive."""
        from ray._raylet import GcsClient

        assert self.head.poll() is None, (self.folder / "head.log").read_text()[-2000:]
        nodes = GcsClient(address=self.address).get_all_node_info().values()
        return sum(node.state == 0 and dict(node.resources_total).get("GPU", 0) > 0 for node in nodes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Growing]:
    """A head without GPUs, and room for three nodes with one each, given back after some idle seconds."""
    folder = Path(tempfile.mkdtemp(prefix="dr", dir="/tmp"))
    port, *others = _free(4)
    address = f"127.0.0.1:{port}"
    provider = {"type": "fake_multinode", "gcs_address": address, "use_node_id_as_ip": True, "launch_multiple": True}
    config = {
        "cluster_name": "growing",
        "max_workers": MOST,
        "idle_timeout_minutes": 0.25,  # a new node is idle until its replica is placed
        "upscaling_speed": 20,
        "provider": provider | {"disable_node_updaters": True, "disable_launch_config_check": True},
        "auth": {},
        "file_mounts": {},
        "docker": {},
        **{key: [] for key in COMMANDS},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST},
        },
    }
    (folder / "cluster.json").write_text(json.dumps(config))
    ports = zip(("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), others, strict=True)
    command = [
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4",
        "--object-store-memory=100000000", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}",
        f"--autoscaling-config={folder / 'cluster.json'}", *(f"--{name}={number}" for name, number in ports),
    ]  # fmt: skip
    programs = Path(sys.executable).parent
    environment = os.environ | PATIENT | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_LOGGER_LEVEL": "warning"}
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen([programs / command[0], *command[1:]], env=environment, stdout=log, stderr=log)
        try:
            yield Growing(address, folder, head)
        finally:
            _end(head, folder)


def recipe_at(folder: Path, cluster: Growing) -> Path:
    engine = {"gpus": 1, "cpus": 1, "replicas": 1, "max_replicas": MOST, "units_in_flight": 2}
    prompts: list[Any] = [{"prompt": f"{n}+{n}="} for n in range(PROMPTS)]
    recipe = {
        "name": "growing",
        "out": str(folder / "out"),
        "unit_size": UNIT,
        "cluster": {"address": cluster.address, "gpus": MOST},
        "prompts": {"path": write(folder / "prompts.jsonl", prompts)},
        "teachers": {"weak": {"model": save_tiny(folder / "model"), "engine": engine}},
    }
    path = folder / "recipe.yaml"
    YAML(typ="safe").dump(recipe, path)
    return path


def wait_for(look: Any, wanted: int) -> None:
    deadline, found = time.monotonic() + SECONDS, None
    while found != wanted:
        assert time.monotonic() < deadline, f"{found} instead of {wanted}"
        with suppress(RpcError):  # the head is not there yet
            found = look()
        time.sleep(0.3)


def test_nodes_come_with_the_work_and_go_after_it(cluster: Growing, tmp_path: Path) -> None:
    wait_for(cluster.gpu_nodes, 0)
    marks = tmp_path / "marks"
    marks.mkdir()
    behaviour = Behaviour(delay=0.1, marks=str(marks), replicas=MOST)
    environment = os.environ | behaviour.variable() | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(ROOT / "tests" / "fake_engine.py"), "generate", str(recipe_at(tmp_path, cluster))]
    seen, ended = Counter[int](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            seen[cluster.gpu_nodes()] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True
    )
    ended.set()
    watcher.join()
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(seen) == 0  # none before the first demand
    assert max(seen) >= MOST  # the head may still list a node that was given back
    assert len(list(marks.iterdir())) >= MOST  # replicas that worked
    keys = Store(str(tmp_path / "out")).read_tables(Store.responses("weak"), RESPONSES, ["prompt_id"])["prompt_id"]
    assert len(keys) == len(set(keys.to_pylist())) == PROMPTS
    wait_for(cluster.gpu_nodes, 0)  # nothing is left running that costs money
