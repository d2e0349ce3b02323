"""What travels with a job: the recipe and what it names by a relative path; absolute paths are the cluster's."""

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deltaray.data.prompts.text import CODECS
from deltaray.errors import UserError
from deltaray.recipe import Recipe

log = logging.getLogger(__name__)

MAX_MIB = 32
SECRETS = (
    ".env*", ".ssh", ".aws", ".azure", ".config", ".docker", ".git*", ".gnupg", ".kube", ".netrc", ".npmrc", ".pypirc",
    ".ray", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx",
    "*credentials*", "auth_token", "*.token", "secrets.*",
)  # fmt: skip
"""Names under which keys are kept, as a rule."""
FILE_KEYS = ("path", "paths", "include", "model", "adapter", "adapters", "chat_template")
"""Keys of a recipe that may name files."""
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jinja", ".txt", *CODECS)


def pack(path: Path, recipe: Recipe, folder: Path) -> None:
    """Copies the recipe's file and what it names into an empty folder, each under its own relative path.

    Raises:
        UserError: something would be lost with the job, cannot be found, or is too large to travel.
    """
    _refuse_lost(recipe)
    _refuse_link_out(path, "RECIPE")
    named = {relative: (key, dict(_files(relative, key))) for relative, key in named_files(recipe)}
    _refuse_large({relative: (key, [*files.values()]) for relative, (key, files) in named.items()})
    for _, files in named.values():
        for relative, real in files.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real, folder / relative)
    shutil.copyfile(path, folder / path.name)


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
        raise UserError(f"{key}: {path} lies outside of this folder, so it cannot travel with the job; {_FIX}")
    if path.exists():
        return [path]
    if _looks_local(key, path) and not _is_made(recipe, path):
        raise UserError(f"{key}: there is no {path} here; relative paths travel with the job: correct it, or {_FIX}")
    return []


_FIX = "put it on storage that all nodes see and write its absolute path"


def _looks_local(key: str, path: Path) -> bool:
    """Rather than a hub id, `name` or `owner/name`, or the name of a tokenizer's own chat template."""
    kind = key.rpartition(".")[2]
    named = kind == "chat_template" and not path.suffix and len(path.parts) == 1
    owned = (kind in ("adapter", "adapters", "chat_template") and not named) or path.suffix in DATA_SUFFIXES
    return owned or len(path.parts) > 2


def _is_made(recipe: Recipe, path: Path) -> bool:
    """Whether the job makes it: the miniature's models and prompts."""
    return recipe.miniature is not None and path.is_relative_to(recipe.miniature.directory)


# --- nothing from outside -----------------------------------------------------------------------------------------
def _files(path: Path, key: str, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """(relative path, real path) of a file, or of all files in a folder, links followed as far as this folder goes.

    Args:
        above: the real paths of the folders on the way here.
    Raises:
        UserError: it leads out of this folder, is not a file, or is where keys are kept.
    """
    real = _refuse_link_out(path, key)
    if not above and (secret := _secret_in(path)):
        raise UserError(f"{key}: {path}: keys are kept under names such as {secret}, and do not travel with a job")
    if not os.path.isdir(real):  # noqa: PTH112
        _refuse_special(path, real, key)
        yield path, real
        return
    if real in above:
        raise UserError(f"{key}: {path} is a link to a folder that it lies in; remove it")
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or _secret_in(Path(entry.name)):
            log.warning(f"{key}: {entry} does not travel with the job: hidden files and those with keys are left out")
        else:
            yield from _files(entry, key, (*above, real))


def _refuse_link_out(path: Path, key: str) -> str:
    """The real path; UserError where a path that begins in this folder ends outside of it.

    A second name of a file (a hard link) cannot be told from the first.
    """
    here, real = os.path.realpath("."), os.path.realpath(path)
    if _is_inside(os.path.abspath(path), here) and not _is_inside(real, here):  # noqa: PTH100
        raise UserError(f"{key}: {path} leads out of this folder, to {real}, so it cannot travel with the job; {_FIX}")
    return real


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _refuse_special(path: Path, real: str, key: str) -> None:
    try:
        mode = os.stat(real).st_mode  # noqa: PTH116
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}; remove it, or {_FIX}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{key}: {path} is not a file (a socket, a pipe or a device) and cannot travel with the job")


def _secret_in(path: Path) -> str | None:
    """The part of a path that names a place for keys."""
    return next((part for part in path.parts if any(fnmatchcase(part.lower(), name) for name in SECRETS)), None)


def _refuse_large(files: dict[Path, tuple[str, list[str]]]) -> None:
    sizes = {path: sum(os.path.getsize(real) for real in reals) for path, (_, reals) in files.items()}  # noqa: PTH202
    total = sum(sizes.values())
    if total > MAX_MIB * 2**20:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"{files[largest][0]}: {largest} has {sizes[largest] / 2**20:,.0f} MiB, all files that the recipe names "
            f"{total / 2**20:,.0f} MiB; a job carries {MAX_MIB} MiB at most: {_FIX}"
        )
