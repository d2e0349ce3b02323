"""A template's control tokens: which ends a turn, which frame turns, and texts in which they are not meant.

Everything here is asked of the tokenizer once and kept on it, beside the template and the arguments that it holds for.
"""

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from itertools import takewhile
from typing import Any, TypeVar

from deltaray.errors import first_line
from deltaray.untrusted import OverLimitError

R = TypeVar("R")

TOLD, ASKED, ANSWERED, FURTHER = "first of all quokka", "two quokka words", "three small quokka words", "quokka again"
"""Texts that no template writes by itself, and that none has to quote: they tell what does come from the template."""


def kept_with_template(compute: Callable[[Any], R]) -> Callable[[Any], R]:
    """Computed once per tokenizer object, and again once its template has changed."""
    name = f"_kept_{compute.__name__}"

    @wraps(compute)
    def look_up(tokenizer: Any) -> R:
        holds_for = (str(tokenizer.chat_template), json.dumps(_arguments(tokenizer), sort_keys=True, default=str))
        kept = getattr(tokenizer, name, None)
        if kept is None or kept[0] != holds_for:
            kept = (holds_for, compute(tokenizer))
            setattr(tokenizer, name, kept)
        return kept[1]

    return look_up


def _arguments(tokenizer: Any) -> dict[str, Any]:
    return getattr(tokenizer, "template_arguments", {})


def written(tokenizer: Any, *turns: tuple[str, str], last: Mapping[str, str] | None = None, **options: Any) -> str:
    """What the template makes of (role, content) turns, as text.

    Args:
        last: further fields of the last turn.
        options: those of `apply_chat_template`.

    Raises:
        ValueError: it refuses them.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1] |= last or {}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **_arguments(tokenizer) | options)
    except Exception as error:  # templates raise what they like
        roles = ", ".join(role for role, _ in turns)
        kind = OverLimitError if isinstance(error, OverLimitError) else ValueError
        raise kind(f"the chat template refuses turns of {roles}: {first_line(error)}") from None
    return str(text)


def turn_end(tokenizer: Any) -> int:
    """The id after which an answer is over: the last of `turn_end_ids`."""
    return turn_end_ids(tokenizer)[-1]


@kept_with_template
def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids with which the template ends the last answer of a conversation; the tokenizer's end token if with none.

    Mostly one. Several where they follow each other directly (Command R7B ends the response, then the turn).

    Raises:
        ValueError: neither the template nor the tokenizer has one, or the template takes or shows no answer.
    """
    text = _answered(tokenizer)
    if ANSWERED not in text:
        raise ValueError("the chat template does not write what an assistant says")
    before, _, after = text.rpartition(ANSWERED)
    known = _added_tokens(tokenizer)
    found = _first_tokens(after, known)
    if found:
        found = _of_the_turn(tokenizer, found, after, _tokens_in(before.rpartition(ASKED)[2], known))
    if not found and tokenizer.eos_token_id is None:
        raise ValueError("neither the chat template nor the tokenizer has a token that ends an answer")
    return tuple(known[token] for token in found) or (int(tokenizer.eos_token_id),)


def _answered(tokenizer: Any) -> str:
    """A prompt and its answer, behind a system turn where the template wants one."""
    turns = ("user", ASKED), ("assistant", ANSWERED)
    try:
        return written(tokenizer, *turns)
    except ValueError:
        with suppress(ValueError):
            return written(tokenizer, ("system", TOLD), *turns)
        raise


def _first_tokens(text: str, known: dict[str, int]) -> list[str]:
    """The tokens with which a text begins, up to the first other word."""
    found, text = list[str](), text.lstrip()
    while token := max((token for token in known if text.startswith(token)), key=len, default=""):
        found.append(token)
        text = text[len(token) :]
    return found


def _of_the_turn(tokenizer: Any, found: list[str], after: str, opened: list[str]) -> list[str]:
    """The end of the turn, without what ends the whole conversation (Phi 4) or begins the next answer (Llama 3).

    Args:
        found: the tokens of `after`, which is what a conversation ends with behind its answer.
        opened: the tokens between question and answer: what ends the question, as a rule, and what opens the answer.
    """
    with suppress(ValueError):  # some templates want the assistant to speak last
        turns = ("user", ASKED), ("assistant", ANSWERED), ("user", FURTHER)
        goes_on = written(tokenizer, *turns).partition(ANSWERED)[2]
        if goes_on.startswith(after):
            return found
        pairs = zip(found, _first_tokens(goes_on, _added_tokens(tokenizer)), strict=False)
        shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        found = shared or found  # some end the last turn otherwise than those before it (gpt-oss)
    header = (opened[1:] or opened) if _always_opens(tokenizer) else []
    return list(takewhile(lambda token: token not in header, found))


