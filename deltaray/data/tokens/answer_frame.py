"""What a chat template writes around an answer, behind its generation prompt, as a short conversation shows it."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltaray.data.tokens.control import kept_with_template, plain_ids, turn_end_ids, written

QUESTION, ANSWER, THOUGHTS = "xquestionx", "xanswerx", "xthoughtsx"
"""Words that no template changes or looks for."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""How templates call the thoughts of an assistant's turn."""
_MARK = r"[\w:|]*think[\w:|]*"
OPENS = re.compile(rf"<({_MARK})>\s*$", re.IGNORECASE)
CLOSES = re.compile(rf"</({_MARK})>\s*$", re.IGNORECASE)
"""The end of a generation prompt that opens a thinking block, or closes one."""


@dataclass(frozen=True)
class Frame:
    """The texts and ids around an answer."""

    lead: str
    """Before an answer without thoughts."""
    opening: str
    """Before thoughts; empty if the generation prompt opens the block."""
    closing: str | None
    """Between thoughts and answer; None: the template has no thinking block."""
    opened: bool
    """The generation prompt opens the thinking block."""
    closed: bool
    """The generation prompt closes the thinking block: the student is told not to think."""
    end: tuple[int, ...]
    """The ids that end the turn."""
    adds_space: bool
    """The tokenizer puts a space before a text that it is given by itself (sentencepiece)."""

    @property
    def takes_thoughts(self) -> bool:
        """Whether thoughts that are kept apart have a place; elsewhere the answer alone is trained."""
        return self.closing is not None and not self.closed

    @property
    def marks(self) -> tuple[str, str] | None:
        """(what opens, what closes) thoughts in a text; None where the template has no such marks."""
        found = re.search(r"<(/[^<>]*)>", self.closing or "")
        return (f"<{found[1][1:]}>", f"<{found[1]}>") if found else None


@kept_with_template
def frame_of(tokenizer: Any) -> Frame:
    """The frame of a tokenizer with its template and the template's arguments; worked out once.

    Raises:
        ValueError: the template shows no answer, or nothing ends it.
    """
    system = _needed_system(tokenizer)
    prompt = written(tokenizer, *system, ("user", QUESTION), add_generation_prompt=True)
    answered = partial(written, tokenizer, *system, ("user", QUESTION), ("assistant", ANSWER))
    before, _ = _around(answered(), ANSWER)
    if before is None:
        raise ValueError("the chat template does not show an assistant's answer as it is")
    opens, closes = OPENS.search(prompt), CLOSES.search(prompt)
    opening, closing = _thinking_block(answered, prompt)
    if closing is None and (mark := opens or closes):
        closing = f"\n</{mark[1]}>\n\n"
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    if opens and not CLOSES.search(lead):  # an answer stands outside the block that the prompt opens: closed first
        lead = closing or ""
    adds_space = _adds_space(tokenizer)
    lead = "" if adds_space and lead == " " else lead
    end = turn_end_ids(tokenizer)
    return Frame(lead, opening, closing, opens is not None, closes is not None, end, adds_space)


def _needed_system(tokenizer: Any) -> list[tuple[str, str]]:
    """A system turn, for templates that take no conversation without one."""
    try:
        written(tokenizer, ("user", QUESTION))
    except ValueError:
        return [("system", QUESTION)]
    return []


def _thinking_block(answered: Callable[..., str], prompt: str) -> tuple[str, str | None]:
    """(opening, closing) of the block that the template writes for thoughts that are kept apart.

    Args:
        answered: the conversation with the answer, and with more fields in its turn.
    """
    for field in REASONING_FIELDS:
        with suppress(ValueError):  # some templates refuse fields that they do not know
            before, rest = _around(answered(last={field: THOUGHTS}), THOUGHTS)
            between, _ = _around(rest or "", ANSWER)
            if before is not None and between is not None and before.startswith(prompt):
                return before[len(prompt) :], between
    return "", None


def _around(text: str, word: str) -> tuple[str | None, str | None]:
    """What stands before and after a word; (None, None) where it does not occur."""
    before, found, after = text.partition(word)
    return (before, after) if found else (None, None)


def _adds_space(tokenizer: Any) -> bool:
    """Whether a text by itself begins with the piece of a space and that text."""
    pieces = tokenizer.convert_ids_to_tokens(plain_ids(tokenizer, "x"))
    return bool(pieces) and str(pieces[0]).startswith(("\u2581", "\u0120"))
