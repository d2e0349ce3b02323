"""The Ray session: what the cluster has, starting and joining Ray."""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.failures import cause_of
from deltaray.recipe.models import Engine
from deltaray.recipe.recipe import Cluster
from deltaray.runtime.localhost import keep_token, listens_here_alone, on_localhost
from deltaray.runtime.raylet_watchdog import RayletWatch

EMBEDDED_CPUS = 8
"""Least logical CPUs of a Ray started here: its workers mostly wait, and pipelines of actor pools deadlock on two."""
START_ATTEMPTS = 3
ANSWER_SECONDS = 1.0
"""In which a Ray on this machine takes a connection."""
RETRY_DELAYS = {"RAY_task_retry_delay_ms": 25_000, "RAY_task_actor_unavailable_retry_delay_base_ms": 10_000}
"""Milliseconds before Ray repeats what was lost with a worker of a cluster; for an actor that is out of reach the first
pause, each further one being twice as long. To know that a node has vanished takes the head five looks of up to 13 s
each; without pauses all three repetitions would be spent on it before."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server, and only by it, for the commands that it runs; its RAY_ADDRESS is then that of the job."""
STREAM_CPUS = 1.0
"""Logical CPUs that the reading and writing tasks around an actor pool need."""
TRIAL_CPUS = 0.25
"""Logical CPUs of the process that leads a trial, for its own small tasks."""


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs of a cluster."""

    cpus: float
    gpus: float

    def gpus_of(self, engine: Engine) -> float:
        """GPUs of one replica: as demanded, else what its parallelism needs where the cluster has GPUs."""
        if engine.gpus is not None:
            return engine.gpus
        return engine.tensor_parallel * engine.pipeline_parallel if self.gpus else 0

    def gpus_per_worker(self, demanded: int | None) -> int:
        return demanded if demanded is not None else int(self.gpus > 0)

    def hidden_gpus(self, gpus: float) -> dict[str, str]:
        """The environment of a process that reserves so many: with none it must see none; Ray leaves them visible."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.gpus and not gpus else {}


def declared_capacity(cluster: Cluster) -> Capacity:
    """What a Ray started on this machine will have; for an address, what the recipe declares (0: ask the cluster)."""
    if joins_cluster(cluster):
        return Capacity(cluster.cpus or 0, cluster.gpus or 0)
    gpus = cluster.gpus if cluster.gpus is not None else _gpus_here()
    return Capacity(cluster.cpus or max(EMBEDDED_CPUS, os.cpu_count() or 1), gpus)


def joins_cluster(cluster: Cluster) -> bool:
    return address_of(cluster) is not None


def address_of(cluster: Cluster) -> str | None:
    """The cluster that a study runs on: the recipe's, inside a Ray job that of the job; None: a Ray of its own.

    What else Ray would join by itself (RAY_ADDRESS, a head that `ray start` has left running here, or only the address
    of one that has died) is not asked for by the recipe: see `others_here`.
    """
    if cluster.address is not None:
        return cluster.address
    return os.environ.get("RAY_ADDRESS") or "auto" if JOB_VARIABLE in os.environ else None


def others_here() -> dict[str, str]:
    """Where a Ray is named that a study without `cluster.address` does not use: address -> what names it."""
    from ray._common.utils import get_ray_address_file

    found, file = {os.environ.get("RAY_ADDRESS", ""): "RAY_ADDRESS"}, Path(get_ray_address_file(None))
    with suppress(OSError):
        found.setdefault(file.read_text().strip(), str(file))
    return {address: where for address, where in found.items() if address}


def which_ray(cluster: Cluster, capacity: "Capacity") -> str:
    """One line on the Ray that a command uses."""
    size = f"{capacity.cpus:g} CPUs" + (f", {capacity.gpus:g} GPUs" if capacity.gpus else "")
    if (address := address_of(cluster)) is not None:
        return f"uses the Ray cluster at {address} ({size})"
    others = [
        f"another Ray runs at {address}: set cluster.address to join it"
        if _answers(address)
        else f"{address}, which {where} names, does not answer"
        for address, where in others_here().items()
    ]
    return "; ".join([f"uses its own Ray on this machine ({size})", *others])


