"""The best of a grid takes the grid's name: chosen on the selection tasks, never on the tasks that are reported."""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from deltaray.evaluate.results import evaluation_of
from deltaray.recipe.study import Study
from deltaray.store import Store


def choose_candidates(study: Study, store: Store) -> None:
    """For every grid whose candidates are all evaluated: commits the winner's student, metrics and evaluation."""
    for name in study.evaluated:
        candidates = study.grid(name)
        if candidates and all(store.exists(Store.evaluation(item)) for item in candidates):
            _choose(study, store, name, candidates)


def _choose(study: Study, store: Store, name: str, candidates: list[str]) -> None:
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    values = {item: evaluation_of(store, item, item, evaluation.selection)["mean"] for item in candidates}
    winner = candidates[int(np.argmax(list(values.values())))]
    if not store.trained(name):
        _copy(store, winner, name)
    metrics = f"{Store.training(winner)}/metrics.jsonl"
    with store.filesystem.open_input_file(metrics) as source:
        store.write_bytes(f"{Store.training(name)}/metrics.jsonl", source.read())
    result = evaluation_of(store, name, winner, evaluation.tasks)
    store.write_json(Store.evaluation(name), {**result, "selected": winner, "selection": values})


def _copy(store: Store, winner: str, name: str) -> None:
    path = store.trained(winner)
    assert path is not None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        shutil.copytree(store.local_folder(path), copy)
        store.put_folder(copy, path.replace(winner, name))
