"""Cluster files against the official schemas and validators, and studies against the nodes that the files name."""

import copy
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft7Validator, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.core.generated import autoscaler_pb2
from ruamel.yaml import YAML

from deltaray import cli
from deltaray.recipe import load_recipe, recipe_folder
from deltaray.recipe.expand import expand
from deltaray.recipe.recipe import Cluster
from deltaray.runtime.demands import Bundle, NodeGroup, Nodes, demands, largest
from deltaray.runtime.session import Capacity, cluster_capacity
from deltaray.study.cluster_file import BOUNDLESS, read_cluster_file
from deltaray.study.fits import fits

CLUSTER = ROOT / "cluster"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
SCHEMAS = {"RayCluster": CRDS / "ray.io_rayclusters.yaml", "RayJob": CRDS / "ray.io_rayjobs.yaml"}
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = [CLUSTER / "aws.yaml", CLUSTER / "gcp.yaml"]
RECIPES = sorted(recipe_folder().rglob("*.yaml"))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.CSafeLoader)  # the schemas are large


def strict(node: Any) -> Any:
    """Refuses unknown fields, as the API server does."""
    if isinstance(node, dict):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for child in node.values():
            strict(child)
    elif isinstance(node, list):
        for child in node:
            strict(child)
    return node


@pytest.mark.skipif(not CRDS.exists(), reason="the KubeRay schemas are not beside the checkout")
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_files_keep_the_official_schema(path: Path) -> None:
    document = read(path)
    versions = read(SCHEMAS[document["kind"]])["spec"]["versions"]
    schema = strict(next(item["schema"]["openAPIV3Schema"] for item in versions if item["name"] == "v1"))
    assert not [error.message for error in Draft7Validator(schema).iter_errors(document)]
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    spec["workerGroupSpecs"][0]["template"]["spec"]["nonsense"] = 1
    assert list(Draft7Validator(schema).iter_errors(document))  # the check would notice


def test_the_job_runs_on_the_cluster_of_the_other_file() -> None:
    job, cluster = read(CLUSTER / "kuberay/rayjob.yaml"), read(CLUSTER / "kuberay/raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_files_pass_rays_own_validator(path: Path) -> None:
    config = read(path)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["max_workers"] == sum(node.get("max_workers", 0) for node in config["available_node_types"].values())
    config["available_node_types"]["cpu"]["nonsense"] = 1
    with pytest.raises(ValidationError):
        validate_config(prepare_config(config))


def test_every_group_of_workers_starts_and_ends_at_zero() -> None:
    for path in KUBERAY:
        spec = read(path)["spec"]
        spec = spec.get("rayClusterSpec", spec)
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in spec["workerGroupSpecs"])
        assert all(group["idleTimeoutSeconds"] > 0 for group in spec["workerGroupSpecs"])
    for path in RAY_UP:
        types = read(path)["available_node_types"]
        assert all(node["min_workers"] == 0 for name, node in types.items() if name != "head")


