"""Whether adapters belong together: one base, one shape per matrix; and what their merge declares of itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaray.errors import UserError
from deltaray.merge.adapter import Adapter
from deltaray.model_files.lora import CONFIG, WEIGHTS
from deltaray.model_files.names import inner_name

NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Keys by which target_modules names more than the adapter has."""


def refuse_strangers(adapters: Sequence[Adapter], base: str | None) -> None:
    """UserError for adapters that are not updates of one model.

    Args:
        base: the user's word that all are of this model, whatever their files name.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for key in ("base_model_name_or_path", "revision") if base is None else ():
            if not _same(first.config.get(key), other.config.get(key)):
                raise UserError(
                    f"{other.folder / CONFIG}: {key}: {other.config.get(key)}, but {first.folder} has "
                    f"{first.config.get(key)}; adapters of different models cannot be merged. If it is the same model "
                    "under two names, say so with --base MODEL"
                )
        for key in ("fan_in_fan_out", "task_type"):
            one, another = first.config.get(key), other.config.get(key)
            if one != another and not (key == "task_type" and None in (one, another)):
                raise UserError(f"{other.folder / CONFIG}: {key}: {another}, but {first.folder} has {one}")
    _refuse_other_wrappers(adapters)
    _refuse_shapes(adapters)


def _same(one: Any, other: Any) -> bool:
    """Equal, or two names of one folder."""
    if one == other or (not one and not other):
        return True
    folders = [Path(str(name)).expanduser() for name in (one, other)]
    return all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])


def _refuse_shapes(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for module, shape in adapter.shapes.items():
            first = seen.setdefault(module, adapter)
            if (first.shapes[module], first.modules[module]) != (shape, adapter.modules[module]):
                raise UserError(
                    f"{adapter.folder / WEIGHTS}: {module}: updates a matrix of {shape[0]} x {shape[1]}, but that of "
                    f"{first.folder} is {first.shapes[module][0]} x {first.shapes[module][1]}; "
                    "these are adapters of different models"
                )


def _refuse_other_wrappers(adapters: Sequence[Adapter]) -> None:
    """One matrix under two names would be two matrices, each changed by some of the adapters."""
    seen: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for module in adapter.modules:
            first, name = seen.setdefault(inner_name(module), (adapter, module))
            if name != module:
                raise UserError(
                    f"{adapter.folder / WEIGHTS}: {module}: {first.folder} calls it {name}: one was trained on the "
                    "language model alone, the other inside a model of images and text; train both on the same"
                )


def base_copies(adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """The base's embeddings that adapters carry along (PEFT saves them beside a LoRA of the embedding).

    Raises:
        UserError: they differ, so somebody has trained or resized them.
    """
    found: dict[str, tuple[Path, torch.Tensor]] = {}
    for adapter in adapters:
        for key in adapter.base_copies:
            tensor = adapter.tensor(key)
            folder, first = found.setdefault(key, (adapter.folder, tensor))
            if first.shape != tensor.shape or not torch.equal(first, tensor):
                raise UserError(
                    f"{adapter.folder / WEIGHTS}: {key}: differs from that of {folder}: their bases are not the same; "
                    "resize and save the base first, then train the adapters on it"
                )
    return {key: tensor for key, (_, tensor) in found.items()}


def modules_of(adapters: Sequence[Adapter]) -> list[str]:
    """The modules that any of the adapters changes, in their files' order."""
    return list(dict.fromkeys(module for adapter in adapters for module in adapter.modules))


def target_modules(adapters: Sequence[Adapter]) -> list[str]:
    """What the merged adapter declares: the adapters' own lists if they name nothing more, else every module."""
    plain = all(
        isinstance(adapter.config.get("target_modules"), list) and not any(adapter.config.get(key) for key in NARROWING)
        for adapter in adapters
    )
    if not plain:
        return modules_of(adapters)
    return sorted({str(name) for adapter in adapters for name in adapter.config["target_modules"]})
