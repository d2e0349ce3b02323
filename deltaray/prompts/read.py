"""Reads prompts from JSONL, JSON, Parquet, CSV or a Hugging Face dataset id, and refuses what cannot be used."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from deltaray.errors import UserError

ROLES = ("system", "user", "assistant")


class PromptRow(TypedDict):
    """One row of `contracts.PROMPTS`."""

    prompt_id: str
    messages: list[dict[str, str]]
    answer: str | None
    source: str | None


def read_prompts(path: str, key: str, limit: int | None = None, drop_duplicates: bool = False) -> list[PromptRow]:
    """All prompts of a file, checked.

    Args:
        path: the file or dataset id. `key`: the recipe's key that names it, for messages. `limit`: rows to use.
        drop_duplicates: keep the first row of an id or text instead of refusing the second.
    Raises:
        UserError: names the file, the row (its line where the format has lines) and the mend.
    """
    rows: list[PromptRow] = []
    seen: dict[str, str] = {}
    for where, raw in _open(path, key):
        row = _normalise(raw, where)
        if row["prompt_id"] in seen:
            if drop_duplicates:
                continue
            kind = "id" if raw.get("id") is not None else "prompt"
            raise UserError(f"{where}: the same {kind} as {seen[row['prompt_id']]}; keep one, or give each its own id")
        seen[row["prompt_id"]] = where
        rows.append(row)
        if limit and len(rows) == limit:
            break
    if not rows:
        raise UserError(f"{path}: holds no prompts ({key}); write one JSON object per line with `prompt` or `messages`")
    return rows


def is_hub_dataset(path: str) -> bool:
    """`owner/name` that is no file here and does not look like one."""
    file = Path(path)
    return path.count("/") == 1 and not (file.exists() or file.is_absolute() or file.suffix in READERS)


def _open(path: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{key}: {path} is a folder; name one file")
    if is_hub_dataset(path):
        return _dataset(path, key)
    if not file.exists():
        raise UserError(f"{key}: there is no file {path}; give a JSONL, JSON, Parquet or CSV file")
    if file.suffix not in READERS:
        raise UserError(f"{key}: {path}: unknown kind {file.suffix!r}; use {', '.join(READERS)}")
    return READERS[file.suffix](file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", _parse(line, f"{file}:{number}")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: broken JSON: {error.msg} at column {error.colno}; write one object per line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: not an object; write {{"prompt": "…"}}')
    return row


def _json(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: broken JSON: {error.msg}; write a list of objects") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of objects; use .jsonl for one object per line")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f'{file}: row {number}: not an object; write {{"prompt": "…"}}')
        yield f"{file}: row {number}", row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        batches = pq.ParquetFile(file).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_text(file).splitlines(keepends=True))
    for row in reader:
        yield f"{file}:{reader.line_num}", {key: value for key, value in row.items() if key and value != ""}


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
"""By the end of the file's name."""


def _dataset(name: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's errors are many; all mean that this id cannot be read here
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: {name!r} is neither a file here nor a dataset that can be loaded: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", dict(row)


def _normalise(raw: dict[str, Any], where: str) -> PromptRow:
    messages = _messages(raw, where)
    identity = raw.get("id")
    prompt_id = str(identity) if identity is not None else _hash(messages)
    answer, source = raw.get("answer"), raw.get("source")
    return PromptRow(
        prompt_id=prompt_id,
        messages=messages,
        answer=None if answer is None else str(answer),
        source=None if source is None else str(source),
    )


def _messages(raw: dict[str, Any], where: str) -> list[dict[str, str]]:
    if raw.get("messages") is not None:
        return _check_messages(raw["messages"], where)
    prompt = raw.get("prompt")
    if isinstance(prompt, list):
        return _check_messages(prompt, where)
    if prompt is None:
        raise UserError(
            f"{where}: neither `prompt` nor `messages`; the row has {', '.join(map(str, raw)) or 'nothing'}"
        )
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: `prompt` is empty or not text; write the user's question")
    return [{"role": "user", "content": prompt}]


def _check_messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `messages` must be a list of {{role, content}}")
    for turn in value:
        good = isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
        if not good:
            raise UserError(f"{where}: a turn needs a role ({', '.join(ROLES)}) and text in `content`, not {turn!r}")
    if value[-1]["role"] != "user":
        raise UserError(f"{where}: the last turn must be the user's; leave the answer out of `messages`")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _hash(messages: list[dict[str, str]]) -> str:
    """Stable over machines and versions: the first 128 bits of SHA-256 over canonical JSON."""
    text = json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
