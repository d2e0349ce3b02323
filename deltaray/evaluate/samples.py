"""The sample log of a harness task: one row per document, and the task's value and error from these rows alone.

A value is the mean of one number per document, over all documents of a group: it can be recomputed from the log, and
two models can be compared document by document. What the harness itself makes of the task stands beside it as it is.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from deltaray.data.contracts import SAMPLES
from deltaray.data.shapes import RESULT
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.statistics import mean_and_stderr
from deltaray.recipe.evaluation import HarnessTask

Row = dict[str, Any]
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What is kept of the harness's own results."""
NOT_FOUND = "[invalid]"
"""What the harness's regular expressions find where there is no answer."""
CUT = 30_000
"""Characters of a prompt, target or answer that are kept."""


# --- rows -------------------------------------------------------------------------------------------------------
def sample_rows(name: str, found: Mapping[str, Any], spec: HarnessTask) -> tuple[list[Row], str]:
    """(rows of `contracts.SAMPLES`, headline metric as `metric,filter`) from the harness's results. Pure.

    Raises:
        UserError: the task has no such metric, or none that is a number per document.
    """
    logged = {task: _by_document(samples) for task, samples in found["samples"].items()}
    documents = [_metrics(of_one) for by_document in logged.values() for of_one in by_document.values()]
    metric = headline(name, spec, documents, found)
    rows = [
        _row(task, document, of_one, metric)
        for task, by_document in logged.items()
        for document, of_one in by_document.items()
    ]
    return rows, metric


def _by_document(samples: Iterable[Row]) -> dict[int, list[Row]]:
    """What is logged of each document, once per filter."""
    found: dict[int, list[Row]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return found


def _metrics(logged: Sequence[Row]) -> dict[str, float]:
    """The document's numbers by `metric,filter`; lists and tuples, which the harness sums up by itself, are none."""
    numbers = {f"{name},{sample['filter']}": sample[name] for sample in logged for name in sample["metrics"]}
    return {name: float(value) for name, value in numbers.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and math.isfinite(float(value))


def headline(name: str, spec: HarnessTask, documents: Sequence[Mapping[str, float]], found: Mapping[str, Any]) -> str:
    """The metric that is the task's value, among those that every document has. Pure."""
    known = [metric for metric in documents[0] if all(metric in of_one for of_one in documents)] if documents else []
    better = {metric: up for of_task in found["higher_is_better"].values() for metric, up in of_task.items()}
    upwards = [metric for metric in known if better.get(metric.partition(",")[0]) is not False]
    own = [metric for metric in found.get("groups", {}).get(spec.task, {}) if metric in upwards]
    last = [metric for metric in upwards if metric.partition(",")[2] == upwards[-1].partition(",")[2]]
    asked = spec.metric
    matching = own or last
    if asked is not None:
        matching = [metric for metric in reversed(known) if asked in (metric, metric.partition(",")[0])]
    if not matching:
        problem = f"has no metric {asked!r} with" if asked else "has no metric with"
        written = f"write one of: {', '.join(known)}" if known else "leave the task out"
        raise UserError(f"evaluation.harness.tasks.{name}.metric: {problem} one number per document; {written}")
    return matching[0]


def _row(task: str, document: int, logged: Sequence[Row], metric: str) -> Row:
    metrics, first = _metrics(logged), logged[0]
    filtered = next(sample for sample in logged if sample["filter"] == metric.partition(",")[2])
    asked, replies = first["arguments"], first["resps"]
    scored = isinstance(replies[0][0], tuple | list)
    return {
        "sample_id": f"{task}#{document}",
        "task": task,
        "doc_id": document,
        "prompt": str(asked[0][0])[-CUT:],
        "continuations": [str(arguments[1]) for arguments in asked] if scored else [],
        "logprobs": [float(of_one[0][0]) for of_one in replies] if scored else [],
        "answers": [] if scored else [str(answer)[:CUT] for of_one in replies for answer in of_one],
        "filtered": json.dumps(filtered["filtered_resps"], default=str)[:CUT],
        "target": str(first["target"])[:CUT],
        "metrics": list(metrics.items()),
        "value": metrics[metric],
    }


# --- results ----------------------------------------------------------------------------------------------------
def task_summary(
    rows: Sequence[Row], metric: str, found: Mapping[str, Any], replies: Iterable[Mapping[str, Any]], truncated: int
) -> dict[str, Any]:
    """The results beside the log: value and error of every metric, what became of the answers, the harness's own."""
    value, stderr = mean_and_stderr(np.array([row["value"] for row in rows]))
    metrics = [dict(row["metrics"]) for row in rows]
    names = [name for name in metrics[0] if all(name in of_one for of_one in metrics)]
    every = {name: mean_and_stderr(np.array([of_one[name] for of_one in metrics])) for name in names}
    return {
        "metric": metric.removesuffix(",none"),
        "value": value,
        "stderr": stderr,
        "n": len(rows),
        "answers": _answers(rows, list(replies), truncated),
        "metrics": {name: {"value": value, "stderr": stderr} for name, (value, stderr) in every.items()},
        "lm_eval": version("lm_eval"),
        **json.loads(json.dumps({key: found[key] for key in KEPT if key in found}, default=str)),
    }


def _answers(rows: Sequence[Row], replies: Sequence[Mapping[str, Any]], truncated: int) -> dict[str, Any]:
    """As for tasks of one's own; `truncated` requests have lost the beginning of their context."""
    written = [reply for reply in replies if reply["logprob"] is None]
    unparsable = sum(NOT_FOUND in row["filtered"] for row in rows)
    notes = {"nothing found by the task's filter": unparsable} if unparsable else {}
    return {
        "total": len(replies),
        "failed": sum(not reply["text"].strip() for reply in written),
        "cut": sum(reply["finish_reason"] == "length" for reply in written),
        "unscored": 0,
        "truncated": truncated,
        "notes": notes,
    }


def store_samples(store: Store, model: str, task: str, rows: list[Row], summary: dict[str, Any]) -> None:
    """Commits the log, then the results, by which it is complete."""
    place = Store.samples(model, task)
    store.write_table(f"{place}.parquet", pa.Table.from_pylist(rows, schema=SAMPLES), SAMPLES)
    store.write_json(Store.sample_results(model, task), summary)


def is_done(store: Store, model: str, task: str, identity: str) -> bool:
    """Whether a task's results are there, and those of this very model and task."""
    place = Store.sample_results(model, task)
    return store.exists(place) and store.read_json(place, {"identity": str})["identity"] == identity


def harness_result(store: Store, model: str, task: str) -> dict[str, Any]:
    """A harness task's entry in `evaluation/<name>.json`."""
    found = store.read_json(Store.sample_results(model, task), RESULT | {"metric": (str, None)})
    return {key: found[key] for key in ("metric", "value", "stderr", "n", "answers")}


def values_by_document(store: Store, model: str, task: str) -> dict[str, float]:
    """Each document's value."""
    table = store.read_table(f"{Store.samples(model, task)}.parquet", ["sample_id", "value"])
    return dict(sorted(zip(table["sample_id"].to_pylist(), table["value"].to_pylist(), strict=True)))
