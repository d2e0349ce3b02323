"""One row of the user's file as one prompt: what it must hold, what it is called, what of it is not Unicode. Pure."""

import hashlib
import json
import re
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant")
COLUMNS = ("id", "prompt", "messages", "answer", "source")
"""What is read of a row; other columns are left alone."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_quoted = json.encoder.encode_basestring  # what json.dumps(…, ensure_ascii=False) does with one text, in C
SHOWN_CHARACTERS = 80
"""Of a text in a message."""


class PromptRow(TypedDict):
    """One row of `contracts.PROMPTS`."""

    prompt_id: str
    messages: list[dict[str, str]]
    answer: str | None
    source: str | None
    error: str | None


class RowError(ValueError):
    """The row is no prompt; the message says why, and the mend."""


def prompt_row(raw: dict[str, Any]) -> PromptRow:
    """A row of any format as a prompt.

    Text that is not Unicode does not refuse the row: what is wrong becomes U+FFFD, and `error` tells why the prompt
    cannot be asked. In `raw` such text holds lone surrogates: those of JSON's escapes, and U+DC80 … U+DCFF for the
    bytes 0x80 … 0xFF that are no UTF-8 (Python's `surrogateescape`).

    Raises:
        RowError: there is no prompt in it.
    """
    messages = _messages(raw)
    identity, answer, source = _text(raw.get("id")), _text(raw.get("answer")), _text(raw.get("source"))
    row = PromptRow(
        prompt_id=_hash(messages) if identity is None else identity,
        messages=messages,
        answer=answer,
        source=source,
        error=None,
    )
    return row if _is_unicode("".join(_texts(row))) else _mended(row)


def compact(text: str) -> bytes:
    """16 bytes that stand for a text where millions are compared."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def content(messages: list[dict[str, str]], answer: str | None) -> bytes:
    """16 bytes that stand for what is asked and what a verifier compares the answers with."""
    return compact(f"{_canonical(messages)} {'null' if answer is None else _quoted(answer)}")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _text(value: Any) -> str | None:
    if isinstance(value, list | dict):  # tests or instructions for a verifier
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if value is None or isinstance(value, str) else str(value)


def _messages(raw: dict[str, Any]) -> list[dict[str, str]]:
    if raw.get("messages") is not None:
        return _turns(raw["messages"])
    prompt = raw.get("prompt")
    if isinstance(prompt, list):
        return _turns(prompt)
    if prompt is None:
        raise RowError(f"neither `prompt` nor `messages`; the row has {_short(', '.join(raw)) or 'nothing'}")
    if not isinstance(prompt, str) or not prompt or prompt.isspace():
        raise RowError("`prompt` is empty or not text; write the user's question")
    return [{"role": "user", "content": prompt}]


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RowError("`messages` must be a list of {role, content}")
    for turn in value:
        good = isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        if not good:
            raise RowError(f"a turn needs a role ({', '.join(ROLES)}) and text in `content`, not {_short(repr(turn))}")
    if value[-1]["role"] != "user":
        raise RowError("the last turn must be the user's; leave the answer out of `messages`")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _hash(messages: list[dict[str, str]]) -> str:
    """Stable over machines and versions: the first 128 bits of SHA-256 over canonical JSON."""
    return hashlib.sha256(_canonical(messages).encode(errors="surrogatepass")).hexdigest()[:32]


def _canonical(messages: list[dict[str, str]]) -> str:
    """`json.dumps` of the list of [role, content], but several times as fast: roles need no quoting."""
    turns = [f'["{turn["role"]}", {_quoted(turn["content"])}]' for turn in messages]
    return f"[{', '.join(turns)}]"


# --- text that is not Unicode -----------------------------------------------------------------------------------
def _texts(row: PromptRow) -> list[str]:
    texts = [turn["content"] for turn in row["messages"]]
    return [row["prompt_id"], *texts, row["answer"] or "", row["source"] or ""]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mended(row: PromptRow) -> PromptRow:
    """The row with U+FFFD and a reason; what was told apart before stays told apart."""
    prompt_id = row["prompt_id"]
    return PromptRow(
        prompt_id=prompt_id if _is_unicode(prompt_id) else f"{_replace(prompt_id)}-{compact(prompt_id).hex()[:8]}",
        messages=[{"role": turn["role"], "content": _replace(turn["content"])} for turn in row["messages"]],
        answer=None if row["answer"] is None else _replace(row["answer"]),
        source=None if row["source"] is None else _replace(row["source"]),
        error=next(_reason(text) for text in _texts(row) if not _is_unicode(text)),
    )


def _replace(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _reason(text: str) -> str:
    """What stands before the colon is the kind under which failures are counted."""
    found = _SURROGATE.search(text)
    assert found is not None
    code, place = ord(found[0]), f"character {found.start() + 1} of {_short(_replace(text))!r}"
    if 0xDC80 <= code <= 0xDCFF:
        return f"invalid UTF-8: byte 0x{code - 0xDC00:02x} at {place}"
    return f"lone surrogate: U+{code:04X} at {place}"
