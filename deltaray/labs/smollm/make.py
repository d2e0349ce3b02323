"""Make the ladder of real models and its prompts, or find what was made earlier.

Every folder carries what it was made of and is trusted only if that is what would be made now; it appears under its
name in one rename, once complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.labs.smollm.fetch import REQUIREMENT, SHA256, fetch_gguf, read_gguf, sha256_of
from deltaray.labs.smollm.task import task_rows
from deltaray.labs.smollm.weaken import LADDER, without_layers

LadderProgress = Callable[[str, int, int], None]
VERSION = 1
"""Raise it when a change of code alters what is made."""
MADE_FILE = "made.json"
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Peru?": "Lima",
    "What is the capital of Japan?": "Tokyo",
    "What is the chemical symbol of iron?": "Fe",
}
"""What the model answers if it was read rightly, each answer with a word that stands in it."""
MISSES = 1
"""Wrong answers that are put up with: rounding differs between processors."""


def settings_of(name: str) -> dict[str, Any]:
    """What a member's folder depends on."""
    return {"version": VERSION, "of": REQUIREMENT, "gguf_sha256": SHA256, "left_out": list(LADDER[name])}


def is_made(folder: Path, name: str) -> bool:
    """Whether `folder` holds this very member, its weights as large as they were written."""
    try:
        found = json.loads((folder / MADE_FILE).read_text())
        size = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("settings") == settings_of(name) and found.get("bytes") == size


def ladder_is_made(directory: Path) -> bool:
    """Whether nothing is left to make."""
    from deltaray.labs.miniature.make import prompts_are_written

    return prompts_are_written(directory, task_rows()) and all(is_made(directory / name, name) for name in LADDER)


def make_ladder(directory: Path, on_progress: LadderProgress) -> None:
    """Make what is missing: ``directory/<member>/`` and ``directory/{prompts,validation,evaluation}.jsonl``.

    Ray must be initialised: the models are made in a process that ends and takes its memory along.

    Raises:
        UserError: the model cannot be fetched, or is not what it should be.
    """
    import ray

    from deltaray.labs.miniature.make import write_prompt_files

    directory = directory.resolve()
    write_prompt_files(directory, task_rows())
    missing = [name for name in LADDER if not is_made(directory / name, name)]
    if missing:
        gguf = fetch_gguf(directory / "source")
        wrong = ray.get(ray.remote(num_cpus=1, max_retries=1)(make_members).remote(str(directory), str(gguf), missing))
        if wrong:
            raise UserError(f"{REQUIREMENT}: the model does not answer as it should: {wrong}; it is not used")
    for name in LADDER:
        on_progress(name, 1, 1)


def make_members(directory: str, gguf: str, names: list[str]) -> dict[str, str]:
    """The body of the Ray task. Makes nothing, and returns the wrong answers, if the model gives too many."""
    model, tokenizer = read_gguf(Path(gguf))
    answers = {question: answer_of(model, tokenizer, question) for question in QUESTIONS}
    wrong = {question: answer for question, answer in answers.items() if QUESTIONS[question] not in answer}
    if len(wrong) > MISSES:
        return wrong
    for name in names:
        _write(Path(directory) / name, name, without_layers(model, LADDER[name]), tokenizer, answers)
    return {}


def answer_of(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer, 24 tokens at most."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


def _write(folder: Path, name: str, model: Any, tokenizer: Any, answers: dict[str, str]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        weights = unfinished / "model.safetensors"
        weights.chmod(0o644)
        made = {"settings": settings_of(name), "bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
        asked = {} if LADDER[name] else {"answers": answers}
        (unfinished / MADE_FILE).write_text(json.dumps(made | asked, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
