"""A cluster in trouble: studies on machines with networks of their own, whose parts fail one after the other.

    python tests/benchmarks/cluster_chaos.py [--faults 36] [--seed 1]      a fake engine, all else real
    python tests/benchmarks/cluster_chaos.py --vllm      vLLM pools and ZeRO-3 on different nodes, left alone

Needs root, iproute2 and redis-server. A head with a Redis, a desk where commands are given and three workers are
namespaces of this computer. One study, with `out` in a bucket of an S3 server, is left alone, and the same one done
again and again while the faults happen. A command that ends with an error is given again. Fails where a response or a
pair is lost or doubled, where a student differs in a bit, or where a study does not end. Writes
`results/cluster-chaos-seed<N>.json` or `results/across-nodes.json`.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from chaos import REAL  # noqa: E402
from cluster_faults import Fault, Faults  # noqa: E402
from cluster_study import BUCKET, Attempts, Result, Study  # noqa: E402
from fake_engine import Behaviour  # noqa: E402
from machine_cluster import PROGRAMS, MachineCluster, machine_cluster, title  # noqa: E402
from machines import network, unavailable  # noqa: E402
from s3_server import Server, serve  # noqa: E402
from tiny_model import save_tiny  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FAMILY = ROOT / "runs" / "miniature-family"
WORKERS, CPUS = 3, 2
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "name",
    "AWS_SECRET_ACCESS_KEY": "word",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--faults", type=int, default=36)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if reason := unavailable(*PROGRAMS):
        sys.exit(f"error: no machines can be made here: {reason}")
    began = time.monotonic()
    with network() as lan, serve(lan.address) as server:
        server.ask("PUT", BUCKET)
        with machine_cluster(lan, WORKERS, CPUS, VARIABLES) as cluster:
            if arguments.vllm:
                result = across_nodes(cluster, lan.folder / "vllm")
            else:
                result = Chaos(cluster, server, arguments.seed).torment(arguments.faults)
    record = {
        "command": " ".join(["python tests/benchmarks/cluster_chaos.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        **result,
        "seconds": round(time.monotonic() - began),
    }
    kind = "across-nodes" if arguments.vllm else f"cluster-chaos-seed{arguments.seed}"
    (RESULTS / f"{kind}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


# --- real engines, undisturbed --------------------------------------------------------------------------------------
def across_nodes(cluster: MachineCluster, folder: Path) -> dict[str, Any]:
    """vLLM pools and ZeRO-3 workers on different nodes; the student is compared with one trained on this machine."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    YAML(typ="safe").dump(real_recipe(folder / "out", cluster.address), recipe)
    attempts, seen = Attempts(cluster, recipe, program=REAL), Counter[tuple[str, str]]()
    while not attempts.done:
        attempts.tend()
        for machine in cluster.workers:
            seen.update((machine.name, title(it)) for it in machine.processes() if title(it))
        time.sleep(0.5)
    assert not attempts.endings, attempts.endings
    places = {
        what: sorted({machine for machine, name in seen if mark in name})
        for what, mark in {"vllm_replicas_on": "engine of", "training_workers_on": "RayTrainWorker"}.items()
    }
    assert all(len(machines) == 2 for machines in places.values()), places
    same = student(folder / "out") == student(trained_here(folder))
    return places | {
        "seconds_of_the_study": round(attempts.seconds or 0),
        "student_equals_one_of_a_single_machine": same,
    }


def real_recipe(out: Path, address: str | None) -> dict[str, Any]:
    def model(name: str) -> str:
        return str(FAMILY / "seed0" / name)

    engine = {"cpus": 1.5, "dtype": "float32", "max_model_len": 32, "arguments": {"max_num_seqs": 64}}  # one a node
    teacher = {"sampling": {"temperature": 1.0, "max_tokens": 12}, "engine": engine}
    run = {"pairing": "delta", "loss": "dpo_norm", "beta": 5, "learning_rate": 1e-4, "batch_size": 32}
    return {
        "name": "across-nodes",
        "out": str(out),
        "shard_size": 256,
        "unit_size": 64,
        "cluster": {"address": address},
        "prompts": {"path": str(FAMILY / "prompts.jsonl"), "limit": 1024},
        "teachers": {name: teacher | {"model": model(name)} for name in ("mini-m", "mini-xs")},
        "scorers": {"exact": {"kind": "exact_match"}},
        "pairings": {"delta": {"chosen": "mini-m", "rejected": "mini-xs", "scorer": "exact"}},
        "student": {"model": model("student"), "max_length": 32},
        "training": {"workers": 2, "cpus_per_worker": CPUS, "dtype": "float32", "runs": {"delta": run}},
    }


