"""The network that workers of a training speak over: the one that Ray's nodes reach each other by.

Without GPUs the workers use gloo, which listens where the machine's host name points. On many machines that is
127.0.1.1 or nothing at all, and on one with several networks it may be the wrong one: then workers of other nodes
cannot connect. The address that Ray knows a node by is one that all others reach.
"""

import os

import psutil
import ray
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeNetwork(TorchConfig):  # type: ignore[misc]
    """Ray Train's torch process group, over the interface of the node's address in the cluster."""

    @property
    def backend_cls(self) -> type["_Backend"]:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: "ray.train._internal.worker_group.WorkerGroup", config: BackendConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, config)


def use_interface_of_node() -> None:
    """Names the interface to gloo, in a worker before its process group is made; what the node has set stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an address; None where none has (a node behind a translated one)."""
    found = (name for name, items in psutil.net_if_addrs().items() if any(item.address == address for item in items))
    return next(found, None)
