"""`--into-base`: a merged adapter added to its base's weights, tensor by tensor, as a model folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deltaray.errors import UserError, led_by
from deltaray.files import read_settings
from deltaray.merge.adapter import Adapter
from deltaray.model_files.folder import INDEX, copy_beside, fetch, refuse_pointers
from deltaray.model_files.headers import and_others, tensors_of_model
from deltaray.model_files.lora import WEIGHTS
from deltaray.model_files.names import match_names
from deltaray.model_files.tensor_file import TensorFile


@dataclass(frozen=True)
class Base:
    """A model folder: its safetensors files, and in which of them each tensor is."""

    folder: Path
    config: Mapping[str, Any]
    places: Mapping[str, str]

    @property
    def files(self) -> list[str]:
        return sorted(set(self.places.values()))


def open_base(name: str | None, revision: str | None = None) -> Base:
    """A base by its folder or hub id.

    Raises:
        UserError: it cannot be found, is quantised, or is not in safetensors.
    """
    if not name:
        raise UserError("--into-base: the adapters name no base; give it with --base MODEL")
    folder = _folder(name, revision)
    with led_by(f"{folder}: holds no readable config.json of a model"):
        config = read_settings(folder / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{folder / 'config.json'}: quantization_config: give the unquantised model with --base MODEL")
    refuse_pointers(folder, "the base")
    return Base(folder, config, {name: held.file.name for name, held in tensors_of_model(folder).items()})


def _folder(name: str, revision: str | None) -> Path:
    try:
        return fetch(name, revision, weights=True)
    except Exception as error:  # the hub's own errors, those of the network below it, and bad names
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the base {name} is not a folder, and no hub has it: {reason}; give --base FOLDER") from None


def refuse_unfit(base: Base, adapter: Adapter) -> dict[str, str]:
    """The module that changes each of the base's tensors, by the tensor's key.

    The base may be the adapter's model inside a wrapper for images, or the other way round.

    Raises:
        UserError: the base has no such weight, or one that is two weights at once.
    """
    weights = [key.removesuffix(".weight") for key in base.places if key.endswith(".weight")]
    found, lost = match_names(adapter.modules, weights)
    if lost:
        raise UserError(
            f"{base.folder}: has no {lost[0]}.weight{and_others(lost)}, which the adapters change; give their base "
            "with --base MODEL"
        )
    tied = _ties(base)
    for module, name in found.items():
        if tied and (adapter.modules[module].embedding or name.split(".")[-1] == "lm_head"):
            raise UserError(
                f"{base.folder}: ties {name}.weight to the output layer, an adapter changes one of them only; "
                "use the merged adapter without --into-base"
            )
    return {f"{name}.weight": module for module, name in found.items()}


def _ties(base: Base) -> bool:
    """Whether the embedding is the output layer, too."""
    head = any(key.split(".")[-2:] == ["lm_head", "weight"] for key in base.places)
    text = base.config.get("text_config") or {}
    return not head or bool(base.config.get("tie_word_embeddings", text.get("tie_word_embeddings")))


def add_to_base(base: Base, adapter: Adapter, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Writes the base with the adapter's updates added into `folder`.

    Raises:
        UserError: the adapter is not of this base.
    """
    changed = refuse_unfit(base, adapter)
    flipped = bool(adapter.config.get("fan_in_fan_out"))
    done = 0
    for name in base.files:
        keys = [key for key, place in base.places.items() if place == name]
        with safe_open(base.folder / name, framework="pt") as source, TensorFile(folder / name, keys) as target:
            for key in keys:
                weight = source.get_tensor(key)
                if key in changed:
                    weight = _added(weight, adapter, changed[key], flipped, base.folder)
                target.add(key, weight)
                done += 1
                progress(done, len(base.places))
    copy_beside(base.folder, folder)
    if (base.folder / INDEX).is_file():
        shutil.copyfile(base.folder / INDEX, folder / INDEX)


def _added(weight: torch.Tensor, adapter: Adapter, module: str, flipped: bool, folder: Path) -> torch.Tensor:
    """The weight plus the update, summed in float32 or more, in the weight's dtype."""
    update = adapter.factors(module)
    assert update is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = update.left.to(wide) @ update.right.to(wide)
    change = change.T if adapter.modules[module].embedding or flipped else change
    if change.shape != weight.shape:
        raise UserError(
            f"{adapter.folder / WEIGHTS}: {module}: updates a matrix of {tuple(change.shape)}, but that of {folder} is "
            f"{tuple(weight.shape)}; give the adapters' base with --base MODEL"
        )
    return (weight.to(wide) + change).to(weight.dtype)