def _always_opens(tokenizer: Any) -> bool:
    """Whether the template begins an answer even where it was not asked to."""
    try:
        asked = {written(tokenizer, ("user", ASKED), add_generation_prompt=opening) for opening in (False, True)}
    except ValueError:
        return False
    return len(asked) == 1


@kept_with_template
def system_refusal(tokenizer: Any) -> str | None:
    """Why prompts with a system turn are not for this template: it refuses such turns, or leaves them out."""
    try:
        text = written(tokenizer, ("system", TOLD), ("user", ASKED), add_generation_prompt=True)
    except ValueError as error:
        return str(error)
    return None if TOLD in text else "the chat template leaves system turns out"


@kept_with_template
def control_tokens(tokenizer: Any) -> frozenset[str]:
    """Tokens that stand for themselves only where the template writes them.

    These are the tokenizer's special tokens, and those that the template writes around turns: in some tokenizers
    (DeepSeek, Command R) they are not marked as special. Markers inside an answer, such as those of thoughts and of
    tool calls, are none where they are not special: models write them as text.
    """
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    told = [_framing(tokenizer, *system) for system in ((), (("system", TOLD),))]
    return frozenset(special.union(*told))


def _framing(tokenizer: Any, *system: tuple[str, str]) -> set[str]:
    """Tokens that the template writes around three turns; none if it refuses them."""
    known = _added_tokens(tokenizer)
    try:
        text = written(tokenizer, *system, ("user", ASKED), ("assistant", ANSWERED), ("user", FURTHER))
    except ValueError:
        return set()
    before, _, rest = text.partition(ASKED)
    opening, _, rest = rest.partition(ANSWERED)
    opened = _tokens_in(opening, known)
    within = {token for token in opened if _closed(token) in opened}
    within |= {_closed(token) for token in within}
    return {*_tokens_in(before, known), *opened, *_tokens_in(rest, known)} - within


def _closed(token: str) -> str:
    """The marker that closes this one: `</think>` of `<think>`."""
    return f"{token[:1]}/{token[1:]}"


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids by text of special and added tokens; those that are white space alone (Gemma has them) mark nothing."""
    known = {token.content: int(number) for number, token in tokenizer.added_tokens_decoder.items()}
    known |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: number for text, number in known.items() if text.strip()}


def _tokens_in(text: str, known: dict[str, int]) -> list[str]:
    """The tokens of `known` that a text holds, from left to right, the longest at each place."""
    there = sorted((token for token in known if token in text), key=len, reverse=True)
    found, place = [], 0
    while place < len(text):
        token = next((token for token in there if text.startswith(token, place)), None)
        found += [] if token is None else [token]
        place += len(token) if token else 1
    return found


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text by itself: nothing is added to it, and `control_tokens` in it are encoded as plain text."""
    if not text:
        return []
    plain = _plain(tokenizer)
    if plain is not None:
        return list(plain.encode(text, add_special_tokens=False).ids)
    if not any(token in text for token in control_tokens(tokenizer)):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _plain(tokenizer: Any) -> Any:
    """A copy of the tokenizer's backend that knows no control tokens; None where it has no backend.

    A copy: the switch belongs to the backend, and other threads may be using that with the switch off. One for each
    set of control tokens, since a copy of a large vocabulary takes seconds.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    control = control_tokens(tokenizer)
    copies = vars(tokenizer).setdefault("_plain_copies", {})
    if control not in copies:
        copies[control] = _without_control(backend, control)
    return copies[control]


def _without_control(backend: Any, control: frozenset[str]) -> Any:
    plain = copy.deepcopy(backend)
    plain.no_truncation()
    plain.no_padding()
    for token in plain.get_added_tokens_decoder().values():
        if token.content in control and not token.special:
            token.special = True
            plain.add_special_tokens([token])
    plain.encode_special_tokens = True
    return plain
