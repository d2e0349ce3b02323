"""What the models can do: the summary of an evaluation, or as much of it as single results tell."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from .aggregation import read_aggregation
from .comparisons import read_answers, read_differences
from .files import attempt, json_of, split_seed, whole
from .model import Comparison, Evaluations, Measure, Model, number


def read_evaluations(folder: Path, teachers: set[str], notes: list[str]) -> Evaluations:
    """The summary when there is one, otherwise the single result files put together."""
    files = {
        path.stem: result
        for path in sorted(folder.glob("*.json"))
        if path.stem != "summary" and (result := attempt(path, _result, None, notes)) is not None
    }
    rows = [(task, row) for tasks in files.values() for task, row in tasks.items()]
    metrics = {task: str(row["metric"]) for task, row in rows if "metric" in row}
    summary = attempt(folder / "summary.json", lambda path: _summary(path, metrics), None, notes)
    return replace(summary or _collected(files, teachers, metrics), answers=read_answers(files))


def _result(path: Path) -> dict[str, dict[str, Any]]:
    """The tasks of one `evaluation/<name>.json`."""
    return {str(task): dict(row) for task, row in json_of(path)["tasks"].items()}


def _summary(path: Path, metrics: dict[str, str]) -> Evaluations:
    content = json_of(path)
    models = tuple(
        Model(
            str(name),
            str(entry.get("role") or "student"),
            {str(task): _measure(value) for task, value in entry.get("tasks", {}).items()},
            _measure(entry.get("mean")),
        )
        for name, entry in content["names"].items()
    )
    named = tuple(str(task) for task in content.get("tasks") or ())
    tasks = named or tuple(dict.fromkeys(task for model in models for task in model.tasks))
    comparisons = tuple(_comparison(entry) for entry in content.get("comparisons") or ())
    merged = read_aggregation(content.get("aggregation"))
    differences = read_differences(content.get("differences") or ())
    seeds, missing = tuple(content.get("seeds") or ()), dict(content.get("missing") or {})
    return Evaluations(tasks, seeds, models, comparisons, metrics, merged, differences, missing=missing)


def _comparison(entry: dict[str, Any]) -> Comparison:
    holds = entry.get("holds")
    return Comparison(
        str(entry["better"]),
        str(entry["worse"]),
        str(entry.get("task") or "mean"),
        number(entry.get("difference")),
        number(entry.get("low")),
        number(entry.get("high")),
        holds if isinstance(holds, bool) else None,
        str(entry.get("method") or "method not given"),
    )


def _collected(files: dict[str, dict[str, dict[str, Any]]], teachers: set[str], metrics: dict[str, str]) -> Evaluations:
    """Means per name over the seeds of single result files; roles follow the names of the contract."""
    grouped: dict[str, list[dict[str, dict[str, Any]]]] = {}
    seeds: set[int] = set()
    for name, tasks in files.items():
        group, seed = split_seed(name)
        grouped.setdefault(group, []).append(tasks)
        seeds |= {seed} if seed is not None else set()
    names = tuple(dict.fromkeys(task for tasks in files.values() for task in tasks))
    models = []
    for name, results in grouped.items():
        measures = {task: _over_seeds([row[task] for row in results if task in row]) for task in names}
        known = [measure.mean for measure in measures.values() if measure.mean is not None]
        mean = Measure(statistics.fmean(known)) if len(known) == len(names) and known else Measure()
        role = "untouched" if name == "student" else "teacher" if name in teachers else "student"
        models.append(Model(name, role, measures, mean))
    return Evaluations(names, tuple(sorted(seeds)), tuple(models), (), metrics)


def _over_seeds(rows: list[dict[str, Any]]) -> Measure:
    """One task over seeds: the spread between seeds, or the file's own error when there is one seed."""
    values = tuple(value for row in rows if (value := number(row.get("value"))) is not None)
    if not values:
        return Measure()
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    stderr = number(rows[0].get("stderr")) if spread is None else spread
    return Measure(statistics.fmean(values), stderr, values, whole(rows[0].get("n")))


def _measure(value: object) -> Measure:
    """A score written as an object of the summary, or as a bare number."""
    if not isinstance(value, dict):
        return Measure(number(value))
    values = tuple(found for item in value.get("values") or () if (found := number(item)) is not None)
    return Measure(number(value.get("mean")), number(value.get("stderr")), values, whole(value.get("n")))
