"""All scorers by the `kind` of the recipe: a section in, a function from a response to its score out.

Two kinds are not such functions, because a model does the work: a judge (`judging.py`) and a reward model
(`rewards.py`). One takes what a data set brought along (`given`).
"""

from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from deltaray.recipe.scorers import Scorer, Size
from deltaray.recipe.study import base_name
from deltaray.score.instructions import ifeval_scorer
from deltaray.score.programs.sandbox import python_tests_scorer
from deltaray.score.response import Response, Score, ScoreFunction
from deltaray.score.surface import surface_scorer
from deltaray.score.verifiers import (
    exact_match_scorer,
    json_scorer,
    multiple_choice_scorer,
    numeric_scorer,
    refusal_scorer,
    token_f1_scorer,
)

_SECTION: TypeAdapter[Any] = TypeAdapter(Scorer)


def size_scorer(spec: Size) -> ScoreFunction:
    def function(response: Response) -> Score:
        size = spec.sizes.get(response.teacher, spec.sizes.get(base_name(response.teacher)))
        return Score(None, "the teacher has no size") if size is None else Score(size)

    return function


SCORERS: dict[str, Callable[[Any], ScoreFunction]] = {
    "size": size_scorer,
    "exact_match": exact_match_scorer,
    "numeric": numeric_scorer,
    "token_f1": token_f1_scorer,
    "multiple_choice": multiple_choice_scorer,
    "json": json_scorer,
    "refusal": refusal_scorer,
    "python_tests": python_tests_scorer,
    "ifeval": ifeval_scorer,
    "surface": surface_scorer,
}


def section_of(spec: dict[str, Any]) -> Any:
    """The recipe's section from what `model_dump` made of it."""
    return _SECTION.validate_python(spec)
