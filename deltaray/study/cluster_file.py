"""Cluster files: which nodes a KubeRay resource or a `ray up` YAML may start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from deltaray.errors import UserError, door, led_by
from deltaray.files import read_small
from deltaray.limits import RECIPE_BYTES, RECIPE_DEPTH
from deltaray.recipe.models import is_there
from deltaray.runtime.demands import NodeGroup

KINDS = "a KubeRay RayCluster or RayJob, or a file for `ray up`"
SPECS = {
    "RayCluster": (),
    "RayJob": ("rayClusterSpec",),
    "RayCronJob": ("jobTemplate", "rayClusterSpec"),
    "RayService": ("rayClusterConfig",),
}
"""KubeRay's kinds, and where in `spec` each describes its cluster."""
BOUNDLESS = 10_000
"""So many nodes at most are reckoned with in one group; KubeRay's own default is 2,147,483,647."""


def read_cluster_file(path: Path) -> list[NodeGroup]:
    """The node groups of a cluster file, the head's among them.

    Other resources may stand in the same file, as in most of Kubernetes' files.

    Raises:
        UserError: names the file, the key and the fix.
    """
    if not is_there(str(path)):
        raise UserError(f"--cluster {path}: there is no such file; give {KINDS}")
    with led_by("--cluster"):
        content = read_small(path, RECIPE_BYTES)
    with door(f"--cluster {path}", "not YAML"):
        yaml = YAML(typ="safe", pure=True)
        yaml.max_depth = 2 * RECIPE_DEPTH
        found = [tree for document in yaml.load_all(content.decode()) for tree in _resources(document)]
    clusters = [tree for tree in found if tree.get("kind") in SPECS or "available_node_types" in tree]
    if len(clusters) != 1:
        raise UserError(f"--cluster {path}: {_what(found, clusters)}; give {KINDS}")
    with door(f"--cluster {path}", "not as Ray's autoscaler reads it"):
        types = _types(path, clusters[0])
        return [_group(path, name, node) for name, node in types.items()]


def _resources(document: Any) -> Iterator[dict[str, Any]]:
    """A document, or the items of a list as `kubectl get -o yaml` writes it."""
    if isinstance(document, dict):
        items = document.get("items") if document.get("kind") == "List" else None
        yield from (item for item in items or [document] if isinstance(item, dict))


def _what(found: list[dict[str, Any]], clusters: list[dict[str, Any]]) -> str:
    """What a file holds that has not just one cluster in it."""
    if clusters:
        return f"it holds {len(clusters)} clusters ({', '.join(map(_title, clusters))}), and one is looked at at a time"
    kinds = [_title(tree) for tree in found if "kind" in tree]
    return f"this is not a cluster file, it holds {', '.join(kinds)}" if kinds else "this is not a cluster file"


def _title(tree: dict[str, Any]) -> str:
    name = (tree.get("metadata") or {}).get("name") or tree.get("cluster_name")
    return " ".join(str(word) for word in (tree.get("kind"), name) if word)


def _types(path: Path, tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ray's types of nodes, each with the most that there may be."""
    if "available_node_types" in tree:
        return _ray_up_types(tree)
    spec = tree["spec"]
    if "clusterSelector" in spec:
        raise UserError(
            f"--cluster {path}: {_title(tree)} runs on a cluster that it does not describe (spec.clusterSelector): "
            f"give that RayCluster's file"
        )
    for key in SPECS[tree["kind"]]:
        spec = spec[key]
    return _kuberay_types(spec)


def _kuberay_types(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the autoscaler makes of the resource, once Kubernetes has filled in what the schema leaves open."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    groups = [_filled_in(group, spec.get("enableInTreeAutoscaling")) for group in spec.get("workerGroupSpecs") or ()]
    resource = {"metadata": {"name": "x", "namespace": "x"}, "spec": spec | {"workerGroupSpecs": groups}}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    types: dict[str, dict[str, Any]] = config["available_node_types"]
    types[config["head_node_type"]]["max_workers"] = 1
    return types


def _filled_in(group: dict[str, Any], grows: bool | None) -> dict[str, Any]:
    """A group of workers with its bounds; both are the number of replicas where nothing scales the cluster."""
    least, most = group.get("minReplicas") or 0, group.get("maxReplicas")
    most = BOUNDLESS if most is None else most
    if not grows:
        least = most = min(max(group.get("replicas") or 0, least), most)
    if group.get("suspend"):
        least = most = 0
    return group | {"minReplicas": least, "maxReplicas": most}


def _ray_up_types(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """With what Ray fills in for the cloud, such as `max_workers`; no type grows beyond that of the whole cluster."""
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(tree)
    types = {
        name: node | {"max_workers": min(config["max_workers"], node["max_workers"])}
        for name, node in config["available_node_types"].items()
    }
    types[config["head_node_type"]]["max_workers"] += 1
    return types


def _group(path: Path, name: str, node: dict[str, Any]) -> NodeGroup:
    resources = node.get("resources") or {}
    if "CPU" not in resources:
        raise UserError(f"--cluster {path}: {name}.resources: write the node's CPU (and GPU), for example {{CPU: 8}}")
    kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
    most = min(node["max_workers"], BOUNDLESS)
    return NodeGroup(name, resources["CPU"], resources.get("GPU", 0), most, kinds[0] if kinds else None)
