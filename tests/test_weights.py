"""What is known of models before they are loaded: whole files, tensors that fit, tokens and lengths that fit."""

import hashlib
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from model_folders import change, configure, put, rename, save_reward, save_vision, shard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from tiny_model import make_model, make_tokenizer, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.generate.fingerprint import add_sampled, fingerprint
from deltaray.model_files.fit import demand_fit, positions
from deltaray.model_files.folder import files_beside
from deltaray.recipe.models import Student, Teacher
from deltaray.recipe.scorers import RewardModel
from deltaray.recipe.training import Lora
from deltaray.score.rewards import RewardWorker
from deltaray.study.check_models import check_model
from deltaray.train.checkpoint import Checkpoints, _checksum
from deltaray.train.student import load_module

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "model"))


def refusal(folder: Path, kind: str = "student", **settings: Any) -> str:
    """What is refused of a model, without the folder's path."""
    given = {"model": str(folder), **settings}
    model = {
        "student": lambda: Student.model_validate(given),
        "teacher": lambda: Teacher.model_validate(given),
        "reward": lambda: RewardModel.model_validate({"kind": "reward_model", **given}),
    }[kind]()
    with pytest.raises(UserError) as error:
        check_model(model, "key")
    return str(error.value).replace(f"{folder}/", "").replace(str(folder), "")


# --- what a folder consists of ------------------------------------------------------------------------------------
ALONG = [
    "LICENSE", "USE_POLICY.txt", "additional_chat_templates/rag.jinja", "added_tokens.json", "chat_template.jinja",
    "config.json", "configuration_own.py", "generation_config.json", "merges.txt", "own/modules.py",
    "preprocessor_config.json", "processor_config.json", "spiece.model", "tekken.json", "tokenizer.json", "vocab.json",
    "vocab.tiktoken",
]  # fmt: skip
BEHIND = [
    "README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.gguf",
    "original/params.json", "original/tokenizer.model", "optimizer.pt", "trainer_state.json", "eval_results.json",
    "training_args.bin", ".cache/x.json", "checkpoint-10/config.json", "consolidated.safetensors", "params.json",
    "figures/loss.png", "onnx/model.onnx",
]  # fmt: skip


def test_one_list_says_what_goes_along(tmp_path: Path) -> None:
    for name in (*ALONG, *BEHIND, "what.ever"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_beside(tmp_path) == sorted([*ALONG, "what.ever"])  # own code may read any file
    for name in ("configuration_own.py", "own/modules.py"):
        (tmp_path / name).unlink()
    assert "what.ever" not in files_beside(tmp_path)


def test_the_fingerprint_of_a_plain_folder_stays_and_further_files_change_it(folder: Path) -> None:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):  # as it was computed before there was a list
        digest.update(f"{file.name} ".encode())
        add_sampled(digest, file)
    seen = {fingerprint(folder)}
    assert seen == {digest.hexdigest()[:16]}
    for name in ("tekken.json", "own.py", "additional_chat_templates/rag.jinja", "processor_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        seen.add(fingerprint(folder))
    assert len(seen) == 5


# --- files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_files_that_are_not_whole(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "key.model: model.safetensors: is cut short" in refusal(folder, kind)
    weights.write_bytes(whole[:50])
    assert "is damaged or no safetensors file" in refusal(folder, kind)
    weights.write_text(POINTER)
    assert "model.safetensors is a pointer of git-lfs" in refusal(folder, kind)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text(POINTER)
    assert "tokenizer.json is a pointer of git-lfs" in refusal(folder, kind)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    folder = shard(tmp_path / "model")
    check_model(Student(model=str(folder)), "key")
    save_tiny(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    assert "holds model.safetensors and an index of other files" in refusal(folder)
    (folder / "model.safetensors").unlink()
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert "index and files are of different models" in refusal(folder)
    first.unlink()
    assert f"names {first.name}, which is not there" in refusal(folder)
    first.write_bytes(kept)
    (folder / "model.safetensors.index.json").unlink()
    assert "holds no model.safetensors and no model.safetensors.index.json" in refusal(folder)


# --- tensors ------------------------------------------------------------------------------------------------------
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (rename(NORM, "model.final_norm.weight"), f"no weights for {NORM}, which would be made up at random; the files "
         "hold model.final_norm.weight"),
        (lambda tensors: tensors.pop(NORM), f"no weights for {NORM}, which would be made up at random; name a model"),
        (put("v_head.weight", 1, 64), "the files hold v_head.weight, which the model has no place for"),
        (put(NORM, 32), f"{NORM} is [32] in the files, and config.json asks for [64]"),
        (put(NORM, 0), f"{NORM}: is empty, as ZeRO-3 leaves it; gather the parameters when saving"),
    ],
)  # fmt: skip
def test_students_whose_weights_do_not_fit(folder: Path, work: Any, told: str) -> None:
    change(folder, work)
    assert told in refusal(folder)
    if "is empty" not in told:
        with pytest.raises(StageError, match=NORM if NORM in told else "v_head"):
            load_module(Student(model=str(folder)), "float32")
    with pytest.raises((StageError, UserError)):
        demand_fit(Student(model=str(folder)))


