"""Small files of an output folder.

A report is also asked for in the middle of a study and after a crash: a missing file is normal, a damaged one
becomes a note on the page, and only the part that it would have fed is absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deltaray.errors import PASSING, first_line

from .model import number

Value = TypeVar("Value")

SEED_SUFFIX = re.compile(r"(.+)-seed(\d+)")


def attempt(path: Path, read: Callable[[Path], Value], missing: Value, notes: list[str]) -> Value:
    """`read(path)`, or `missing` when the file is absent or damaged; damage is noted."""
    if not path.is_file():
        return missing
    try:
        return read(path)
    except PASSING:
        raise
    except BaseException as error:
        notes.append(f"{path.parent.name}/{path.name} could not be read: {first_line(error)}")
        return missing


def split_seed(name: str) -> tuple[str, int | None]:
    """`delta-seed2` is seed 2 of `delta`; a name without the suffix has no seed."""
    match = SEED_SUFFIX.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a half-written last line is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def whole(value: object) -> int | None:
    """A count, or None for anything that is not a finite number."""
    found = number(value)
    return None if found is None else int(found)
