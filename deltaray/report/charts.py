"""Plotly figures as plain dictionaries.

A colour is written `@name` and stands for the CSS variable `--name`: the page fills it in, so one style sheet
themes text and charts alike, and a change between light and dark only redraws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .format import Scale, count, significant
from .model import Evaluations, Measure, Model, Pairing, Run, Tokens

Trace = dict[str, Any]

COLOURS = 8
"""Distinct colours of the style sheet, `--c1` to `--c8`; more names start over."""
POINTS = 500
"""Points of one curve; longer runs are averaged in equal stretches."""
BINS = 40
SYMBOLS = {"student": "circle", "untouched": "diamond", "teacher": "square"}
CURVES = (
    ("loss", "Loss", (("loss", "solid", ""),)),
    ("margin", "Reward margin", (("rewards_margin", "solid", ""),)),
    ("accuracy", "Reward accuracy", (("rewards_accuracy", "solid", ""),)),
    ("logps", "Log-probability per token", (("logps_chosen", "solid", "chosen"), ("logps_rejected", "dot", "rejected"))),
)
"""Chart id, title, and its metrics with dash style and a word that tells them apart."""


@dataclass(frozen=True)
class Chart:
    """One figure: `alt` says in words what it shows, `height` is in CSS pixels, `kind` steers the page's controls."""

    id: str
    title: str
    alt: str
    height: int
    kind: str
    data: list[Trace]
    layout: dict[str, Any]


def colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of each trained student, the same in every chart of the page."""
    return {name: f"@c{position % COLOURS + 1}" for position, name in enumerate(dict.fromkeys(names))}


def score_charts(evaluations: Evaluations, palette: dict[str, str]) -> list[Chart]:
    """One dot chart per task, and one of the mean when there are several tasks."""
    models = ordered(evaluations)
    tasks = (["mean"] if len(evaluations.tasks) > 1 else []) + list(evaluations.tasks)
    scale, span = Scale.of(evaluations), _span(evaluations)
    return [_score_chart(f"score-{i}", task, models, scale, span, palette) for i, task in enumerate(tasks)]


def ordered(evaluations: Evaluations) -> list[Model]:
    """Trained students by mean, then the untouched one, then the teachers."""
    rank = {"student": 0, "untouched": 1, "teacher": 2}
    return sorted(evaluations.models, key=lambda model: (rank.get(model.role, 3), -(model.mean.mean or 0.0), model.name))


def measure_of(model: Model, task: str) -> Measure:
    """A model's score on a task, or its mean."""
    return model.mean if task == "mean" else model.tasks.get(task, Measure())


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
    data = [_length_bars(side, lengths, starts, width, top) for side, lengths in sides]
    layout = _layout("tokens", "share of answers") | {"barmode": "overlay", "bargap": 0.06}
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return Chart(f"length-{position}", pairing.name, _length_alt(pairing), 220, "length", data, layout)


def _layout(x_title: str, y_title: str) -> dict[str, Any]:
    """What all figures share: quiet axes, no legend of Plotly's (the page has its own), no fixed width."""
    axis = {"gridcolor": "@grid", "zerolinecolor": "@axis", "linecolor": "@axis", "tickcolor": "@axis",
            "automargin": True, "fixedrange": True, "ticks": ""}  # fmt: skip
    return {
        "autosize": True,
        "showlegend": False,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@muted", "size": 12},
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@axis", "font": {"color": "@ink"}},
        "xaxis": axis | {"title": {"text": x_title, "standoff": 6}},
        "yaxis": axis | {"title": {"text": y_title, "standoff": 6}},
    }


def _span(evaluations: Evaluations) -> list[float]:
    """One horizontal range for all score charts, with room for the value labels."""
    ends = [
        (measure.mean - (measure.stderr or 0.0), measure.mean + (measure.stderr or 0.0))
        for model in evaluations.models
        for measure in [*model.tasks.values(), model.mean]
        if measure.mean is not None
    ]
    low, high = (min(end[0] for end in ends), max(end[1] for end in ends)) if ends else (0.0, 1.0)
    room = (high - low) or 0.1
    return [max(low - 0.08 * room, 0.0) if low >= 0 else low - 0.08 * room, high + 0.3 * room]


def _score_chart(
    id: str, task: str, models: list[Model], scale: Scale, span: list[float], palette: dict[str, str]
) -> Chart:
    shown = [(model, measure_of(model, task)) for model in reversed(models)]
    data = [_score_dot(model, measure, scale, palette) for model, measure in shown if measure.mean is not None]
    seeds = [_seed_dots(model, measure, palette) for model, measure in shown if len(measure.values) > 1]
    layout = _layout("", "")
    layout["xaxis"] |= {"range": span, "tickformat": ".0%" if scale.percent else "", "nticks": 6, "zeroline": False}
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": [model.name for model, _ in shown],
                        "showgrid": True, "tickfont": {"color": "@ink", "size": 13}}  # fmt: skip
    layout["shapes"] = [
        _reference(measure.mean) for model, measure in shown if model.role == "untouched" and measure.mean is not None
    ]
    words = "; ".join(f"{m.name} {_with_error(measure, scale)}" for m, measure in reversed(shown))
    title = "Mean of all tasks" if task == "mean" else task
    return Chart(id, title, f"Scores, {title}: {words}.", 60 + 34 * len(shown), "score", seeds + data, layout)


