"""IFEval: verifiable instructions, checked by the lm-eval package's own checkers, with limits on each response."""

import json
from importlib.util import find_spec
from typing import Any

from deltaray.errors import UserError
from deltaray.recipe.scorers import IfEval
from deltaray.score.response import UNANSWERED, Response, Score, ScoreFunction
from deltaray.untrusted import limited

SECONDS = 5.0
"""Of computing for one response; an essay takes a hundredth of one."""
PACKAGES = ("langdetect", "lm_eval.tasks.ifeval.utils")


def ifeval_scorer(spec: IfEval) -> ScoreFunction:
    """Raises UserError if lm-eval is not installed."""
    if (lacking := _lacking()) is not None:
        raise UserError(f"a scorer of kind ifeval needs `pip install deltaray[ifeval]`: {lacking}")

    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        asked = _asked(response)
        if asked is None:
            return Score(None, "the answer lists no instructions: write {instruction_id_list, kwargs}")
        followed = limited("deltaray.untrusted.instructions", SECONDS).call("followed", *asked, response.text)
        if isinstance(followed, str):
            return Score(None, followed)
        parts = {"followed": float(sum(followed)), "instructions": float(len(followed))}
        return Score(sum(followed) / len(followed), parts=parts)

    return function


def _lacking() -> str | None:
    """Which package is not there; they are imported in the process that checks."""
    try:
        lacking = [name for name in PACKAGES if find_spec(name) is None]
    except ImportError as error:
        return str(error)
    return f"no {lacking[0]}" if lacking else None


def _asked(response: Response) -> tuple[list[str], list[dict[str, Any]], str] | None:
    """(ids of instructions, arguments of each, the prompt)."""
    try:
        value = json.loads(response.answer or "")
        ids, kwargs = value["instruction_id_list"], value.get("kwargs") or [{} for _ in value["instruction_id_list"]]
        good = ids and len(ids) == len(kwargs) and all(isinstance(item, dict) for item in kwargs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    prompt = response.messages[-1]["content"] if response.messages else ""
    return (ids, kwargs, prompt) if good else None
