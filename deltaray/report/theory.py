"""The theory's page: what `theory.json` tells, as tables and charts of the simulation and the closed form."""

from __future__ import annotations

from typing import Any

from .charts import COLOURS, Chart, Trace, frame
from .format import count, share, significant

Record = dict[str, Any]

SETTING = (
    ("dimension", "dimension"),
    ("student", "student's cosine to the truth"),
    ("chosen", "chosen teacher's"),
    ("rejected", "rejected teacher's"),
    ("chosen_overlap", "cosine of the chosen teacher's error to the student's"),
    ("rejected_overlap", "of the rejected teacher's error to the student's"),
    ("teacher_overlap", "of the teachers' errors to each other"),
    ("batch", "inputs per step"),
    ("step_size", "step size"),
    ("steps", "steps"),
    ("draws", "draws"),
    ("seed", "seed"),
)


def setting_rows(record: Record) -> list[tuple[str, str]]:
    """What was asked for: name and value."""
    return [(title, significant(record["setting"][key], 4)) for key, title in SETTING]


def summary_rows(record: Record) -> list[tuple[str, str, str]]:
    """Measure, simulated, closed form."""
    found, form, agreement = record["best"], record["closed_form"], record["agreement"]
    best, quiet = form["best"], form["best_without_noise"]
    low, _, high = found["steps_of_draws"]
    return [
        ("best cosine", f"{found['cosine']:.4f} ± {found['stderr']:.4f}", f"{best['cosine']:.4f}"),
        ("at step (of 9 in 10 draws)", f"{found['step']} ({low} to {high})", _step(best["step"])),
        ("best without noise of batches", "", f"{quiet['cosine']:.4f} at step {_step(quiet['step'])}"),
        ("draws that are better there", share(found["share_improved"]), ""),
        ("draws whose first step gains", "", share(form["chance_of_rising"])),
        ("largest step size that gains", "", _step(form["largest_step_size"])),
        (
            "largest difference of the two curves",
            f"{agreement['largest_difference']:.1e} (standard error {agreement['its_stderr']:.1e})",
            "",
        ),
        ("differences in standard errors, root mean square", f"{agreement['rms_in_stderrs']:.2f}", ""),
    ]


def dimension_rows(record: Record) -> list[tuple[str, ...]]:
    """Dimension, draws whose first step gains (counted, predicted), draws that gain, gain (simulated, predicted)."""
    return [
        (
            count(row["dimension"]),
            f"{share(row['share_rising_at_first'])} ({share(row['chance_of_rising'])})",
            share(row["share_improved"]),
            f"{_signed(row['gain'])} ± {row['gain_stderr']:.4f}",
            _signed(row["closed_form_gain"]),
        )
        for row in record["by_dimension"]
    ]


def _step(value: float | None) -> str:
    return "none" if value is None else significant(value)


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def theory_charts(record: Record) -> list[Chart]:
    """Cosine over steps, over steps by batch, and by dimension who gains."""
    return [_course_chart(record), _batch_chart(record), _dimension_chart(record)]


def _course_chart(record: Record) -> Chart:
    curve, steps = record["curve"], list(range(len(record["curve"]["mass"])))
    band: Trace = {
        "type": "scatter", "mode": "lines", "name": "9 in 10 draws", "fill": "toself", "fillcolor": "@chosen-fill",
        "x": [*steps, *reversed(steps)], "y": [*curve["low"], *reversed(curve["high"])],
        "line": {"width": 0}, "hoverinfo": "skip",
    }  # fmt: skip
    data = [
        band,
        _line("simulated", steps, curve["simulated"], "@chosen", "solid", 3.0),
        _line("closed form", steps, curve["closed_form"], "@rejected", "5px,4px", 1.8),
        _line("without noise of batches", steps, curve["without_noise"], "@muted", "2px,3px", 1.8),
    ]
    form = record["closed_form"]["best"]
    alt = (
        f"Cosine of the student to the truth over steps: from {curve['simulated'][0]:.4f} up to "
        f"{record['best']['cosine']:.4f} at step {record['best']['step']}, {curve['simulated'][-1]:.4f} at the end; "
        f"the closed form has its best, {form['cosine']:.4f}, at step {_step(form['step'])}."
    )
    return Chart("theory-course", "Cosine to the truth", alt, 340, "theory", data, _legend(frame("step", "cosine")))


def _batch_chart(record: Record) -> Chart:
    data = []
    for place, row in enumerate(record["by_batch"]):
        curve, colour = row["curve"], f"@c{place % COLOURS + 1}"
        steps = list(range(len(curve["mass"])))
        name = f"{count(row['batch'])} inputs per step"
        data.append(_line(name, steps, curve["simulated"], colour, "solid", 2.4))
        data.append(_line(name, steps, curve["closed_form"], colour, "5px,4px", 1.2) | {"showlegend": False})
    words = "; ".join(
        f"{count(row['batch'])} inputs per step: best {row['best']['cosine']:.4f} at step {row['best']['step']}"
        for row in record["by_batch"]
    )
    alt = f"Cosine over steps by batch size, simulated and dashed the closed form. {words}."
    return Chart("theory-batch", "By batch size", alt, 340, "theory", data, _legend(frame("step", "cosine")))


def _dimension_chart(record: Record) -> Chart:
    rows = record["by_dimension"]
    dimensions = [row["dimension"] for row in rows]
    series = (
        ("first step gains, counted", "share_rising_at_first", "@chosen", "solid"),
        ("first step gains, closed form", "chance_of_rising", "@rejected", "5px,4px"),
        ("better at the best stopping point", "share_improved", "@c3", "2px,3px"),
    )
    data = [
        _line(name, dimensions, [row[key] for row in rows], colour, dash, 1.8) | {"mode": "lines+markers"}
        for name, key, colour, dash in series
    ]
    words = "; ".join(f"{count(row['dimension'])}: {share(row['share_improved'])}" for row in rows)
    layout = _legend(frame("dimension", "share of draws"))
    layout["xaxis"] |= {"type": "log", "tickvals": dimensions, "ticktext": [count(value) for value in dimensions]}
    layout["yaxis"] |= {"range": [-0.03, 1.03], "tickformat": ".0%"}
    alt = f"Share of draws that gain, by dimension. Better at the best stopping point: {words}."
    return Chart("theory-dimension", "By dimension", alt, 340, "theory", data, layout)


def _line(name: str, x: list[int], y: list[float], colour: str, dash: str, width: float) -> Trace:
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y,
        "line": {"color": colour, "dash": dash, "width": width},
        "hovertemplate": "%{fullData.name}, %{x}: %{y:.4f}<extra></extra>",
    }  # fmt: skip


def _legend(layout: dict[str, Any]) -> dict[str, Any]:
    """With names below the picture."""
    return layout | {"showlegend": True, "legend": {"orientation": "h", "y": -0.2, "font": {"color": "@muted"}}}
