"""The identity of responses: all that changes an answer changes it, and nothing else does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny

from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.recipe.models import Teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "lora"


def digest(model: Path | str, **settings: Any) -> str:
    return identity_digest(generation_identity(Teacher.model_validate({"model": str(model), **settings})))


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"seed": 1}},
        {"sampling": {"seed": None}},
        {"sampling": {"stop": ["\n"]}},
        {"sampling": {"max_tokens": 7}},
        {"system": "Be brief."},
        {"reasoning": "qwen3"},
        {"chat_template_arguments": {"enable_thinking": False}},
        {"revision": "v2"},
        {"engine": {"dtype": "float32"}},
        {"engine": {"max_model_len": 128}},
        {"engine": {"arguments": {"quantization": "fp8"}}},
        {"engine": {"arguments": {"an_argument_nobody_knows_yet": 1}}},
        {"endpoint": {"url": "https://host/v1"}},
    ],
    ids=str,
)
def test_what_changes_answers_changes_the_identity(model: Path, settings: dict[str, Any]) -> None:
    assert digest(model, **settings) != digest(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": {"samples": 8}},
        {"engine": {"gpus": 2, "cpus": 3, "replicas": 2, "max_replicas": 4, "units_in_flight": 3}},
        {"engine": {"arguments": {"max_num_seqs": 7, "gpu_memory_utilization": 0.5, "enforce_eager": True}}},
    ],
    ids=str,
)
def test_what_changes_speed_alone_does_not(model: Path, settings: dict[str, Any]) -> None:
    assert digest(model, **settings) == digest(model)


def test_endpoints_count_by_their_address_and_body_not_by_their_pace() -> None:
    def served(**endpoint: Any) -> str:
        return digest("served", endpoint={"url": "https://host/v1", **endpoint})

    assert served(in_flight=1, retries=0, timeout=1, requests_per_minute=2, key_variable="KEY") == served()
    assert served(url="https://other/v1") != served() != served(body={"logit_bias": {"5": 1}})


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_folder_counts_by_what_is_in_it(model: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("notes")
    assert digest(copy) == digest(model)
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    assert digest(copy) != digest(model)


def test_a_chat_template_counts_by_its_text(model: Path, tmp_path: Path) -> None:
    for name, text in (("a", "{{ messages }}"), ("b", "{{ messages }}"), ("c", "{{ messages }}!")):
        (tmp_path / name).write_text(text)
    first, same, other = (digest(model, chat_template=str(tmp_path / name)) for name in "abc")
    assert first == same and len({first, other, digest(model)}) == 3


def test_an_adapter_counts_by_its_weights(model: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    assert digest(model, adapter=str(moved)) == digest(model, adapter=str(adapter)) != digest(model)
    (moved / "adapter_model.safetensors").write_bytes(b"Weights")
    assert digest(model, adapter=str(moved)) != digest(model, adapter=str(adapter))


def test_no_secret_is_part_of_it(model: Path) -> None:
    identity = generation_identity(
        Teacher.model_validate({"model": str(model), "engine": {"arguments": {"hf_token": "hf_secret"}}})
    )
    assert "hf_secret" not in str(identity)


def test_the_digest_does_not_depend_on_order() -> None:
    assert identity_digest({"a": 1, "b": {"c": 2, "d": 3}}) == identity_digest({"b": {"d": 3, "c": 2}, "a": 1})
