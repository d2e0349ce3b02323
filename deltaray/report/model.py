"""What a report shows, as typed values.

Every field may be missing in a study that is still running, so a reader fills what it finds and a section
without data says which command produces it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


def number(value: object) -> float | None:
    """A finite number, or None for anything else (null, NaN of a diverged step, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Measure:
    """One score: mean over seeds on the task's own scale, its standard error, one value per seed."""

    mean: float | None = None
    stderr: float | None = None
    values: tuple[float, ...] = ()
    n: int | None = None


@dataclass(frozen=True)
class Model:
    """One evaluated model; `role` is student (trained here), untouched or teacher."""

    name: str
    role: str
    tasks: dict[str, Measure]
    mean: Measure


@dataclass(frozen=True)
class Comparison:
    """One claim that was checked: `better` above `worse` on `task`, with an interval of the difference."""

    better: str
    worse: str
    task: str
    difference: float | None
    low: float | None
    high: float | None
    holds: bool | None
    method: str


@dataclass(frozen=True)
class Interval:
    """A difference of two means."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Aggregated:
    """A model in the table of merged deltas."""

    name: str
    kind: str
    deltas: int | None
    mean: Measure
    over_student: Interval | None
    over_best: Interval | None


@dataclass(frozen=True)
class Difference:
    """One model less another on a task or on the mean; `verdict` is better, worse or open, for the first."""

    first: str
    second: str
    task: str
    interval: Interval
    verdict: str


@dataclass(frozen=True)
class Answers:
    """What became of a model's answers to a task, where something is to be told of them."""

    model: str
    task: str
    total: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Evaluations:
    """All scores of a study; `metrics` names the metric of a task where a result file says it."""

    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    models: tuple[Model, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    metrics: dict[str, str] = field(default_factory=dict)
    aggregation: tuple[Aggregated, ...] = ()
    differences: tuple[Difference, ...] = ()
    answers: tuple[Answers, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    """Benchmarks that were asked for and are not evaluated, with the reason."""

    def with_role(self, role: str) -> tuple[Model, ...]:
        """The models of one role, in the order of the summary."""
        return tuple(model for model in self.models if model.role == role)


@dataclass(frozen=True)
class Run:
    """One training run: a column per metric, one entry per optimizer step, None where not logged."""

    name: str
    group: str
    seed: int | None
    columns: dict[str, tuple[float | None, ...]]
    signs: tuple[tuple[int, str], ...] = ()
    """Failure signatures: (step at which it was first seen, name)."""

    def column(self, key: str) -> tuple[float | None, ...]:
        """A metric's values, or nothing but None when the run does not log it."""
        return self.columns.get(key, (None,) * len(self.columns["step"]))

    def last(self, key: str) -> float | None:
        """The last logged value of a metric."""
        return next((value for value in reversed(self.column(key)) if value is not None), None)


@dataclass(frozen=True)
class FunnelStep:
    """One stage between prompts and pairs, in rows."""

    stage: str
    entered: int
    left: int
    removed: int


@dataclass(frozen=True)
class Pairing:
    """The pairs of one pairing.

    `rows` counts what the shards hold; `pairs` is the seeded sample that the page embeds. Lengths are in the
    student's tokens and cover all rows. `chosen_right` is the share of scored chosen answers with score 1, or
    None when the scores are not right/wrong; `rejected_right` likewise. `delta` is the content of `_delta.json`;
    `removed` counts candidates by the rule that removed them, `removed_rows` are some of them with their texts.
    """

    name: str
    rows: int = 0
    funnel: tuple[FunnelStep, ...] = ()
    chosen_lengths: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    rejected_lengths: Tokens = field(default_factory=lambda: np.zeros(0, np.int64))
    binary: bool = False
    chosen_right: float | None = None
    rejected_right: float | None = None
    teachers: tuple[str, ...] = ()
    pairs: tuple[dict[str, Any], ...] = ()
    delta: dict[str, Any] | None = None
    removed: dict[str, int] = field(default_factory=dict)
    removed_rows: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Stage:
    """One executed stage: seconds of wall time, `done` and `skipped` in `unit`s, peak memory in GiB."""

    name: str
    started: float | None
    seconds: float
    done: int | None
    skipped: int | None
    unit: str
    tokens: int | None
    peak_gib: float | None


@dataclass(frozen=True)
class Merge:
    """One merge of adapters: its measures over all matrices, by kind of matrix, and of every matrix.

    None where a measure is not defined: most compare two adapters, sensitivity is gam's alone.
    """

    name: str
    method: str
    adapters: tuple[str, ...]
    reference: str | None
    rank: int
    summary: dict[str, float | None]
    kinds: dict[str, dict[str, float | None]]
    matrices: dict[str, dict[str, float | None]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Exploration:
    """The trials' records, and the landscape once it has been drawn."""

    trials: tuple[dict[str, Any], ...] = ()
    landscape: dict[str, Any] | None = None

    @property
    def states(self) -> str:
        """`18 finished, 2 failed`."""
        names = [trial["state"] for trial in self.trials]
        return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))

    @property
    def unfinished(self) -> list[tuple[str, str, str]]:
        """(trial, state, reason) of those that came to nothing."""
        return [
            (trial["name"], trial["state"], trial["reason"] or "")
            for trial in self.trials
            if trial["state"] in ("failed", "stopped")
        ]


@dataclass(frozen=True)
class Study:
    """Everything found under an output folder; `notes` are sentences about files that could not be read."""

    out: Path
    name: str
    recipe: str | None
    evaluations: Evaluations
    runs: tuple[Run, ...]
    pairings: tuple[Pairing, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    merges: tuple[Merge, ...] = ()
    exploration: Exploration | None = None
