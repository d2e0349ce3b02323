"""Rows of JSONL, JSON, Parquet and CSV files and of Hugging Face data sets, one by one, whatever their size."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltaray.data.prompts.rows import COLUMNS
from deltaray.data.prompts.text import BUFFER_BYTES, CODECS, TEXT_READERS, Numbered, read_text, refuse_repeated
from deltaray.data.prompts.turns import RowError
from deltaray.data.prompts.view import WHOLE, View
from deltaray.errors import UserError, door, first_line
from deltaray.recipe.models import is_there

BATCH_ROWS = 1024
"""Rows of a Parquet file or data set in memory at once."""
READERS = (*TEXT_READERS, ".parquet")
"""By the end of the file's name; text may be compressed (`CODECS`)."""
SHOWN_NAMES = 20
UNREAD = (
    "system", "system_prompt", "instruction", "input", "context", "documents", "tools", "functions", "image", "images",
    "video", "videos", "audio", "audios", "reasoning", "thinking", "chosen_reasoning", "rejected_reasoning",
)  # fmt: skip
"""Columns that mean something to an answer: the user hears of those that are not read."""

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Tells nobody."""


def open_rows(
    path: str, key: str, columns: tuple[str, ...] = COLUMNS, view: View = WHOLE, say: Say = silent
) -> Numbered:
    """The rows of a prompt file or data set; numbers that are none (NaN, infinity) are null.

    Args:
        key: the recipe's key that names it, for messages.
        columns: what is read of a row, where others can be left out. view: which part of a data set.
        say: is told once of every column that is not read though it means something.
    Raises:
        UserError: there is no such file, or it is not of its kind; raised when that part is reached.
    """
    with door(f"{key}: {path}"):
        return _told(_opened(path, key, columns, view, say), path)


def _told(rows: Numbered, path: str) -> Numbered:
    """The rows; whatever a library raises over one of them names the file."""
    with door(path, "cannot be read"):
        yield from rows


@contextmanager
def row_door(path: str, number: int) -> Iterator[None]:
    """What is wrong with a row becomes one message with its place.

    Raises:
        UserError: the row is not what it should be, or a library could make nothing of it.
    """
    try:
        with door(place(path, number), "cannot be used"):
            yield
    except UserError as error:
        if isinstance(error.__cause__, RowError):
            raise UserError(f"{place(path, number)}: {error.__cause__}") from None
        raise


def _opened(path: str, key: str, columns: tuple[str, ...], view: View, say: Say) -> Numbered:
    file, kind = Path(path), kind_of(path)
    if file.is_dir():
        raise UserError(f"{key}: {path} is a folder; name one file")
    if is_hub_dataset(path):
        return _finite(_dataset(path, key, columns, view, say))
    if not file.exists():
        raise UserError(f"{key}: there is no file {path}; give a JSONL, JSON, Parquet or CSV file")
    if kind not in READERS or (kind == ".parquet" and file.suffix.lower() != kind):
        codecs = ", ".join(CODECS)
        raise UserError(
            f"{key}: {path}: unknown kind {''.join(file.suffixes[-2:])!r}; use {', '.join(READERS)}, or one of the "
            f"first three with {codecs} behind it"
        )
    if not file.is_file():
        raise UserError(f"{key}: {path} is a pipe or a device, which may never end; name an ordinary file")
    for what, named in (("config", view.config), ("split", view.split)):
        if named not in (None, "train"):
            say(f"{key}: {path} is a file and has no `{what}`: {named!r} is ignored")
    if kind == ".parquet":
        return _finite(_parquet(file, key, columns, view, say))
    return _finite(_noticed(read_text(file, kind), key, columns, say))


def kind_of(path: str) -> str:
    """The end of a file's name that says what is in it, without that of a codec."""
    file = Path(path)
    return (Path(file.stem) if file.suffix.lower() in CODECS else file).suffix.lower()


def is_hub_dataset(path: str) -> bool:
    """`owner/name` that is not a file here and does not look like one."""
    file = Path(path)
    return path.count("/") == 1 and not (is_there(path) or file.is_absolute() or kind_of(path) in READERS)


def place(path: str, number: int) -> str:
    """Where a row is, for messages."""
    return f"{path}:{number}" if kind_of(path) in TEXT_READERS and not is_hub_dataset(path) else f"{path}: row {number}"