def trained_here(folder: Path) -> Path:
    """The same study with the same responses, its student trained again by two workers of one Ray on this machine."""
    out, recipe = folder / "here", folder / "here.yaml"
    kept = shutil.ignore_patterns("students", "training", "checkpoints", "lock")
    shutil.copytree(folder / "out", out, ignore=kept)
    YAML(typ="safe").dump(real_recipe(out, None), recipe)
    subprocess.run([*REAL, "train", str(recipe)], cwd=ROOT, check=True, capture_output=True)
    return out


def student(out: Path) -> str:
    return hashlib.sha256((out / "students/delta/model.safetensors").read_bytes()).hexdigest()


# --- the same study again and again ---------------------------------------------------------------------------------
class Chaos:
    """Studies under faults, compared with one that was left alone."""

    def __init__(self, cluster: MachineCluster, server: Server, seed: int) -> None:
        self.cluster, self.server, self.seed, self.draw = cluster, server, seed, random.Random(seed)
        self.folder = cluster.network.folder
        self.model = save_tiny(self.folder / "student", vocabulary=2048)
        self.faults: list[Fault] = []
        self.attempts: list[Attempts] = []
        self.restarted: Counter[str] = Counter()  # nodes whose Ray had ended without being killed

    def torment(self, faults: int) -> dict[str, Any]:
        alone, wanted = self.study("undisturbed", 0)
        assert not alone.endings, alone.endings
        students = set[str]()
        while len(self.faults) < faults:
            attempts, found = self.study(f"disturbed-{len(self.attempts) + 1}", faults - len(self.faults))
            self.attempts.append(attempts)
            students.add(found.student)
            assert found.rows == wanted.rows and found.pairs == wanted.pairs
        assert students == {wanted.student}, f"{len(students | {wanted.student})} different students"
        return self.record(alone, wanted)

    def study(self, name: str, faults: int) -> tuple[Attempts, Result]:
        """One study, with so many faults at most while it runs."""
        behaviour = Behaviour(delay=1.0)
        lab = Study(self.folder / name, prompts=384, shard_size=64, behaviour=behaviour, student=self.model)
        lab.server, lab.cluster = self.server, self.cluster
        attempts = Attempts(self.cluster, lab.write(), environment=behaviour.variable())

        def tend() -> None:
            self.restarted.update(self.cluster.tend())
            attempts.tend()

        trouble = Faults(self.cluster, self.server.gate, self.draw, tend, attempts.stage)
        while len(trouble.done) < faults and not attempts.done:
            trouble.next()
            print(f"{name} {time.monotonic() - attempts.began:.0f} s: {trouble.done[-1]}", flush=True)
        attempts.finish()
        self.faults += trouble.done
        print(f"{name}: {attempts.seconds:.0f} s, {attempts.commands} commands, {attempts.endings}", flush=True)
        return attempts, lab.check()

    def record(self, alone: Attempts, wanted: Result) -> dict[str, Any]:
        seconds = [round(attempts.seconds or 0) for attempts in self.attempts]
        return {
            "seed": self.seed,
            "faults": dict(Counter(fault.kind for fault in self.faults)),
            "studies": len(self.attempts),
            "rows_of_a_study": wanted.rows,
            "pairs_of_a_study": len(wanted.pairs),
            "rows_lost": 0,  # it fails otherwise
            "rows_doubled": 0,
            "pairs_lost": 0,
            "pairs_doubled": 0,
            "different_students": 1,
            "commands": [attempts.commands for attempts in self.attempts],
            "seconds_of_a_study": seconds,
            "seconds_undisturbed": round(alone.seconds or 0),
            "nodes_that_ended_by_themselves": dict(self.restarted),
            "commands_that_ended": [asdict(ending) for attempts in self.attempts for ending in attempts.endings],
            "every_fault": [fault.record() for fault in self.faults],
        }


if __name__ == "__main__":
    main()
