"""The recipe's filters as pure predicates on one candidate pair; True: it stays."""

import re
from collections.abc import Callable, Collection
from typing import Any

from deltaray.errors import UserError
from deltaray.recipe import filters as recipe
from deltaray.score.surface import cjk_share, is_refusal, is_repetitive
from deltaray.untrusted import OverLimitError, limited

Candidate = dict[str, Any]
Rule = Callable[[Candidate], bool]

_MAKERS = {
    "openai": "openai", "gpt": r"chat ?gpt|gpt-?[345][\w.-]*", "anthropic": "anthropic", "claude": "claude",
    "google": "google", "gemini": "gemini", "gemma": "gemma", "bard": "bard", "deepmind": "deepmind", "qwen": "qwen",
    "tongyi": "tongyi", "alibaba": "alibaba", "deepseek": "deepseek", "meta ai": "meta ai", "llama": "llama",
    "mistral": r"mistral(?: ai)?", "mixtral": "mixtral", "cohere": "cohere", "command r": "command r", "xai": "xai",
    "x.ai": r"x\.ai", "grok": "grok", "perplexity": "perplexity", "microsoft": "microsoft", "copilot": "copilot",
    "phi": r"phi-?\d", "moonshot": "moonshot", "kimi": "kimi", "zhipu": "zhipu", "chatglm": "chatglm", "baidu": "baidu",
    "ernie": "ernie", "yi": r"yi-?\d+b", "01.ai": r"01\.ai",
}  # fmt: skip
"""Assistants and those who make them: what a name holds in any case, and the pattern of the whole name."""
_BETWEEN = (
    "an?|the|your|ai|artificial|intelligence|large|language|virtual|helpful|friendly|conversational|model|assistant"
    "|chat ?bot|system|called|named|known|as|by|from|at|that|which|was|been|made|created|built|trained|developed"
)
"""What may stand between the speaker and such a name."""
_MADE_BY = rf"(?:(?:{_BETWEEN})[\s,-]+){{0,12}}(?:{'|'.join(_MAKERS.values())})"
_IDENTITY = re.compile(
    rf"\b(?:i am|i'm|i was|i have been|my name is|as)\s+{_MADE_BY}\b"
    r"|\b(?:deepseek|qwen|alibaba cloud)\b",
    re.IGNORECASE,
)


SPECIAL = frozenset(r"\.^$*+?{}[]|()")
"""Characters without which a regular expression is plain text."""
SEARCH_SECONDS = 1.0
"""Of computing for the search of one text."""


def claims_other_identity(text: str) -> bool:
    """Whether the speaker names another maker's model as itself or its maker, or one of those that are hardly named
    for another reason (DeepSeek, Qwen, Alibaba Cloud)."""
    lowered = text.lower()
    if not any(part in lowered for part in _MAKERS):  # nearly all texts, and the pattern takes long
        return False
    return _IDENTITY.search(text.replace("’", "'")) is not None


def language_of(text: str) -> str:
    """ISO 639-1 code of the language that a text is most likely in."""
    return str(_identifier().classify(text)[0])


def _identifier() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise UserError(f"a filter of kind language needs `pip install deltaray[filters]`: {error}") from None
    return py3langid


def text_filter(item: Any, dropped: Collection[str] = ()) -> Rule | None:
    """The predicate of a filter that needs no tokens; None for one that does.

    Args:
        dropped: the ids of the prompts that a filter on prompts removes (`prompts.dropped_prompts`).
    """
    if isinstance(item, recipe.DuplicatePrompt | recipe.Contaminated):
        return _of_sources(item, lambda pair: pair["prompt_id"] not in dropped)
    if isinstance(item, recipe.Correctness):
        return _of_sources(item, lambda pair: _is_correct(item, pair))
    if isinstance(item, recipe.Keywords):
        return _of_sources(item, _without_keywords(item))
    fault = _fault(item)
    return None if fault is None else _of_sources(item, _sided(item.side, fault))


def token_filter(item: Any) -> Rule | None:
    """The predicate of a filter that counts the student's tokens; None for any other."""
    if isinstance(item, recipe.LengthGap):
        return _of_sources(item, lambda pair: abs(pair["chosen_tokens"] - pair["rejected_tokens"]) <= item.max_tokens)
    if isinstance(item, recipe.Length):
        sides = _sides(item.side)
        return _of_sources(item, lambda pair: all(_fits(item, pair[f"{side}_tokens"]) for side in sides))
    return None


def _fault(item: Any) -> Callable[[str], bool] | None:
    """What a sided filter does not tolerate in a text."""
    if isinstance(item, recipe.Repetition):
        return lambda text: is_repetitive(text, item.sentences, item.phrases)
    if isinstance(item, recipe.Cjk):
        return lambda text: cjk_share(text) >= item.share
    if isinstance(item, recipe.Language):
        _identifier()
        return lambda text: language_of(text) not in item.languages
    if isinstance(item, recipe.Identity):
        return claims_other_identity
    return is_refusal if isinstance(item, recipe.Refusal) else None


def _without_keywords(item: recipe.Keywords) -> Rule:
    """Plain words are looked for here; expressions with limits, and what cannot be searched in time does not stay."""
    pattern = "|".join(f"(?:{one})" for one in item.patterns)
    plain = re.compile(pattern, re.IGNORECASE) if not SPECIAL & {*"".join(item.patterns)} else None

    def is_found(text: str) -> bool:
        if plain is not None:
            return plain.search(text) is not None
        return bool(limited("deltaray.untrusted.patterns", SEARCH_SECONDS).call("found", pattern, text))

    def rule(pair: Candidate) -> bool:
        try:
            return not any(is_found(pair[side][0]["content"]) for side in _sides(item.side))
        except OverLimitError as error:
            pair["refusal"] = f"filter keywords: its patterns cannot be searched for: {error}"
            return False

    return rule


def _sided(side: str, fault: Callable[[str], bool]) -> Rule:
    sides = _sides(side)
    return lambda pair: not any(fault(pair[side][0]["content"]) for side in sides)


def _sides(side: str) -> tuple[str, ...]:
    return ("chosen", "rejected") if side == "both" else (side,)


def _of_sources(item: Any, rule: Rule) -> Rule:
    if item.sources is None:
        return rule
    return lambda pair: pair["source"] not in item.sources or rule(pair)


def _fits(item: recipe.Length, tokens: int) -> bool:
    return (item.min_tokens or 0) <= tokens <= (item.max_tokens or tokens)


def _is_correct(item: recipe.Correctness, pair: Candidate) -> bool:
    chosen, rejected = pair["scores"][item.scorer]
    if not _says(item.chosen, chosen, pair["chosen_finish"]) or not _says(
        item.rejected, rejected, pair["rejected_finish"]
    ):
        return False
    return not item.min_gap or (None not in (chosen, rejected) and chosen - rejected >= item.min_gap)


def _says(wanted: str, score: float | None, finish: str) -> bool:
    """Whether a verifier's score is what a side must have; an unscored response is neither right nor wrong."""
    if wanted == "wrong_or_truncated" and finish == "length":
        return True
    return {"any": True, "right": score == 1}.get(wanted, score == 0)
