"""The exploration as a page shows it: the delta landscape as a chart and in words, and a table of all trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charts import Chart, Trace, frame
from .format import ABSENT, duration, significant
from .model import Exploration

COLUMNS = (
    "Trial", "State", "Settings", "Delta", "Chosen quality", "Held-out accuracy", "Mean", "Gain", "Signs of failure",
    "Time",
)  # fmt: skip
TEXTS = (0, 1, 2, 8)
"""Columns that are words; the others sort as numbers."""
SETTINGS = ("loss", "learning_rate", "beta", "lora", "min_delta", "max_delta", "scorer")


@dataclass(frozen=True)
class Cell:
    """What is shown, and what a column sorts by."""

    text: str
    key: float | str


def read_trial(path: Path) -> dict[str, Any]:
    """A trial's record.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record.setdefault("reason", "")
    trial_cells(record)
    return record


def read_landscape(path: Path) -> dict[str, Any]:
    """The landscape.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["points"]:
        landscape_chart(found)
    return found


# --- the table --------------------------------------------------------------------------------------------------
def trial_rows(exploration: Exploration) -> list[list[Cell]]:
    """A row per trial, the largest gain first."""
    rows = [trial_cells(trial) for trial in exploration.trials]
    return sorted(rows, key=lambda row: row[7].key, reverse=True)


def trial_cells(record: dict[str, Any]) -> list[Cell]:
    """In the order of `COLUMNS`."""
    settings = record["settings"]
    words = [f"{name.replace('_', ' ')} {_word(settings[name])}" for name in SETTINGS if settings[name] is not None]
    gain, spent = record.get("gain") or {}, sum(record.get("seconds", {}).values())
    signs = ", ".join(record.get("signatures", ())).replace("_", " ")
    return [
        Cell(record["name"], record["name"]),
        Cell(record["state"], record["state"]),
        Cell(", ".join(words), ", ".join(words)),
        _measured(record.get("delta")),
        _measured(record.get("quality")),
        _measured(record.get("heldout_accuracy")),
        _measured(record.get("mean")),
        Cell(_with_interval(gain), gain.get("difference", float("-inf"))),
        Cell(signs, signs),
        Cell(duration(spent) if spent else ABSENT, spent),
    ]


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str) else significant(value)


def _measured(found: dict[str, Any] | None) -> Cell:
    value = (found or {}).get("mean")
    error = (found or {}).get("stderr")
    text = significant(value) + (f" ± {significant(error, 2)}" if error is not None else "")
    return Cell(ABSENT if value is None else text, float("-inf") if value is None else value)


def _with_interval(gain: dict[str, Any]) -> str:
    if not gain:
        return ABSENT
    return f"{significant(gain['difference'])} ({significant(gain['low'])} to {significant(gain['high'])})"


# --- the chart --------------------------------------------------------------------------------------------------
def landscape_chart(found: dict[str, Any]) -> Chart:
    """Gain against delta with intervals, coloured by the quality of the chosen answers, and the fitted curve."""
    points = found["points"]
    layout = frame("measured delta of the pairs, on the scorer's scale", "gain over the untouched student")
    layout["xaxis"] |= {"zeroline": True}
    layout["yaxis"] |= {"zeroline": True}
    layout["annotations"] = [_label(point) for point in points if point["outlier"]]
    data = [_curve(found), _markers(points)] if found["curve"] else [_markers(points)]
    if found["bend"] and found["bend"]["bends"]:
        layout["shapes"] = _knee(found["knee"] if found["knee"]["saturates"] else found["bend"])
    alt = f"Delta landscape. {found['summary']}"
    return Chart("landscape", "Gain against delta", alt, 420, "landscape", data, layout)


def _markers(points: Sequence[dict[str, Any]]) -> Trace:
    known = [point["quality"] for point in points if point["quality"] is not None]
    marker: dict[str, Any] = {"size": 11, "line": {"color": "@ink", "width": 1}}
    if len(known) == len(points):
        bar = {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": "@muted"}, "title": {"text": "chosen quality"}}
        marker |= {"color": known, "colorscale": [[0, "@soft"], [1, "@c1"]], "colorbar": bar}
    else:
        marker["color"] = "@c1"
    return {
        "type": "scatter", "mode": "markers", "name": "pairings",
        "x": [point["delta"] for point in points], "y": [point["gain"] for point in points],
        "error_x": _error(points, "delta"), "error_y": _error(points, "gain"), "marker": marker,
        "customdata": [[point["label"], _course(point)] for point in points],
        "hovertemplate": "%{customdata[0]}: delta %{x:.3f}, gain %{y:.3f}<br>%{customdata[1]}<extra></extra>",
    }  # fmt: skip


def _error(points: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """From the value to both ends of its interval."""

    def far(point: dict[str, Any], end: str) -> float:
        return 0.0 if point[f"{what}_{end}"] is None else abs(point[f"{what}_{end}"] - point[what])

    above, below = ([far(point, end) for point in points] for end in ("high", "low"))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "@axis", "width": 3}


def _course(point: dict[str, Any]) -> str:
    changes = [point["chosen_change"], point["rejected_change"]]
    if None in changes:
        return ""
    return "log-prob chosen {}, rejected {} nats".format(*(significant(change) for change in changes))


def _curve(found: dict[str, Any]) -> Trace:
    deltas, curve = [point["delta"] for point in found["points"]], found["curve"]
    knee = curve["knee"]
    places = sorted({min(deltas), max(deltas), *([knee] if knee is not None else [])})
    ends = knee if knee is not None else max(places)
    heights = [curve["level"] + curve["slope"] * min(x, ends) + curve["after"] * max(x - ends, 0) for x in places]
    line = {"color": "@c2", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": "fit", "x": places, "y": heights, "line": line,
            "hoverinfo": "skip"}  # fmt: skip


def _knee(knee: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the curve saturates, or bends, and the interval of that as a band."""
    whole = {"y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    low, high = knee["interval"]
    at = {"type": "line", "x0": knee["knee"], "x1": knee["knee"], "line": {"color": "@c2", "width": 1.5, "dash": "dot"}}
    band = {"type": "rect", "x0": low, "x1": high, "fillcolor": "@soft", "line": {"width": 0}}
    return [band | whole, at | whole]


def _label(point: dict[str, Any]) -> dict[str, Any]:
    style = {"showarrow": False, "xanchor": "left", "xshift": 10, "font": {"color": "@ink", "size": 12}}
    return {"x": point["delta"], "y": point["gain"], "text": point["label"].replace(">", "&gt;"), **style}
