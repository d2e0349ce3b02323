"""The folders of trained students: they load wherever the untouched student did, and what cannot be saved is known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import change, configure, make_vision, put, save_vision, shard
from safetensors.torch import load_file
from tiny_model import TEMPLATE, make_tokenizer, save_tiny
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from deltaray.data.tokens import load_tokenizer
from deltaray.errors import UserError
from deltaray.model_files.headers import tensors_of_model
from deltaray.recipe.models import Student
from deltaray.study.check_models import check_model
from deltaray.train.saving import write_student


def train_and_save(source: Path, folder: Path, **settings: Any) -> Any:
    """Adds one to every weight and writes the folder as training does; returns the model."""
    student = Student.model_validate({"model": str(source), **settings})
    check_model(student, "student", saved="model")
    trust = student.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=trust)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    state = model.state_dict()
    write_student(model, state, load_tokenizer(student, "student"), student, source, folder)
    return model


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    files = {held.file for held in tensors_of_model(folder).values()}
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_a_generation_configuration_that_cannot_be_saved_is_taken_over(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    text = json.dumps({"temperature": 0.7, "top_k": 3, "eos_token_id": [1, 5], "transformers_version": "4.1"})
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_pretrained(source).save_pretrained(tmp_path)
    train_and_save(source, tmp_path / "trained")
    assert (tmp_path / "trained" / "generation_config.json").read_text() == text
    (source / "generation_config.json").unlink()
    train_and_save(source, tmp_path / "further")
    assert GenerationConfig.from_pretrained(tmp_path / "further").eos_token_id == 1


def test_all_files_beside_the_weights_go_along(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    for name in ("LICENSE", "own.py", "x.tiktoken", "additional_chat_templates/rag.jinja", "tekken.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{{ messages }}")
    (source / "README.md").write_text("scores of the untouched student")
    configure(source, "tokenizer_config.json", a_key_of_later_versions=1)
    train_and_save(source, tmp_path / "trained")
    assert names(tmp_path / "trained") == names(source) - {"README.md"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "trained" / name).read_bytes() == (source / name).read_bytes()


CODE = """from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_student_with_code_of_its_own_loads_again(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    (source / "own_model.py").write_text(CODE)
    classes = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.Own"}
    configure(source, model_type="own", architectures=["Own"], auto_map=classes)
    with pytest.raises(UserError, match="trust_remote_code"):
        check_model(Student(model=str(source)), "student")
    train_and_save(source, tmp_path / "trained", trust_remote_code=True)
    assert (tmp_path / "trained" / "own_model.py").read_text() == CODE
    options = {"trust_remote_code": True, "output_loading_info": True}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    change(source, put("v_head.weight", 1))
    with pytest.raises(UserError, match=r"hold v_head\.weight, which the model has no place for"):
        check_model(Student(model=str(source), trust_remote_code=True), "student")


def test_the_template_that_was_trained_with_is_saved(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (tmp_path / "other.jinja").write_text(f"{TEMPLATE} ")
    train_and_save(source, tmp_path / "trained", chat_template=str(tmp_path / "other.jinja"))
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").chat_template == f"{TEMPLATE} "


def test_the_configuration_stays_but_for_the_type_of_the_weights(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    configure(source, torch_dtype="bfloat16", a_key_of_later_versions={"x": 1})
    before = json.loads((source / "config.json").read_text())
    del before["dtype"]
    (source / "config.json").write_text(json.dumps(before))
    train_and_save(source, tmp_path / "trained")
    after = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert after == before | {"torch_dtype": "float32"}


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_a_student_of_images_and_text_stays_one(tmp_path: Path, kind: str) -> None:
    """transformers loads the language model alone out of some of them; the rest is taken over."""
    source, trained = save_vision(tmp_path / "source", kind), tmp_path / "trained"
    change(source, put("mtp.layers.0.weight", 2, 2) if kind == "qwen3_5" else lambda tensors: None)
    train_and_save(source, trained)
    assert names(source) - {"model.safetensors"} <= names(trained)
    before, after = weights(source), weights(trained)
    assert before.keys() == after.keys()
    apart = {name for name in before if torch.equal(before[name], after[name])}
    seen = ("visual.", "mtp.") if kind == "qwen3_5" else ()
    assert apart == {name for name in before if name.removeprefix("model.").startswith(seen) and seen}
    model, info = AutoModelForImageTextToText.from_pretrained(trained, output_loading_info=True)
    assert type(model) is type(make_vision(kind)) and not info["missing_keys"] and not info["unexpected_keys"]
    check_model(Student(model=str(trained)), "student", saved="model")


def test_a_tied_head_is_not_taken_over(tmp_path: Path) -> None:
    source = shard(tmp_path / "source")
    for file in source.glob("model-*.safetensors"):
        change(source, lambda tensors: tensors.pop("lm_head.weight", None), file.name)
    places = json.loads((source / "model.safetensors.index.json").read_text())
    del places["weight_map"]["lm_head.weight"]
    (source / "model.safetensors.index.json").write_text(json.dumps(places))
    configure(source, tie_word_embeddings=True)
    model = train_and_save(source, tmp_path / "trained")
    assert "lm_head.weight" not in weights(tmp_path / "trained")
    change(tmp_path / "trained", put("lm_head.weight", 64, 64))
    again = train_and_save(tmp_path / "trained", tmp_path / "again")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(found.lm_head.weight, again.lm_head.weight) and model.config.tie_word_embeddings


def test_what_cannot_be_saved_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("The last layer of this kind\ncannot be written")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", refuse)
    check_model(Student(model=folder), "student")
    with pytest.raises(UserError, match=r"^student\.model: .* loads, but .* saved: The last layer of this kind;"):
        check_model(Student(model=folder), "student", saved="model")
    check_model(Student(model=folder), "student", saved="adapter")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    with pytest.raises(UserError, match="could not be saved: The last layer of this kind;"):
        check_model(Student(model=folder), "student", saved="adapter")


def test_a_tokenizer_that_the_files_do_not_give_is_written(tmp_path: Path) -> None:
    source = Path(save_tiny(tmp_path / "source"))
    student = Student(model=str(source))
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["café"])
    tokenizer.chat_template = TEMPLATE
    write_student(model, model.state_dict(), tokenizer, student, source, tmp_path / "trained")
    assert "café" in AutoTokenizer.from_pretrained(tmp_path / "trained").get_vocab()
