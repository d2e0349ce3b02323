"""Figures of many values: training curves and answer lengths, thinned so that a page stays small."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .charts import Chart, Trace, frame
from .format import significant
from .model import Pairing, Run, Tokens

POINTS = 500
"""Points of one curve; longer runs are averaged in equal stretches."""
BINS = 40
LOGPS = (("logps_chosen", "solid", "chosen"), ("logps_rejected", "5px,3px", "rejected"))
ACCURACIES = (("rewards_accuracy", "solid", ""), ("heldout_accuracy", "2px,3px", "on held-out pairs"))
CURVES = (
    ("loss", "Loss", (("loss", "solid", ""), ("heldout_loss", "2px,3px", "on held-out pairs"))),
    ("margin", "Reward margin", (("rewards_margin", "solid", ""), ("heldout_margin", "2px,3px", "on held-out pairs"))),
    ("accuracy", "Reward accuracy", ACCURACIES),
    ("logps", "Log-probability per token", LOGPS),
)
"""Chart id, title, and its metrics with dash style and a word that tells them apart."""


def curve_charts(runs: Sequence[Run], palette: dict[str, str]) -> list[Chart]:
    """Loss, margin, accuracy and log-probabilities over the optimizer steps of all runs."""
    return [_curve_chart(key, title, parts, runs, palette) for key, title, parts in CURVES]


def length_chart(pairing: Pairing, position: int) -> Chart:
    """Answer lengths of both sides; the last bin also holds everything longer."""
    both = np.concatenate([pairing.chosen_lengths, pairing.rejected_lengths])
    top = int(np.quantile(both, 0.995)) if both.size else 1
    width = max(1, math.ceil((top + 1) / BINS))
    starts = np.arange(0, top + 1, width)
    sides = (("chosen", pairing.chosen_lengths), ("rejected", pairing.rejected_lengths))
    data = [_length_steps(side, lengths, starts, width, top) for side, lengths in sides]
    layout = frame("tokens", "share of answers")
    layout["xaxis"] |= {"zeroline": False, "range": [0, int(starts[-1]) + width]}
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return Chart(f"length-{position}", pairing.name, _length_alt(pairing), 220, "length", data, layout)


def _curve_chart(
    key: str, title: str, parts: Sequence[tuple[str, str, str]], runs: Sequence[Run], palette: dict[str, str]
) -> Chart:
    data = [_curve(run, metric, dash, word, palette) for run in runs for metric, dash, word in parts]
    shown = [part for part in parts if not part[0].startswith("heldout") or any(run.last(part[0]) for run in runs)]
    words = "; ".join(_course(run, metric, word) for run in runs for metric, _, word in shown)
    alt = f"{title} over optimizer steps. {words}."
    layout = frame("optimizer step", "")
    layout["xaxis"] |= {"fixedrange": False, "rangemode": "tozero", "nticks": 6}
    if key == "accuracy":
        layout["yaxis"] |= {"tickformat": ".0%"}
    drawn = [trace for trace in data if trace["x"]]
    return Chart(f"curve-{key}", title, alt, 260, "curve", drawn, layout)


def _course(run: Run, metric: str, word: str) -> str:
    first = next((value for value in run.column(metric) if value is not None), None)
    name = f"{run.name} {word}".strip()
    if first is None:
        return f"{name}: not logged"
    return f"{name}: {significant(first)} to {significant(run.last(metric))}"


def _curve(run: Run, metric: str, dash: str, word: str, palette: dict[str, str]) -> Trace:
    """One line; `meta` tells the page which button switches it."""
    both = zip(run.column("step"), run.column(metric), strict=True)
    points = [(step, value) for step, value in both if step is not None and value is not None]
    steps, values = _thinned(points)
    name = f"{run.name} {word}".strip()
    return {
        "type": "scatter", "mode": "lines" if len(points) > 1 else "markers", "name": name, "meta": run.group,
        "x": steps, "y": values, "line": {"color": palette.get(run.group, "@c1"), "width": 1.8, "dash": dash},
        "opacity": 1.0 if run.seed in (None, 0) else 0.6,
        "hovertemplate": "%{fullData.name}, step %{x:.0f}: %{y:.4g}<extra></extra>",
    }  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most POINTS points, each the mean of an equal stretch."""
    if len(points) > POINTS:
        stretches = np.array_split(np.array(points), POINTS)
        points = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in stretches]
    return [step for step, _ in points], [float(f"{value:.5g}") for _, value in points]


def _length_steps(side: str, lengths: Tokens, starts: Tokens, width: int, top: int) -> Trace:
    """Shares per bin of `width` tokens; what is longer than `top` counts in the last bin."""
    counts = np.bincount(np.minimum(lengths, top) // width, minlength=len(starts))
    labels = [_bin_label(int(start), width, top, int(lengths.max(initial=0))) for start in starts]
    shares = [round(float(value), 5) for value in counts / max(lengths.size, 1)]
    return {
        "type": "scatter", "mode": "lines", "name": side, "fill": "tozeroy", "fillcolor": f"@{side}-fill",
        "x": [*starts.tolist(), int(starts[-1]) + width], "y": [*shares, 0.0], "customdata": [*labels, ""],
        "line": {"color": f"@{side}", "width": 1.8, "shape": "hv"},
        "hovertemplate": "%{fullData.name}, %{customdata} tokens: %{y:.1%}<extra></extra>",
    }  # fmt: skip


def _bin_label(start: int, width: int, top: int, longest: int) -> str:
    end = start + width - 1
    if end >= top and longest > end:
        return f"{start} and more"
    return str(start) if width == 1 else f"{start} to {end}"


def _length_alt(pairing: Pairing) -> str:
    parts = [
        f"{side} median {np.median(lengths):.0f}, 90 % at most {np.quantile(lengths, 0.9):.0f}"
        for side, lengths in (("chosen", pairing.chosen_lengths), ("rejected", pairing.rejected_lengths))
        if lengths.size
    ]
    return f"Answer lengths in tokens, pairing {pairing.name}: {'; '.join(parts)}."
