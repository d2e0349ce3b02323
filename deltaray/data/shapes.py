"""What the JSON files of `out` must look like for their readers (`storage/shape.py`)."""

from deltaray.data.storage.shape import ANY, Shape

ANSWERS: Shape = {"total": int, "failed": int, "cut": int, "unscored": int, "notes": {ANY: int}}
RESULT: Shape = {"value": float, "stderr": float, "n": int, "answers": ANSWERS}
"""One task's entry in `evaluation/<name>.json`."""
EVALUATION: Shape = {"model": str, "tasks": {ANY: RESULT}, "mean": float}
_MEAN: Shape = {"mean": float, "stderr": float}
_INTERVAL: Shape = {"difference": float, "low": float, "high": float}
SUMMARY: Shape = {
    "tasks": [str],
    "seeds": [int],
    "names": {ANY: {"role": str, "tasks": {ANY: _MEAN}, "mean": _MEAN}},
    "claims": [str],
    "comparisons": [{"better": str, "worse": str, "holds": bool, "method": str, **_INTERVAL}],
    "differences": [{"first": str, "second": str, "task": str, "verdict": str, **_INTERVAL}],
    "missing": {ANY: str},
}
FUNNEL: Shape = [{"stage": str, "in": int, "out": int, "removed": int}]
ASKED: Shape = {"samples": (int, dict, list), "requests": int, "truncated": int}
"""What was asked for one task of lm-evaluation-harness."""