def test_harmless_tensors_are_no_mistake(tmp_path: Path) -> None:
    make_model(tied=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    change(tmp_path, put("model.layers.0.self_attn.rotary_emb.inv_freq", 16))
    check_model(Student(model=str(tmp_path)), "key", "model")
    load_module(Student(model=str(tmp_path)), "float32")


def test_teachers_and_untied_heads(folder: Path) -> None:
    change(folder, put("something.extra", 3))
    check_model(Teacher(model=str(folder)), "key")  # vLLM refuses it itself where it minds
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "no weights for lm_head.weight" in refusal(folder, "teacher")


@pytest.mark.parametrize("name", ["value_head.weight", "v_head.summary.weight", "reward_head.0.weight", None])
def test_a_reward_model_without_its_head(tmp_path: Path, name: str | None) -> None:
    folder = save_reward(tmp_path / "reward")
    spec = RewardModel(kind="reward_model", model=str(folder))
    check_model(spec, "key")
    change(folder, put("lm_head.weight", 64, 64))  # that of the language model it was
    check_model(spec, "key")
    change(folder, rename("score.weight", name) if name else lambda tensors: tensors.pop("score.weight"))
    told = refusal(folder, "reward")
    assert "key.model: : no weights for score.weight" in told and (name or "lm_head.weight") in told
    with pytest.raises(UserError, match=r"scorers\.rm\.model: .*no weights for score\.weight"):
        RewardWorker(Store(str(tmp_path / "out")), spec, "scorers.rm")
    configure(folder, num_labels=2, id2label={"0": "bad", "1": "good"})
    assert "gives 2 numbers; name one that gives one" in refusal(folder, "reward")


def test_quantised_teachers_are_judged_by_their_files_alone(folder: Path) -> None:
    change(folder, rename("lm_head.weight", "lm_head.qweight"))
    assert "no weights for lm_head.weight" in refusal(folder, "teacher")
    check_model(Teacher.model_validate({"model": str(folder), "engine": {"arguments": {"quantization": "awq"}}}), "key")
    (folder / "quantize_config.json").write_text("{}")
    check_model(Teacher(model=str(folder)), "key")


# --- lengths and tokens -------------------------------------------------------------------------------------------
def test_lengths_beyond_the_positions(folder: Path) -> None:
    check_model(Student(model=str(folder), max_length=256), "key")
    assert "key.max_length: 512 tokens, but  has positions for 256; write 256 or less" in refusal(
        folder, max_length=512
    )
    told = refusal(folder, "teacher", engine={"max_model_len": 300})
    assert "key.engine.max_model_len: 300 tokens, but  has positions for 256" in told


def test_a_table_of_positions_ends_also_for_the_default_length(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", n_positions=100, n_embd=32, n_layer=1, n_head=2, vocab_size=64, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert "key.max_length: 2,048 tokens, but  has positions for 100" in refusal(tmp_path)
    check_model(Student(model=str(tmp_path), max_length=100), "key")


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("llama", {"max_position_embeddings": 100}, 100),
        ("llama", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 400),
        ("qwen2", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
         "original_max_position_embeddings": 100}}, 400),
        ("llama", {"max_position_embeddings": 800, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
         "original_max_position_embeddings": 100, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 800),
        ("gpt2", {"n_positions": 77}, 77),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("deberta-v2", {"relative_attention": True, "position_biased_input": False}, None),
        ("bert", {"max_position_embeddings": 90}, 90),
        ("gemma3", {"text_config": {"max_position_embeddings": 55}}, 55),
    ],
)  # fmt: skip
def test_the_positions_of_many_kinds(kind: str, settings: dict[str, Any], limit: int | None) -> None:
    assert positions(AutoConfig.for_model(kind, **settings)) == limit


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<n{number}>" for number in range(64 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    check_model(Student(model=str(folder)), "key")
    tokenizer.add_special_tokens({"pad_token": "<padding>"})  # the first without a row; no text becomes it
    tokenizer.save_pretrained(folder)
    check_model(Student(model=str(folder)), "key")
    tokenizer.eos_token = "<padding>"  # now answers end with it
    tokenizer.save_pretrained(folder)
    assert "no row for: '<padding>' is 64;" in refusal(folder)
    tokenizer.eos_token = "<eos>"
    tokenizer.add_tokens(["<tool>", "<think>"])
    tokenizer.save_pretrained(folder)
    for kind in ("student", "teacher"):
        told = refusal(folder, kind)
        assert "embedding of 64 rows has no row for: '<tool>' is 65 (2 such tokens); resize the embedding" in told


