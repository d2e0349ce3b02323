"""Model folders for the tests of weights: tiny models of several kinds, and ways to spoil their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForSequenceClassification

Tensors = dict[str, torch.Tensor]
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
VISION = {
    "gemma3": {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    "qwen3_5": {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
    "qwen2_5_vl": {
        "hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    },
}  # fmt: skip
LINEAR = {f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def make_vision(kind: str) -> Any:
    """A model of images and text with random weights."""
    torch.manual_seed(0)
    text = TEXT | (LINEAR if kind == "qwen3_5" else {})
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION[kind])
    return AutoModelForImageTextToText.from_config(config).eval()


def save_vision(folder: Path, kind: str = "gemma3") -> Path:
    """Its folder, with the files that only images need."""
    make_vision(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"image_seq_length": 4}))
    return folder


def save_reward(folder: Path) -> Path:
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, work: Callable[[Tensors], Any], name: str = "model.safetensors") -> None:
    """Changes the tensors of a file."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    work(tensors)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})


def rename(old: str, new: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Changes keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path, size: str = "60KB") -> Path:
    make_model().save_pretrained(folder, max_shard_size=size)
    make_tokenizer().save_pretrained(folder)
    return folder
