"""What travels with a job: the recipe and what it names by a relative path; absolute paths are the cluster's."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.prompts.text import CODECS
from deltaray.recipe import Recipe

MAX_MIB = 32
FILE_KEYS = ("path", "paths", "include", "model", "adapter", "adapters", "chat_template")
"""Keys of a recipe that may name files."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jinja", ".txt", *CODECS)


def pack(path: Path, recipe: Recipe, folder: Path) -> None:
    """Copies the recipe's file and what it names into an empty folder, each under its own relative path.

    Raises:
        UserError: something would be lost with the job, cannot be found, or is too large to travel.
    """
    _refuse_lost(recipe)
    files = dict(named_files(recipe))
    _refuse_large(files)
    for relative in files:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.is_dir():
            shutil.copytree(relative, target, dirs_exist_ok=True)
        else:
            shutil.copy2(relative, target)
    shutil.copy2(path, folder / path.name)


def _refuse_lost(recipe: Recipe) -> None:
    if not _is_remote(recipe.out):
        raise UserError(
            f"out: {recipe.out} is relative: a job would write it into a folder that is deleted with the job; name "
            "storage that all nodes see, for example --set out=s3://bucket/study or --set out=/shared/study"
        )


def _is_remote(path: str) -> bool:
    """Whether a path means the same on every machine, or the cluster's."""
    return "://" in path or path.startswith(("/", "~"))


def named_files(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """(relative path, the recipe's key) of every file and folder here that the recipe names."""
    for key, value in _named(recipe.model_dump(mode="json"), ""):
        if _is_remote(value):
            continue
        for seed in recipe.seeds if "{seed}" in value else recipe.seeds[:1]:
            yield from ((file, key) for file in _found(recipe, key, Path(value.replace("{seed}", str(seed)))))


def _named(node: Any, at: str) -> Iterator[tuple[str, str]]:
    """(key, value) of every string under one of FILE_KEYS, but for models that only a server knows."""
    for name, value in node.items() if isinstance(node, dict) else ():
        key = f"{at}.{name}" if at else name
        served = name == "model" and node.get("endpoint")
        if isinstance(value, str) and name in FILE_KEYS and not served:
            yield key, value
        elif isinstance(value, list) and name in FILE_KEYS:
            yield from ((key, item) for item in value if isinstance(item, str))
        else:
            yield from _named(value, key)
    for number, item in enumerate(node if isinstance(node, list) else ()):
        yield from _named(item, f"{at}.{number}")


def _found(recipe: Recipe, key: str, path: Path) -> list[Path]:
    if os.path.normpath(path).startswith(".."):
        raise UserError(f"{key}: {path} lies outside of this folder, so it cannot travel with the job; {_MEND}")
    if path.exists():
        return [path]
    if _looks_local(key, path) and not _is_made(recipe, path):
        raise UserError(f"{key}: there is no {path} here; relative paths travel with the job: correct it, or {_MEND}")
    return []


_MEND = "put it on storage that all nodes see and write its absolute path"


def _looks_local(key: str, path: Path) -> bool:
    """Rather than a hub id, `name` or `owner/name`, or the name of a tokenizer's own chat template."""
    kind = key.rpartition(".")[2]
    named = kind == "chat_template" and not path.suffix and len(path.parts) == 1
    owned = (kind in ("adapter", "adapters", "chat_template") and not named) or path.suffix in DATA_SUFFIXES
    return owned or len(path.parts) > 2


def _is_made(recipe: Recipe, path: Path) -> bool:
    """Whether the job makes it: the miniature's models and prompts."""
    return recipe.miniature is not None and path.is_relative_to(recipe.miniature.directory)


def _refuse_large(files: dict[Path, str]) -> None:
    sizes = {path: _size(path) for path in files}
    total = sum(sizes.values())
    if total > MAX_MIB * 2**20:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"{files[largest]}: {largest} has {sizes[largest] / 2**20:,.0f} MiB, all files that the recipe names "
            f"{total / 2**20:,.0f} MiB; a job carries {MAX_MIB} MiB at most: {_MEND}"
        )


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
