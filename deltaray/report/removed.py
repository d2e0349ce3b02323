"""Candidates that a rule of a pairing removed: how many by each, and a bounded number of them with their texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from .files import attempt
from .pairs import BATCH, Row, clip, opened

SHOWN = 40
"""Of each reason, at most."""


@dataclass(frozen=True)
class Removed:
    """`reasons`: rows by reason, in the order of the rules; `rows`: some of them with their texts."""

    reasons: dict[str, int]
    rows: tuple[Row, ...]


def read_removed(folder: Path, characters: int, notes: list[str]) -> Removed:
    """Reads the candidates that a pairing lost; damage is noted, never raised.

    Args:
        characters: of all texts together; what comes after goes without, every reason alike.
    """
    files = sorted(folder.glob("*.parquet"))
    reasons, found = Counter[str](), dict[str, list[Row]]()
    for path in files:
        attempt(path, lambda path: _read(path, max(1, SHOWN // len(files)), reasons, found), None, notes)
    kept = [row for rows in found.values() for row in _within(rows, characters // max(len(found), 1))]
    return Removed(dict(reasons), tuple(kept))


def _read(path: Path, most: int, reasons: Counter[str], found: dict[str, list[Row]]) -> None:
    """Adds a file's rows to `reasons`, and of each reason up to `most` with texts to `found`."""
    with opened(path) as file:
        here = Counter[str]()
        for batch in file.iter_batches(BATCH):
            for count in pc.value_counts(batch["reason"]).to_pylist():
                reasons[count["values"]] += count["counts"]
            for row in batch.filter(pc.is_valid(batch["chosen"])).to_pylist():
                here[row["reason"]] += 1
                rows = found.setdefault(row["reason"], [])
                if here[row["reason"]] <= most and len(rows) < SHOWN:
                    rows.append(clip(row))


def _within(rows: list[Row], characters: int) -> list[Row]:
    """The first rows until the characters run out; at least one."""
    kept: list[Row] = []
    for row in rows:
        characters -= sum(len(turn["content"]) for side in ("prompt", "chosen", "rejected") for turn in row[side])
        if characters < 0 and kept:
            break
        kept.append(row)
    return kept
