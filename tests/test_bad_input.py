"""The user's mistakes, through the command line: exit code 2, one message that names what and the fix, no file."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from model_folders import change, configure, rename
from ruamel.yaml import YAML
from tiny_model import save_tiny

from deltaray import cli
from deltaray.data.prompts import PromptSource, read_prompts, store_prompts, store_source
from deltaray.data.store import Store
from deltaray.recipe import load_recipe
from deltaray.study.pipeline import Pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("weak", "weaker", "student")):
        save_tiny(folder / name, seed)
    save_tiny(folder / "mute", 9)
    (folder / "mute" / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def recipe(tmp_path: Path, models: Path) -> dict[str, Any]:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "3+3=", "answer": "6"}\n')
    return {
        "name": "study",
        "out": str(tmp_path / "out"),
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "teachers": {"weak": {"model": str(models / "weak")}, "weaker": {"model": str(models / "weaker")}},
        "pairings": {"delta": {"chosen": "weak", "rejected": "weaker"}},
        "student": {"model": str(models / "student")},
        "training": {"runs": {"delta": {"pairing": "delta", "learning_rate": 1e-5}}},
        "evaluation": {"tasks": {"sums": {"path": str(tmp_path / "tasks.jsonl")}}},
    }


@pytest.fixture
def refused(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the recipe, checks what all refusals have in common, returns the message."""

    def run(*arguments: str, verb: str = "run") -> str:
        path = tmp_path / "recipe.yaml"
        YAML(typ="safe").dump(recipe, path)
        monkeypatch.setattr(sys, "argv", ["deltaray", verb, str(path), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        stdout, stderr = capfd.readouterr()
        assert stop.value.code == 2, stderr
        assert stderr.startswith("error: ") and "Traceback" not in stderr and not stdout
        assert not (tmp_path / "out").exists()
        return stderr.replace(str(tmp_path), "")

    return run


def test_missing_and_empty_prompt_file(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    recipe["prompts"]["path"] = str(tmp_path / "none.jsonl")
    assert "prompts.path: there is no file /none.jsonl" in refused()
    (tmp_path / "none.jsonl").write_text("")
    assert "/none.jsonl: holds no prompts (prompts.path)" in refused()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "/prompts.jsonl:2: broken JSON"),
        ('{"question": "x"}', "/prompts.jsonl:2: neither `prompt` nor `messages`"),
        ('{"prompt": "1+1="}', "/prompts.jsonl:2: the same prompt as /prompts.jsonl:1"),
    ],
)
def test_bad_prompt_rows(refused: Any, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n' + line + "\n")
    assert message in refused()


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_mistake_in_the_last_row_of_many(refused: Any, tmp_path: Path, verb: str) -> None:
    rows = [json.dumps({"prompt": f"{n}+1="}) for n in range(50_000)]  # more than a shard holds
    (tmp_path / "prompts.jsonl").write_text("\n".join([*rows, "{]"]))
    assert "/prompts.jsonl:50001: broken JSON" in refused(verb=verb)


def test_bad_text_is_no_mistake(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "1\xff="}\n{"prompt": "\\ud800"}\n{"prompt": "\\u0000"}\n')
    YAML(typ="safe").dump(recipe, tmp_path / "recipe.yaml")
    items, _ = Pipeline(load_recipe(tmp_path / "recipe.yaml")).plan()
    assert [item.total for item in items if item.stage == "generate"] == [3, 3]
    assert not (tmp_path / "out").exists()


def test_duplicate_ids(refused: Any, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "/prompts.jsonl:2: the same id as /prompts.jsonl:1" in refused()


def test_a_teacher_that_does_not_exist(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    recipe["teachers"]["weak"]["model"] = str(tmp_path / "nobody")
    assert "teachers.weak.model: there is no folder /nobody" in refused()
    recipe["teachers"]["weak"]["model"] = "models/nobody"  # may be a hub id
    there_is_none = "there is no folder models/nobody here, and it could not be fetched from the Hub"
    assert f"teachers.weak.model: {there_is_none}" in refused()
    recipe["teachers"]["weak"]["model"] = str(tmp_path / "nobody")
    (tmp_path / "nobody").mkdir()
    assert "teachers.weak.model: /nobody holds no config.json" in refused()


def test_an_adapter_that_cannot_be_served(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    recipe["teachers"]["weak"]["adapter"] = str(tmp_path / "lora")
    assert "teachers.weak.adapter: /lora holds no adapter_config.json" in refused()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.bin").write_bytes(b"a pickle")
    assert "teachers.weak.adapter: /lora holds no adapter_model.safetensors" in refused()


@pytest.mark.parametrize("verb", ["run", "plan", "train"])
def test_the_mistakes_of_all_models_come_at_once(
    recipe: dict[str, Any], refused: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str
) -> None:
    for number, name in enumerate(("cut", "renamed", "headless", "fine")):
        save_tiny(tmp_path / name, number)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    change(tmp_path / "renamed", rename("model.norm.weight", "model.last_norm.weight"))
    recipe["teachers"]["weak"]["model"] = str(tmp_path / "cut")
    recipe["student"] |= {"model": str(tmp_path / "renamed")}
    recipe["teachers"]["weaker"] |= {"model": str(tmp_path / "fine"), "engine": {"max_model_len": 5000}}
    recipe["scorers"] = {"reward": {"kind": "reward_model", "model": str(tmp_path / "headless")}}
    configure(tmp_path / "headless", id2label={"0": "reward"}, label2id={"reward": 0})
    capfd.readouterr()
    message = refused(verb=verb)
    assert "teachers.weak.model: /cut/model.safetensors: is cut short" in message
    assert "teachers.weaker.engine.max_model_len: 5,000 tokens, but /fine has positions for 256" in message
    assert "scorers.reward.model: /headless: no weights for score.weight" in message
    assert "student.model: /renamed: no weights for model.norm.weight" in message


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_an_endpoint_without_its_key(recipe: dict[str, Any], refused: Any, verb: str) -> None:
    """A served model is not a folder here; nothing but the server's address and key is looked at."""
    endpoint = {"url": "http://localhost:1/v1", "key_variable": "NO_SUCH_KEY_ANYWHERE"}
    recipe["teachers"]["weak"] = {"model": "nowhere/served-model", "endpoint": endpoint}
    message = refused(verb=verb)
    assert "teachers.weak.endpoint.key_variable" in message and "NO_SUCH_KEY_ANYWHERE" in message


def test_a_tokenizer_without_chat_template(recipe: dict[str, Any], refused: Any, models: Path) -> None:
    recipe["teachers"]["weaker"]["model"] = str(models / "mute")
    message = refused()
    assert "teachers.weaker.model: the tokenizer of" in message and "teachers.weaker.chat_template" in message


def test_both_sides_the_same_teacher(recipe: dict[str, Any], refused: Any) -> None:
    recipe["pairings"]["delta"]["rejected"] = "weak"
    assert "pairings.delta.rejected: chosen and rejected are both 'weak'" in refused()


def test_an_unknown_loss(recipe: dict[str, Any], refused: Any) -> None:
    recipe["training"]["runs"]["delta"]["loss"] = "ppo"
    assert "training.runs.delta.loss: 'ppo' is not allowed; write 'dpo_norm', 'dpo', 'robust'" in refused()


@pytest.mark.parametrize("verb", ["run", "plan", "generate", "train"])
def test_more_than_the_cluster_has(recipe: dict[str, Any], refused: Any, verb: str) -> None:
    recipe["training"]["workers"] = 1000
    assert "training.workers: 1000 training workers needs 1000 CPUs, the cluster has" in refused(verb=verb)
    recipe["training"]["workers"] = 1
    recipe["teachers"]["weak"]["engine"] = {"gpus": 64}
    assert "teachers.weak.engine: vLLM for teacher weak needs 64 GPUs, the cluster has" in refused(verb=verb)


def test_an_out_that_cannot_be(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    recipe["out"] = str(tmp_path / "taken")
    assert "out: /taken is a file; name a folder" in refused()
    recipe["out"] = "nonsense://somewhere"
    assert "out: nonsense://somewhere is neither a folder nor the address of an object store" in refused()


def test_prompts_that_changed_under_an_out(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    recipe["out"] = str(tmp_path / "used")
    store = Store(recipe["out"])
    store_prompts(store, read_prompts(recipe["prompts"]["path"], "prompts.path"), 512)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    before = sorted((tmp_path / "used").rglob("*"))
    assert "/used belongs to another recipe: prompt" in refused()
    assert sorted((tmp_path / "used").rglob("*")) == before


def test_task_prompts_that_changed_under_an_out(recipe: dict[str, Any], refused: Any, tmp_path: Path) -> None:
    recipe["out"] = str(tmp_path / "used")
    tasks = PromptSource(recipe["evaluation"]["tasks"]["sums"]["path"], "evaluation.tasks.sums.path")
    store_source(Store(recipe["out"]), tasks, 512, 256, Store.evaluation_prompts("sums"))
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "3+3=", "answer": "7"}\n')
    before = sorted((tmp_path / "used").rglob("*"))
    assert "has another text or answer now" in refused()
    assert sorted((tmp_path / "used").rglob("*")) == before


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_stage_that_the_recipe_does_not_name(recipe: dict[str, Any], refused: Any, verb: str) -> None:
    del recipe["training"], recipe["evaluation"]
    assert "study: the recipe has no" in refused(verb=verb)


def test_a_task_without_answers(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "3+3="}\n')
    assert "evaluation.tasks.sums.path" in refused()


def test_commands_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["run"], ["plan", "x.yaml", "--nonsense"]):
        monkeypatch.setattr(sys, "argv", ["deltaray", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and "Traceback" not in capfd.readouterr().err


def test_folders_that_are_no_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for verb in ("status", "report"):
        monkeypatch.setattr(sys, "argv", ["deltaray", verb, str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and "is not an output folder of deltaray" in capfd.readouterr().err
