"""What a finished trial has shown, from what its stages have stored; over its seeds."""

from typing import Any

import numpy as np

from deltaray.data.shapes import EVALUATION
from deltaray.data.store import Store
from deltaray.evaluate.compare import compare
from deltaray.evaluate.results import evaluation_of
from deltaray.evaluate.statistics import mean_and_stderr
from deltaray.evaluate.values import TaskValues
from deltaray.pair.describe import delta_path
from deltaray.recipe.check_exploration import objectives_of
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.search_space import Trial
from deltaray.recipe.study import Study

EDGE = 5
"""Steps at each end of a run whose mean log-probs are compared: single batches scatter."""

Facts = dict[str, Any]


def facts_of(study: Study, store: Store, trial: Trial) -> Facts:
    """Per run and over the seeds: delta, held-out accuracy, scores, gain over the untouched student.

    Args:
        study: of this trial alone.
    """
    runs = {name: _run_facts(study, store, name) for name in study.runs}
    facts: Facts = {"runs": runs}
    for key in ("delta", "quality", "heldout_accuracy", "selection"):
        facts[key] = over_seeds([run[key] for run in runs.values()])
    own = next(iter(runs.values()))["delta_interval"]
    facts["delta"] |= _interval(facts["delta"], own if len({run["pairing"] for run in runs.values()}) == 1 else None)
    for side in ("chosen", "rejected"):
        facts[f"logps_{side}_change"] = over_seeds([run[f"logps_{side}_change"] for run in runs.values()])["mean"]
    facts["signatures"] = sorted({name for run in runs.values() for name in run["signatures"]})
    if study.recipe.evaluation is not None:
        facts |= _scores(study, store)
    return facts


def over_seeds(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard error of what is known; the error of a single value is not."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return {"mean": None, "stderr": None}
    mean, stderr = mean_and_stderr(known)
    return {"mean": mean, "stderr": stderr if len(known) > 1 else None}


def _interval(delta: dict[str, float | None], own: list[float | None] | None) -> dict[str, float | None]:
    """Of pairs that serve all seeds their own bootstrap over prompts; else two standard errors over the seeds."""
    if own is not None:
        return {"low": own[0], "high": own[1], "stderr": None}
    mean, stderr = delta["mean"], delta["stderr"]
    if mean is None or stderr is None:
        return {"low": None, "high": None}
    return {"low": mean - 2 * stderr, "high": mean + 2 * stderr}


def _run_facts(study: Study, store: Store, name: str) -> Facts:
    run = study.runs[name]
    lines = read_metrics(store, name)
    told = store.read_json(delta_path(run.pairings[0]))
    delta = (told.get("delta") or {}).get("mean") or {}
    evaluation = study.recipe.evaluation
    selection = evaluation_of(store, name, name, evaluation.selection) if evaluation and evaluation.selection else {}
    return {
        "seed": study.evaluated[name].seed,
        "path": store.trained(name),
        "pairing": run.pairings[0],
        "pairs": store.read_json(f"{Store.training(name)}/data.json", {"trained": int})["trained"],
        "steps": len(lines),
        "delta": delta.get("value"),
        "delta_interval": [delta.get("low"), delta.get("high")],
        "quality": (told.get("chosen_score") or {}).get("value"),
        "heldout_accuracy": last_of(lines, "heldout_accuracy"),
        "logps_chosen_change": change_of(lines, "logps_chosen"),
        "logps_rejected_change": change_of(lines, "logps_rejected"),
        "signatures": sorted({sign for line in lines for sign in line.get("signatures", ())}),
        "selection": selection.get("mean"),
        "selection_tasks": {task: it["value"] for task, it in selection.get("tasks", {}).items()},
    }


def _scores(study: Study, store: Store) -> Facts:
    """Evaluation over the seeds, and the gain with its interval."""
    runs = list(study.runs)
    students = [study.runs[name].student for name in runs]
    results = {name: store.read_json(Store.evaluation(name), EVALUATION) for name in (*runs, *students)}
    tasks = {
        task: over_seeds([results[name]["tasks"][task]["value"] for name in runs]) for task in results[runs[0]]["tasks"]
    }
    mean = over_seeds([results[name]["mean"] for name in runs])
    if len(runs) == 1:  # one seed: the error over prompts
        mean["stderr"] = float(np.mean([task["stderr"] for task in results[runs[0]]["tasks"].values()]))
    return {
        "tasks": tasks,
        "mean": mean,
        "untouched": over_seeds([results[name]["mean"] for name in students])["mean"],
        "gain": compare(study, TaskValues(study, store, results), runs, students),
        "gains": [results[run]["mean"] - results[student]["mean"] for run, student in zip(runs, students, strict=True)],
    }


def read_metrics(store: Store, run: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return store.read_lines(f"{Store.training(run)}/metrics.jsonl", {"step": int})


def last_of(lines: list[dict[str, Any]], key: str) -> float | None:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def change_of(lines: list[dict[str, Any]], key: str) -> float | None:
    """By how much a metric has changed from the first steps to the last."""
    values = [line[key] for line in lines if line.get(key) is not None]
    edge = max(1, min(EDGE, len(values) // 2))
    return float(np.mean(values[-edge:]) - np.mean(values[:edge])) if values else None


def objective_values(recipe: Recipe, facts: Facts) -> dict[str, float | None]:
    """The trial's value of every objective, the mean over its seeds."""
    return {name: _objective(name, facts) for name in objectives_of(recipe)}


def _objective(name: str, facts: Facts) -> float | None:
    if name in ("selection", "heldout_accuracy", "mean"):
        return facts[name]["mean"]
    if name in facts["tasks"]:
        return facts["tasks"][name]["mean"]
    return over_seeds([run["selection_tasks"].get(name) for run in facts["runs"].values()])["mean"]
