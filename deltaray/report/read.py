"""Reads the small files of an output folder.

A report is also asked for in the middle of a study and after a crash: a missing file is normal, a damaged one
becomes a note on the page, and only the part that it would have fed is absent.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .aggregation import read_aggregation
from .comparisons import read_answers, read_differences
from .deltas import read_delta
from .landscape import Exploration, read_landscape, read_trial
from .merging import read_merge
from .model import Comparison, Evaluations, FunnelStep, Measure, Merge, Model, Pairing, Run, Stage, Study, number
from .pairs import BUDGET, Sample, read_pairing
from .removed import read_removed

Value = TypeVar("Value")

SEED_SUFFIX = re.compile(r"(.+)-seed(\d+)")


def read_study(out: Path, limit: int, seed: int = 0) -> Study:
    """Everything a report needs; at most `limit` pairs per pairing are kept for the page."""
    notes: list[str] = []
    recipe = _attempt(out / "recipe.yaml", lambda path: path.read_text(encoding="utf-8"), None, notes)
    runs = tuple(_runs(out / "training", notes))
    folders = [path for path in sorted((out / "pairs").glob("pairing=*")) if path.is_dir()]
    sample = Sample(limit, BUDGET // max(len(folders), 1), seed)
    pairings = tuple(_pairing(out, folder, sample, notes) for folder in folders)
    teachers = {teacher for pairing in pairings for teacher in pairing.teachers}
    evaluations = _evaluations(out / "evaluation", teachers, notes)
    stages: tuple[Stage, ...] = _attempt(out / ".deltaray" / "stages.jsonl", _stages, (), notes)
    name = _study_name(recipe) or out.resolve().name
    merges = tuple(_merges(out / "adapters", notes))
    exploration = _exploration(out / "tuning", notes)
    return Study(out, name, recipe, evaluations, runs, pairings, stages, tuple(notes), merges, exploration)


def _pairing(out: Path, folder: Path, sample: Sample, notes: list[str]) -> Pairing:
    """The pairs, what is told of them, and what was removed on the way (a quarter as much text)."""
    funnel: tuple[FunnelStep, ...] = _attempt(folder / "funnel.json", _funnel, (), notes)
    found = read_pairing(folder, funnel, sample, notes)
    removed = read_removed(out / ".deltaray" / "removed" / folder.name, sample.characters // 4, notes)
    delta = _attempt(folder / "delta.json", read_delta, None, notes)
    return replace(found, delta=delta, removed=removed.reasons, removed_rows=removed.rows)


def split_seed(name: str) -> tuple[str, int | None]:
    """`delta-seed2` is seed 2 of `delta`; a name without the suffix has no seed."""
    match = SEED_SUFFIX.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def _attempt(path: Path, read: Callable[[Path], Value], missing: Value, notes: list[str]) -> Value:
    """`read(path)`, or `missing` when the file is absent or damaged; damage is noted."""
    if not path.is_file():
        return missing
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read: {error or type(error).__name__}")
        return missing


def _study_name(recipe: str | None) -> str | None:
    """The recipe's `name`, when it has one."""
    try:
        parsed = YAML(typ="safe").load(recipe or "")
    except YAMLError:
        return None
    name = parsed.get("name") if isinstance(parsed, dict) else None
    return str(name) if name else None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a half-written last line is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _funnel(path: Path) -> tuple[FunnelStep, ...]:
    return tuple(
        FunnelStep(str(row["stage"]), int(row["in"]), int(row["out"]), int(row["removed"])) for row in _json(path)
    )


def _runs(folder: Path, notes: list[str]) -> Iterator[Run]:
    """Every run that has at least one step."""
    for path in sorted(folder.glob("*/metrics.jsonl")):
        run = _attempt(path, _run, None, notes)
        if run is not None:
            yield run


def _run(path: Path) -> Run | None:
    """One run; a step that a resumed run repeated counts with its last line."""
    steps: dict[float, dict[str, Any]] = {}
    for row in _lines(path):
        step = number(row.get("step"))
        if step is not None:
            steps[step] = row
    if not steps:
        return None
    rows = [steps[step] for step in sorted(steps)]
    keys = {key for row in rows for key in row}
    columns = {key: tuple(number(row.get(key)) for row in rows) for key in sorted(keys)}
    group, seed = split_seed(path.parent.name)
    signs = [(int(step), str(name)) for step in sorted(steps) for name in steps[step].get("signatures") or ()]
    return Run(path.parent.name, group, seed, columns, tuple(signs))


def _merges(folder: Path, notes: list[str]) -> Iterator[Merge]:
    """Every merged adapter; those that were trained have no such file."""
    for path in sorted(folder.glob("*/merge.json")):
        merge = _attempt(path, read_merge, None, notes)
        if merge is not None:
            yield merge


def _exploration(folder: Path, notes: list[str]) -> Exploration | None:
    """The trials so far; None where nothing has been explored."""
    trials = [_attempt(path, read_trial, None, notes) for path in sorted((folder / "trials").glob("*.json"))]
    found = _attempt(folder / "landscape.json", read_landscape, None, notes)
    return Exploration(tuple(trial for trial in trials if trial), found) if any(trials) else None


def _measure(value: object) -> Measure:
    """A score written as an object of the summary, or as a bare number."""
    if not isinstance(value, dict):
        return Measure(number(value))
    values = tuple(found for item in value.get("values") or () if (found := number(item)) is not None)
    return Measure(number(value.get("mean")), number(value.get("stderr")), values, _count(value.get("n")))


def _evaluations(folder: Path, teachers: set[str], notes: list[str]) -> Evaluations:
    """The summary when there is one, otherwise the single result files put together."""
    files = {
        path.stem: result
        for path in sorted(folder.glob("*.json"))
        if path.stem != "summary" and (result := _attempt(path, _result, None, notes)) is not None
    }
    rows = [(task, row) for tasks in files.values() for task, row in tasks.items()]
    metrics = {task: str(row["metric"]) for task, row in rows if "metric" in row}
    summary = _attempt(folder / "summary.json", lambda path: _summary(path, metrics), None, notes)
    return replace(summary or _collected(files, teachers, metrics), answers=read_answers(files))


def _result(path: Path) -> dict[str, dict[str, Any]]:
    """The tasks of one `evaluation/<name>.json`."""
    return {str(task): dict(row) for task, row in _json(path)["tasks"].items()}


def _summary(path: Path, metrics: dict[str, str]) -> Evaluations:
    content = _json(path)
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
    return Measure(statistics.fmean(values), stderr, values, _count(rows[0].get("n")))


def _stages(path: Path) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            str(row.get("stage", "unnamed")),
            _moment(row.get("started")),
            number(row.get("seconds")) or 0.0,
            _count(row.get("done")),
            _count(row.get("skipped")),
            str(row.get("unit") or ""),
            _count(row.get("tokens")),
            number(row.get("peak_gib")),
        )
        for row in _lines(path)
    )


def _count(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _moment(value: object) -> float | None:
    """Seconds since the epoch, from a number or an ISO 8601 text (UTC when it names no zone)."""
    if not isinstance(value, str):
        return number(value)
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
