"""Merging folders: what PEFT saves goes in, what PEFT and vLLM load comes out, and everything else is refused."""

import json
from pathlib import Path

import pytest
import torch
from adapters import configure, dense_updates, make_adapter, merge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import make_model

from deltaray.errors import UserError
from deltaray.merge.adapter import Adapter
from deltaray.merge.methods import METHODS
from deltaray.merge.run import RECORD
from deltaray.model_files.tensor_file import TensorFile

Q = "model.layers.0.self_attn.q_proj"


def same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


# --- reading: what PEFT makes of a folder is what we do ---------------------------------------------------------------
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 24}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"^model.layers.0.*q_proj": 5}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "regular expression": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "all linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_adapter_comes_out_as_it_went_in(tmp_path, name):
    source = make_adapter(tmp_path / "a", **SETTINGS[name])
    for method in ("gam", "cat"):
        merge([source], tmp_path / method, method)
        same(dense_updates(tmp_path / method), dense_updates(source))


def test_adapters_of_odd_ranks_scalings_and_targets_are_averaged_as_their_dense_updates(tmp_path):
    sources = [make_adapter(tmp_path / str(n), n, **settings) for n, settings in enumerate(SETTINGS.values())]
    dense = [dense_updates(source) for source in sources]
    names = {name for each in dense for name in each}
    zero = {name: torch.zeros_like(next(each[name] for each in dense if name in each)) for name in names}
    wanted = {name: sum(each.get(name, zero[name]) for each in dense) / len(dense) for name in names}
    report = merge(sources, tmp_path / "mean", "mean")
    same(dense_updates(tmp_path / "mean"), wanted)
    assert any("count as zero" in warning for warning in report.warnings)
    skipped = {name: wanted[name] * len(dense) / sum(name in each for each in dense) for name in names}
    merge(sources, tmp_path / "skipped", "mean", skip_missing=True)
    same(dense_updates(tmp_path / "skipped"), skipped)


