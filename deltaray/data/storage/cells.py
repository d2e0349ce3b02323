"""Tables as CSV, in which no text can become a formula where somebody opens it in a spreadsheet."""

import io
import re

import pyarrow as pa
from pyarrow import csv

_FORMULA = re.compile(r"[\x00-\x20\u00a0\u3000\ufeff]*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""What makes a spreadsheet take a cell for a formula, or run it together with the next one."""


def csv_bytes(table: pa.Table) -> bytes:
    """A table of numbers and texts as UTF-8 CSV. Numbers stay as they are."""
    columns = [_harmless(column) if _is_text(column.type) else column for column in table.columns]
    names = [harmless(name) for name in table.column_names]
    buffer = io.BytesIO()
    csv.write_csv(pa.table(columns, names=names), buffer)
    return buffer.getvalue()


def harmless(text: str) -> str:
    """A cell's text; one that a spreadsheet would calculate begins with an apostrophe, which makes it text. Pure."""
    return f"'{text}" if _FORMULA.match(text) and not _is_numbers(text) else text


def _harmless(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([None if text is None else harmless(text) for text in column.to_pylist()], pa.string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_numbers(text: str) -> bool:
    """Numbers with single spaces between them."""
    return all(re.fullmatch(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?", part) for part in text.split(" "))
