"""Make the family of one seed, or find the one made earlier.

Every model folder carries the settings it was made with.  A folder is trusted only if they are the present
ones; it appears under its name in one rename, once complete, so an interrupted run leaves nothing half-made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from deltaray.labs.miniature.family import FAMILIES
from deltaray.labs.miniature.fit import train_model
from deltaray.labs.miniature.member import SPLIT_SIZES, TRAINING, Member, Rows
from deltaray.labs.miniature.task import SPLIT_SEED
from deltaray.labs.miniature.tokenizer import CHAT_TEMPLATE, build_tokenizer

FamilyProgress = Callable[[str, int, int], None]

VERSION = 1
"""Raise it when a change of code, not of settings, alters what is made."""
PARALLEL = 2
"""Models trained at a time: the machine this is meant for has two cores, whatever Ray has been told."""
POLL_SECONDS = 0.5
SETTINGS_FILE = "family.json"


def settings_of(spec: Member, seed: int) -> dict[str, Any]:
    """Everything a model's weights and folder depend on, with a hash of it all."""
    settings: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "model": asdict(spec),
        "training": asdict(TRAINING),
        "splits": asdict(SPLIT_SIZES) | {"seed": SPLIT_SEED},
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, sort_keys=True)
    return settings | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_made(folder: Path, spec: Member, seed: int) -> bool:
    """Whether `folder` holds this very model."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and found.get("sha256") == settings_of(spec, seed)["sha256"]


def family_is_made(directory: Path, seed: int, family: str = "ladder") -> bool:
    """Whether nothing is left to make of the family of `seed`."""
    folders = {spec: directory / f"seed{seed}" / spec.name for spec in FAMILIES[family]}
    return all(is_made(folder, spec, seed) for spec, folder in folders.items())


def make_model(folder: Path, spec: Member, seed: int, on_progress: Callable[[int, int], None]) -> None:
    """Train one model and put it in `folder`, replacing whatever an older version left there."""
    model = train_model(spec, seed, on_progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{spec.name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        model.save_pretrained(unfinished)
        build_tokenizer().save_pretrained(unfinished)
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings_of(spec, seed), indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_prompt_files(directory: Path, rows: Rows) -> None:
    """`prompts.jsonl`, `validation.jsonl` and `evaluation.jsonl`: the same for every seed."""
    directory.mkdir(parents=True, exist_ok=True)
    for path, lines in _prompt_files(directory, rows):
        if path.is_file() and path.read_text() == lines:
            continue
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(lines)
        unfinished.replace(path)


def prompts_are_written(directory: Path, rows: Rows) -> bool:
    """Whether `write_prompt_files` would write nothing."""
    return all(path.is_file() and path.read_text() == lines for path, lines in _prompt_files(directory, rows))


def _prompt_files(directory: Path, rows: Rows) -> Iterator[tuple[Path, str]]:
    for split, lines_of in rows.items():
        yield directory / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in lines_of)


class ProgressBoard:
    """Where training tasks leave how far they are; as a Ray actor it is reachable from every process."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, int]] = {}

    def post(self, name: str, step: int, total: int) -> None:
        """Remember the latest step of one model."""
        self._latest[name] = (step, total)

    def take(self) -> dict[str, tuple[int, int]]:
        """What has changed since the last call."""
        latest, self._latest = self._latest, {}
        return latest


def _make_model_task(folder: str, spec: Member, seed: int, board: Any) -> str:
    """The body of the Ray task: `make_model` with progress sent to the board."""
    make_model(Path(folder), spec, seed, lambda step, total: board.post.remote(spec.name, step, total))
    return spec.name


def _make_in_parallel(seed_directory: Path, specs: Iterable[Member], seed: int, on_progress: FamilyProgress) -> None:
    """Train `specs` in Ray tasks, the longest first, `PARALLEL` at a time."""
    task = ray.remote(num_cpus=1, max_retries=1)(_make_model_task)
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    waiting = sorted(specs, key=lambda spec: spec.layers * spec.hidden * spec.last_step, reverse=True)
    steps = {spec.name: spec.last_step for spec in waiting}
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < PARALLEL:
                spec = waiting.pop(0)
                running.append(task.remote(str(seed_directory / spec.name), spec, seed, board))
            done, running = ray.wait(running, timeout=POLL_SECONDS)
            for name, (step, total) in ray.get(board.take.remote()).items():
                on_progress(name, step, total)
            for name in ray.get(done):
                on_progress(name, steps[name], steps[name])
    finally:
        for left in running:
            ray.cancel(left, force=True)
        ray.kill(board)


def make_family(directory: Path, seed: int, on_progress: FamilyProgress, family: str = "ladder") -> dict[str, Path]:
    """Make what is missing of the family of `seed`; returns the folder of every model by name.

    Lays out ``directory/seed<k>/<model>/`` and ``directory/{prompts,validation,evaluation}.jsonl``.  Ray must
    be initialised.  `on_progress(model, step, total)` is called from this process, for models found ready too.
    """
    directory = directory.resolve()
    seed_directory = directory / f"seed{seed}"
    members = FAMILIES[family]
    write_prompt_files(directory, members[0].rows())
    folders = {spec.name: seed_directory / spec.name for spec in members}
    missing = [spec for spec in members if not is_made(folders[spec.name], spec, seed)]
    for spec in members:
        if spec not in missing:
            on_progress(spec.name, spec.last_step, spec.last_step)
    if missing:
        _make_in_parallel(seed_directory, missing, seed, on_progress)
    return folders
