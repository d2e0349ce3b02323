"""IFEval: verifiable instructions, checked by the lm-eval package's own checkers."""

import json
from dataclasses import dataclass
from typing import Any

from deltaray.errors import UserError
from deltaray.recipe.scorers import IfEval
from deltaray.runtime.failures import reason_of
from deltaray.score.response import UNANSWERED, Response, Score, ScoreFunction


@dataclass(frozen=True)
class _Example:
    """What lm-eval's checker asks for."""

    key: int
    instruction_id_list: list[str]
    prompt: str
    kwargs: list[dict[str, Any]]


def ifeval_scorer(spec: IfEval) -> ScoreFunction:
    """Raises UserError if lm-eval is not installed."""
    try:
        from lm_eval.tasks.ifeval.utils import test_instruction_following_strict as check
    except ImportError as error:
        raise UserError(f"a scorer of kind ifeval needs `pip install deltaray[ifeval]`: {error}") from None

    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        example = _example(response)
        if example is None:
            return Score(None, "the answer lists no instructions: write {instruction_id_list, kwargs}")
        try:
            followed = check(example, response.text).follow_instruction_list
        except LookupError as error:  # an unknown id, or nltk's punkt_tab that cannot be fetched from here
            return Score(None, f"not checkable: {reason_of(error)}")
        except (TypeError, ValueError) as error:
            return Score(None, f"arguments do not fit: {error}")
        parts = {"followed": float(sum(followed)), "instructions": float(len(followed))}
        return Score(sum(followed) / len(followed), parts=parts)

    return function


def _example(response: Response) -> _Example | None:
    try:
        value = json.loads(response.answer or "")
        ids, kwargs = value["instruction_id_list"], value.get("kwargs") or [{} for _ in value["instruction_id_list"]]
        good = ids and len(ids) == len(kwargs) and all(isinstance(item, dict) for item in kwargs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    prompt = response.messages[-1]["content"] if response.messages else ""
    return _Example(0, ids, prompt, kwargs) if good else None
