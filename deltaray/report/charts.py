"""Plotly figures as plain dictionaries.

A colour is written `@name` and stands for the CSS variable `--name`: the page fills it in, so one style sheet
themes text and charts alike, and a change between light and dark only redraws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .format import Scale, count
from .model import Evaluations, Measure, Model

Trace = dict[str, Any]

COLOURS = 8
"""Distinct colours of the style sheet, `--c1` to `--c8`; more names start over."""
SYMBOLS = {"student": "circle", "untouched": "diamond", "teacher": "square"}


@dataclass(frozen=True)
class Chart:
    """One figure: `alt` says what it shows, `height` is in CSS pixels, `kind` steers the page's controls."""

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

    def place(model: Model) -> tuple[int, float, str]:
        return rank.get(model.role, 3), -(model.mean.mean or 0.0), model.name

    return sorted(evaluations.models, key=place)


def measure_of(model: Model, task: str) -> Measure:
    """A model's score on a task, or its mean."""
    return model.mean if task == "mean" else model.tasks.get(task, Measure())


def frame(x_title: str, y_title: str) -> dict[str, Any]:
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
        "xaxis": axis | ({"title": {"text": x_title, "standoff": 6}} if x_title else {}),
        "yaxis": axis | ({"title": {"text": y_title, "standoff": 6}} if y_title else {}),
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
    return [max(low - 0.08 * room, 0.0) if low >= 0 else low - 0.08 * room, high + 0.22 * room]


def _score_chart(
    id: str, task: str, models: list[Model], scale: Scale, span: list[float], palette: dict[str, str]
) -> Chart:
    """Models from top to bottom; one without a value on this task keeps its empty line."""
    names = [model.name for model in reversed(models)]
    shown = [(m, measure) for m in reversed(models) if (measure := measure_of(m, task)).mean is not None]
    data = [_seed_dots(m, measure, palette) for m, measure in shown if len(measure.values) > 1]
    data += [_score_dot(m, measure, scale, palette) for m, measure in shown]
    layout = frame("", "")
    layout["xaxis"] |= {"range": span, "nticks": 6, "zeroline": False}
    layout["xaxis"]["tickformat"] = ".0%" if scale.percent else ""
    layout["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": names}
    layout["yaxis"] |= {"range": [-0.6, len(names) - 0.4], "tickfont": {"color": "@ink", "size": 13}}
    layout["shapes"] = [_reference(measure.mean) for m, measure in shown if m.role == "untouched"]
    layout["annotations"] = [_value_label(m, measure, scale) for m, measure in shown]
    words = "; ".join(f"{m.name} {_with_error(measure, scale)}" for m, measure in reversed(shown))
    title = "Mean of all tasks" if task == "mean" else task
    return Chart(id, title, f"Scores, {title}: {words}.", 44 + 30 * len(names), "score", data, layout)


def _value_label(model: Model, measure: Measure, scale: Scale) -> dict[str, Any]:
    """The value in figures, right of the error bar."""
    place = (measure.mean or 0.0) + (measure.stderr or 0.0)
    style = {"showarrow": False, "xanchor": "left", "xshift": 8, "font": {"color": "@ink", "size": 12}}
    return {"x": place, "y": model.name, "text": scale.digits(measure.mean), **style}


def _with_error(measure: Measure, scale: Scale) -> str:
    error = f" ± {scale.digits(measure.stderr)}" if measure.stderr is not None else ""
    return scale.score(measure.mean) + error


def _colour(model: Model, palette: dict[str, str]) -> str:
    """Trained students have the colour of their name; the others are told apart by ink and symbol."""
    if model.role == "student":
        return palette.get(model.name, "@c1")
    return "@ink" if model.role == "untouched" else "@muted"


def _score_dot(model: Model, measure: Measure, scale: Scale, palette: dict[str, str]) -> Trace:
    """One model with its error bar: the symbol tells the role, filled means trained here."""
    colour = _colour(model, palette)
    size = f", n = {count(measure.n)}" if measure.n else ""
    fill = colour if model.role == "student" else "@panel"
    return {
        "type": "scatter", "mode": "markers", "name": model.name,
        "x": [measure.mean], "y": [model.name],
        "error_x": {"type": "data", "array": [measure.stderr or 0.0], "color": colour, "thickness": 2,
                    "width": 6},
        "marker": {"symbol": SYMBOLS.get(model.role, "circle"), "size": 7, "color": fill,
                   "line": {"color": colour, "width": 1.8}},
        "hovertemplate": f"%{{y}}: {_with_error(measure, scale)}{size}<extra></extra>",
    }  # fmt: skip


def _seed_dots(model: Model, measure: Measure, palette: dict[str, str]) -> Trace:
    """The single seeds behind a mean."""
    colour = _colour(model, palette)
    return {
        "type": "scatter", "mode": "markers", "name": model.name, "opacity": 0.4,
        "x": list(measure.values), "y": [model.name] * len(measure.values),
        "marker": {"symbol": "line-ns-open", "size": 9, "color": colour, "line": {"width": 1.5}},
        "hovertemplate": "%{y}, one seed: %{x}<extra></extra>",
    }  # fmt: skip


def _reference(value: float | None) -> dict[str, Any]:
    """A line at the untouched student, which training is meant to raise."""
    return {"type": "line", "x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
            "line": {"color": "@axis", "width": 1.5, "dash": "dot"}}  # fmt: skip
