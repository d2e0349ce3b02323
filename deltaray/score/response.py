"""What a scorer is given and what it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltaray.runtime.failures import reason_of


@dataclass(frozen=True, slots=True)
class Response:
    """One stored response with what its prompt says."""

    teacher: str
    text: str
    answer: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The turns before it, with all that tools add to them."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number on the scorer's scale, or None and why there is none."""

    value: float | None
    note: str | None = None
    """`kind` or `kind: words`; kinds are counted. With a value it says what the value rests on, where that helps."""
    parts: dict[str, float] = field(default_factory=dict)
    """Numbers that the score is made from."""

    def row(self) -> dict[str, Any]:
        """The columns of `contracts.SCORES` besides the key; what is not a finite number becomes null."""
        parts = [(name, float(value)) for name, value in self.parts.items() if math.isfinite(value)]
        if self.value is not None and not math.isfinite(self.value):
            return {"score": None, "note": "not a finite number", "parts": parts}
        return {"score": self.value, "note": self.note, "parts": parts}


ScoreFunction = Callable[[Response], Score]

SCORER_FAILED, JUDGE_FAILED, UNPARSABLE = "scorer failed", "judge failed", "unparsable"
"""Kinds of notes of responses that a scorer should have scored and has not."""
FAILED = (SCORER_FAILED, JUDGE_FAILED)
NOT_ASKED = ("failed response", "other source", "not drawn", "nothing to compare with", "compared with itself")
"""Kinds of notes of responses that were not to be scored."""


def scored(function: ScoreFunction, response: Response) -> Score:
    """The function's score, or no score and what it raised: one response never ends a stage."""
    try:
        score = function(response)
        score.row()
    except BaseException as error:
        return unscored(error)
    return score


def unscored(error: BaseException, kind: str = SCORER_FAILED) -> Score:
    """No score, and why; raises the error again where it concerns more than a response."""
    return Score(None, f"{kind}: {reason_of(error)}")


UNANSWERED = Score(None, "no answer to compare with")