def test_the_mean_is_what_peft_concatenates(tmp_path, pair):
    model = PeftModel.from_pretrained(make_model(), pair[0], adapter_name="a")
    model.load_adapter(pair[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    model.save_pretrained(tmp_path / "peft", selected_adapters=["both"])
    for method, options in (("mean", {}), ("cat", {"weights": (0.5, 0.5)})):
        merge(pair, tmp_path / method, method, **options)
        same(dense_updates(tmp_path / method), dense_updates(tmp_path / "peft" / "both"))


# --- writing: what others load ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_peft_computes_with_the_merged_adapter_what_the_dense_weights_give(tmp_path, pair, method):
    report = merge(pair, tmp_path / "out", method)
    ids = torch.arange(12)[None] % 60
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    dense = make_model()
    adapter = Adapter(tmp_path / "out")
    with torch.no_grad():
        for module in adapter.modules:
            dense.get_submodule(module).weight += adapter.factors(module).dense().float()
        plain = make_model()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        assert float((dense(ids).logits - plain).norm()) > 0.01 * float(plain.norm())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == report.rank and config["base_model_name_or_path"] == "tiny"
    assert set(config["target_modules"]) == {"q_proj", "v_proj", "down_proj"}


def test_every_saved_tensor_is_found_by_peft_and_no_other(tmp_path):
    sources = [make_adapter(tmp_path / str(n), n, **SETTINGS[name]) for n, name in enumerate(("patterns", "one layer"))]
    merge(sources, tmp_path / "out", "mean")
    model = get_peft_model(make_model(), LoraConfig.from_pretrained(tmp_path / "out"))
    found = model.load_adapter(tmp_path / "out", adapter_name="again")
    assert not [key for key in found.missing_keys if "again" in key] and not found.unexpected_keys


def test_vllm_reads_ranks_and_scalings_as_we_wrote_them(tmp_path):
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel

    sources = [make_adapter(tmp_path / str(n), n, **SETTINGS[name]) for n, name in enumerate(("patterns", "rslora"))]
    merge(sources, tmp_path / "out", "mean")
    read = helper.from_local_dir(str(tmp_path / "out"), None)
    read.validate_legal(LoRAConfig(max_lora_rank=16, lora_dtype="bfloat16"))
    model = LoRAModel.from_local_checkpoint(
        str(tmp_path / "out"), {"q_proj", "v_proj", "down_proj"}, read, device="cpu", dtype=torch.float32
    )
    ours = Adapter(tmp_path / "out")
    assert model.loras.keys() == ours.modules.keys()
    for name, lora in model.loras.items():
        wanted = ours.factors(name).dense()
        assert lora.rank == lora.lora_a.shape[0] == lora.lora_b.shape[1]
        torch.testing.assert_close(lora.scaling * (lora.lora_b @ lora.lora_a).double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_the_merge_is_stored_in_the_widest_dtype_of_the_adapters_or_the_one_asked_for(tmp_path, pair, dtype):
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    merge(pair, tmp_path / "asked", dtype=dtype)
    assert dtypes(tmp_path / "asked") == {types[dtype]}
    for source in pair:
        recast(source, types[dtype])
    merge(pair, tmp_path / "same")
    assert dtypes(tmp_path / "same") == {types[dtype]}
    recast(pair[0], torch.bfloat16)
    merge(pair, tmp_path / "widest")
    assert dtypes(tmp_path / "widest") == {torch.promote_types(types[dtype], torch.bfloat16)}


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}


def recast(folder, dtype):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_files_written_tensor_by_tensor_are_those_of_the_library(tmp_path):
    tensors = {
        "ä.weight": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).T,
    }
    with TensorFile(tmp_path / "ours", list(tensors)) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_the_record_beside_the_adapter_holds_every_matrix(tmp_path, pair):
    report = merge(pair, tmp_path / "out", reference="b")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record == json.loads(json.dumps(report.record()))
    assert record["reference"] == str(pair[1]) and len(record["modules"]) == 6
    assert 0 < record["modules"][Q]["norm_ratio"] < 1 and record["modules"][Q]["sensitivity"] > 0
    assert record["summary"]["norm_ratio"] < 0.8 and "subspaces differ" in record["warnings"][0]


def test_zero_updates_are_told_by_their_cause(tmp_path, pair):
    opposite = make_adapter(tmp_path / "opposite")
    spoil(opposite, lambda tensors: [tensor.neg_() for name, tensor in tensors.items() if "lora_B" in name])
    told = merge([pair[0], opposite], tmp_path / "out").warnings
    assert told == ["the merged update of 6 of 6 matrices is zero: the adapters cancel there"]
    for source in pair:
        spoil(source, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    told = merge(pair, tmp_path / "out").warnings
    assert len(told) == 2 and all("does not change 6 of 6 matrices" in warning for warning in told)
    assert not any(tensor.any() for tensor in load_file(tmp_path / "out/adapter_model.safetensors").values())


def test_a_failed_merge_leaves_what_was_there(tmp_path, pair):
    merge(pair, tmp_path / "out")
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    spoil(pair[1], lambda tensors: tensors[f"base_model.model.{Q}.lora_B.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN"):
        merge(pair, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


# --- what is refused --------------------------------------------------------------------------------------------------
def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
BAD_FOLDERS = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "broken configuration": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled files can run"),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20), "is damaged or no safetensors"),
    "empty, as vectors": (lambda f: spoil(f, lambda t: t.update({it: torch.zeros(0) for it in t})), "as ZeRO-3 leaves"),
    "another method": (lambda f: configure(f, peft_type="IA3"), "peft_type is IA3"),
    "dora": (lambda f: configure(f, use_dora=True), "use_dora: cannot be merged"),
    "biases": (lambda f: configure(f, bias="all"), "bias: cannot be merged"),
    "lora biases": (lambda f: configure(f, lora_bias=True), "lora_bias: cannot be merged"),
    "modules to save": (lambda f: configure(f, modules_to_save=["lm_head"]), "modules_to_save: cannot be merged"),
    "pissa": (lambda f: configure(f, init_lora_weights="pissa"), "init_lora_weights: pissa has changed the base"),
    "lora-ga": (lambda f: configure(f, init_lora_weights="lora_ga"), "init_lora_weights: lora_ga has changed the base"),
    "rank zero": (lambda f: configure(f, r=0), "must be positive integers"),
    "half a rank": (lambda f: configure(f, rank_pattern={"q_proj": 4.5}), "must be positive integers"),
    "no alpha": (lambda f: configure(f, lora_alpha=None), "must be finite numbers"),
    "alpha not a number": (lambda f: configure(f, alpha_pattern={"q_proj": float("nan")}), "must be finite numbers"),
    "pattern of another kind": (lambda f: configure(f, rank_pattern=["q_proj"]), "gives numbers by the modules' names"),
    "pattern that is none": (lambda f: configure(f, alpha_pattern={"(": 8}), "is not a regular expression"),
    "another base": (lambda f: configure(f, base_model_name_or_path="huge"), "base_model_name_or_path: huge, but"),
    "another revision": (lambda f: configure(f, revision="v2"), "revision: v2, but"),
    "another layout": (lambda f: configure(f, fan_in_fan_out=True), "fan_in_fan_out: True, but"),
    "another task": (lambda f: configure(f, task_type="SEQ_CLS"), "task_type: SEQ_CLS, but"),
    "half a pair": (lambda f: spoil(f, lambda t: t.pop(B)), "lora_B.weight is missing"),
    "no tensors": (lambda f: spoil(f, lambda t: t.clear()), "holds no LoRA tensor"),
    "a magnitude": (
        lambda f: spoil(f, lambda t: t.update({B.replace("_B", "_magnitude_vector"): t[B]})),
        "is not a LoRA",
    ),
    "empty": (lambda f: spoil(f, lambda t: t.update({A: t[A][:, :0]})), "as ZeRO-3 leaves it"),
    "three dimensions": (lambda f: spoil(f, lambda t: t.update({A: t[A][None]})), "are not matrices"),
    "rank unlike config": (lambda f: configure(f, r=5), "must be the same"),
    "another shape": (lambda f: spoil(f, lambda t: t.update({A: t[A][:, :9]})), "updates a matrix of 64 x 9"),
    "not a number": (lambda f: spoil(f, lambda t: t[B].fill_(float("nan"))), "256 of 256 numbers are NaN"),
    "infinite": (lambda f: spoil(f, lambda t: t[A][0].fill_(float("inf"))), "64 of 256 numbers are NaN or infinite"),
    "integers": (lambda f: spoil(f, lambda t: t.update({A: t[A].to(torch.int8)})), "holds I8"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused_by_name(tmp_path, pair, name):
    change, message = BAD_FOLDERS[name]
    change(pair[1])
    with pytest.raises(UserError, match=message) as refusal:
        merge(pair, tmp_path / "out")
    assert str(pair[1]) in str(refusal.value) and not (tmp_path / "out").exists()


def test_bases_that_the_user_vouches_for_are_the_same(tmp_path, pair):
    configure(pair[1], base_model_name_or_path="/elsewhere/tiny")
    merge(pair, tmp_path / "out", base="tiny")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for source, name in zip(pair, ("real", "link"), strict=True):
        configure(source, base_model_name_or_path=str(tmp_path / name))
    merge(pair, tmp_path / "out")


def test_embeddings_that_adapters_carry_along_must_agree(tmp_path):
    sources = [make_adapter(tmp_path / str(n), n, target_modules=["embed_tokens"]) for n in range(2)]
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert copy in load_file(sources[0] / "adapter_model.safetensors")  # PEFT saves it
    merge(sources, tmp_path / "out")
    assert copy in load_file(tmp_path / "out/adapter_model.safetensors")
    spoil(sources[1], lambda tensors: tensors[copy].add_(1))
    with pytest.raises(UserError, match="their bases are not the same"):
        merge(sources, tmp_path / "out")


BAD_REQUESTS = {
    "unknown method": ({"method": "average"}, "--method average: is not a merge method"),
    "reference elsewhere": ({"reference": "c"}, "--reference c: is none of the adapters"),
    "reference without use": ({"method": "mean", "reference": "a"}, "--reference: mean does not take it"),
    "density without use": ({"density": 0.5}, "--density: gam does not take it; methods that do: ties"),
    "seed zero without use": ({"seed": 0}, "--seed: gam does not take it"),
    "seed of ties": ({"method": "knots", "inner": "ties", "seed": 1}, "draws nothing"),
    "one weight": ({"weights": (1.0,)}, "1 of them for 2 adapters"),
    "weights that cancel": ({"method": "task-arithmetic", "weights": (1.0, -1.0)}, "add up to zero"),
    "no weights": ({"weights": (0.0, 0.0)}, "add up to zero"),
    "weights that are none": ({"weights": (float("nan"), 1.0)}, "add up to zero"),
    "rank zero": ({"rank": 0}, "--rank 0"),
    "density zero": ({"method": "ties", "density": 0.0}, "--density 0.0"),
    "no scale": ({"scale": float("inf")}, "--scale inf"),
    "unknown dtype": ({"dtype": "INT8"}, "--dtype INT8: must be one of"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_before_anything_is_read(tmp_path, name):
    request, message = BAD_REQUESTS[name]
    with pytest.raises(UserError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", **request)


def test_nothing_but_an_earlier_merge_is_replaced(tmp_path, pair):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for out in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):
        with pytest.raises(UserError, match="is there already"):
            merge(pair, out)
    with pytest.raises(UserError, match="is one of the adapters"):
        merge(pair, pair[0])
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    merge(pair, tmp_path / "out", "mean")
    merge(pair, tmp_path / "out", "gam")
    assert json.loads((tmp_path / "out" / RECORD).read_text())["method"] == "gam"


def test_references_are_found_by_path_and_name(tmp_path, pair, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reference in (str(pair[1]), "b", "./b", "a/../b"):
        report = merge([Path("a"), Path("b")], tmp_path / "out", reference=reference)
        assert report.reference == "b"
    (tmp_path / "x").mkdir()
    twins = [pair[0], make_adapter(tmp_path / "x/a", 3)]
    assert merge(twins, tmp_path / "out", reference="a").reference == str(pair[0])  # a path counts before a name
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="names several"):
        merge(twins, tmp_path / "out", reference="a")
