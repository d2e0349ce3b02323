"""The rules a candidate pair must pass, in order. Each is a pure predicate on one candidate and has a name, so that
the funnel can say what every rule removed.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from deltaray.recipe.deltas import Pairing

FAILURES = ("prompt refused", "engine error", "empty answer")
"""Kinds of failed responses, as their `error` begins."""
Candidate = dict[str, Any]
Rule = Callable[[Candidate], bool]
"""True: the pair stays."""


def rules(pairing: Pairing, max_length: int) -> list[tuple[str, Rule]]:
    """The rules of a pairing as (name, predicate), in the order of the funnel.

    Args:
        max_length: the student's; a prompt of max_length - 2 tokens or more leaves no room for a response.
    """
    chosen_rules: list[tuple[str, Rule, bool]] = [
        *((kind, partial(_did_not_fail, kind), True) for kind in FAILURES),
        ("refused by the student's template", lambda pair: not pair["refused"], True),
        ("truncated", lambda pair: "length" not in _finishes(pair), pairing.drop_truncated),
        ("identical", lambda pair: pair["chosen"] != pair["rejected"], pairing.drop_identical),
        ("prompt too long for the student", lambda pair: pair["prompt_tokens"] < max_length - 2, True),
        ("chosen not wrong", lambda pair: pair["chosen_score"] == 0, pairing.keep == "chosen_wrong"),
        ("chosen not right", lambda pair: pair["chosen_score"] == 1, pairing.keep == "chosen_right"),
        ("delta below min_delta", lambda pair: _at_least(pair["delta"], pairing.min_delta), True),
        ("delta above max_delta", lambda pair: _at_least(pairing.max_delta, pair["delta"]), True),
        ("length gap", lambda pair: _length_gap(pair) <= (pairing.max_length_gap or 0), _has(pairing.max_length_gap)),
    ]
    optional = {"delta below min_delta": pairing.min_delta, "delta above max_delta": pairing.max_delta}
    return [
        (name, rule) for name, rule, wanted in chosen_rules if wanted and (name not in optional or _has(optional[name]))
    ]


def draw_key(pair: Candidate, seed: int) -> int:
    """A pair's place in a seeded random order that does not depend on where or when it is computed."""
    text = f"{seed}#{pair['prompt_id']}#{pair['chosen_sample']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _did_not_fail(kind: str, pair: Candidate) -> bool:
    return not any((pair[side] or "").startswith(kind) for side in ("chosen_error", "rejected_error"))


def _has(value: object) -> bool:
    return value is not None


def _finishes(pair: Candidate) -> tuple[str, str]:
    return pair["chosen_finish"], pair["rejected_finish"]


def _length_gap(pair: Candidate) -> int:
    return abs(int(pair["chosen_tokens"]) - int(pair["rejected_tokens"]))


def _at_least(value: float | None, bound: float | None) -> bool:
    """An unscored pair passes no window."""
    return value is not None and bound is not None and value >= bound