def _answers(address: str) -> bool:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _gpus_here() -> int:
    if not Path("/proc/driver/nvidia").exists():  # importing torch takes seconds
        return 0
    import torch

    return torch.cuda.device_count()


_watches: list[RayletWatch] = []
"""Of the Ray that this process has started or joined."""


def start_ray(cluster: Cluster, say: Callable[[str], None]) -> Capacity:
    """Joins the cluster at `cluster.address` (inside a Ray job: the job's), or starts Ray on this machine.

    Args:
        say: told which Ray it is, and if the Ray of this machine dies, before this process ends with it.

    Raises:
        UserError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data doubles a pool and waits for the new nodes before it doubles again: all that it may use come at once
    os.environ.setdefault("RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_FACTOR", "1000000")
    if joins_cluster(cluster):
        for name, delay in RETRY_DELAYS.items():
            os.environ.setdefault(name, str(delay))
    import ray

    if not ray.is_initialized():
        on_sigterm = signal.getsignal(signal.SIGTERM)
        _join_or_start(cluster)
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end the driver before it can say how to resume
        _watches.append(RayletWatch(say))
        say(which_ray(cluster, cluster_capacity(cluster)))
    return cluster_capacity(cluster)


def _join_or_start(cluster: Cluster) -> None:
    address = address_of(cluster)
    try:
        init_ray(_init_arguments(cluster))
    except (ConnectionError, RuntimeError) as error:
        if address is None:
            raise
        raise UserError(
            f"cluster.address: the Ray at {address} cannot be joined: {cause_of(error)}\nstart it, correct the "
            "address, or leave cluster.address out: then the study starts a Ray of its own on this machine"
        ) from error


def cluster_capacity(cluster: Cluster) -> Capacity:
    """What the cluster has, or may grow to: its nodes of now, what its autoscaler reports, what the recipe declares."""
    import ray

    now = ray.cluster_resources()
    grown = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    declared = {"CPU": cluster.cpus or 0, "GPU": cluster.gpus or 0}
    cpus, gpus = (max(now.get(kind, 0), grown.get(kind, 0), declared[kind]) for kind in ("CPU", "GPU"))
    return Capacity(cpus, gpus)


def init_ray(arguments: dict[str, Any]) -> None:
    """`ray.init`, repeated on a machine so busy that Ray's processes need longer than the 30 s it gives them.

    Without an `address` it starts a Ray of its own, whatever else runs or has run on this machine. That listens on
    localhost, and asks other users of this machine for a token unless RAY_AUTH_MODE says `disabled`.
    """
    import ray

    arguments = {"address": "local"} | arguments
    own = arguments["address"] == "local"
    if own and os.environ.get("RAY_AUTH_MODE", "token") == "token":
        keep_token()
    here = own or listens_here_alone(str(arguments["address"]))
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with on_localhost() if here else nullcontext():
                ray.init(**arguments)
            return
        except Exception as error:
            slow = "timed out during startup" in str(error)
            if not slow or attempt == START_ATTEMPTS:
                raise
            ray.shutdown()


def _init_arguments(cluster: Cluster) -> dict[str, Any]:
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if (address := address_of(cluster)) is not None:
        return arguments | {"address": address}
    capacity = declared_capacity(cluster)
    return arguments | {
        "num_cpus": capacity.cpus,
        "num_gpus": capacity.gpus,
        "include_dashboard": cluster.dashboard,
        "object_store_memory": 512 * 2**20 if capacity.gpus == 0 else None,
    }


def cpus_of_a_core() -> float:
    """Logical CPUs that stand for one core of this node: above 1 where Ray was started here with more than it has."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    logical = next(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == here)
    return max(1.0, float(logical) / (os.cpu_count() or 1))


def beside_driver() -> dict[str, Any]:
    """Options of a small actor that belongs to this process: on its node, so that no other node takes it along.

    Ray puts an actor that asks for nothing on any node, spot ones included. One that dies is made
    again, without what it knew, and asked again.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(here, soft=False)
    return {"num_cpus": 0, "scheduling_strategy": place, "max_restarts": -1, "max_task_retries": -1}


def stop_ray() -> None:
    import ray

    while _watches:
        _watches.pop().stop()
    ray.shutdown()


def logs_of_ray() -> str:
    """The folder of Ray's own logs on the node of the driver."""
    import ray

    return os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs")  # noqa: PTH118
