"""Verifiers that compare a response with the prompt's answer. Pure: text and answer in, a `Score` out."""

import json
from collections import Counter
from fractions import Fraction
from string import punctuation
from typing import Any

from deltaray.recipe.scorers import ExactMatch, Json, MultipleChoice, Numeric, Refusal, TokenF1
from deltaray.score.answers import fenced_blocks, final_letter, final_number
from deltaray.score.response import UNANSWERED, Response, Score, ScoreFunction
from deltaray.score.surface import is_refusal


def exact_match(text: str, answer: str | None) -> float | None:
    """1.0 if the response is the answer (white space around both ignored), else 0.0; None without an answer."""
    if answer is None:
        return None
    return float(text.strip() == answer.strip())


def exact_match_scorer(spec: ExactMatch) -> ScoreFunction:
    def function(response: Response) -> Score:
        return UNANSWERED if response.answer is None else Score(exact_match(response.text, response.answer))

    return function


def numeric_scorer(spec: Numeric) -> ScoreFunction:
    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        wanted, found = final_number(response.answer), final_number(response.text)
        if wanted is None:
            return Score(None, "the answer holds no number")
        if found is None:
            return Score(0.0, "no number")
        return Score(float(_same(*found, *wanted, Fraction(spec.tolerance))))

    return function


def _same(found: Fraction, found_percent: bool, wanted: Fraction, wanted_percent: bool, tolerance: Fraction) -> bool:
    """Whether two numbers agree; where one side alone says `%`, 50 % may be written 50 or 0.5."""
    forms = {found}
    if found_percent and not wanted_percent:
        forms.add(found / 100)
    if wanted_percent and not found_percent:
        forms.add(found * 100)
    return any(abs(form - wanted) <= tolerance * max(abs(form), abs(wanted)) for form in forms)


def multiple_choice_scorer(spec: MultipleChoice) -> ScoreFunction:
    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        wanted = final_letter(response.answer) or final_letter(f"Answer: {response.answer}")
        if wanted is None:
            return Score(None, "the answer is not a letter A to J")
        found = final_letter(response.text)
        return Score(0.0, "no choice") if found is None else Score(float(found == wanted))

    return function


def json_scorer(spec: Json) -> ScoreFunction:
    def function(response: Response) -> Score:
        blocks = fenced_blocks(response.text)
        text = blocks[0][1] if len(blocks) == 1 and blocks[0][0] in ("", "json") else response.text
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return Score(0.0, "not JSON")
        if spec.keys and not (isinstance(value, dict) and value.keys() >= set(spec.keys)):
            return Score(0.0, "keys are missing")
        return Score(1.0)

    return function


def refusal_scorer(spec: Refusal) -> ScoreFunction:
    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        wanted = response.answer.strip().lower()
        if wanted not in ("refuse", "comply"):
            return Score(None, "the answer is neither `refuse` nor `comply`")
        return Score(float(is_refusal(response.text) == (wanted == "refuse")))

    return function


def token_f1_scorer(spec: TokenF1) -> ScoreFunction:
    def function(response: Response) -> Score:
        value = token_f1(response.text, response.answer)
        return UNANSWERED if value is None else Score(value)

    return function


def token_f1(text: str, answer: str | None) -> float | None:
    """The F1 of shared words, SQuAD's measure (1606.05250, section 6.1), the best over a JSON list of answers.

    Compared is what stands in the last <answer>…</answer> of the text, or else all of it; case, punctuation and
    articles do not count.
    """
    if answer is None:
        return None
    given = _words(text.rpartition("<answer>")[2].partition("</answer>")[0])
    return max((_f1(given, _words(each)) for each in _answers(answer)), default=None)


def _answers(answer: str) -> list[str]:
    try:
        found = json.loads(answer)
    except ValueError:
        return [answer]
    return [str(each) for each in found] if isinstance(found, list) else [answer]


def _words(text: str) -> Counter[str]:
    bare = "".join(character for character in text.lower() if character not in punctuation)
    return Counter(word for word in bare.split() if word not in ("a", "an", "the"))


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    """Where one side has no words, 1.0 if the other has none either."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
