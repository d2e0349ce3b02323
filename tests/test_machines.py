"""A cluster whose nodes have networks of their own: a cable is pulled, a node is lost, training goes across nodes.

Only with DELTARAY_TEST_MACHINES=1, as root, with iproute2 and a Redis server; it takes a minute and a half.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos import FAKE, Lab, check_complete, generated_again, leftovers
from fake_engine import Behaviour
from machine_cluster import PROGRAMS, MachineCluster, machine_cluster
from machines import Machine, network, unavailable

from deltaray.train.network import interface_of

REASON = unavailable(*PROGRAMS) if os.environ.get("DELTARAY_TEST_MACHINES") else "DELTARAY_TEST_MACHINES is not set"
on_machines = pytest.mark.skipif(REASON is not None, reason=REASON or "")
CUT = 3.0
"""Seconds; the head takes a node for dead after about 15."""
SUM = """
import json, sys, ray, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from deltaray.train.network import NodeNetwork

def work(config):
    rank = torch.distributed.get_rank()
    total = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(total)
    said = {"address": ray.util.get_node_ip_address(), "total": total.item()}
    open(f"{config['folder']}/{rank}.json", "w").write(json.dumps(said))

ray.init(address=sys.argv[1], log_to_driver=False)
workers = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 2})
run = RunConfig(storage_path=f"{sys.argv[2]}/state")
TorchTrainer(work, train_loop_config={"folder": sys.argv[2]}, torch_config=NodeNetwork(timeout_s=60),
             scaling_config=workers, run_config=run).fit()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[MachineCluster]:
    """A head, a desk and two workers with two CPUs each."""
    with network() as lan, machine_cluster(lan, workers=2, cpus=2) as made:
        yield made


def wait_for(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def engines(machine: Machine) -> int:
    return sum("ray::MapWorker" in " ".join(process.cmdline()) for process in machine.processes())


@on_machines
def test_a_pulled_cable_and_a_lost_node_cost_no_response(cluster: MachineCluster, tmp_path: Path) -> None:
    marks, log = tmp_path / "marks", tmp_path / "command.log"
    marks.mkdir()
    behaviour = Behaviour(delay=0.5, marks=str(marks))
    lab = Lab(tmp_path / "study", behaviour=behaviour, settings={"cluster": {"address": cluster.address}})
    command = cluster.command(*FAKE, "generate", str(lab.write()), environment=behaviour.variable(), log=log)
    wait_for(lambda: all(engines(worker) for worker in cluster.workers) and bool(generated_again(marks)[0]), "engines")
    one, other = cluster.workers
    one.pull_cable()
    time.sleep(CUT)
    one.plug_cable()
    assert command.poll() is None, log.read_text()
    cluster.kill(other)
    assert command.wait(180) == 0, log.read_text()
    cluster.restore(other)
    check_complete(lab)
    assert not leftovers(lab.out)
    generated, again = generated_again(marks)
    print(f"{again} of {generated} rows generated again")
    assert again <= 2 * lab.in_flight()


@on_machines
def test_training_workers_of_two_nodes_reach_each_other(cluster: MachineCluster, tmp_path: Path) -> None:
    """Though the name of each machine points to itself, which is where gloo would listen."""
    cluster.wait()
    log = tmp_path / "command.log"
    command = cluster.command("python", "-c", SUM, cluster.address, str(tmp_path), environment={}, log=log)
    assert command.wait(180) == 0, log.read_text()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {item["address"] for item in said} == {worker.address for worker in cluster.workers}
    assert [item["total"] for item in said] == [3.0, 3.0]


def test_the_interface_is_that_of_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # nobody's (RFC 5737)
