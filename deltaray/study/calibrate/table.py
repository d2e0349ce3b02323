"""A calibration and its prediction, for people and for machines."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from deltaray.study.calibrate.predict import Interval, Prediction
from deltaray.study.calibrate.records import Calibration

COLUMNS = (
    "teacher",
    "responses",
    "failed",
    "prompt tokens",
    "tokens",
    "tokens/s a replica",
    "tokens in all",
    "seconds",
)


def calibration_table(calibration: Calibration, prediction: Prediction) -> Table:
    """A line per teacher: what its responses are like, and what all of them will take beside the pool's start."""
    asked = max(measure.prompts for measure in calibration.teachers.values())
    title = f"generate: measured on {asked:,} prompts, {calibration.date}; 95 % intervals"
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for name, measure in calibration.teachers.items():
        whole, prompt = prediction.teachers[name], measure.prompt_tokens
        table.add_row(
            name,
            f"{whole.rows:,}",
            f"{measure.failed / measure.rows:.1%}",
            "" if prompt is None else f"{prompt.mean:,.1f}",
            f"{measure.tokens.mean:,.1f} ± {1.96 * measure.tokens.error:,.1f}",
            f"{1 / measure.seconds_per_token.mean:,.0f}",
            shown(whole.tokens),
            shown(whole.seconds),
        )
    return table


def prediction_lines(calibration: Calibration, prediction: Prediction) -> Iterator[str]:
    """The pools in the order of their start, then the stage as a whole."""
    for pool, measure in zip(prediction.pools, calibration.pools, strict=True):
        names, replicas = ", ".join(pool.teachers), "1 replica" if pool.replicas == 1 else f"{pool.replicas} replicas"
        yield (
            f"pool of {names}: {replicas}, from second {pool.begins:,.0f}, {shown(pool.seconds)} s, of which "
            f"{measure.start_seconds:,.0f} s until the first token"
        )
    yield f"generate in all: {shown(prediction.seconds)} s, {shown(prediction.tokens)} tokens"
    if prediction.gpu_hours.value:
        cost = "" if prediction.cost is None else f", cost {shown(prediction.cost, 2)}"
        yield f"GPU-hours: {shown(prediction.gpu_hours, 2)}{cost}"


def shown(interval: Interval, digits: int = 0) -> str:
    """`21 (19 … 24)`."""
    return f"{interval.value:,.{digits}f} ({interval.low:,.{digits}f} … {interval.high:,.{digits}f})"


def calibration_json(calibration: Calibration, prediction: Prediction) -> dict[str, Any]:
    return {"calibration": calibration.model_dump(mode="json"), "prediction": prediction.model_dump(mode="json")}
