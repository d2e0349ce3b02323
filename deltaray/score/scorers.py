"""Scorers as pure functions: a response's text and its prompt's answer in, a score or None out."""

from collections.abc import Callable

ScoreFunction = Callable[[str, str | None], float | None]


def exact_match(text: str, answer: str | None) -> float | None:
    """1.0 if the response is the answer (white space around both ignored), else 0.0; None without an answer."""
    if answer is None:
        return None
    return float(text.strip() == answer.strip())


SCORERS: dict[str, ScoreFunction] = {"exact_match": exact_match}
"""By the `kind` of a recipe's scorer or the `metric` of its tasks."""