def _with_error(measure: Measure, scale: Scale) -> str:
    error = f" ± {scale.digits(measure.stderr)}" if measure.stderr is not None else ""
    return scale.score(measure.mean) + error


def _score_dot(model: Model, measure: Measure, scale: Scale, palette: dict[str, str]) -> Trace:
    """One model: symbol by role, colour by name for trained students, its value written behind the error bar."""
    colour = palette.get(model.name, "@c1") if model.role == "student" else "@ink" if model.role == "untouched" else "@muted"
    size = f", n = {count(measure.n)}" if measure.n else ""
    fill = colour if model.role == "student" else "@panel"
    return {
        "type": "scatter", "mode": "markers", "name": model.name,
        "x": [measure.mean], "y": [model.name],
        "error_x": {"type": "data", "array": [measure.stderr or 0.0], "color": colour, "thickness": 2, "width": 5},
        "marker": {"symbol": SYMBOLS.get(model.role, "circle"), "size": 11, "color": fill,
                   "line": {"color": colour, "width": 2}},
        "hovertemplate": f"%{{y}}: {_with_error(measure, scale)}{size}<extra></extra>",
    }  # fmt: skip


def _seed_dots(model: Model, measure: Measure, palette: dict[str, str]) -> Trace:
    """The single seeds behind a mean."""
    colour = palette.get(model.name, "@muted")
    return {
        "type": "scatter", "mode": "markers", "name": model.name, "opacity": 0.4,
        "x": list(measure.values), "y": [model.name] * len(measure.values),
        "marker": {"symbol": "line-ns-open", "size": 9, "color": colour, "line": {"width": 1.5}},
        "hovertemplate": "%{y}, one seed: %{x}<extra></extra>",
    }  # fmt: skip


def _reference(value: float) -> dict[str, Any]:
    """A line at the untouched student, which training is meant to raise."""
    return {"type": "line", "x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
            "line": {"color": "@axis", "width": 1.5, "dash": "dot"}}  # fmt: skip


def _curve_chart(
    key: str, title: str, parts: Sequence[tuple[str, str, str]], runs: Sequence[Run], palette: dict[str, str]
) -> Chart:
    data = [_curve(run, metric, dash, word, palette) for run in runs for metric, dash, word in parts]
    words = "; ".join(_course(run, metric, word) for run in runs for metric, _, word in parts)
    layout = _layout("optimizer step", "")
    layout["xaxis"] |= {"fixedrange": False, "rangemode": "tozero"}
    if key == "accuracy":
        layout["yaxis"] |= {"tickformat": ".0%"}
    drawn = [trace for trace in data if trace["x"]]
    return Chart(f"curve-{key}", title, f"{title} over optimizer steps. {words}.", 260, "curve", drawn, layout)


def _course(run: Run, metric: str, word: str) -> str:
    first = next((value for value in run.column(metric) if value is not None), None)
    name = f"{run.name} {word}".strip()
    return f"{name}: not logged" if first is None else f"{name}: {significant(first)} to {significant(run.last(metric))}"


def _curve(run: Run, metric: str, dash: str, word: str, palette: dict[str, str]) -> Trace:
    """One line; `meta` tells the page which button switches it."""
    points = [(s, v) for s, v in zip(run.column("step"), run.column(metric), strict=True) if v is not None and s is not None]
    steps, values = _thinned(points)
    name = f"{run.name} {word}".strip()
    return {
        "type": "scatter", "mode": "lines" if len(points) > 1 else "markers", "name": name, "meta": run.group,
        "x": steps, "y": values, "line": {"color": palette.get(run.group, "@c1"), "width": 1.8, "dash": dash},
        "opacity": 1.0 if run.seed in (None, 0) else 0.6,
        "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
    }  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most POINTS points, each the mean of an equal stretch."""
    if len(points) > POINTS:
        stretches = np.array_split(np.array(points), POINTS)
        points = [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in stretches]
    return [step for step, _ in points], [float(f"{value:.5g}") for _, value in points]


def _length_bars(side: str, lengths: Tokens, starts: Tokens, width: int, top: int) -> Trace:
    """Shares per bin of `width` tokens; what is longer than `top` counts in the last bin."""
    counts = np.bincount(np.minimum(lengths, top) // width, minlength=len(starts)) if lengths.size else np.zeros(len(starts))
    labels = [_bin_label(int(start), width, top, int(lengths.max(initial=0))) for start in starts]
    return {
        "type": "bar", "name": side, "x": (starts + (width - 1) / 2).tolist(), "width": width * 0.94,
        "y": [round(float(value), 5) for value in counts / max(lengths.size, 1)],
        "customdata": labels, "opacity": 0.62, "marker": {"color": f"@{side}", "line": {"color": f"@{side}", "width": 1}},
        "hovertemplate": "%{customdata} tokens: %{y:.1%}<extra>%{fullData.name}</extra>",
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
