"""The rules a candidate pair must pass, in order. Each is a pure predicate on one candidate and has a name, so that
the funnel can say what every rule removed.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from deltaray.data.tokens.response_tokens import THOUGHTS
from deltaray.pair.filters import Candidate, Rule, text_filter, token_filter
from deltaray.recipe.pairing import Pairing

FAILURES = ("prompt refused", "engine error", "empty answer", "answer calls tools", "answer not Unicode")
"""Kinds of failed responses, as their `error` begins."""
Named = tuple[str, Rule]


def rules(pairing: Pairing, max_length: int, dropped: Mapping[int, Collection[str]] | None = None) -> list[Named]:
    """All rules of a pairing as (name, predicate), in the order of the funnel; see `text_rules` and `token_rules`."""
    return text_rules(pairing, dropped or {}) + token_rules(pairing, max_length)


def text_rules(pairing: Pairing, dropped: Mapping[int, Collection[str]]) -> list[Named]:
    """The rules that need no tokens, so that only what passes them is tokenised.

    Args:
        dropped: by the place of a filter on prompts among the pairing's filters, the ids of the prompts it removes.
    """
    optional: list[tuple[str, Rule, bool]] = [
        ("of another source", lambda pair: _is_of(pairing.sources or [], pair["source"]), pairing.sources is not None),
        *((kind, partial(_did_not_fail, kind), True) for kind in FAILURES),
        ("another failure", partial(_did_not_fail, ""), True),
        ("truncated", lambda pair: "length" not in _finishes(pair), pairing.drop_truncated),
        ("identical", lambda pair: _plain(pair, "chosen") != _plain(pair, "rejected"), pairing.drop_identical),
        ("chosen not wrong", lambda pair: pair["chosen_score"] == 0, pairing.keep == "chosen_wrong"),
        ("chosen not right", lambda pair: pair["chosen_score"] == 1, pairing.keep == "chosen_right"),
        ("not tied", lambda pair: pair["delta"] == 0, pairing.keep == "tied"),
        ("delta not positive", lambda pair: (pair["delta"] or 0) > 0, _wants_positive(pairing)),
        ("delta below min_delta", lambda pair: _at_least(pair["delta"], pairing.min_delta), _has(pairing.min_delta)),
        ("delta above max_delta", lambda pair: _at_least(pairing.max_delta, pair["delta"]), _has(pairing.max_delta)),
    ]
    found = [(name, rule) for name, rule, wanted in optional if wanted]
    for place, item in enumerate(pairing.filters):
        rule = text_filter(item, dropped.get(place, ()))
        found += [(_shown(pairing, place), rule)] if rule else []
    return found


def token_rules(pairing: Pairing, max_length: int) -> list[Named]:
    """The rules that count the student's tokens.

    Args:
        max_length: the student's; a prompt of max_length - 2 tokens or more leaves no room for a response.
    """
    found: list[Named] = [
        ("thoughts where the student must not think", lambda pair: pair["refusal"] != THOUGHTS),
        ("refused by the student's template", lambda pair: not pair["refusal"]),
        ("prompt too long for the student", lambda pair: pair["prompt_tokens"] < max_length - 2),
    ]
    if pairing.drop_identical:
        found.append(("identical in the student's tokens", lambda pair: not pair["same_tokens"]))
    if pairing.max_length_gap is not None:
        most = pairing.max_length_gap
        found.append(("length gap", lambda pair: abs(pair["chosen_tokens"] - pair["rejected_tokens"]) <= most))
    for place, item in enumerate(pairing.filters):
        rule = token_filter(item)
        found += [(_shown(pairing, place), rule)] if rule else []
    return found


def draw_key(pair: Candidate, seed: int) -> int:
    """A pair's place in a seeded random order that does not depend on where or when it is computed."""
    text = f"{seed}#{pair['prompt_id']}#{pair['chosen_sample']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _shown(pairing: Pairing, place: int) -> str:
    """The name of a filter in the funnel; filters of one kind are numbered by their place in the recipe."""
    item = pairing.filters[place]
    side: str = getattr(item, "side", "both")
    name = f"filter {item.kind}" + (f" ({side})" if side != "both" else "")
    several = sum(other.kind == item.kind for other in pairing.filters) > 1
    return f"{name} #{place}" if several else name


def _is_of(patterns: Sequence[str], source: str | None) -> bool:
    return any(fnmatchcase(source or "", pattern) for pattern in patterns)


def _did_not_fail(kind: str, pair: Candidate) -> bool:
    errors = (pair[side] for side in ("chosen_error", "rejected_error"))
    return not any(error is not None and error.startswith(kind) for error in errors)


def _wants_positive(pairing: Pairing) -> bool:
    asked = pairing.keep == "tied" or _has(pairing.min_delta) or _has(pairing.max_delta)
    return pairing.policy != "by_sample" and not asked


def _plain(pair: Candidate, side: str) -> tuple[str, ...]:
    texts = pair[f"{side}_reasoning"] or "", pair[side][0]["content"]
    return tuple(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)


def _has(value: object) -> bool:
    return value is not None


def _finishes(pair: Candidate) -> tuple[str, str]:
    return pair["chosen_finish"], pair["rejected_finish"]


def _at_least(value: float | None, bound: float | None) -> bool:
    """An unscored pair passes no window."""
    return value is not None and bound is not None and value >= bound
