"""The results as a terminal shows them. Pure: summary in, text out."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

MARKS = {"better": " ▲", "worse": " ▼", "open": ""}
NOTABLE = 0.01
"""Share of a task's answers from which on it is said what is wrong with them."""


def result_table(summary: dict[str, Any]) -> Table:
    """One row per model, best mean first; each value with its standard error, marked where it differs from the
    untouched student's."""
    table = Table(title=_title(summary), title_justify="left")
    columns = (*summary["tasks"], "mean")
    for column in ("model", "role", *columns):
        table.add_column(column, justify="left" if column in ("model", "role") else "right")
    factors, marks = _factors(summary), _marks(summary)
    ranked = sorted(summary["names"].items(), key=lambda entry: -entry[1]["mean"]["mean"])
    for name, entry in ranked:
        values = {**entry["tasks"], "mean": entry["mean"]}
        cells = [
            _value(values[task], factors[task]) + marks.get((name, task), "") if task in values else ""
            for task in columns
        ]
        table.add_row(name, entry["role"], *cells)
    return table


def _title(summary: dict[str, Any]) -> str:
    seeds = len(summary["seeds"])
    over = f"over {seeds} seeds" if seeds > 1 else "over prompts"
    against = "; ▲ better, ▼ worse than the untouched student" if _marks(summary) else ""
    return f"{'per cent, ' if 100 in _factors(summary).values() else ''}± standard error {over}{against}"


def _factors(summary: dict[str, Any]) -> dict[str, float]:
    """100 for the tasks whose values are shares, else 1."""
    factors = {}
    for task in (*summary["tasks"], "mean"):
        entries = [{**entry["tasks"], "mean": entry["mean"]}.get(task) for entry in summary["names"].values()]
        factors[task] = 100.0 if all(0 <= entry["mean"] <= 1 for entry in entries if entry) else 1.0
    return factors


def _marks(summary: dict[str, Any]) -> dict[tuple[str, str], str]:
    """▲ or ▼ by (model, task), where the interval of its difference from the untouched student excludes 0."""
    untouched = {name for name, entry in summary["names"].items() if entry["role"] == "untouched"}
    found = {}
    for row in summary["differences"]:
        for name, other, verdict in (
            (row["first"], row["second"], row["verdict"]),
            (row["second"], row["first"], OPPOSITE[row["verdict"]]),
        ):
            if other in untouched and MARKS[verdict]:
                found[name, row["task"]] = MARKS[verdict]
    return found


OPPOSITE = {"better": "worse", "worse": "better", "open": "open"}


def _value(value: dict[str, Any], factor: float) -> str:
    return (
        f"{factor * value['mean']:.{1 if factor > 1 else 3}f} ± {factor * value['stderr']:.{1 if factor > 1 else 3}f}"
    )


def claims_text(summary: dict[str, Any]) -> list[str]:
    """One line per claim: whether it holds, the difference in points and its interval."""
    return [
        f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['better']} > {claim['worse']} by "
        f"{100 * claim['difference']:.1f} points [{100 * claim['low']:.1f}, {100 * claim['high']:.1f}] "
        f"({claim['method']})"
        for claim in summary["comparisons"]
    ]


def comparison_table(first: str, second: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """One model against another, a row per task: the difference, its interval, and what may be said."""
    table = Table(title=f"{first} less {second}, 95 % intervals", title_justify="left")
    for column in ("task", "difference", "interval", ""):
        table.add_column(column, justify="left" if column in ("task", "") else "right")
    said = {"better": f"{first} is better", "worse": f"{second} is better", "open": "not told apart"}
    for row in rows:
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        table.add_row(row["task"], f"{row['difference']:+.4f}", interval, said[row["verdict"]])
    return table


def answers_text(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the answers of each (model, task), where that concerns more than a few of them.

    Args:
        results: `evaluation/<name>.json` by name.
    """
    return [
        f"{name} on {task}: of {answers['total']:,} answers {what}"
        for name, result in results.items()
        for task, entry in result["tasks"].items()
        if (what := _trouble(answers := entry["answers"], NOTABLE))
    ]


def _trouble(answers: Mapping[str, Any], least: float = 0.0) -> str:
    """`12 failed, 3 cut at max_tokens, 40 no number`."""
    counted = {"failed": answers["failed"], "cut at max_tokens": answers["cut"], "without a score": answers["unscored"]}
    counted |= {"with a shortened context": answers.get("truncated", 0), **answers["notes"]}
    return ", ".join(f"{count:,} {what}" for what, count in counted.items() if count > least * answers["total"])
