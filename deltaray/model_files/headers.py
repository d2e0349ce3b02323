"""What safetensors files hold, from their headers: names, shapes and types of tensors, and whether a file is whole."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from deltaray.data.storage.shape import ANY, misfit
from deltaray.errors import UserError, door
from deltaray.files import read_settings
from deltaray.model_files.folder import INDEX, is_pointer

SINGLE = "model.safetensors"
LONGEST = 100_000_000
"""Bytes of a header, at most; the format's own limit."""


@dataclass(frozen=True)
class Held:
    """One tensor of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def tensors_of_file(path: Path) -> dict[str, Held]:
    """The tensors of one file by name.

    Raises:
        UserError: the file is not a safetensors file, was not fetched whole, or holds a tensor without elements.
    """
    header, end = _header(path)
    size = path.stat().st_size
    held = {name: Held(path, it["dtype"], tuple(it["shape"])) for name, it in header.items()}
    wanted = end + max((it["data_offsets"][1] for it in header.values()), default=0)
    if size != wanted:
        what = "cut short" if size < wanted else "too long"
        raise UserError(f"{path}: is {what}: {size:,} bytes, and its header says {wanted:,}; fetch or save it again")
    with door(str(path), "is damaged or no safetensors file; fetch or save it again"), safe_open(path, "np"):
        pass  # the library has looked whether tensors lie one behind the other, as long as their types say
    for name, tensor in held.items():
        if 0 in tensor.shape and tensor.dtype.startswith(("F", "BF")):  # some quantisers leave empty integers
            raise UserError(f"{path}: {name}: {EMPTY}")
    return held


EMPTY = "is empty, as ZeRO-3 leaves it; gather the parameters when saving"


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(tensors by name as the header tells of them, where the header ends)."""
    if is_pointer(path):
        raise UserError(f"{path}: is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`")
    try:
        if not path.is_file():
            raise ValueError
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= LONGEST else b""
        header = json.loads(text)
        header.pop("__metadata__", None)
        if misfit(header, {ANY: {"dtype": str, "shape": [int], "data_offsets": [int]}}):
            raise ValueError
        return header, 8 + length
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{path}: is damaged or no safetensors file; fetch or save it again") from None


def tensors_of_model(folder: Path, any_names: bool = False) -> dict[str, Held]:
    """The tensors of a model folder by name.

    Args:
        any_names: where there is neither the one file nor an index, take all safetensors files, as vLLM does.

    Raises:
        UserError: a file is missing, damaged or not whole, or the index and the files tell different stories.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file() and SINGLE not in _weight_map(index).values():
            raise UserError(
                f"{folder}: holds {SINGLE} and an index of other files, so that readers take different weights; "
                "delete those that are not meant"
            )
        return tensors_of_file(folder / SINGLE)
    if index.is_file():
        return _indexed(index)
    files = sorted(folder.glob("*.safetensors")) if any_names else []
    if not files:
        raise UserError(f"{folder}: holds no {SINGLE} and no {INDEX}; save the model with save_pretrained")
    return {name: held for file in files for name, held in tensors_of_file(file).items()}


def _indexed(index: Path) -> dict[str, Held]:
    places = _weight_map(index)
    lacking = sorted({file for file in places.values() if not (index.parent / file).is_file()})
    if lacking:
        raise UserError(f"{index}: names {lacking[0]}{and_others(lacking)}, which is not there; fetch it")
    held: dict[str, Held] = {}
    for file in sorted(set(places.values())):
        held |= tensors_of_file(index.parent / file)
    absent = [name for name, file in places.items() if name not in held or held[name].file.name != file]
    if absent:
        raise UserError(
            f"{index}: {absent[0]} is not in {places[absent[0]]}{and_others(absent)}; index and files are of different "
            "models: fetch or save them again"
        )
    return held


def _weight_map(index: Path) -> Mapping[str, str]:
    settings = read_settings(index, LONGEST)
    if misfit(settings, {"weight_map": {ANY: str}}):
        raise UserError(f"{index}: is damaged or no index of safetensors files; fetch or save it again")
    places: dict[str, str] = settings["weight_map"]
    if outside := [file for file in places.values() if "/" in file or file.startswith(".")]:
        raise UserError(f"{index}: names {outside[0]!r}, which lies outside of its folder; fetch or save it again")
    return places


def and_others(names: object) -> str:
    """` (and 3 more)`, or nothing where there is one."""
    count = len(names) - 1  # type: ignore[arg-type]
    return f" (and {count:,} more)" if count > 0 else ""
