"""A Ray cluster over machines: a Redis for the head, the head, workers, and a desk where commands are given.

Every machine runs `ray start --block` as a service: where it has ended, `tend` starts it again, as Kubernetes or
systemd would.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
from conftest import ROOT
from job_server import PATIENT
from machines import Machine, Network, command_line, end

PORT = 6379
REDIS_PORT = 6390
SECONDS = 300
"""Until a node must have joined."""
OF_RAY = re.compile("ray::|/ray/")
RAYLET, GCS = "/raylet/raylet --", "/gcs/gcs_server --"
PROGRAMS = ("redis-server",)


class MachineCluster:
    """The cluster; made by `machine_cluster`, which starts and ends it."""

    def __init__(self, network: Network, workers: int, cpus: int, environment: Mapping[str, str]) -> None:
        self.network, self.cpus = network, cpus
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_LOGGER_LEVEL": "warning",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_LD_PRELOAD_ON_WORKERS": "1",  # the machine's clock is theirs too
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # as KubeRay sets it where the head has a Redis
            **{name: value for name, value in PATIENT.items() if "health_check" not in name},
            **environment,
        }
        self.head, self.desk = network.machine("head"), network.machine("desk")
        self.workers = [network.machine(f"worker{number}") for number in range(1, workers + 1)]
        self.services: dict[str, subprocess.Popen[Any]] = {}
        self.up: set[str] = set()  # machines on which a raylet was seen
        self.redis = self._start_redis()

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    @property
    def machines(self) -> list[Machine]:
        return [self.head, self.desk, *self.workers]

    def _start_redis(self) -> "subprocess.Popen[Any]":
        command = ["redis-server", "--bind", self.network.address, "--port", str(REDIS_PORT), "--save", ""]
        command += ["--protected-mode", "no", "--dir", str(self.network.folder)]
        with self._log("redis") as log:
            return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=log, stderr=log)

    def _log(self, name: str) -> IO[bytes]:
        return (self.network.folder / f"{name}.log").open("ab")

    # --- Ray --------------------------------------------------------------------------------------------------------
    def start_ray(self, machine: Machine) -> None:
        """Starts the machine's service; does not wait for it."""
        cpus = self.cpus if machine in self.workers else 0
        own = {"RAY_external_storage_namespace": self.network.bridge}
        command = ["ray", "start", "--block", f"--node-ip-address={machine.address}", f"--num-cpus={cpus}"]
        command += ["--object-store-memory=100000000", "--include-log-monitor=false"]
        if machine is self.head:
            own |= {"RAY_REDIS_ADDRESS": f"{self.network.address}:{REDIS_PORT}"}
            command += ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"]
        else:
            command += [f"--address={self.address}"]
        with self._log(machine.name) as log:
            self.services[machine.name] = machine.start(command, self.environment | own, log)

    def tend(self) -> list[str]:
        """Starts Ray again on the machines where it has ended; their names."""
        ended = [machine for machine in self.machines if machine.on and self._ended(machine)]
        for machine in ended:
            end(self.services[machine.name])
            for process in machine.processes():
                if OF_RAY.search(command_line(process)):  # what the raylet left behind
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            self.start_ray(machine)
        return [machine.name for machine in ended]

    def _ended(self, machine: Machine) -> bool:
        """Whether a raylet was there and is not any more: `ray start --block` stays when it went of its own accord."""
        if self.services[machine.name].poll() is not None:
            return True
        running = any(RAYLET in command_line(process) for process in machine.processes())
        gone = machine.name in self.up and not running
        self.up = (self.up | {machine.name}) if running else (self.up - {machine.name})
        return gone

    def kill(self, machine: Machine) -> None:
        """Power off."""
        machine.kill()
        self.up.discard(machine.name)
        self.services[machine.name].wait()

    def restore(self, machine: Machine) -> None:
        """A machine of the same name and address with an empty disk takes the place of one that was killed."""
        machine.boot()
        self.start_ray(machine)

    def wait(self) -> None:
        """Until all machines are nodes of the cluster."""
        deadline = time.monotonic() + SECONDS
        while alive(self.address) != {machine.address for machine in self.machines}:
            assert time.monotonic() < deadline, f"only {alive(self.address)} have joined: {self.network.folder}"
            time.sleep(0.5)

    # --- commands ---------------------------------------------------------------------------------------------------
    def command(self, *command: str, environment: Mapping[str, str], log: Path) -> "subprocess.Popen[Any]":
        """Gives a command at the desk; its output is appended to the file."""
        with log.open("ab") as sink:
            return self.desk.start(command, self.environment | environment, sink)

    def close(self) -> None:
        for service in self.services.values():
            end(service)
        self.redis.kill()
        self.redis.wait()


def title(process: psutil.Process) -> str:
    """What a worker of Ray's runs, by the title that Ray gives it; empty for others and for idle ones."""
    name = command_line(process).partition("ray::")[2]
    return "" if name.startswith("IDLE") else name.partition(".")[0].strip()


def alive(address: str) -> set[str]:
    """Addresses of the nodes that the head takes for alive; none while it does not answer."""
    from ray._raylet import GcsClient
    from ray.exceptions import RpcError

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=5).values()
    except (RpcError, OSError, RuntimeError):
        return set()
    return {node.node_manager_address for node in nodes if node.state == 0}


@contextmanager
def machine_cluster(
    network: Network, workers: int, cpus: int = 2, environment: Mapping[str, str] | None = None
) -> Iterator[MachineCluster]:
    """A cluster whose nodes have all joined. The desk and the head have no CPUs for work."""
    cluster = MachineCluster(network, workers, cpus, environment or {})
    try:
        cluster.start_ray(cluster.head)
        deadline = time.monotonic() + SECONDS
        while not alive(cluster.address):
            assert time.monotonic() < deadline, "the head does not start"
            time.sleep(0.3)
        for machine in (cluster.desk, *cluster.workers):
            cluster.start_ray(machine)
        cluster.wait()
        yield cluster
    finally:
        cluster.close()
