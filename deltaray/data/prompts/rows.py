"""One row of the user's file as one prompt: what it must hold, what it is called, what of it is not Unicode. Pure."""

import hashlib
import json
import re
from typing import Any, NotRequired, TypedDict

from deltaray.data.prompts.turns import (
    RowError,
    Turn,
    agrees,
    checked_tools,
    checked_turns,
    conversation_json,
    plain_turns,
    refuse_written_turns,
    with_system,
)
from deltaray.text.words import is_unicode, short

COLUMNS = ("id", "prompt", "messages", "system", "tools", "answer", "source")
"""What is read of a row; other columns are left alone."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_quoted = json.encoder.encode_basestring  # what json.dumps(…, ensure_ascii=False) does with one text, in C


class PromptRow(TypedDict):
    """One row of `contracts.PROMPTS`."""

    prompt_id: str
    messages: list[dict[str, str]]
    answer: str | None
    source: str | None
    error: str | None
    conversation: NotRequired[str | None]


def prompt_row(raw: dict[str, Any]) -> PromptRow:
    """A row of any format as a prompt.

    Text that is not Unicode does not refuse the row: what is wrong becomes U+FFFD, and `error` tells why the prompt
    cannot be asked. In `raw` such text holds lone surrogates: those of JSON's escapes, and U+DC80 … U+DCFF for the
    bytes 0x80 … 0xFF that are not UTF-8 (Python's `surrogateescape`).

    Raises:
        RowError: there is no prompt in it.
    """
    turns, tools = _turns(raw), checked_tools(raw.get("tools"))
    messages, conversation = plain_turns(turns), conversation_json(turns, tools)
    identity, answer, source = _text(raw.get("id")), _text(raw.get("answer")), _text(raw.get("source"))
    row = PromptRow(
        prompt_id=prompt_hash(messages, conversation) if identity is None else identity,
        messages=messages,
        answer=answer,
        source=source,
        error=None,
        conversation=conversation,
    )
    return row if is_unicode("".join(_texts(row))) else _mended(row)


def compact(text: str) -> bytes:
    """16 bytes that stand for a text where millions are compared."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def content(messages: list[dict[str, str]], answer: str | None, conversation: str | None) -> bytes:
    """16 bytes that stand for what is asked and what a verifier compares the answers with."""
    asked = _canonical(messages) if conversation is None else conversation
    return compact(f"{asked} {'null' if answer is None else _quoted(answer)}")


def _text(value: Any) -> str | None:
    if isinstance(value, list | dict):  # tests or instructions for a verifier
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if value is None or isinstance(value, str) else str(value)


def _turns(raw: dict[str, Any]) -> list[Turn]:
    prompt, messages = raw.get("prompt"), raw.get("messages")
    if messages is None and prompt is None:
        raise RowError(f"neither `prompt` nor `messages`; the row has {short(', '.join(raw)) or 'nothing'}")
    if messages is None and not isinstance(prompt, list):
        if not isinstance(prompt, str) or not prompt or prompt.isspace():
            raise RowError("`prompt` is empty or not text; write the user's question")
        refuse_written_turns(prompt, "prompt")
        return with_system([{"role": "user", "content": prompt}], raw.get("system"))
    turns = checked_turns(prompt if messages is None else messages)
    if messages is not None and not agrees(prompt, turns):
        raise RowError("`prompt` and `messages` say different things; leave one of them out")
    return with_system(turns, raw.get("system"))


def prompt_hash(messages: list[dict[str, str]], conversation: str | None = None) -> str:
    """Stable over machines and versions: the first 128 bits of SHA-256 over canonical JSON."""
    asked = _canonical(messages) if conversation is None else conversation
    return hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()[:32]


def _canonical(messages: list[dict[str, str]]) -> str:
    """`json.dumps` of the list of [role, content], but several times as fast: roles need no quoting."""
    turns = [f'["{turn["role"]}", {_quoted(turn["content"])}]' for turn in messages]
    return f"[{', '.join(turns)}]"


# --- text that is not Unicode -----------------------------------------------------------------------------------
def _texts(row: PromptRow) -> list[str]:
    texts = [turn["content"] for turn in row["messages"]]
    return [row["prompt_id"], *texts, row["answer"] or "", row["source"] or "", row.get("conversation") or ""]


def _mended(row: PromptRow) -> PromptRow:
    """The row with U+FFFD and a reason; what was told apart before stays told apart."""
    prompt_id, conversation = row["prompt_id"], row.get("conversation")
    return PromptRow(
        prompt_id=prompt_id if is_unicode(prompt_id) else f"{replaced(prompt_id)}-{compact(prompt_id).hex()[:8]}",
        messages=[{"role": turn["role"], "content": replaced(turn["content"])} for turn in row["messages"]],
        answer=None if row["answer"] is None else replaced(row["answer"]),
        source=None if row["source"] is None else replaced(row["source"]),
        error=next(not_unicode(text) for text in _texts(row) if not is_unicode(text)),
        conversation=None if conversation is None else replaced(conversation),
    )


def replaced(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which no Parquet file can hold."""
    return _SURROGATE.sub("\ufffd", text)


def not_unicode(text: str) -> str:
    """What stands before the colon is the kind under which failures are counted."""
    found = _SURROGATE.search(text)
    assert found is not None
    code, place = ord(found[0]), f"character {found.start() + 1} of {short(replaced(text))!r}"
    if 0xDC80 <= code <= 0xDCFF:
        return f"invalid UTF-8: byte 0x{code - 0xDC00:02x} at {place}"
    return f"lone surrogate: U+{code:04X} at {place}"
