"""Reads the pair shards of one pairing without holding their texts in memory.

A pairing may have hundreds of thousands of long answers. One pass reads the short columns for counts and
lengths, a second pass picks the texts of a seeded sample.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .files import attempt
from .model import FunnelStep, Pairing, Tokens

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]

BATCH = 256
CLIP = 20_000
"""Characters of one message that the page keeps."""
BUDGET = 16_000_000
"""Characters that all pairings of a page may embed together, so that the page opens on a phone."""
ROW = 350
"""Characters that a pair takes beside its texts."""
FIELDS = (
    "prompt_id", "prompt", "chosen", "rejected", "chosen_model", "rejected_model", "chosen_score",
    "rejected_score", "delta", "chosen_tokens", "rejected_tokens", "source", "answer", "chosen_sample",
    "rejected_sample",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the page may embed of one pairing: at most `limit` rows with `characters` in all."""

    limit: int
    characters: int
    seed: int = 0


def read_pairing(folder: Path, funnel: tuple[FunnelStep, ...], sample: Sample, notes: list[str]) -> Pairing:
    """Counts and lengths of all rows, texts of a sample; damage is noted, never raised."""
    name = folder.name.removeprefix("pairing=")
    tables = {path: attempt(path, _short, None, notes) for path in sorted(folder.glob("*.parquet"))}
    files = {path: len(table) for path, table in tables.items() if table is not None}
    rows = sum(files.values())
    short = _joined([tables[path] for path in files])
    chosen_scores, rejected_scores = _floats(short, "chosen_score"), _floats(short, "rejected_score")
    binary = _binary(np.concatenate([chosen_scores, rejected_scores]))
    wanted = random.Random(f"{sample.seed}-{name}").sample(range(rows), min(sample.limit, rows))
    return Pairing(
        name=name,
        rows=rows,
        funnel=funnel,
        chosen_lengths=_lengths(short, "chosen_tokens"),
        rejected_lengths=_lengths(short, "rejected_tokens"),
        binary=binary,
        chosen_right=_share_right(chosen_scores) if binary else None,
        rejected_right=_share_right(rejected_scores) if binary else None,
        teachers=_teachers(short),
        pairs=_within_budget(_pick(files, wanted, notes), wanted, sample.characters),
    )


def opened(path: Path) -> pq.ParquetFile:
    """A Parquet file whose pages are checked where they bear checksums, as all of ours do."""
    return pq.ParquetFile(path, page_checksum_verification=True)


def _short(path: Path) -> pa.Table:
    """A file's columns without long texts; absent ones are absent."""
    with opened(path) as file:
        wanted = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("score", "tokens", "model")]
        return file.read(columns=[name for name in wanted if name in file.schema_arrow.names])


def _joined(tables: list[pa.Table]) -> dict[str, pa.ChunkedArray]:
    """Their columns, joined over the files."""
    found: dict[str, list[pa.Array]] = {}
    for table in tables:
        for name in table.column_names:
            found.setdefault(name, []).extend(table[name].chunks)
    return {name: pa.chunked_array(chunks) for name, chunks in found.items() if chunks}


def _floats(columns: dict[str, pa.ChunkedArray], name: str) -> Floats:
    """A score column; null is NaN."""
    if name not in columns:
        return np.zeros(0)
    return np.asarray(columns[name].cast(pa.float64()).to_numpy(), np.float64)


def _lengths(columns: dict[str, pa.ChunkedArray], name: str) -> Tokens:
    """A token count column without its nulls."""
    if name not in columns:
        return np.zeros(0, np.int64)
    return np.asarray(columns[name].drop_null().cast(pa.int64()).to_numpy(), np.int64)


def _binary(scores: Floats) -> bool:
    """Whether the scores say right or wrong: some are there and each is 0 or 1."""
    known = scores[~np.isnan(scores)]
    return bool(known.size) and bool(np.isin(known, (0.0, 1.0)).all())


def _share_right(scores: Floats) -> float | None:
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else None


def _teachers(columns: dict[str, pa.ChunkedArray]) -> tuple[str, ...]:
    """The model names of both sides, sorted."""
    names: set[str] = set()
    for side in ("chosen_model", "rejected_model"):
        if side in columns:
            names |= {str(name) for name in columns[side].unique().to_pylist() if name}
    return tuple(sorted(names))


def _pick(files: dict[Path, int], wanted: list[int], notes: list[str]) -> dict[int, Row]:
    """The rows at the global positions `wanted`, by position; those of a file that cannot be read are left out.

    Args:
        files: with their rows.
    """
    positions = np.sort(np.array(wanted, np.int64))
    picked: dict[int, Row] = {}
    first = 0
    for path, rows in files.items():
        inside = positions[(positions >= first) & (positions < first + rows)] - first
        found = attempt(path, partial(_rows_of, inside), list[Row](), notes)
        picked.update(zip((inside + first).tolist(), found, strict=False))
        first += rows
    return picked


def _rows_of(positions: npt.NDArray[np.int64], path: Path) -> list[Row]:
    """Some rows of a file, read batch by batch."""
    found: list[Row] = []
    with opened(path) as file:
        first, present = 0, [name for name in FIELDS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=BATCH, columns=present):
            inside = positions[(positions >= first) & (positions < first + batch.num_rows)]
            found += map(clip, batch.take(pa.array(inside - first)).to_pylist() if inside.size else [])
            first += batch.num_rows
    return found


def clip(row: Row) -> Row:
    """A row whose messages are cut at CLIP characters; `cut` counts the rest. Null and NaN go."""
    for side in ("prompt", "chosen", "rejected"):
        row[side] = [_clip_message(message) for message in row.get(side) or []]
    return {key: value for key, value in row.items() if value is not None and value == value}


def _clip_message(message: Row) -> Row:
    content = str(message.get("content") or "")
    clipped: Row = {"role": str(message.get("role") or "unknown"), "content": content[:CLIP]}
    if len(content) > CLIP:
        clipped["cut"] = len(content) - CLIP
    return clipped


def _within_budget(picked: dict[int, Row], wanted: list[int], budget: int) -> tuple[Row, ...]:
    """Rows in the random order of `wanted` until the characters run out, then in shard order.

    At least one row stays, so that a pairing never looks empty by mistake.
    """
    kept: list[int] = []
    for position in filter(picked.__contains__, wanted):
        sides = (picked[position][side] for side in ("prompt", "chosen", "rejected"))
        budget -= ROW + sum(len(message["content"]) for messages in sides for message in messages)
        if budget < 0 and kept:
            break
        kept.append(position)
    return tuple(picked[position] for position in sorted(kept))
