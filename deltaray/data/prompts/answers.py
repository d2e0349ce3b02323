"""The answer of one side of a preference row: its text, its thoughts, or why it cannot be trained. Pure."""

from typing import Any, NamedTuple

from deltaray.data.prompts.rows import not_unicode, replaced
from deltaray.data.prompts.turns import (
    CALLS,
    RowError,
    Turn,
    agrees,
    refuse_written_turns,
    same_beginning,
    thoughts_of,
    turns_of,
)
from deltaray.text.words import is_unicode, short

CALLS_TOOLS = "answer calls tools"
NOT_UNICODE = "answer not Unicode"
EMPTY = "empty answer"
"""Kinds of answers that are stored as failed, as their `error` begins: the funnel counts their pairs."""


class Answer(NamedTuple):
    """What one side says."""

    text: str
    reasoning: str | None = None
    error: str | None = None


def split_side(raw: dict[str, Any], side: str) -> tuple[list[Turn], Answer]:
    """(all turns before the answer, the answer) of a side.

    A text needs `prompt`. Turns may begin with the prompt's, which they then repeat; or go on where `prompt` ends.

    Raises:
        RowError: it is neither, or says something else than `prompt`.
    """
    value, prompt = raw[side], raw.get("prompt")
    if isinstance(value, str):
        refuse_written_turns(value, side)
        if prompt is None or prompt == []:
            raise RowError(f"`{side}` is text, so the row needs a `prompt`")
        return _start(prompt), answer_of({"role": "assistant", "content": value}, side)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns or not all(_has_role(turn) for turn in turns):
        there = f", not {short(repr(value))}"
        raise RowError(f"`{side}` must be text, or turns {{role, content}} of which the last is the assistant's{there}")
    if turns[-1]["role"] != "assistant":
        raise RowError(f"`{side}` must be text, or turns of which the last is the assistant's, not the {_who(turns)}")
    before = turns_of(turns[:-1], side) if turns[:-1] else []
    if before and before[-1]["role"] == "assistant":
        raise RowError(f"`{side}` ends in two turns of the assistant; join them, or leave the first one out")
    return _joined(prompt, before, side), answer_of(turns[-1], side)


def _has_role(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str)


def _who(turns: list[dict[str, Any]]) -> str:
    return f"{turns[-1]['role']}'s"


def _start(prompt: Any) -> list[Turn]:
    """The turns that `prompt` is."""
    if isinstance(prompt, str):
        refuse_written_turns(prompt, "prompt")
        if not prompt.strip():
            raise RowError("`prompt` is empty; write the user's question")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, dict) and "role" in prompt:
        return turns_of([prompt], "prompt")
    if not isinstance(prompt, list):
        raise RowError(f"`prompt` must be text, or turns {{role, content}}, not {short(repr(prompt))}")
    return turns_of(prompt, "prompt")


def _joined(prompt: Any, before: list[Turn], side: str) -> list[Turn]:
    """A side's turns before its answer with those of `prompt`, whose beginning they may be."""
    if prompt is None or prompt in ("", []):
        if not before:
            raise RowError(f"`{side}` is an answer alone, so the row needs a `prompt`")
        return before
    start = _start(prompt)
    if not any(turn["role"] == "user" for turn in before):
        system = [turn for turn in before if turn["role"] == "system"]
        rest = [turn for turn in before if turn["role"] != "system"]
        return [*(system if start[0]["role"] != "system" else []), *start, *rest]
    if isinstance(prompt, str):
        if agrees(prompt, before):
            return before
    elif same_beginning(start, before):
        return before
    elif start[0]["role"] == "system" and same_beginning(start[1:], before):
        return [start[0], *before]
    elif before[0]["role"] == "system" and same_beginning(start, before[1:]):
        return before
    raise RowError(f"`prompt` and the turns of `{side}` say different things; leave one of them out")


def answer_of(turn: Turn, side: str) -> Answer:
    """The answer that an assistant's turn is.

    Raises:
        RowError: it holds something that is neither text nor thoughts nor calls.
    """
    [found] = turns_of([turn if turn.get("content") is not None else turn | {"content": ""}], side)
    text, thoughts = found["content"] or "", thoughts_of(found)
    if any(found.get(name) for name in CALLS):
        return Answer(replaced(text), thoughts and replaced(thoughts), f"{CALLS_TOOLS}: only text is trained")
    wrong = next((it for it in (text, thoughts or "") if not is_unicode(it)), None)
    if wrong is not None:
        return Answer(replaced(text), thoughts and replaced(thoughts), f"{NOT_UNICODE}: {not_unicode(wrong)}")
    return Answer(text, thoughts, None if text.strip() else EMPTY)
