"""What SECURITY.md promises: secrets, names, pickles, remote code, ports, containers, pins."""

import ast
import io
import json
import pickle
import re
import shlex
import tomllib
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from tiny_model import save_tiny

from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe import Recipe, load_recipe
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.scorers import RewardModel
from deltaray.score.rewards import RewardWorker
from deltaray.study.check_models import check_model
from deltaray.train.checkpoint import Checkpoints, _checksum
from deltaray.train.student import load_module

PLANTED = "hf_PlantedPlantedPlanted9c41"
WEAK = {"model": "owner/weak"}
CLUSTER = ROOT / "cluster"


def recipe(**sections: Any) -> dict[str, Any]:
    return {"name": "study", "out": "runs/x", "prompts": {"path": "p.jsonl"}, "teachers": {"weak": WEAK}, **sections}


def load(tree: dict[str, Any], folder: Path, *overrides: str) -> Recipe:
    YAML(typ="safe").dump(tree, folder / "recipe.yaml")
    return load_recipe(folder / "recipe.yaml", list(overrides))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"teachers": {"weak": WEAK | {"engine": {"arguments": {"hf_token": "anything"}}}}}, "arguments.hf_token"),
        ({"teachers": {"weak": WEAK | {"engine": {"arguments": {"x": {"password": "p"}}}}}}, "arguments.x.password"),
        ({"teachers": {"weak": WEAK | {"system": f"use {PLANTED}"}}}, "teachers.weak.system"),
        ({"teachers": {"weak": WEAK | {"endpoint": {"url": "https://u:pass@host/v1"}}}}, "endpoint.url"),
        ({"teachers": {"weak": WEAK | {"endpoint": {"url": "https://host/v1?api_key=abc"}}}}, "endpoint.url"),
        (
            {"teachers": {"weak": WEAK | {"endpoint": {"url": "https://host/v1", "body": {"api-key": "abc"}}}}},
            "endpoint.body.api-key",
        ),
        (
            {"teachers": {"weak": WEAK | {"endpoint": {"url": "https://h/v1", "key_variable": "sk-" + "a" * 30}}}},
            "endpoint.key_variable",
        ),
        ({"out": "s3://AKIAABCDEFGHIJKLMNOP:secret@bucket/study"}, "out"),
        ({"prompts": {"path": "https://account.blob/x.jsonl?sv=1&sig=abcdef"}}, "prompts.path"),
        # other messages quote what they refuse, so these must come first
        ({"name": f"x {PLANTED}"}, "name"),
        ({"prompts": {"path": "p.jsonl", "limit": PLANTED}}, "prompts.limit"),
        ({"prompts": {"path": "p.jsonl", "duplicates": PLANTED}}, "prompts.duplicates"),
        ({"pairings": {"p": {"chosen": PLANTED, "rejected": "weak"}}}, "pairings.p.chosen"),
        ({"prompts": {"path": "secretless-but-in-the-environment.jsonl"}}, "prompts.path"),
        ({"prompts": {"path": "secretless-of-a-token.jsonl"}}, "prompts.path"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_quoted(
    sections: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secretless-but-in-the-environment")
    monkeypatch.setenv("GITHUB_TOKEN", "secretless-of-a-token")
    with pytest.raises(UserError) as caught:
        load(recipe(**sections), tmp_path)
    message = str(caught.value)
    assert re.search(rf"recipe.yaml:\d+: (teachers\.weak\.)?(engine\.)?{re.escape(key)}: holds ", message), message
    for quoted in ("anything", "secretless", "PlantedPlanted", "pass@", "abc", "a" * 30, "secret@"):
        assert quoted not in message.replace(key, "")


@pytest.mark.parametrize(
    "tree",
    [{PLANTED: 1}, {"prompts": {"path": "p", PLANTED: "x"}}, {"teachers": {PLANTED: WEAK}}],
    ids=["at the top", "in a section", "as a name"],
)
def test_a_secret_that_is_a_key_is_refused_and_not_quoted(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of its keys holds a secret") as caught:
        load(recipe(**tree), tmp_path)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize("text", [f"a: {PLANTED}\na: {PLANTED}x\n", f"a: *{PLANTED}\n", f"a: !{PLANTED} x\n"])
def test_no_message_about_yaml_quotes_a_secret(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        PLANTED,
        f"name.x={PLANTED}",
        f"name=[{PLANTED}",
        f"{PLANTED}.x=1",
        f"name={PLANTED}",
        f"name.{PLANTED}=1",
        f"name.{PLANTED}.x=1",
    ],
)
def test_no_message_about_an_override_quotes_a_secret(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe(), tmp_path, override)
    assert PLANTED not in str(caught.value)


def test_a_secret_on_the_command_line_is_not_quoted_either(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--set teachers.weak.revision: holds what looks like a key") as caught:
        load(recipe(), tmp_path, f"teachers.weak.revision={PLANTED}")
    assert PLANTED not in str(caught.value)


def test_what_only_sounds_like_a_secret_passes(tmp_path: Path) -> None:
    arguments = {"tokenizer_mode": "auto", "eos_token": "</s>", "max_num_batched_tokens": 512, "stop_token": "x"}
    endpoint = {"url": "https://host:443/v1?version=3", "key_variable": "OPENAI_API_KEY", "body": {"max_tokens": 3}}
    teachers = {
        "weak": WEAK | {"engine": {"arguments": arguments}, "chat_template_arguments": {"bos_token": "<s>"}},
        "task-sk-1": {"model": "served", "endpoint": endpoint, "system": "Keep every secret. The key is kindness."},
    }
    loaded = load(recipe(teachers=teachers, out="s3://bucket/study?endpoint_override=host:9000"), tmp_path)
    assert loaded.teachers["task-sk-1"].endpoint is not None


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ".hidden", "/etc", "a\nb", "", "a b"])
@pytest.mark.parametrize(
    "section", ["teachers", "scorers", "pairings", "training", "tasks", "selection", "student", "preferences", "name"]
)
def test_names_cannot_leave_their_folders(section: str, name: str, tmp_path: Path) -> None:
    task = {"path": "t.jsonl"}
    trees: dict[str, dict[str, Any]] = {
        "teachers": recipe(teachers={name: WEAK}),
        "scorers": recipe(scorers={name: {"kind": "exact_match"}}),
        "pairings": recipe(student=WEAK, pairings={name: {"chosen": "weak", "rejected": "weak"}}),
        "training": recipe(student=WEAK, training={"runs": {name: {"pairing": "p"}}}),
        "tasks": recipe(evaluation={"tasks": {name: task}}),
        "selection": recipe(evaluation={"tasks": {"t": task}, "selection": {name: task}}),
        "student": recipe(student=WEAK | {"name": name}),
        "preferences": {"name": "x", "out": "runs/x", "preferences": {"path": "p.jsonl", "chosen": name}},
        "name": recipe() | {"name": name},
    }
    with pytest.raises(UserError, match="use letters, digits"):
        load(trees[section], tmp_path)


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is called."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_in_the_code_loads_what_could_run() -> None:
    running = re.compile(
        r"(^|\.)(torch|joblib|marshal|shelve|dill|pickle|cloudpickle)\.(load|loads|open)$|^(eval|exec)$"
    )
    found = {}
    for file in sorted((ROOT / "deltaray").rglob("*.py")):
        source = file.read_text()
        if names := sorted(name for name in calls(ast.parse(source)) if running.search(name)):
            found[str(file.relative_to(ROOT / "deltaray"))] = names
        assert "allow_pickle=True" not in source and "weights_only=False" not in source
        assert "trust_remote_code=True" not in source, file
    assert found == {
        "generate/stream.py": ["pickle.loads"],  # what another of our own processes has packed, inside Ray
        "untrusted/child.py": ["pickle.loads"],  # what the process that has started it asks
        "score/programs/confinement.py": ["exec"],  # in the sandbox
    }


@pytest.mark.parametrize("kind", [Model, Teacher, Student, RewardModel])
def test_remote_code_is_off_unless_the_recipe_says_so(kind: type[Model]) -> None:
    assert kind.model_fields["trust_remote_code"].default is False


class _Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_refused_and_not_read(tmp_path: Path) -> None:
    folder, mark = Path(save_tiny(tmp_path / "model")), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"weights": _Trap(mark)}, folder / "pytorch_model.bin")
    model = Student(model=str(folder))
    with pytest.raises(UserError, match=r"^student.model: .* holds no \*.safetensors; pickled weights can run code"):
        check_model(model, "student")
    with pytest.raises(OSError, match="safetensors"):
        load_module(model, "float32")
    judge = RewardModel(kind="reward_model", model=str(folder))
    with pytest.raises(UserError, match="safetensors"):
        RewardWorker(Store(str(tmp_path / "out")), judge, "scorers.reward")
    assert not mark.exists()


