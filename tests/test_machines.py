"""A cluster whose nodes have networks and clocks of their own, in trouble: `benchmarks/cluster_chaos.py` in short.

Needs root, iproute2, a C compiler and a Redis server; skipped, with the reason, where one is lacking.
"""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chaos import FAKE
from fake_engine import Behaviour
from lab import Lab, check_complete, generated_again, leftovers
from machine_cluster import PROGRAMS, MachineCluster, machine_cluster, title
from machines import Machine, clocks, network, unavailable
from tiny_model import save_tiny

import deltaray.study.pipeline
from deltaray.recipe import load_recipe
from deltaray.study.pipeline import Pipeline
from deltaray.train.network import interface_of

REASON = unavailable(*PROGRAMS)
on_machines = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CUT = 3.0
"""Seconds; the head takes a node for dead after about 15."""
SILENCE = 600.0
"""Seconds without a word of a command, after which it is given up."""
HOUR = 3600.0
AFTER = {"pairs", "references", "training", "students", "checkpoints", "train", "lock"}
"""Folders of what is made from responses."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[MachineCluster]:
    """A head, a desk and two workers with two CPUs each."""
    with network() as lan, machine_cluster(lan, workers=2, cpus=2) as made:
        yield made


def wait_for(look: Callable[[], bool], what: str, command: "subprocess.Popen[Any]", log: Path) -> None:
    """Until it is so; on a busy machine a study takes long: only a command that says nothing more has failed."""
    said, began = "", time.monotonic()
    since = began
    while True:
        ended = command.poll()
        if look():
            break
        assert ended is None, f"ended with {ended} before {what}:\n{log.read_text()}"
        if said != (said := log.read_text()):
            since = time.monotonic()
        assert time.monotonic() < since + SILENCE, f"no {what}:\n{said}"
        time.sleep(0.1)
    print(f"{what} after {time.monotonic() - began:.0f} s")


def engines(machine: Machine) -> int:
    return sum(title(process).startswith("MapWorker") for process in machine.processes())


def training_workers(machine: Machine) -> int:
    return sum(title(process).startswith("RayTrainWorker") for process in machine.processes())


def lab_of(folder: Path, cluster: MachineCluster, behaviour: Behaviour) -> Lab:
    """A study from prompts to a student, whose two training workers do not fit on one of the nodes."""
    run = {"pairing": "delta", "loss": "dpo_norm", "beta": 5, "batch_size": 8, "learning_rate": 1e-4}
    training = {"workers": 2, "cpus_per_worker": 2, "dtype": "float32", "checkpoint_steps": 4, "runs": {"delta": run}}
    settings = {
        "cluster": {"address": cluster.address},
        "scorers": {"exact": {"kind": "exact_match"}},
        "pairings": {"delta": {"chosen": "strong", "rejected": "weak", "scorer": "exact"}},
        "student": {"model": save_tiny(folder / "model", vocabulary=2048), "max_length": 96},
        "training": training,
    }
    return Lab(folder / "study", prompts=128, behaviour=behaviour, settings=settings)


@on_machines
def test_misfortunes_cost_no_response_and_no_pair_and_change_no_bit(
    cluster: MachineCluster, tmp_path: Path, ray_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks that are hours apart, a pulled cable, a lost node, a head that is killed, in one study."""
    marks, log = tmp_path / "marks", tmp_path / "command.log"
    marks.mkdir()
    behaviour = Behaviour(delay=1.0, marks=str(marks))
    lab = lab_of(tmp_path, cluster, behaviour)
    one, other = cluster.workers
    one.set_clock(HOUR)
    other.set_clock(-HOUR)
    command = cluster.command(*FAKE, "run", str(lab.write()), environment=behaviour.variable(), log=log)
    wait_for(lambda: all(map(engines, cluster.workers)) and generated_again(marks)[0] > 0, "engines", command, log)
    one.pull_cable()
    time.sleep(CUT)
    one.plug_cable()
    assert command.poll() is None, log.read_text()
    cluster.kill(other)
    cluster.restore(other)
    wait_for(lambda: all(map(training_workers, cluster.workers)), "training on both nodes", command, log)
    cluster.kill(cluster.head)
    cluster.restore(cluster.head)
    wait_for(lambda: command.poll() is not None, "end", command, log)
    assert command.returncode == 0, log.read_text()
    generated, again = generated_again(marks)
    print(f"{again} of {generated} rows generated again")
    assert again <= 2 * lab.in_flight()
    assert check_complete(lab) == 2 * lab.prompts
    assert not leftovers(lab.out)
    files = (lab.out / "pairs/pairing=delta").glob("*.parquet")
    pairs = Counter(key for file in files for key in pq.read_table(file)["prompt_id"].to_pylist())
    assert pairs == Counter(key for key, _ in lab.wanted())  # `strong` is always right, `weak` never
    assert student(lab.out) == student(trained_here(lab, monkeypatch))


def trained_here(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same responses, all after them done again by this process's Ray on this machine, which is left alone."""
    monkeypatch.setattr(deltaray.study.pipeline, "stop_ray", lambda: None)
    out = lab.folder / "here"
    shutil.copytree(lab.out, out, ignore=lambda _, names: AFTER & {*names})
    lab.settings |= {"cluster": {}, "out": str(out)}
    Pipeline(load_recipe(lab.write())).run()
    return out


def student(out: Path) -> bytes:
    return (out / "students/delta/model.safetensors").read_bytes()


CLOCKS = """
import queue, subprocess, sys, threading, time
from multiprocessing import Semaphore
began, day = time.monotonic(), time.time()
threading.Event().wait(0.1), Semaphore(0).acquire(timeout=0.1), time.sleep(0.1)
try:
    queue.Queue().get(timeout=0.1)
except queue.Empty:
    pass
print(time.monotonic() - began, time.time() - day, int(subprocess.run(["date", "+%s"], capture_output=True).stdout))
"""


@pytest.mark.parametrize("ahead", [0.0, HOUR, -1.5 * HOUR])
def test_a_machines_clock_is_its_own_and_nobody_waits_longer_for_it(ahead: float, tmp_path: Path) -> None:
    """What the tests above rest on."""
    machine = Machine.__new__(Machine)
    machine.clock = tmp_path / "clock"
    machine.set_clock(ahead)
    own = {"LD_PRELOAD": str(clocks(tmp_path)), "CLOCK_OFFSET": str(machine.clock)}
    ran = subprocess.run([sys.executable, "-c", CLOCKS], env=os.environ | own, capture_output=True, text=True)
    lasted, of_day, shown = (float(word) for word in ran.stdout.split())
    assert 0.4 <= lasted < 60 and of_day == pytest.approx(lasted, abs=0.1)
    assert shown - time.time() == pytest.approx(ahead, abs=60)


def test_the_interface_is_that_of_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # nobody's (RFC 5737)