# --- adapters of teachers -----------------------------------------------------------------------------------------
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rewrapped(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace(".model.layers", ".model.language_model.layers")] = tensors.pop(name)


BAD_ADAPTERS = {
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is cut short"),
    "pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), "is a pointer of git-lfs"),
    "empty": (lambda f: change(f, put(A, 0), WEIGHTS), "is empty, as ZeRO-3 leaves it"),
    "no B": (lambda f: change(f, lambda t: t.pop(B), WEIGHTS), "q_proj has no lora_B"),
    "no layer": (lambda f: change(f, lambda t: [t.pop(A), t.pop(B)], WEIGHTS), "no weights for model.layers.0"),
    "other names": (
        lambda f: change(f, lambda t: [rename(A, A.replace("q_proj", "query"))(t), t.pop(B)], WEIGHTS),
        "query has no lora_B",
    ),
    "other module": (
        lambda f: change(f, lambda t: [rename(it, it.replace("layers.0", "layers.7"))(t) for it in (A, B)], WEIGHTS),
        "the model has no model.layers.7.self_attn.q_proj; name the model that the adapter was trained on",
    ),
    "other wrapper": (
        lambda f: change(f, rewrapped, WEIGHTS),
        "model.language_model.layers.0.mlp.down_proj (and 5 more), which it calls model.layers.0.mlp.down_proj",
    ),
    "other size": (lambda f: change(f, put(A, 4, 32), WEIGHTS), "matrix of 64 x 32, but the model's is 64 x 64"),
    "modules to save": (lambda f: configure(f, CONFIG, modules_to_save=["lm_head"]), "modules_to_save"),
    "whole layer": (
        lambda f: change(f, put("base_model.model.lm_head.weight", 64, 64), WEIGHTS),
        "base_model.model.lm_head.weight is not a LoRA factor",
    ),
    "resized": (
        lambda f: change(f, put("base_model.model.model.embed_tokens.weight", 70, 64), WEIGHTS),
        "has 70 rows and the model's embedding 64: its vocabulary was resized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_adapters_that_are_not_those_of_the_model(folder: Path, tmp_path: Path, name: str) -> None:
    adapter = make_adapter(tmp_path / "lora")
    check_model(Teacher(model=str(folder), adapter=str(adapter)), "key")
    spoil, told = BAD_ADAPTERS[name]
    spoil(adapter)
    message = refusal(folder, "teacher", adapter=str(adapter))
    assert message.startswith("key.adapter: ") and told in message


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens", "lm_head"]}, {"rank_pattern": {"q_proj": 2}}])
def test_adapters_of_embeddings_and_of_many_ranks_fit(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = make_adapter(tmp_path / "lora", **settings)
    check_model(Teacher(model=str(folder), adapter=str(adapter)), "key")


def as_of_wrapper(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()
    for side, shape in {"A": (4, 32), "B": (32, 4)}.items():
        put(f"base_model.model.{prefix}.layers.0.self_attn.q_proj.lora_{side}.weight", *shape)(tensors)


def test_an_adapter_of_a_wrapper_fits_it_by_the_names_of_model_and_files(tmp_path: Path) -> None:
    base = save_vision(tmp_path / "base")
    adapter = make_adapter(tmp_path / "lora")
    told = refusal(base, "teacher", adapter=str(adapter))
    assert "which it calls" in told and "merge the adapter into its model (`deltaray merge --into-base`)" in told
    for prefix in ("model.language_model", "language_model.model"):
        change(adapter, partial(as_of_wrapper, prefix), WEIGHTS)
        configure(adapter, CONFIG, layers_to_transform=[0])
        check_model(Teacher(model=str(base), adapter=str(adapter)), "key")


# --- where training goes on ---------------------------------------------------------------------------------------
def test_an_adapter_to_go_on_from_must_find_its_places(folder: Path, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=8, targets=["q_proj"])
    wrapped = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "start")
    student, start = Student(model=str(folder)), str(tmp_path / "start")
    load_module(student, "float32", lora, start)
    change(tmp_path / "start", rewrapped, WEIGHTS)
    with pytest.raises(StageError, match=r"holds .*language_model.*, which the adapter has no place for"):
        load_module(student, "float32", lora, start)
    wrapped.save_pretrained(tmp_path / "start")
    change(tmp_path / "start", put(A, 4, 32), WEIGHTS)
    with pytest.raises(StageError, match=r"size mismatch for .*q_proj\.lora_A"):
        load_module(student, "float32", lora, start)
    wrapped.save_pretrained(tmp_path / "start")
    change(tmp_path / "start", lambda tensors: [tensors.pop(A), tensors.pop(B)], WEIGHTS)
    with pytest.raises(StageError, match=r"holds no .*layers\.0\.self_attn\.q_proj\.lora_A.* \(and 1 more\)"):
        load_module(student, "float32", lora, start)


def test_a_damaged_checkpoint_is_not_sound(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Store(str(tmp_path)), "run")
    tensors = {f"w|{kind}": torch.zeros(2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    content = save(tensors)
    path = f"{checkpoints.folder}/step"
    checkpoints.store.write_bytes(f"{path}/rank.safetensors", content)
    files = {"rank.safetensors": [len(content), zlib.crc32(content)]}
    plain: dict[str, Any] = {"files": files, "state": {"data": 1, "step": 1}}
    checkpoints.store.write_json(f"{path}/manifest.json", plain | {"checksum": _checksum(plain)})
    manifest = checkpoints.manifest("step", 1)
    assert manifest is not None and checkpoints.manifest("step", 2) is None  # other pairs
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert checkpoints.shapes("step", manifest, ["rank.safetensors"]) == {"rank.safetensors": shapes}
    assert checkpoints.shapes("step", manifest, ["gone.safetensors"]) is None
    checkpoints.store.write_bytes(f"{path}/rank.safetensors", content[:-1] + b"!")
    assert checkpoints.shapes("step", manifest, ["rank.safetensors"]) is None
    checkpoints.store.write_json(f"{path}/manifest.json", plain)
    assert checkpoints.manifest("step", 1) is None  # without its checksum
    checkpoints.store.write_bytes(f"{path}/manifest.json", b"[")
    assert checkpoints.manifest("step", 1) is None
