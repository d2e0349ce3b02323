"""Training under chaos: workers, nodes and commands are killed at random moments, and no bit of a student may change.

    .venv/bin/python tests/benchmarks/training_chaos.py [--kills 20] [--seed 1]

A Ray cluster of a head and three nodes on this machine (raylets of their own; two nodes train, one is spare). One study
trains the same run again and again: the first is left alone, the others are disturbed until all kills are done. Every
student must then hold the same bytes. A killed node is replaced, a killed command started again. Writes
`results/training-chaos.json`.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from miniature_seeds import PACKAGES, hardware, installed
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_model import save_tiny  # noqa: E402

RESULT = Path(__file__).parent / "results" / "training-chaos.json"
PAIRS, RUNS, SLOT = 400, 12, 2
KINDS = ("worker", "node", "command")
PATIENCE = 240.0
"""Seconds until something that can be killed must have appeared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaray-chaos-", ignore_cleanup_errors=True) as folder:
        began = time.monotonic()
        lab = Lab(Path(folder), random.Random(arguments.seed))
        try:
            result = lab.torment(arguments.kills)
        finally:
            lab.cluster.shutdown()
        result["seconds"] = round(time.monotonic() - began)
    record = {
        "command": " ".join(["python tests/benchmarks/training_chaos.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "seed": arguments.seed,
        **result,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


class Lab:
    """The study, its cluster, and the command that trains."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self.folder, self.draw, self.out = folder, draw, folder / "out"
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=SLOT) for _ in range(3)]
        self.recipe = self.write()
        self.commands = 0
        self.process = self.start()

    def write(self) -> Path:
        """400 pairs of sums, right over wrong, and a recipe with the same run under many names."""
        draw = random.Random(0)
        rows = [
            {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"i guess {draw.randrange(100)}"}
            for a, b in ((draw.randrange(1000), draw.randrange(1000)) for _ in range(PAIRS))
        ]
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = {"pairing": "delta", "batch_size": 8, "epochs": 8, "learning_rate": 1e-4}
        recipe = {
            "name": "training-chaos",
            "out": str(self.out),
            "cluster": {"address": self.cluster.address},
            "preferences": {"path": str(self.folder / "pairs.jsonl")},
            "pairings": {"delta": {"chosen": "chosen", "rejected": "rejected"}},
            "student": {"model": save_tiny(self.folder / "student", vocabulary=2048), "max_length": 64},
            "training": {
                "workers": 2,
                "cpus_per_worker": SLOT,  # one worker a node
                "dtype": "float32",
                "micro_batch_tokens": 300,
                "checkpoint_steps": 10,
                "heldout": 0.05,
                "max_failures": 100,
                "runs": dict.fromkeys(self.names(), run),
            },
        }
        path = self.folder / "recipe.yaml"
        YAML(typ="safe").dump(recipe, path)
        return path

    @staticmethod
    def names() -> list[str]:
        return [f"run{number:02d}" for number in range(RUNS)]

    def start(self) -> subprocess.Popen[Any]:
        self.commands += 1
        with (self.folder / f"command-{self.commands}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "deltaray", "run", str(self.recipe)], cwd=ROOT, stdout=log, stderr=log
            )

    # --- the schedule -----------------------------------------------------------------------------------------------
    def torment(self, kills: int) -> dict[str, Any]:
        self.wait(lambda: self.done() >= 1)
        done: Counter[str] = Counter()
        while done.total() < kills and self.done() < RUNS - 1:
            kind = self.draw.choice(KINDS)
            late = self.draw.random() < 0.75  # most kills come when there is something to lose
            self.wait(lambda late=late: bool(self.workers()) and (self.checkpointed() or not late))
            time.sleep(self.draw.uniform(0, 5 if late else 12))
            if self.kill(kind):
                done[kind] += 1
        code = self.process.wait(1800)
        while code:
            assert code < 0 or code == 1, self.log()
            self.process = self.start()
            code = self.process.wait(1800)
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in self.students()}
        assert len(self.students()) == RUNS and len(digests) == 1, f"{len(digests)} different students"
        said = "".join(path.read_text() for path in self.folder.glob("command-*.log"))
        return {
            "kills": dict(done),
            "commands": self.commands,
            "runs": RUNS,
            "steps_of_a_run": 8 * -(-self.pairs_trained() // 8),
            "resumptions": said.count("resumed after step"),
            "different_students": len(digests),
        }

    def wait(self, until: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            if self.process.poll() not in (None, 0):
                self.process = self.start()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def kill(self, kind: str) -> bool:
        if kind == "command":
            if self.process.poll() is not None:
                return False
            self.process.kill()
            self.process.wait()
            self.process = self.start()
            return True
        workers = self.workers()
        if not workers:
            return False
        if kind == "worker":
            self.draw.choice(workers).kill()
            return True
        training = [node for node in self.nodes if node_of(workers, node)]
        if not training:
            return False
        lost = self.draw.choice(training)
        self.nodes.remove(lost)
        self.cluster.remove_node(lost, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=SLOT))
        return True

    # --- looking ----------------------------------------------------------------------------------------------------
    def students(self) -> list[Path]:
        return sorted(self.out.glob("students/run*/model.safetensors"))

    def done(self) -> int:
        return len(self.students())

    def checkpointed(self) -> bool:
        """Whether the run of now has a checkpoint."""
        return any((self.out / ".deltaray" / "checkpoints").glob("run*/*/manifest.json"))

    def pairs_trained(self) -> int:
        return int(json.loads((self.out / "training" / "run00" / "data.json").read_text())["trained"])

    def workers(self) -> list[psutil.Process]:
        """Of this cluster only, in the order of their ids."""
        below = psutil.Process().children(recursive=True)
        return sorted((it for it in below if "RayTrainWorker" in title(it)), key=lambda process: process.pid)

    def log(self) -> str:
        return (self.folder / f"command-{self.commands}.log").read_text()[-3000:]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def node_of(workers: list[psutil.Process], node: Any) -> bool:
    """Whether one of the workers runs on this node."""
    raylets = {info.process.pid for infos in node.all_processes.values() for info in infos}
    return any(parent.pid in raylets for worker in workers for parent in _parents(worker))


def _parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.parents())
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
