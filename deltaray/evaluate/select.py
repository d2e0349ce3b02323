"""The best of a grid takes the grid's name: chosen on the selection tasks, never on the tasks that are reported."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deltaray.data.shapes import EVALUATION
from deltaray.data.store import Store
from deltaray.evaluate.results import evaluation_of
from deltaray.recipe.study import Study


def choose_candidates(study: Study, store: Store) -> dict[str, dict[str, Any]]:
    """Of every grid whose candidates are all trained, the winner's student and metrics take its name.

    All answers to the selection tasks must be scored.

    Returns:
        by the grid's name `selected`, the winner's, and `selection`, each candidate's mean over the selection tasks.
    """
    return {
        name: _choose(study, store, name, candidates)
        for name in study.evaluated
        if (candidates := study.grid(name)) and all(map(store.trained, candidates))
    }


def _choose(study: Study, store: Store, name: str, candidates: list[str]) -> dict[str, Any]:
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    values = {item: evaluation_of(store, item, item, evaluation.selection)["mean"] for item in candidates}
    winner = candidates[int(np.argmax(list(values.values())))]
    if not store.trained(name) or _taken_from(store, name) != winner:
        _copy(store, winner, name)
    metrics = f"{Store.training(winner)}/metrics.jsonl"
    with store.filesystem.open_input_file(metrics) as source:
        store.write_bytes(f"{Store.training(name)}/metrics.jsonl", source.read())
    return {"selected": winner, "selection": values}


def _taken_from(store: Store, name: str) -> str | None:
    """The winner of the last time: another grid may have another one."""
    path = Store.evaluation(name)
    selected: str | None = store.read_json(path, EVALUATION).get("selected") if store.exists(path) else None
    return selected


def _copy(store: Store, winner: str, name: str) -> None:
    path = store.trained(winner)
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        shutil.copytree(store.local_folder(path), copy)
        store.put_folder(copy, path.replace(winner, name))
