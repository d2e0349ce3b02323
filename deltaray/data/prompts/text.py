"""Rows of text files: JSON Lines, JSON and CSV, plain or compressed, each with the line it begins in.

Bytes that are not UTF-8 stay in the text as lone surrogates (`surrogateescape`): `rows.py` tells what to do with them.
NaN and infinity, which JSON does not know and pandas writes, are null.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from deltaray.errors import UserError
from deltaray.limits import JSON_FILE_BYTES, ROW_BYTES

Numbered = Iterator[tuple[int, dict[str, Any]]]
"""Rows with their line (formats that have lines) or number, from 1."""

BUFFER_BYTES = 1 << 20
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""By the end of the file's name."""
UTF8_MARK = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"


def read_text(file: Path, kind: str) -> Numbered:
    """The rows of a file of one of `TEXT_READERS`' kinds.

    Raises:
        UserError: the file cannot be read, or is not what its name says; with file and line.
    """
    codec = CODECS.get(file.suffix.lower())
    try:
        with _open(file, codec) as source:
            yield from TEXT_READERS[kind](file, source)
    except OSError as error:  # a codec's failure has no errno
        what = f"not a whole {codec} file: {error}" if codec and error.errno is None else error.strerror or error
        raise UserError(f"{file}: cannot be read: {what}") from None


def _open(file: Path, codec: str | None) -> BinaryIO:
    """The file's text behind its byte order mark."""
    raw: Any = pa.input_stream(str(file), compression=codec) if codec else file.open("rb", buffering=0)
    source = io.BufferedReader(raw, BUFFER_BYTES)
    try:
        start = source.peek(4)[:4]
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(start) == 4 and 0 in (start[0], start[1]) and any(start)):
            raise UserError(f"{file}:1: not UTF-8 text but UTF-16 or UTF-32; save the file as UTF-8")
        if start.startswith(UTF8_MARK):
            source.read(len(UTF8_MARK))
    except BaseException:
        source.close()
        raise
    return cast(BinaryIO, source)


def _decode(line: bytes) -> str:
    return line.decode(errors="surrogateescape")


# --- JSON -------------------------------------------------------------------------------------------------------
class _RepeatedError(ValueError):
    """A key stands twice in one object."""


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        key, _ = Counter(key for key, _ in items).most_common(1)[0]
        raise _RepeatedError(f"the key {key!r} is there twice in one object")
    return found


_json = json.JSONDecoder(
    strict=False,  # control characters inside strings are text like any other
    object_pairs_hook=_object,
    parse_constant=lambda _: None,
)


def _jsonl(file: Path, source: BinaryIO) -> Numbered:
    for number, line in enumerate(iter(lambda: source.readline(ROW_BYTES + 1), b""), start=1):
        if len(line) > ROW_BYTES:
            raise UserError(f"{file}:{number}: a line of more than {ROW_BYTES:,} bytes; write one object per line")
        if not line.isspace():
            yield number, _parse(_decode(line), file, number)


def _parse(line: str, file: Path, number: int) -> dict[str, Any]:
    start = len(line) - len(line.lstrip(_SPACE))
    try:
        row, end = _json.raw_decode(line, start)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}:{number}: broken JSON: {_why(error)}; write one object per line") from None
    rest = line[end:].strip(_SPACE)
    if rest:
        what = "a comma" if rest == "," else "a second object" if rest[0] == "{" else "something else"
        raise UserError(f"{file}:{number}: broken JSON: {what} follows the object; write one object per line, no more")
    return _checked(row, f"{file}:{number}")


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where}: not an object; write {{"prompt": "…"}}')
    return row


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_list(file: Path, source: BinaryIO) -> Numbered:
    """The objects of one list, one by one: each has its line, and what is wrong with it has one, too."""
    content = source.read(JSON_FILE_BYTES + 1)
    if len(content) > JSON_FILE_BYTES:
        raise UserError(f"{file}: more than {JSON_FILE_BYTES:,} bytes; use .jsonl, which is read line by line")
    text = _decode(content)
    at = _next(text, 0)
    if text[at : at + 1] != "[":
        raise UserError(f"{file}: not a list of objects; use .jsonl for one object per line")
    line, counted, at = 1, 0, _next(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = _json.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UserError(f"{file}:{line}: broken JSON: {_why(error)}; write a list of objects") from None
        yield line, _checked(row, f"{file}:{line}")
        at = _next(text, at)
        more = text[at : at + 1] == ","
        at = _next(text, at + 1) if more else at
    if text[at : at + 1] != "]" or text[at + 1 :].strip(_SPACE):
        line += text.count("\n", counted, at)
        raise UserError(f"{file}:{line}: broken JSON: the list does not end here as it should; write a list of objects")


def _next(text: str, at: int) -> int:
    """Where the next character that is not a space stands."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


# --- CSV --------------------------------------------------------------------------------------------------------
def _csv(file: Path, source: BinaryIO) -> Numbered:
    """An empty field is null. A row's line is that of its beginning: a quoted text may go over several."""
    csv.field_size_limit(ROW_BYTES)  # what a quote that is left open may take into memory
    text = io.TextIOWrapper(source, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)  # else a quote left open would swallow the rest of the file
    names: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if fields and names is None:
                names = _header(fields, f"{file}:{line}")
            elif fields and names is not None:
                yield line, _row(names, fields, f"{file}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}:{reader.line_num}: broken CSV: {error}; is a quote left open, or not doubled?"
        ) from None


def _header(names: list[str], where: str) -> list[str]:
    refuse_repeated([name for name in names if name], where)
    return names


def refuse_repeated(names: list[str], where: str) -> None:
    """UserError if a column is there twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column {twice[0]!r} is there twice; rename one of them, or leave it out")


def _row(names: list[str], fields: list[str], where: str) -> dict[str, Any]:
    if len(fields) != len(names):
        raise UserError(
            f"{where}: {len(fields)} fields where the header has {len(names)}; put text that holds commas or line "
            'breaks into double quotes ("), and double those inside it'
        )
    return {name: value or None for name, value in zip(names, fields, strict=True) if name}


TEXT_READERS: dict[str, Callable[[Path, BinaryIO], Numbered]] = {".jsonl": _jsonl, ".json": _json_list, ".csv": _csv}
"""By the end of the file's name, without that of a codec."""
