"""Conversations to token ids by the chat template, with what people wrote kept as text.

A prompt that holds `<|im_end|>` would end its own turn: the template pastes texts between its control tokens, and the
tokenizer cannot tell whose they are. So such texts are marked before they are pasted, and after it the template's own
tokens and the texts between them are encoded apart, as the tokenizer does by itself.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

from deltaray.data.tokens.control import control_tokens, plain_ids

MARK, INSTEAD = "\ufdd0", "x"
"""A code point that no text may hold (Unicode keeps it for uses such as this one), and what stands in for a token when
the way to encode is tried out."""


class ControlTokenError(TemplateError):
    """A text holds control tokens, and this tokenizer cannot encode them as text."""


def rendered_ids(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
    """Ids of one conversation; `options` are those of `apply_chat_template`.

    Raises:
        ControlTokenError: a turn holds a control token that could not be kept as text.
    """
    arguments = getattr(tokenizer, "template_arguments", {}) | options
    told = {"conversation": list(messages), "tools": arguments.pop("tools", None)}
    foreign = foreign_tokens(tokenizer, messages, told["tools"])
    if not foreign:
        return list(tokenizer.apply_chat_template(**told, tokenize=True, return_dict=False, **arguments))
    marked, tried = (
        tokenizer.apply_chat_template(**_replaced(told, foreign, by), tokenize=False, **arguments)
        for by in (_marked, lambda _: INSTEAD)
    )
    straight = list(tokenizer(tried, add_special_tokens=False)["input_ids"])
    if _apart(tokenizer, tried) != straight or any(marked.count(token) != tried.count(token) for token in foreign):
        raise ControlTokenError(f"the text holds {min(foreign)}, a control token that cannot be encoded as text here")
    return _apart(tokenizer, marked)


def foreign_tokens(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any = None) -> frozenset[str]:
    """Control tokens that stand in what the turns, or the tools that they are given, say."""
    control = control_tokens(tokenizer)
    starts = {token[:2] for token in control}  # hundreds of tokens begin alike
    texts = [text for text in _strings([messages, tools]) if any(start in text for start in starts)]
    return frozenset(token for token in control if any(token in text for text in texts))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, item in value.items() if key != "role" for text in _strings(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _strings(item))


def _replaced(value: Any, tokens: frozenset[str], by: Any) -> Any:
    """The same turns with `by` of each token instead of it in their texts."""
    if isinstance(value, str):
        return _pattern(tokens).sub(lambda found: by(found[0]), value)
    if isinstance(value, dict):
        return {key: item if key == "role" else _replaced(item, tokens, by) for key, item in value.items()}
    return [_replaced(item, tokens, by) for item in value] if isinstance(value, list | tuple) else value


def _marked(token: str) -> str:
    return token[0] + MARK + token[1:]


def _pattern(tokens: Iterable[str]) -> "re.Pattern[str]":
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _apart(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text whose control tokens stand for themselves unless they are marked."""
    kinds = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
    there = [token for token in control_tokens(tokenizer) if token in text and token in kinds]
    ids: list[int] = []
    strip = False  # some tokens take the white space beside them along
    for part in re.split(f"({_pattern(there).pattern})", text) if there else [text]:
        if part in there:
            number, token = kinds[part]
            ids.append(int(number))
            strip = token.rstrip
            continue
        ids += plain_ids(tokenizer, (part.lstrip() if strip else part).replace(MARK, ""))
        strip = False
    return ids
