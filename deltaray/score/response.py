"""What a scorer is given and what it gives."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from deltaray.failures import ROW_WIDTH, reason_of

SHARES = ("exact_match", "numeric", "token_f1", "multiple_choice", "json", "refusal", "python_tests", "ifeval")
"""Kinds of scorers whose scores go from 0 to 1."""


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

    def within(self, low: float = -math.inf, high: float = math.inf) -> "Score":
        """The score itself, or none where its value is not a finite number on the scale."""
        if self.value is None or (math.isfinite(self.value) and low <= self.value <= high):
            return self
        wrong = f"{self.value} is outside its scale, {low:g} to {high:g}"
        wrong = wrong if math.isfinite(self.value) else f"{self.value} is not a finite number"
        return replace(self, value=None, note=f"{SCORER_FAILED}: {wrong}")

    def row(self) -> dict[str, Any]:
        """The columns of `contracts.SCORES` besides the key; what is not a finite number becomes null."""
        parts = [(_stored(name), float(value)) for name, value in self.parts.items() if math.isfinite(value)]
        note = None if self.note is None else _stored(self.note)
        if self.value is not None and not math.isfinite(self.value):
            return {"score": None, "note": "not a finite number", "parts": parts}
        return {"score": None if self.value is None else float(self.value), "note": note, "parts": parts}


ScoreFunction = Callable[[Response], Score]

SCORER_FAILED, JUDGE_FAILED, UNPARSABLE = "scorer failed", "judge failed", "unparsable"
"""Kinds of notes of responses that a scorer should have scored and has not."""
FAILED = (SCORER_FAILED, JUDGE_FAILED)
NOT_ASKED = ("failed response", "other source", "not drawn", "nothing to compare with", "compared with itself")
"""Kinds of notes of responses that were not to be scored."""


def scored(function: ScoreFunction, response: Response) -> Score:
    """The function's score, or no score and what it raised: one response never ends a stage."""
    try:
        score = function(response).within()
        score.row()
    except BaseException as error:
        return unscored(error)
    return score


def scale_of(spec: dict[str, Any]) -> tuple[float, float]:
    """The least and the highest score that a scorer can give, from its section."""
    if spec["kind"] in SHARES or (spec["kind"] == "judge" and spec.get("against") is not None):
        return 0.0, 1.0
    return (1.0, 5.0) if spec["kind"] == "judge" else (-math.inf, math.inf)


def _stored(text: str) -> str:
    """One short line that can be stored."""
    return " ".join(text.split())[:ROW_WIDTH].encode("utf-8", "replace").decode()


def unscored(error: BaseException, kind: str = SCORER_FAILED) -> Score:
    """No score, and why; raises the error again where it concerns more than a response."""
    return Score(None, f"{kind}: {reason_of(error)}")


UNANSWERED = Score(None, "no answer to compare with")
