"""What was predicted beside what the generation then took."""

from itertools import accumulate
from typing import Any

import pyarrow.compute as pc

from deltaray.data.store import Store
from deltaray.generate.fingerprint import identity_digest
from deltaray.study.calibrate.predict import Interval, predict
from deltaray.study.calibrate.records import Calibration, Measure, read_calibration


def compare(store: Store) -> list[dict[str, Any]]:
    """Prediction against truth, one row per quantity; empty without a calibration of the teachers that are stored.

    The truth is null as long as it is not known: of tokens until all responses are there, of seconds also if a run of
    the stage did not come to its end (then nothing tells how long it took).

    Returns:
        rows of `what`, `predicted`, `low`, `high` (95 %), `truth` and `off`, the prediction's relative error.
    """
    calibration = read_calibration(store)
    prompts = store.count_rows(Store.prompts)
    if calibration is None or not prompts or not _measured_these(store, calibration):
        return []
    prediction = predict(calibration, prompts)
    tokens = {name: _tokens(store, name, prompts, measure) for name, measure in calibration.teachers.items()}
    rows = sum(teacher.rows for teacher in prediction.teachers.values())
    known = [truth for truth in tokens.values() if truth is not None]
    complete = len(known) == len(tokens)
    return [
        *(_row(f"tokens of {name}", prediction.teachers[name].tokens, truth) for name, truth in tokens.items()),
        _row("tokens", prediction.tokens, sum(known) if complete else None),
        _row("seconds", prediction.seconds, _seconds(store, rows) if complete else None),
    ]


def _row(what: str, predicted: Interval, truth: float | None) -> dict[str, Any]:
    off = None if not truth else round(predicted.value / truth - 1, 4)
    return {
        "what": what,
        "predicted": round(predicted.value, 1),
        "low": round(predicted.low, 1),
        "high": round(predicted.high, 1),
        "truth": truth,
        "off": off,
    }


def _measured_these(store: Store, calibration: Calibration) -> bool:
    """Whether the responses that are stored, or on their way, are those of the teachers that were measured."""
    found = {name: store.definition(Store.responses(name)) for name in calibration.teachers}
    return all(
        definition is not None and identity_digest(definition) == calibration.teachers[name].identity
        for name, definition in found.items()
    )


def _tokens(store: Store, name: str, prompts: int, measure: Measure) -> int | None:
    folder = Store.responses(name)
    if store.count_rows(folder) < prompts * measure.samples:
        return None
    return sum(pc.sum(store.read_table(path, ["tokens"])["tokens"]).as_py() or 0 for path in store.committed(folder))


def _seconds(store: Store, rows: int) -> float | None:
    """Seconds of the runs of the stage that made all the rows, without later attempts at failed ones."""
    path = store.stages
    lines = store.read_lines(path, {"stage": str, "done": int, "seconds": float}) if store.exists(path) else []
    runs = [record for record in lines if record["stage"] == "generate"]
    done = list(accumulate(run["done"] for run in runs))
    return round(sum(run["seconds"] for run in runs[: done.index(rows) + 1]), 1) if rows in done else None
