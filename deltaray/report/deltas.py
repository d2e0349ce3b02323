"""What the page says about the deltas of a pairing: read from `_delta.json`, as a chart and as rows of tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .charts import Chart, frame
from .format import ABSENT, count, share, significant
from .model import Pairing

SHOWN = 12
"""Rows of what differs, largest effect first."""
EXTREMES = {"largest": "Largest delta", "most_negative": "Most negative delta", "nearest_zero": "Delta nearest zero"}


@dataclass(frozen=True)
class Example:
    """One pair with its texts, clipped: (role, text) of the prompt's turns, and both answers."""

    title: str
    chosen_model: str
    rejected_model: str
    turns: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str


def read_delta(path: Path) -> dict[str, Any]:
    """The content of a `_delta.json`.

    Raises:
        ValueError, KeyError, TypeError: it is damaged or of another kind.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found = Pairing(path.parent.name, delta=content)
    overview(found), difference_rows(found), examples(found), delta_chart(found, 0)
    return content


def overview(pairing: Pairing) -> list[str]:
    """Cells of the pairing's line: scorer, delta, shares, quality, length, levels."""
    found = pairing.delta
    assert found is not None
    delta, levels, gap = found["delta"], found["levels"], found["length_gap"]
    return [
        found["scorer"] or ABSENT,
        _with_interval(delta["mean"]),
        " / ".join(share(delta[name]["value"]) for name in ("below", "at", "above")),
        _with_interval(found["chosen_score"]),
        _with_interval(gap["mean"]),
        _with_interval(gap["correlation"]),
        significant(levels["generator"]),
        significant(levels["selection"]),
        significant(levels["sample_deviation"]),
        significant(levels["ratio"]),
    ]


def _with_interval(estimate: dict[str, float | None]) -> str:
    if estimate["value"] is None:
        return ABSENT
    return f"{significant(estimate['value'])} ({significant(estimate['low'])} to {significant(estimate['high'])})"


def difference_rows(pairing: Pairing) -> list[list[str]]:
    """What differs most between chosen and rejected: name, both means, effect, shares, adjusted p."""
    rows = pairing.delta["differences"] if pairing.delta else []
    return [
        [
            str(row["what"]),
            significant(row["chosen"]),
            significant(row["rejected"]),
            significant(row["effect"]),
            share(row["chosen_higher"]),
            share(row["chosen_lower"]),
            _p(row["p_adjusted"]),
            count(row["prompts"]),
        ]
        for row in rows[:SHOWN]
    ]


def _p(value: float | None) -> str:
    return ABSENT if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def examples(pairing: Pairing) -> list[tuple[str, list[Example]]]:
    """The extremes that there are, by their titles."""
    found = pairing.delta["examples"] if pairing.delta else {}
    groups = [(title, [_example(row) for row in found.get(name, [])]) for name, title in EXTREMES.items()]
    return [(title, rows) for title, rows in groups if rows]


def _example(row: dict[str, Any]) -> Example:
    scores = f"{significant(row['chosen_score'])} against {significant(row['rejected_score'])}"
    return Example(
        f"Delta {significant(row['delta'])} ({scores}), prompt {row['prompt_id']}",
        str(row["chosen_model"]),
        str(row["rejected_model"]),
        tuple((str(turn["role"]), str(turn["content"])) for turn in row["prompt"]),
        str(row["chosen"][0]["content"]),
        str(row["rejected"][0]["content"]),
    )


def delta_chart(pairing: Pairing, position: int) -> Chart:
    """The histogram of the deltas; what lies below zero has the colour of the rejected."""
    assert pairing.delta is not None
    bins = pairing.delta["delta"]["histogram"]
    start, width, counts = float(bins["start"]), float(bins["width"]), [int(value) for value in bins["counts"]]
    starts = [start + width * place for place in range(len(counts))]
    data = {
        "type": "bar", "x": [at + width / 2 for at in starts], "y": counts, "width": width,
        "marker": {"color": ["@rejected" if at < 0 else "@chosen" for at in starts], "line": {"width": 0}},
        "customdata": [f"{significant(at)} to below {significant(at + width)}" for at in starts],
        "hovertemplate": "%{customdata}: %{y:,} pairs<extra></extra>",
    }  # fmt: skip
    layout = frame("delta", "pairs")
    layout["bargap"] = 0
    words = f"mean {_with_interval(pairing.delta['delta']['mean'])}, {count(sum(counts))} pairs"
    return Chart(f"delta-{position}", pairing.name, f"Deltas of {pairing.name}: {words}.", 220, "delta", [data], layout)
