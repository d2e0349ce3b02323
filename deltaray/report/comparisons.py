"""Models against models, and what became of their answers, ready to print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .charts import ordered
from .format import Scale, count, listed
from .model import Answers, Difference, Evaluations, Interval

MARKS = {"better": "▲", "worse": "▼"}
OPPOSITE = {"better": "worse", "worse": "better", "open": "open"}
COUNTED = {
    "failed": "failed",
    "cut": "cut at max_tokens",
    "unscored": "without a score",
    "truncated": "asked with a shortened context",
}


def read_differences(found: Iterable[Mapping[str, Any]]) -> tuple[Difference, ...]:
    """The rows of a summary."""
    return tuple(
        Difference(
            str(row["first"]),
            str(row["second"]),
            str(row["task"]),
            Interval(float(row["difference"]), float(row["low"]), float(row["high"])),
            str(row["verdict"]),
        )
        for row in found
    )


def read_answers(files: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[Answers, ...]:
    """What single results tell of answers, where there is something to tell."""
    rows = []
    for model, tasks in files.items():
        for task, entry in tasks.items():
            found = entry.get("answers") or {}
            counts = {words: int(found.get(key) or 0) for key, words in COUNTED.items()}
            counts |= {str(note): int(number) for note, number in (found.get("notes") or {}).items()}
            counts = {words: number for words, number in counts.items() if number}
            if counts:
                rows.append(Answers(model, task, int(found["total"]), counts))
    return tuple(rows)


def answer_rows(evaluations: Evaluations) -> list[tuple[str, str, str, str]]:
    """Per model and task: both names, how many answers, what is wrong with some of them."""
    return [
        (row.model, row.task, count(row.total), listed([f"{count(it)} {words}" for words, it in row.counts.items()]))
        for row in evaluations.answers
    ]


def marks(evaluations: Evaluations) -> dict[tuple[str, str], str]:
    """▲ or ▼ by (model, task), where the interval of the difference from the untouched student excludes 0."""
    untouched = {model.name for model in evaluations.models if model.role == "untouched"}
    found = {}
    for row in evaluations.differences:
        sides = (row.first, row.second, row.verdict), (row.second, row.first, OPPOSITE.get(row.verdict, "open"))
        for name, other, verdict in sides:
            if other in untouched and verdict in MARKS:
                found[name, row.task] = MARKS[verdict]
    return found


def difference_rows(evaluations: Evaluations) -> list[tuple[str, str, list[tuple[str, str, str, float]]]]:
    """Per pair of models, the one with the higher mean first: names, and for each task (difference, interval, words,
    number to sort by)."""
    order = {model.name: place for place, model in enumerate(ordered(evaluations))}
    scale = Scale.of(evaluations)
    pairs: dict[tuple[str, str], dict[str, tuple[str, str, str, float]]] = {}
    for row in evaluations.differences:
        turned = order.get(row.first, 0) > order.get(row.second, 0)
        names = (row.second, row.first) if turned else (row.first, row.second)
        pairs.setdefault(names, {})[row.task] = _cell(row, turned, names, scale)
    empty = ("", "", "", 0.0)
    columns = ("mean", *evaluations.tasks)
    return [(*names, [cells.get(task, empty) for task in columns]) for names, cells in sorted(pairs.items())]


def _cell(row: Difference, turned: bool, names: tuple[str, str], scale: Scale) -> tuple[str, str, str, float]:
    sign = -1.0 if turned else 1.0
    ends = sorted((sign * row.interval.low, sign * row.interval.high))
    verdict = OPPOSITE.get(row.verdict, "open") if turned else row.verdict
    words = {"better": f"{names[0]} is better", "worse": f"{names[1]} is better"}.get(verdict, "not told apart")
    low, high = map(scale.signed, ends)
    difference = sign * row.interval.difference
    return scale.signed(difference), f"{low} to {high}", words, difference
