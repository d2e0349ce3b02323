"""The exploration in the terminal: a row per trial, the best first."""

from typing import Any

from rich.table import Table

from deltaray.data.storage.shape import ANY
from deltaray.data.store import Store

SHOWN = 40
"""Rows; all are in `tuning/trials.csv`."""


def trial_table(store: Store) -> Table:
    """The trials by their objectives; those that came to nothing last, with the reason."""
    rows = store.read_table("tuning/trials.parquet").to_pylist()
    rows.sort(key=lambda row: [-value for value in row["objectives"] or []] or [float("inf")])
    more = f"; {len(rows) - SHOWN} more in tuning/trials.csv" if len(rows) > SHOWN else ""
    table = Table(title=f"trials{more}", title_justify="left")
    for column in ("trial", "state", "delta", "held-out accuracy", "mean", "gain over the untouched", "signs"):
        table.add_column(column, justify="left" if column in ("trial", "state", "signs") else "right")
    for row in rows[:SHOWN]:
        name = f"{row['trial']} *" if row["best"] else row["trial"]
        interval = _interval(row["gain"], row["gain_low"], row["gain_high"])
        spread = f" ± {row['mean_stderr']:.3f}" if row["mean_stderr"] is not None else ""
        state = row["state"] if row["state"] == "finished" else f"{row['state']}: {row['reason'] or ''}"
        numbers = (_number(row["delta"]), _number(row["heldout_accuracy"]), f"{_number(row['mean'])}{spread}")
        table.add_row(name, state, *numbers, interval, row["signatures"])
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None or low is None or high is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def best_line(store: Store) -> str:
    """Where the best student is."""
    if not store.exists("tuning/best.json"):
        return "no trial can be called the best: none was finished with all objectives"
    best: dict[str, Any] = store.read_json("tuning/best.json", {"path": (str, None), "objectives": {ANY: float}})
    values = ", ".join(f"{name} {value:.4g}" for name, value in best["objectives"].items())
    return f"best student: {best['path']} ({values})"
