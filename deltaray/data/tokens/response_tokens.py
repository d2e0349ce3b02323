"""A response's token ids: what the student itself would write after the prompt's ids.

The rule, for every chat template:

1. The prompt is rendered with its generation prompt (`chat.render_prompt`).
2. What the template writes between the generation prompt and an answer (gpt-oss' channel, an empty thinking block)
   comes first; thoughts that are kept apart stand in the template's thinking block.
3. The answer's text is tokenised by itself, so nothing merges across a border and nothing is stripped or dropped.
   Where the teacher has the student's tokenizer and its ids spell just that text, its ids are taken.
4. The tokens that end the template's turn follow, and nothing after them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaray.data.tokens import control_tokens, plain_ids
from deltaray.data.tokens.answer_frame import Frame, frame_of
from deltaray.data.tokens.chat import RefusedError

TAIL = 8
"""So many last prompt ids tell whether two prompts let the assistant begin in the same way."""
THOUGHTS = "the prompt tells the student not to think, and the response has thoughts in its text"
"""Why `response_ids` refuses such a response."""


@dataclass(frozen=True)
class Written:
    """A response as its teacher wrote it."""

    text: str
    reasoning: str | None = None
    """Thoughts that are kept apart from the text."""
    token_ids: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()
    """The teacher's own, where it has the student's tokenizer; else empty."""


def response_ids(tokenizer: Any, prompt: Sequence[int], written: Written) -> list[int]:
    """Ids of a response behind a prompt's ids, end of the turn included.

    Raises:
        RefusedError: the template has no place for what was written.
        ValueError: the template shows no answers, or nothing ends them (see `answer_frame.frame_of`).
    """
    frame = frame_of(tokenizer)
    lead, text = _parts(tokenizer, frame, written)
    lead_ids = [token for piece in lead for token in piece]
    own = _without_end(tokenizer, frame, written.token_ids)
    head = _head(tokenizer, own, text)
    if head is not None:
        same_start = list(written.prompt_token_ids[-TAIL:]) == list(prompt[-TAIL:])
        if same_start and _same_words(head, tokenizer.decode(lead_ids)):
            return [*own, *frame.end]
        if not head.strip():
            return [*([] if same_start else lead_ids), *own, *frame.end]
    return [*lead_ids, *plain_ids(tokenizer, _alone(frame, text)), *frame.end]


def _parts(tokenizer: Any, frame: Frame, written: Written) -> tuple[list[list[int]], str]:
    """(ids of what the template writes before the answer, thoughts included; the answer's text)."""
    text, marks = written.text, frame.marks
    if marks and not written.reasoning and (marks[1] in text or text.lstrip().startswith(marks[0])):
        opening, text = _with_own_thoughts(frame, marks[0], text)
        return [_template_ids(tokenizer, opening)], text
    if written.reasoning and frame.takes_thoughts:
        return _thoughts(tokenizer, frame, written.reasoning), text
    blank = not frame.lead.strip() and text.startswith(frame.lead)
    return [[] if blank else _template_ids(tokenizer, frame.lead)], text


def _with_own_thoughts(frame: Frame, mark: str, text: str) -> tuple[str, str]:
    """(what opens the thoughts that a text holds, the text): they are opened once, here, by the prompt or by the text.

    Args:
        mark: what opens thoughts in a text.
    """
    if frame.closed:
        raise RefusedError(THOUGHTS)
    begun = text.lstrip().startswith(mark)
    if frame.opened:
        return "", text.lstrip().removeprefix(mark).lstrip("\n") if begun else text
    return "" if begun else frame.opening, text


def _thoughts(tokenizer: Any, frame: Frame, reasoning: str) -> list[list[int]]:
    """Thoughts in the template's block. One text for the tokenizer, as the student writes it, unless they hold control
    tokens, which are text there."""
    closing = frame.closing or ""
    if any(token in reasoning for token in control_tokens(tokenizer)):
        ends = [_template_ids(tokenizer, end) for end in (frame.opening, closing)]
        return [ends[0], plain_ids(tokenizer, reasoning), ends[1]]
    return [_template_ids(tokenizer, frame.opening + reasoning + closing)]


def _template_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _alone(frame: Frame, text: str) -> str:
    """The text for a tokenizer that puts a space before every text: the one that engines decode is not doubled."""
    return text[1:] if frame.adds_space and text[:1] == " " and not text[1:2].isspace() else text


# --- the teacher's own ids ----------------------------------------------------------------------------------------
def _without_end(tokenizer: Any, frame: Frame, ids: Sequence[int]) -> list[int]:
    ends, own = {*frame.end, *tokenizer.all_special_ids}, list(ids)
    while own and own[-1] in ends:
        own.pop()
    return own


def _head(tokenizer: Any, own: list[int], text: str) -> str | None:
    """What the ids spell before the text; None where they do not end with it: a stop string was cut off, or they hold
    control tokens that are not in the text."""
    if not own or not text:
        return None
    spelled = tokenizer.decode(own, clean_up_tokenization_spaces=False)
    if not spelled.endswith(text):  # sentencepiece decodes no space at the beginning
        text = text.removeprefix(" ")
    return spelled[: len(spelled) - len(text)] if spelled.endswith(text) else None


def _same_words(one: str, other: str) -> bool:
    """Apart from white space, which parsers of thoughts strip."""
    return "".join(one.split()) == "".join(other.split())
