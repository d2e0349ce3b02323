"""What a judge is asked, and what its words mean. Pure; an answer that does not say is never guessed at."""

import json
import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from deltaray.recipe.scorers import Judge
from deltaray.score.response import JUDGE_FAILED, UNPARSABLE, Score

Question = tuple[str, list[dict[str, str]]]
"""(its name, the conversation that is put to the judge)."""

ORDERS = ("first", "second")
"""Where the response stands in a comparison: each is asked once in either place."""

_RATED = """\
You rate one response to a conversation.

<conversation>
{conversation}
</conversation>

<response>
{response}
</response>

What counts is this alone: {question}
Neither length nor style counts for its own sake. Use whole numbers: 1 (very poor), 2 (poor), 3 (acceptable), \
4 (good), 5 (excellent).
Think in a few sentences. Then end with a line of exactly this form:
Rating: <1 to 5>"""

_COMPARED = """\
You compare two responses to a conversation.

<conversation>
{conversation}
</conversation>

<response_A>
{first}
</response_A>

<response_B>
{second}
</response_B>

What counts:
{questions}
Neither length, style nor the order of the responses counts for its own sake.
Think in a few sentences. Then end with a line of exactly this form, where tie means equally good:
Verdict: <A, B or tie>"""

_MARKS = r"[\s*_`\"'\[(<]{0,6}"
_RATING = re.compile(
    rf"rating[\"'*_`\s]{{0,4}}(?:[:=]|\bis\b){_MARKS}([-+]?\d{{1,4}}(?:\.\d{{1,4}})?)([^\n]{{0,20}})", re.IGNORECASE
)
_VERDICT = re.compile(rf"verdict[\"'*_`\s]{{0,4}}(?:[:=]|\bis\b){_MARKS}(a|b|tie)\b([^\n]{{0,20}})", re.IGNORECASE)
_BARE_RATING = re.compile(r"[\s*_`\[(]{0,6}([1-5])[\s*_`\])./5]{0,6}")
_HEDGE = re.compile(r"^[\s*_`\"')\]>]{0,6}(?:(?:to|or|and)\b|[-–,]\s?[\dab]\b|/\s?(?!5\b)[\dab])", re.IGNORECASE)
"""What follows a statement that names more than one: `3-4`, `3 or 4`, `A or B`; `4/5` is one."""


def questions_of(
    spec: Judge, messages: Sequence[dict[str, Any]], text: str, other: str | None = None
) -> Iterator[Question]:
    """All that the judge is asked about one response; `other` is what it is compared with."""
    conversation = "\n\n".join(f"[{turn['role']}]\n{_words(turn)}" for turn in messages)
    if spec.against is None:
        for aspect, question in spec.aspects.items():
            yield aspect, _ask(_RATED.format(conversation=conversation, response=text, question=question))
        return
    looked_at = "\n".join(f"- {question}" for question in spec.aspects.values())
    for order in ORDERS:
        first, second = (text, other or "") if order == "first" else (other or "", text)
        yield (
            order,
            _ask(_COMPARED.format(conversation=conversation, first=first, second=second, questions=looked_at)),
        )


def _words(turn: dict[str, Any]) -> str:
    """A turn's text, and what it calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([turn.get("content") or "", *calls]).strip() if calls else str(turn["content"])


def _ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def parse_rating(text: str) -> float | None:
    """1 … 5, or None where the answer states no single whole number on that scale. The last statement counts."""
    stated = list(_RATING.finditer(text))
    if not stated:
        bare = _BARE_RATING.fullmatch(text) if len(text) < 32 else None
        return float(bare[1]) if bare else _from_json(text)
    number, rest = stated[-1].groups()
    value = float(number)
    return value if value in (1, 2, 3, 4, 5) and not _HEDGE.match(rest) else None


def _from_json(text: str) -> float | None:
    try:
        value: Any = json.loads(text.strip().removeprefix("```json").removesuffix("```"))
    except (ValueError, RecursionError):
        return None
    rating = value.get("rating", value.get("score")) if isinstance(value, dict) else None
    if isinstance(rating, bool) or not isinstance(rating, int | float):
        return None
    return float(rating) if rating in (1, 2, 3, 4, 5) else None


def parse_verdict(text: str, order: str) -> float | None:
    """1 if the verdict is for the response that stood in this place, 0 if against, 0.5 for a tie, else None."""
    stated = list(_VERDICT.finditer(text))
    if not stated or _HEDGE.match(stated[-1][2]):
        return None
    verdict = stated[-1][1].lower()
    return 0.5 if verdict == "tie" else float((verdict == "a") == (order == "first"))


def score_of(spec: Judge, answers: dict[str, list[tuple[str, str | None]]]) -> Score:
    """The score of one response from the judge's answers, (text, error) by question.

    A question answered several times (the judge's `samples`) counts with the mean of its readable answers; one
    without any leaves the response without a score.
    """
    parts: dict[str, float] = {}
    for name in ORDERS if spec.against else spec.aspects:
        told = answers.get(name, [])
        values = [
            parse_verdict(text, name) if spec.against else parse_rating(text) for text, error in told if not error
        ]
        readable = [value for value in values if value is not None]
        if readable:
            parts[name] = fmean(readable)
    missing = [name for name in (ORDERS if spec.against else spec.aspects) if name not in parts]
    if not missing:
        value = fmean(parts.values())
        return Score(0.5 if spec.against and len(set(parts.values())) > 1 else value, parts=parts)
    errors = [error for name in missing for _, error in answers.get(name, []) if error]
    return Score(None, f"{JUDGE_FAILED}: {errors[0]}" if errors else f"{UNPARSABLE}: {', '.join(missing)}", parts)