def test_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    scripts = sorted(CLUSTER.rglob("*.sh"))
    assert scripts
    checked = subprocess.run([shellcheck, "--severity=style", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_every_shipped_file(recipe: Path, tmp_path: Path) -> None:
    study = expand(load_recipe(recipe, [f"out={tmp_path / 'out'}"]))
    for path in [*KUBERAY, *RAY_UP]:
        found = fits(study, read_cluster_file(path), path.name)
        assert found and not [fit.reason for fit in found if fit.verdict == "never"]
        assert all(fit.room == fit.most for fit in found)


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["deltaray", "plan", str(recipe_folder() / "qwen2.5-ladder.yaml"), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(str(stop.value.code))


def test_plan_tells_what_fits_what_waits_and_what_never_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = read(CLUSTER / "aws.yaml")
    types = cluster["available_node_types"]
    types["training"]["max_workers"] = types["teachers-1gpu"]["max_workers"] = 0
    types["teachers-4gpu"]["max_workers"] = 4
    del types["cpu"]["max_workers"]  # then as many as the whole cluster may have
    YAML(typ="safe").dump(cluster, tmp_path / "small.yaml")
    out = f"out={tmp_path / 'out'}"
    small = ("--cluster", str(tmp_path / "small.yaml"), "--set", out)
    assert plan(monkeypatch, *small, "--json") == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["cluster"] == {"cpus": 4 * 48 + 40 * 8, "gpus": 16}
    verdicts = {fit["what"].split()[-1]: fit["verdict"] for fit in answer["fits"] if fit["stage"] == "generate"}
    assert verdicts == dict.fromkeys(("0.5b", "1.5b"), "fits") | dict.fromkeys(
        ("3b", "7b", "14b", "32b", "72b"), "waits"
    )
    assert next(fit["room"] for fit in answer["fits"] if fit["what"].endswith("72b")) == 4

    eight = ("--set", "teachers.72b.engine.tensor_parallel=8", "--set", "training.accelerator=H100")
    assert plan(monkeypatch, *small, *eight) == 2
    stdout, stderr = capfd.readouterr()
    assert "never" in stdout and "Traceback" not in stderr
    name = tmp_path / "small.yaml"
    assert f"teachers.72b.engine: vLLM for teacher 72b needs 1 x 1 CPU + 8 GPU on one node, {name} has" in stderr
    assert f"training.workers: 8 training workers needs 8 x 1 CPU + 1 GPU (H100) on one node, {name}" in stderr
    assert not (tmp_path / "out").exists()


POD = "{containers: [{name: ray, resources: {limits: {cpu: 1500m}}}]}"
GROUP = f"{{groupName: g, rayStartParams: {{num-cpus: '8', num-gpus: '4'}}, template: {{spec: {POD}}}, BOUNDS}}"
RESOURCE = (
    f"kind: RayCluster\nspec: {{headGroupSpec: {{template: {{spec: {POD}}}}}, workerGroupSpecs: [{GROUP}], MORE}}\n"
)
GROWS = "enableInTreeAutoscaling: true"


@pytest.mark.parametrize(
    ("bounds", "more", "most"),
    [
        ("minReplicas: 1, maxReplicas: 5, replicas: 2", GROWS, 5),
        ("maxReplicas: 5, numOfHosts: 2", GROWS, 10),
        ("minReplicas: 1, maxReplicas: 5, replicas: 2", "suspend: false", 2),  # nothing scales it
        ("minReplicas: 3, maxReplicas: 5, replicas: 2, numOfHosts: 2", "suspend: false", 6),
        ("minReplicas: 0", "suspend: false", 0),
        ("minReplicas: 1, maxReplicas: 5, suspend: true", GROWS, 0),
        ("minReplicas: 0", GROWS, BOUNDLESS),  # the schema fills in 2,147,483,647
        ("maxReplicas: 2147483647", GROWS, BOUNDLESS),
    ],
)
def test_a_group_has_as_many_nodes_as_kubernetes_would_make(bounds: str, more: str, most: int, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(RESOURCE.replace("BOUNDS", bounds).replace("MORE", more))
    assert read_cluster_file(path) == [NodeGroup("headgroup", 2, 0, 1), NodeGroup("g", 8, 4, most)]


def wrapped(kind: str, *keys: str) -> str:
    spec = yaml.safe_load(RESOURCE.replace("BOUNDS", "replicas: 2").replace("MORE", "suspend: false"))["spec"]
    for key in reversed(keys):
        spec = {key: spec}
    return yaml.safe_dump({"kind": kind, "metadata": {"name": "here"}, "spec": spec})


@pytest.mark.parametrize(
    "text",
    [
        wrapped("RayJob", "rayClusterSpec"),
        wrapped("RayCronJob", "jobTemplate", "rayClusterSpec"),
        wrapped("RayService", "rayClusterConfig"),
        "kind: Secret\n---\n" + wrapped("RayCluster") + "---\n\n---\nkind: Service\n",
        yaml.safe_dump({"kind": "List", "items": [yaml.safe_load(wrapped("RayCluster")), {"kind": "Pod"}]}),
    ],
    ids=["job", "cron job", "service", "several documents", "list"],
)
def test_a_cluster_is_found_wherever_kubernetes_lets_it_stand(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert read_cluster_file(path) == [NodeGroup("headgroup", 2, 0, 1), NodeGroup("g", 8, 4, 2)]


def test_a_cluster_without_workers_has_its_head(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"kind: RayCluster\nspec: {{headGroupSpec: {{template: {{spec: {POD}}}}}}}\n")
    assert read_cluster_file(path) == [NodeGroup("headgroup", 2, 0, 1)]


def test_ray_fills_in_how_many_workers_a_cloud_cluster_may_have(tmp_path: Path) -> None:
    cluster = read(CLUSTER / "gcp.yaml")
    del cluster["max_workers"]  # Ray's default is 2
    YAML(typ="safe").dump(cluster, tmp_path / "cluster.yaml")
    assert all(group.most <= 2 for group in read_cluster_file(tmp_path / "cluster.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("a: [", "not YAML"),
        ("name: x\n", "this is not a cluster file; give"),
        ("- 1\n", "this is not a cluster file; give"),
        (
            "kind: Ingress\nmetadata: {name: way}\n---\nkind: Pod\n",
            "this is not a cluster file, it holds Ingress way, Pod;",
        ),
        (wrapped("RayCluster") + "---\n" + wrapped("RayJob"), "it holds 2 clusters (RayCluster here, RayJob here)"),
        ("kind: RayJob\nspec: {clusterSelector: {a: b}}\n", "(spec.clusterSelector): give that RayCluster's file"),
        ("kind: RayJob\nspec: {}\n", "not as Ray's autoscaler reads it: KeyError: 'rayClusterSpec'"),
        ("kind: RayCluster\nspec: [1]\n", "not as Ray's autoscaler reads it"),
        ("kind: RayCluster\nspec: {headGroupSpec: {template: {spec: {containers: []}}}}\n", "IndexError: list index"),
        ("available_node_types: {}\n", "not as Ray's autoscaler reads it: KeyError: 'provider'"),
        (
            "provider: {type: aws, region: x}\nhead_node_type: head\navailable_node_types: {head: {node_config: {}}}\n",
            "head.resources: write the node's CPU",
        ),
    ],
)
def test_a_file_that_is_no_cluster_file(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    assert plan(monkeypatch, "--cluster", str(path)) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith(f"error: --cluster {path}") and message in stderr and "Traceback" not in stderr


def possible(count: int, bundle: Bundle, nodes: list[tuple[float, list[float]]]) -> bool:
    """Whether some assignment of `count` bundles to nodes and cards works; tries them all."""
    for places in itertools.combinations_with_replacement(range(len(nodes)), count):
        if all(_holds(places.count(number), bundle, cpus, cards) for number, (cpus, cards) in enumerate(nodes)):
            return True
    return False


def _holds(count: int, bundle: Bundle, cpus: float, cards: list[float]) -> bool:
    if count * bundle.cpus > cpus:
        return False
    if bundle.gpus >= 1:
        return count * bundle.gpus <= len(cards)
    return not bundle.gpus or count <= sum(int(1 / bundle.gpus + 1e-9) for _ in cards)


def test_placing_finds_room_exactly_where_some_assignment_does() -> None:
    draw = random.Random(0)
    for _ in range(300):
        bundle = Bundle(draw.randint(1, 5), draw.choice([0, 0.5, 1, 2]), draw.choice([0, 0.25, 0.3, 0.6, 1, 2, 4]))
        if not bundle.cpus and not bundle.gpus:
            continue
        groups = [
            NodeGroup(str(number), draw.choice([0, 1, 2, 4]), draw.choice([0, 1, 2, 4]), draw.randint(0, 2))
            for number in range(3)
        ]
        nodes = [(group.cpus, [1.0] * int(group.gpus)) for group in groups for _ in range(group.most)]
        placed = sum(Nodes(groups).place(bundle).values())
        most = max((n for n in range(1, bundle.count + 1) if possible(n, bundle, nodes)), default=0)
        assert placed == most, (bundle, groups)


def test_a_replica_over_several_nodes_asks_for_single_gpus(tmp_path: Path) -> None:
    engine = [
        "teachers.72b.engine.tensor_parallel=16",
        "teachers.72b.engine.arguments.distributed_executor_backend=ray",
    ]
    overrides = [f"out={tmp_path / 'out'}", *engine]
    study = expand(load_recipe(recipe_folder() / "qwen2.5-ladder.yaml", overrides))
    groups = read_cluster_file(CLUSTER / "aws.yaml")
    fit = next(fit for fit in fits(study, groups, "it") if fit.what.endswith("72b"))
    assert (fit.verdict, fit.room, fit.most) == ("waits", 7, 8)  # 112 GPUs in all
    demand = next(it for it in demands(study, largest(groups)) if it.what.endswith("72b"))
    assert demand.total(1).gpus == 16 and all(bundle.gpus <= 1 for bundle in demand.bundles(1))


def test_a_joined_cluster_counts_with_what_its_autoscaler_may_start(ray_session: Any) -> None:
    declared, has = Cluster(gpus=1), ray_session.cluster_resources()["CPU"]
    assert cluster_capacity(declared) == Capacity(has, 1)
    config = autoscaler_pb2.ClusterConfig()
    for cpus, gpus, most in ((8, 0, 4), (16, 4, 2)):
        group = config.node_group_configs.add(max_count=most)
        group.resources.update({"CPU": cpus, "GPU": gpus})
    gcs = ray_session._private.worker.global_worker.gcs_client
    key = ray_session._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    space = ray_session._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    gcs.internal_kv_put(key, config.SerializeToString(), True, space)
    try:
        assert cluster_capacity(declared) == Capacity(8 * 4 + 16 * 2, 4 * 2)
    finally:
        gcs.internal_kv_del(key, False, space)


def test_the_guides_messages_are_those_of_the_code() -> None:
    sources = "".join(file.read_text() for file in sorted((ROOT / "deltaray").rglob("*.py")))
    spoken = re.sub(r'"\s*\n\s*f?"', "", sources).replace("\\n", "")
    table = (CLUSTER / "README.md").read_text().partition("most likely messages")[2]
    messages = re.findall(r"^\| `(.+?)` \| \S", table, re.MULTILINE)
    assert len(messages) == 20
    for message in messages:
        fragments = [part.strip(" ;") for part in message.split("…")]
        assert all(part in spoken for part in fragments), message


def test_the_guides_links_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (CLUSTER / "README.md").read_text())
    assert links and all((CLUSTER / link).exists() for link in links)
