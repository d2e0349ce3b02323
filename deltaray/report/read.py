"""Reads what a report is made of from an output folder."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaray.data.store import Store
from deltaray.recipe.yaml import YamlError, read_yaml

from .deltas import read_delta
from .evaluations import read_evaluations
from .files import attempt, json_of, lines_of, split_seed, whole
from .landscape import read_landscape, read_trial
from .merging import read_merge
from .model import Exploration, FunnelStep, Merge, Pairing, Run, Stage, Study, number
from .pairs import BUDGET, Sample, read_pairing
from .removed import read_removed


def read_study(out: Path, limit: int, seed: int = 0) -> Study:
    """Everything a report needs; at most `limit` pairs per pairing are kept for the page."""
    notes: list[str] = []
    recipe = attempt(out / Store.recipe, lambda path: path.read_text(encoding="utf-8"), None, notes)
    runs = tuple(_runs(out / "training", notes))
    folders = [path for path in sorted((out / "pairs").glob("pairing=*")) if path.is_dir()]
    sample = Sample(limit, BUDGET // max(len(folders), 1), seed)
    pairings = tuple(_pairing(out, folder, sample, notes) for folder in folders)
    teachers = {teacher for pairing in pairings for teacher in pairing.teachers}
    evaluations = read_evaluations(out / "evaluation", teachers, notes)
    stages: tuple[Stage, ...] = attempt(out / Store.stages, _stages, (), notes)
    name = _study_name(recipe) or out.resolve().name
    merges = tuple(_merges(out / "adapters", notes))
    exploration = _exploration(out / "tuning", notes)
    return Study(out, name, recipe, evaluations, runs, pairings, stages, tuple(notes), merges, exploration)


def _pairing(out: Path, folder: Path, sample: Sample, notes: list[str]) -> Pairing:
    """The pairs, what is told of them, and what was removed on the way (a quarter as much text)."""
    funnel: tuple[FunnelStep, ...] = attempt(folder / "_funnel.json", _funnel, (), notes)
    if (folder / "funnel.json").exists():
        notes.append(f"{folder.name} is of an earlier version of deltaray; `deltaray pair` makes its pairs again")
    found = read_pairing(folder, funnel, sample, notes)
    removed = read_removed(out / Store.all_removed / folder.name, sample.characters // 4, notes)
    delta = attempt(folder / "_delta.json", read_delta, None, notes)
    return replace(found, delta=delta, removed=removed.reasons, removed_rows=removed.rows)


def _study_name(recipe: str | None) -> str | None:
    """The recipe's `name`, when it has one."""
    try:
        parsed = read_yaml(recipe or "").value
    except YamlError:
        return None
    name = parsed.get("name") if isinstance(parsed, dict) else None
    return str(name) if name else None


def _funnel(path: Path) -> tuple[FunnelStep, ...]:
    return tuple(
        FunnelStep(str(row["stage"]), int(row["in"]), int(row["out"]), int(row["removed"])) for row in json_of(path)
    )


def _runs(folder: Path, notes: list[str]) -> Iterator[Run]:
    """Every run that has at least one step."""
    for path in sorted(folder.glob("*/metrics.jsonl")):
        run = attempt(path, _run, None, notes)
        if run is not None:
            yield run


def _run(path: Path) -> Run | None:
    """One run; a step that a resumed run repeated counts with its last line."""
    steps: dict[float, dict[str, Any]] = {}
    for row in lines_of(path):
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
        merge = attempt(path, read_merge, None, notes)
        if merge is not None:
            yield merge


def _exploration(folder: Path, notes: list[str]) -> Exploration | None:
    """The trials so far; None where nothing has been explored."""
    trials = [attempt(path, read_trial, None, notes) for path in sorted((folder / "trials").glob("*.json"))]
    found = attempt(folder / "landscape.json", read_landscape, None, notes)
    return Exploration(tuple(trial for trial in trials if trial), found) if any(trials) else None


def _stages(path: Path) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            str(row.get("stage", "unnamed")),
            _moment(row.get("started")),
            number(row.get("seconds")) or 0.0,
            whole(row.get("done")),
            whole(row.get("skipped")),
            str(row.get("unit") or ""),
            whole(row.get("tokens")),
            number(row.get("peak_gib")),
        )
        for row in lines_of(path)
    )


def _moment(value: object) -> float | None:
    """Seconds since the epoch, from a number or an ISO 8601 text (UTC when it names no zone)."""
    if not isinstance(value, str):
        return number(value)
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