@pytest.mark.parametrize("dump", [pickle.dumps, lambda trap: _saved(trap)], ids=["pickle", "torch"])
def test_pickles_in_a_checkpoint_are_not_run(dump: Any, tmp_path: Path) -> None:
    """Beside its files, and as one of them with the right size and checksum."""
    mark, checkpoints = tmp_path / "mark", Checkpoints(Store(str(tmp_path / "out")), "run")
    content = dump({"w|weight": _Trap(mark)})
    folder = f"{checkpoints.folder}/step"
    for name in ("rank-00000-00000.safetensors", "mp_rank_00_model_states.pt", "optimizer.pt", "pytorch_model.bin"):
        checkpoints.store.write_bytes(f"{folder}/{name}", content)
    files = {"rank-00000-00000.safetensors": [len(content), zlib.crc32(content)]}
    manifest: dict[str, Any] = {"files": files, "state": {"data": 1, "step": 1}}
    checkpoints.store.write_json(f"{folder}/manifest.json", manifest | {"checksum": _checksum(manifest)})
    manifest = checkpoints.manifest("step", 1)
    assert checkpoints.complete() == ["step"] and manifest is not None
    assert checkpoints.shapes("step", manifest, list(manifest["files"])) is None
    assert not mark.exists()


def _saved(value: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def pods() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        spec = spec.get("rayClusterSpec", spec)
        assert spec["authOptions"]["mode"] == "token"
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            found.append((group.get("groupName", "head"), group["template"]["spec"]))
    return found


def test_every_pod_is_confined_and_gets_its_secrets_by_reference() -> None:
    assert len(pods()) == 10
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, name
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"] is True
            mounts = {it["mountPath"]: it["name"] for it in container["volumeMounts"]}
            volumes = {it["name"]: it for it in pod["volumes"]}
            assert {"name": "HOME", "value": "/scratch"} in container["env"]
            assert all("emptyDir" in volumes[mounts[place]] for place in ("/tmp", "/scratch", "/dev/shm"))
            assert confined["allowPrivilegeEscalation"] is False and confined["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert container["readinessProbe"] and container["livenessProbe"]
            assert not re.search(":latest$|^[^:]*$", container["image"])
            assert not [item for item in container["env"] if re.search("TOKEN|KEY|SECRET|PASSWORD", item["name"])]
            assert all("secretRef" in item for item in container["envFrom"])


def test_the_network_lets_in_the_cluster_its_operator_and_metrics() -> None:
    spec = yaml.safe_load((CLUSTER / "network" / "policy.yaml").read_text())["spec"]
    nodes = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert spec["podSelector"] == nodes and spec["policyTypes"] == ["Ingress", "Egress"]
    among, *others = spec["ingress"]
    assert among == {"from": [{"podSelector": nodes}]} and spec["egress"][0] == {"to": [{"podSelector": nodes}]}
    ports = {port["port"] for rule in others for port in rule["ports"]}
    assert ports == {8265, 52365, 8080} and all(rule["from"] for rule in others)
    assert "169.254.0.0/16" in spec["egress"][-1]["to"][0]["ipBlock"]["except"]


def test_slurms_folders_cannot_be_guessed() -> None:
    script = (CLUSTER / "slurm.sh").read_text()
    assert "umask 077" in script and "$SLURM_JOB_ID" not in re.sub(
        r"mktemp -d \S+", "", script.partition("# --block")[2]
    )
    for made in re.findall(r"/tmp/\S+", script):
        assert "XXXXXXXX" in made, made


def starts() -> list[str]:
    """Every `ray start` of the shipped files."""
    found = []
    for name in ("aws.yaml", "gcp.yaml"):
        config = yaml.safe_load((CLUSTER / name).read_text())
        found += [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    script = (CLUSTER / "slurm.sh").read_text().replace("\\\n", " ")
    exported = next(line for line in script.splitlines() if line.startswith("export RAY_AUTH_MODE"))
    found += [f"{exported.removeprefix('export ')} {line}" for line in script.splitlines() if "ray start" in line]
    return [command for command in found if "ray start" in command]


def test_every_head_asks_for_a_token_and_listens_to_itself_only() -> None:
    assert len(starts()) == 6
    for command in starts():
        assert "RAY_AUTH_MODE=token" in shlex.split(command), command
        assert "--dashboard-host=127.0.0.1" in command or "--head" not in command


def test_ray_is_told_everywhere_not_to_log_the_variables_of_jobs() -> None:
    for file in (*CLUSTER.glob("*.yaml"), CLUSTER / "slurm.sh", CLUSTER / "Dockerfile"):
        assert "RAY_LOGGER_LEVEL=warning" in file.read_text(), file
    for _, pod in pods():
        assert {"name": "RAY_LOGGER_LEVEL", "value": "warning"} in pod["containers"][0]["env"]


def pinned() -> dict[str, list[str]]:
    """The hashes of each pin of the image."""
    lines = (CLUSTER / "constraints.txt").read_text().replace("\\\n", "").splitlines()
    found = [line.partition(" --hash") for line in (" ".join(it.split()) for it in lines) if line[:1] not in ("#", "")]
    return {pin: (dash + rest).split() for pin, dash, rest in found}


def test_the_image_runs_without_root_and_pins_everything() -> None:
    lines = [line.split() for line in (CLUSTER / "Dockerfile").read_text().splitlines() if line.strip()]
    assert [words[1] for words in lines if words[0] == "USER"] == ["ray"]
    assert not any("latest" in words[1] for words in lines if words[0] == "FROM")
    pins = pinned()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+_-]+( ; .*)?", pin) for pin in pins)
    for pin, hashes in pins.items():
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", item) for item in hashes), pin
    runs = " ".join(" ".join(words) for words in lines)
    assert "pip install --require-hashes --requirement constraints.txt" in runs and "--no-deps ./deltaray" in runs
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*map(Requirement, project["dependencies"] + project["optional-dependencies"]["gpu"])]
    missing = [item for item in wanted if f"{canonicalize_name(item.name)}{item.specifier}" not in pins]
    assert wanted and not missing


def test_the_bill_of_materials_lists_what_is_pinned() -> None:
    parts = json.loads((CLUSTER / "sbom.json").read_text())["components"]
    pins = pinned()
    assert [f"{part['name']}=={part['version']}" for part in parts] == [pin.partition(" ;")[0] for pin in pins]


def test_the_resolved_recipe_holds_no_value_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are named, never read into it."""
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    endpoint = {"url": "https://host/v1", "key_variable": "OPENAI_API_KEY"}
    loaded = load(recipe(teachers={"weak": WEAK | {"endpoint": endpoint}}), tmp_path)
    assert PLANTED not in json.dumps(loaded.model_dump(mode="json"))
