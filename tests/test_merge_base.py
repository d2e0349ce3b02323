"""`merge --into-base`: the base's weights with the merged adapter in them, as a model folder that others load."""

import json
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, merge
from model_folders import make_vision, save_vision
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge_adapters import SETTINGS, Q, same
from tiny_model import make_model, save_tiny

from deltaray.errors import UserError
from deltaray.merge.adapter import Adapter
from deltaray.merge.run import RECORD


@pytest.mark.parametrize("shards", [1, 3])
def test_into_base_is_what_peft_merges(tmp_path, pair, shards):
    model = make_model()
    model.save_pretrained(tmp_path / "base", max_shard_size="5GB" if shards == 1 else "60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= shards
    merge(pair, tmp_path / "adapter")
    merge(pair, tmp_path / "model", base=str(tmp_path / "base"), into_base=True)
    wanted = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").merge_and_unload().state_dict()
    found = type(model).from_pretrained(tmp_path / "model").state_dict()
    same(found, wanted, 1e-6)
    assert not (tmp_path / "model/adapter").exists() and (tmp_path / "model" / RECORD).is_file()


def test_embeddings_go_into_a_base_that_does_not_tie_them(tmp_path):
    save_tiny(tmp_path / "base")
    source = make_adapter(tmp_path / "a", **SETTINGS["embedding"])
    merge([source], tmp_path / "model", base=str(tmp_path / "base"), into_base=True)
    wanted = PeftModel.from_pretrained(make_model(), source).merge_and_unload().state_dict()
    same(load_file(tmp_path / "model/model.safetensors"), wanted, 1e-6)
    make_model(tied=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match=r"ties model\.embed_tokens\.weight"):
        merge([source], tmp_path / "tied model", base=str(tmp_path / "tied"), into_base=True)


@pytest.mark.parametrize(
    ("spoil_base", "message"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda base: (base / "config.json").unlink(), "no readable config.json"),
        (lambda base: (base / "config.json").write_text('{"quantization_config": {"bits": 4}}'), "unquantised"),
        (lambda base: save_file({"x": torch.zeros(1)}, base / "model.safetensors"), "which the adapters change"),
        (lambda base: make_model_of_other_size(base), "updates a matrix of"),
    ],
)
def test_bases_that_do_not_fit_are_refused(tmp_path, pair, spoil_base, message):
    base = Path(save_tiny(tmp_path / "base"))
    spoil_base(base)
    with pytest.raises(UserError, match=message):
        merge(pair, tmp_path / "model", base=str(base), into_base=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("trained_on", ["text", "modules", "files"])
def test_into_a_base_that_wraps_the_model_for_images(tmp_path, kind, trained_on):
    """An adapter of the language model alone lands in it, and so does one by the wrapper's names, old or new."""
    base = save_vision(tmp_path / "base", kind)
    before = load_file(base / "model.safetensors")
    wanted = next(name for name in before if name.endswith("layers.1.mlp.down_proj.weight"))
    name = {
        "text": "model.layers.1.mlp.down_proj",
        "modules": "model.language_model.layers.1.mlp.down_proj",
        "files": wanted.removesuffix(".weight"),
    }[trained_on]
    source = adapter_of(tmp_path / "a", {name: (32, 48)})
    merge([source], tmp_path / "model", base=str(base), into_base=True)
    after = load_file(tmp_path / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [wanted]
    change = Adapter(source).factors(name).dense().float()
    torch.testing.assert_close(after[wanted], before[wanted] + change)
    assert type(make_vision(kind)).from_pretrained(tmp_path / "model") is not None
    assert (tmp_path / "model/processor_config.json").is_file()


def test_an_adapter_of_a_wrapper_lands_in_the_language_model_alone(tmp_path):
    save_tiny(tmp_path / "base")
    source = adapter_of(tmp_path / "a", {"model.language_model.layers.0.self_attn.q_proj": (64, 64)})
    merge([source], tmp_path / "model", base=str(tmp_path / "base"), into_base=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{Q}.weight"]


def test_what_has_no_place_in_the_base_is_told(tmp_path):
    save_tiny(tmp_path / "base")
    modules = {"model.visual.blocks.0.attn.proj": (64, 64), Q: (64, 64)}
    with pytest.raises(UserError, match=r"has no .*, which the adapters change; give their base"):
        merge([adapter_of(tmp_path / "a", modules)], tmp_path / "model", base=str(tmp_path / "base"), into_base=True)
    assert not (tmp_path / "model").exists()


def test_adapters_of_two_wrappers_are_not_averaged_with_nothing(tmp_path):
    names = (Q, Q.replace("model.", "model.language_model."))
    sources = [adapter_of(tmp_path / str(number), {name: (64, 64)}) for number, name in enumerate(names)]
    with pytest.raises(
        UserError, match=r"q_proj: .*0 calls it model\.layers\.0\.self_attn\.q_proj: one was trained on"
    ):
        merge(sources, tmp_path / "out")


def adapter_of(folder, modules):
    """An adapter with random factors of modules by name, with the shapes [d, k] of their matrices."""
    die = torch.Generator().manual_seed(0)
    sides = {"A": lambda d, k: (2, k), "B": lambda d, k: (d, 2)}
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape(*size), generator=die)
        for name, size in modules.items()
        for side, shape in sides.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 2}
    config["target_modules"] = sorted({name.split(".")[-1] for name in modules})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_all_beside_the_weights_goes_into_the_merged_model(tmp_path, pair):
    base = tmp_path / "base"
    make_model().save_pretrained(base, max_shard_size="60KB")
    beside = (
        "own.py",
        "vocab.tiktoken",
        "additional_chat_templates/rag.jinja",
        "tekken.json",
        "LICENSE",
        "spiece.model",
    )
    for name in beside:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in ("pytorch_model.bin", "README.md", "trainer_state.json", "original/consolidated.00.pth"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    merge(pair, tmp_path / "model", base=str(base), into_base=True)
    names = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    weights = {path.name for path in base.glob("model*")}
    assert names == {*beside, *weights, "config.json", "generation_config.json", RECORD}


def make_model_of_other_size(base):
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.repeat(*[2] * tensor.ndim) for name, tensor in tensors.items()}, base / "model.safetensors")
