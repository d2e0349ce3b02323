"""Rows of the page's tables, ready to print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .charts import measure_of, ordered
from .format import ABSENT, Scale, count, duration, moment, share, significant
from .model import Evaluations, Pairing, Run, Stage, Study
from .summary import Claim, claims

ROLES = {"student": "trained", "untouched": "untouched", "teacher": "teacher"}


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head."""

    value: str
    label: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar as fractions of its track: where it starts and how wide it is, 0..1."""

    start: float
    width: float


@dataclass(frozen=True)
class ClaimRow:
    """A claim and its interval on a scale that all claims share; `zero` and `point` are positions 0..1."""

    claim: Claim
    zero: float
    point: float | None
    span: Bar | None


@dataclass(frozen=True)
class TimeRow:
    """One kind of stage over all its executions."""

    name: str
    runs: int
    seconds: float
    time: str
    bar: Bar
    share: str
    done: str
    skipped: str
    rate: str
    tokens: str
    peak: str


def tiles(study: Study) -> list[Tile]:
    """The few figures that say how large the study is; absent parts have no tile."""
    found = []
    if study.pairings:
        found.append(Tile(count(sum(pairing.rows for pairing in study.pairings)), "preference pairs"))
    if study.runs:
        found.append(Tile(count(len(study.runs)), "training run" + "s" * (len(study.runs) > 1)))
    if study.evaluations.comparisons:
        holding = sum(claim.verdict == "holds" for claim in claims(study.evaluations))
        found.append(Tile(f"{holding} of {len(study.evaluations.comparisons)}", "claims hold"))
    if study.stages:
        found.append(Tile(duration(sum(stage.seconds for stage in study.stages)), "in all stages"))
    return found


def score_rows(evaluations: Evaluations) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Per model: name, role, one (value, error) per column; the mean first if there are several tasks."""
    scale = Scale.of(evaluations)
    columns = (["mean"] if len(evaluations.tasks) > 1 else []) + list(evaluations.tasks)
    rows = []
    for model in ordered(evaluations):
        found = [measure_of(model, task) for task in columns]
        cells = [(scale.score(measure.mean), scale.digits(measure.stderr)) for measure in found]
        rows.append((model.name, ROLES.get(model.role, model.role), cells))
    return rows


def task_size(evaluations: Evaluations, task: str) -> str:
    """How many questions a task has, where all models agree on it."""
    sizes = {measure_of(model, task).n for model in evaluations.models}
    return f"n = {count(sizes.pop())}" if len(sizes) == 1 and None not in sizes else ""


def claim_rows(evaluations: Evaluations) -> list[ClaimRow]:
    """Claims with positions on one scale that always shows zero."""
    checked = claims(evaluations)
    ends = [0.0] + [
        end for claim in checked for end in (claim.comparison.low, claim.comparison.high) if end is not None
    ]
    low, high = min(ends), max(ends)
    width = (high - low) * 1.12 or 1.0
    origin = low - width * 0.06

    def at(value: float) -> float:
        return round((value - origin) / width, 4)

    return [ClaimRow(claim, at(0.0), *_interval(claim, at)) for claim in checked]


def _interval(claim: Claim, at: Callable[[float], float]) -> tuple[float | None, Bar | None]:
    item = claim.comparison
    if item.difference is None or item.low is None or item.high is None:
        return None, None
    return at(item.difference), Bar(at(item.low), round(at(item.high) - at(item.low), 4))


def run_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Per run: name, steps, last loss, margin, accuracy, both log-probs, median tokens per second."""
    rows = []
    for run in runs:
        speeds = sorted(value for value in run.column("tokens_per_second") if value is not None)
        rows.append(
            [
                run.name,
                count(run.last("step")),
                *(significant(run.last(key)) for key in ("loss", "rewards_margin")),
                share(run.last("rewards_accuracy")),
                *(significant(run.last(key)) for key in ("logps_chosen", "logps_rejected")),
                count(speeds[len(speeds) // 2]) if speeds else ABSENT,
            ]
        )
    return rows


def funnel_bars(pairing: Pairing) -> list[tuple[str, str, str, Bar]]:
    """Per stage: name, rows left, rows removed, and the bar of what is left relative to the prompts."""
    largest = max((step.entered for step in pairing.funnel), default=0) or 1
    return [
        (step.stage, count(step.left), count(step.removed), Bar(0.0, round(min(step.left / largest, 1.0), 4)))
        for step in pairing.funnel
    ]


def time_rows(stages: Sequence[Stage]) -> list[TimeRow]:
    """Stages in the order of their first execution, repeated executions added up."""
    grouped: dict[str, list[Stage]] = {}
    for stage in stages:
        grouped.setdefault(stage.name, []).append(stage)
    total = sum(stage.seconds for stage in stages) or 1.0
    return [_time_row(name, group, total) for name, group in grouped.items()]


def _time_row(name: str, group: list[Stage], total: float) -> TimeRow:
    seconds = sum(stage.seconds for stage in group)
    done = [stage.done for stage in group if stage.done is not None]
    tokens = sum(stage.tokens or 0 for stage in group)
    peaks = [stage.peak_gib for stage in group if stage.peak_gib is not None]
    unit = next((stage.unit for stage in reversed(group) if stage.unit), "")
    return TimeRow(
        name=name,
        runs=len(group),
        seconds=seconds,
        time=duration(seconds),
        bar=Bar(0.0, round(seconds / total, 4)),
        share=share(seconds / total),
        done=f"{count(sum(done))} {unit}".strip() if done else ABSENT,
        skipped=count(group[-1].skipped) if group[-1].skipped else ABSENT,
        rate=f"{significant(sum(done) / seconds)}/s" if sum(done) and seconds else ABSENT,
        tokens=f"{count(tokens / seconds)}/s" if tokens and seconds else ABSENT,
        peak=f"{max(peaks):.2f} GiB" if peaks else ABSENT,
    )


def time_span(stages: Sequence[Stage]) -> str:
    """When the first stage began and the last one ended."""
    known = [(stage.started, stage.started + stage.seconds) for stage in stages if stage.started is not None]
    return f"From {moment(min(known)[0])} to {moment(max(end for _, end in known))}." if known else ""
