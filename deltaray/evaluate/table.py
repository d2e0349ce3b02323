"""The results as a terminal shows them. Pure: summary in, text out."""

from typing import Any

from rich.table import Table


def result_table(summary: dict[str, Any]) -> Table:
    """One row per model, best mean first; each value with its standard error, in per cent."""
    table = Table(title=_title(summary), title_justify="left")
    for column in ("model", "role", *summary["tasks"], "mean"):
        table.add_column(column, justify="left" if column in ("model", "role") else "right")
    ranked = sorted(summary["names"].items(), key=lambda entry: -entry[1]["mean"]["mean"])
    for name, entry in ranked:
        tasks = [_value(entry["tasks"][task]) for task in summary["tasks"]]
        table.add_row(name, entry["role"], *tasks, _value(entry["mean"]))
    return table


def _title(summary: dict[str, Any]) -> str:
    seeds = len(summary["seeds"])
    return "per cent, ± standard error " + (f"over {seeds} seeds" if seeds > 1 else "over prompts")


def _value(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['stderr']:.1f}"


def claims_text(summary: dict[str, Any]) -> list[str]:
    """One line per claim: whether it holds, the difference in points and its interval."""
    return [
        f"{'holds' if claim['holds'] else 'DOES NOT HOLD'}: {claim['better']} > {claim['worse']} by "
        f"{100 * claim['difference']:.1f} points [{100 * claim['low']:.1f}, {100 * claim['high']:.1f}] "
        f"({claim['method']})"
        for claim in summary["comparisons"]
    ]