def files_of(path: str, key: str, view: View = WHOLE) -> list[Path]:
    """The local files that hold what is read; empty if there are none."""
    if not is_hub_dataset(path):
        return [Path(path)]
    return [Path(item["filename"]) for item in _load_dataset(path, key, view.config, view.split).cache_files]


def _finite(rows: Numbered) -> Numbered:
    for number, row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None
        yield number, row


# --- columns ----------------------------------------------------------------------------------------------------
def _noticed(rows: Numbered, key: str, columns: tuple[str, ...], say: Say) -> Numbered:
    """The rows; tells once of each column in `UNREAD` that holds something and is not read."""
    left = set(UNREAD) - set(columns)
    for number, row in rows:
        for name in [name for name in left.intersection(row) if row[name]]:
            left.remove(name)
            _tell(name, key, say)
        yield number, row


def _tell(name: str, key: str, say: Say) -> None:
    say(f"{key}: column {name!r} is ignored: what it says reaches neither prompts nor answers")


def _wanted(names: list[str], path: str, key: str, columns: tuple[str, ...], view: View, say: Say) -> list[str]:
    """What is read of a table's columns.

    Raises:
        UserError: one that the recipe names, or one that is always needed, is not there.
    """
    refuse_repeated(names, path)
    there = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "") or "none"
    for ours, theirs in view.columns.items():
        if theirs not in names:
            raise UserError(f"{path}: no column {theirs!r} (columns.{ours}); the columns are {there}")
    ours_there = {*names, *view.columns}
    if "chosen" in columns and not {"chosen", "rejected"} <= ours_there:
        raise UserError(f"{path}: no `chosen` and `rejected`; the columns are {there}")
    if set(COLUMNS) <= set(columns) and not {"prompt", "messages"} & ours_there:
        raise UserError(f"{path}: neither `prompt` nor `messages`; the columns are {there}")
    for name in sorted(set(UNREAD).intersection(names) - set(columns)):
        _tell(name, key, say)
    return [name for name in columns if name in names]


# --- Arrow ------------------------------------------------------------------------------------------------------
def _parquet(file: Path, key: str, columns: tuple[str, ...], view: View, say: Say) -> Numbered:
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as source:
            found = _wanted(source.schema_arrow.names, str(file), key, columns, view, say)
            yield from _arrow_rows(source.iter_batches(BATCH_ROWS, columns=found))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {first_line(error)}") from None


def _arrow_rows(batches: Iterable[Any]) -> Numbered:
    """Rows of record batches or tables."""
    number = 0
    for batch in batches:
        for row in _python_rows(batch):
            number += 1
            yield number, row


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    """Arrow itself reads no invalid UTF-8, and leaves text that is declared as bytes undecoded."""
    if not any("binary" in str(kind) for kind in batch.schema.types):
        try:
            return list(batch.to_pylist())
        except UnicodeDecodeError:
            pass
    columns = {name: [_value(item) for item in batch[name]] for name in batch.schema.names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _value(scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(item) for item in scalar.values]
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.dictionary[scalar.index.as_py()])
    buffer = getattr(scalar, "as_buffer", None)  # of strings and bytes
    return scalar.as_py() if buffer is None else buffer().to_pybytes().decode(errors="surrogateescape")


# --- the hub ----------------------------------------------------------------------------------------------------
def _dataset(name: str, key: str, columns: tuple[str, ...], view: View, say: Say) -> Numbered:
    rows = _load_dataset(name, key, view.config, view.split)
    wanted = rows.select_columns(_wanted(rows.column_names, name, key, columns, view, say))
    yield from _arrow_rows(wanted.with_format("arrow").iter(BATCH_ROWS))


@lru_cache(maxsize=2)
def _load_dataset(name: str, key: str, config: str | None, split: str | None) -> Any:
    """The data set in the local cache, mapped into memory: a study that is resumed needs no second download."""
    import datasets

    try:
        return datasets.load_dataset(*filter(None, (name, config)), split=split or "train")
    except Exception as error:  # the hub's errors are many; all mean that this id cannot be read here
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        section = key.removesuffix(".path")
        if "nknown split" in reason or "nrecognized instruction" in reason:
            asked = f"has no split {split!r}" if split else "has no split 'train', which is read where none is named"
            raise UserError(f"{section}.split: {name!r} {asked}: {reason}; name one that exists") from None
        if "onfig name is missing" in reason or "uilderConfig" in reason:
            raise UserError(f"{section}.config: {name!r}: {reason}; name one that exists") from None
        raise UserError(f"{key}: {name!r} is neither a file here nor a dataset that can be loaded: {reason}") from None
