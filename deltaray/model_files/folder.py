"""What a model folder consists of: the one list for saving students, merging into a base, and fingerprints.

A folder that is written beside new weights takes along everything that is not weights, so that it loads wherever the
original did: configuration, tokenizer, templates, processors of images and sound, own code, licences. What tells about
the old weights (README, results of a training) stays behind.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from deltaray.errors import UserError
from deltaray.limits import MODEL_LAYERS

INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack",
    ".tflite", ".pdparams", ".distcp", ".index.json",
)  # fmt: skip
WEIGHT_NAMES = ("params.json", "consolidated.*", "optimizer*", "scheduler*", "rng_state*", "training_args*")
"""Meta's and Mistral's own formats, and the states of a training that goes on."""
RESULTS = ("trainer_state.json", "*_results.json", "*_log_history.json", "merge.json")
CONFIGURATION = ("config.json", "generation_config.json", "adapter_config.json", "merges.txt")
CONFIGURATION_STARTS = ("tokenizer", "vocab", "special_tokens_map", "added_tokens", "chat_template", "tekken")
CONFIGURATION_SUFFIXES = (".jinja", ".model", ".tiktoken", ".py", "processor_config.json", ".spm")
LICENCES = ("license", "licence", "notice", "copying", "use_policy", "usage_policy")
DOCUMENTS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".html", ".ipynb", ".log", ".rst")
TEMPLATES = "additional_chat_templates"
COUNTED = re.compile(r"layers?$|experts?($|_)|blocks$|depths?$|stages$|heads$|groups$|codebooks$")
"""Keys of a configuration that say how often something is built."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git-lfs has not fetched."""


class Part(Enum):
    """What a file is to its model."""

    WEIGHTS = "weights"
    ANSWERS = "answers"
    """Beside the weights it decides what the model answers, or whether it loads."""
    ATTACHED = "attached"
    """Goes along with copies."""
    UNKNOWN = "unknown"
    """Goes along where the model has code of its own, which may read any file."""
    NOT_OURS = "not ours"


def part_of(path: PurePosixPath) -> Part:
    """The part that a file of a model folder is, by its path inside it."""
    name = path.name
    if any(piece.startswith(".") for piece in path.parts):
        return Part.NOT_OURS
    named = name in CONFIGURATION or name.startswith(CONFIGURATION_STARTS) or name.endswith(CONFIGURATION_SUFFIXES)
    if len(path.parts) > 1:
        code = name.endswith(".py") or path.parts[0] == TEMPLATES
        return Part.ANSWERS if code and name.endswith(CONFIGURATION_SUFFIXES) else Part.NOT_OURS
    if name.endswith(".safetensors"):
        return Part.WEIGHTS
    if named:
        return Part.ANSWERS
    if name.endswith(WEIGHT_SUFFIXES) or any(path.match(pattern) for pattern in WEIGHT_NAMES):
        return Part.WEIGHTS
    if name.lower().startswith(LICENCES):
        return Part.ATTACHED
    if name.lower().endswith(DOCUMENTS) or any(path.match(pattern) for pattern in RESULTS):
        return Part.NOT_OURS
    return Part.ATTACHED if name.endswith((".json", ".txt")) else Part.UNKNOWN


def files_of(folder: Path) -> Iterator[tuple[PurePosixPath, Part]]:
    """All files of a model folder, in the order of their paths, with the part that each is."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = PurePosixPath(Path(place).relative_to(folder).as_posix())
        yield from ((inside / name, part_of(inside / name)) for name in names)


def answering_files(folder: Path) -> list[str]:
    """The files that decide what a model answers, by their paths inside the folder."""
    kinds = {str(path): part for path, part in files_of(folder)}
    return sorted(
        name
        for name, part in kinds.items()
        if part is Part.ANSWERS or (part is Part.WEIGHTS and name.endswith(".safetensors"))
    )


def files_beside(folder: Path) -> list[str]:
    """What goes along with a copy of a model that gets other weights, by path inside the folder."""
    return _beside(str(path) for path, _ in files_of(folder))


def _beside(names: Iterable[str]) -> list[str]:
    parts = {name: part_of(PurePosixPath(name)) for name in names}
    wanted = {Part.ANSWERS, Part.ATTACHED}
    if any(name.endswith(".py") for name in parts):
        wanted.add(Part.UNKNOWN)
    return sorted(name for name, part in parts.items() if part in wanted and name != "adapter_config.json")


def copy_beside(source: Path, target: Path, leave: Iterable[str] = ()) -> None:
    """Copies what is not weights from one model folder into another, over what is there, but for `leave`."""
    for name in files_beside(source):
        if name not in leave:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def refuse_pointers(folder: Path, key: str) -> None:
    """UserError for a file that git-lfs has not fetched."""
    for path, part in files_of(folder):
        if part in (Part.WEIGHTS, Part.ANSWERS, Part.ATTACHED) and is_pointer(folder / path):
            raise UserError(
                f"{key}: {folder / path} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`"
            )


def refuse_endless(path: Path, settings: Any) -> None:
    """UserError for settings that count more layers, experts or the like than can be built to look at them.

    Args:
        settings: what a file of a model's folder says.
    """
    items = settings.items() if isinstance(settings, dict) else ()
    for name, value in items:
        if isinstance(value, dict):
            refuse_endless(path, value)
        elif COUNTED.search(str(name)) and isinstance(value, int | float) and value > MODEL_LAYERS:
            raise UserError(f"{path}: {name}: {value:,} is more than any model has; fetch or save it again")


def is_pointer(path: Path) -> bool:
    """Whether git-lfs has not fetched a file."""
    try:
        if not path.is_file():  # a pipe would never answer
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


# --- folders of the hub -------------------------------------------------------------------------------------------
def cached_folder(name: str, revision: str | None) -> Path | None:
    """Where a model lies on this machine: its folder, or what the hub's cache holds with its weights; else None."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    for file in ("model.safetensors", INDEX):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def fetch(name: str, revision: str | None, weights: bool) -> Path:
    """A model's folder; one of a hub is fetched: what is beside the weights, with `weights` also its safetensors.

    Raises:
        Exception: the hub's own errors, those of the network below it, and bad names.
    """
    from huggingface_hub import HfApi, snapshot_download

    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        names = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # offline: what is in the cache will do
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    wanted = _beside(names) + [file for file in names if weights and file.endswith((".safetensors", INDEX))]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
