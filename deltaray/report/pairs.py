"""Reads the pair shards of one pairing without holding their texts in memory.

A pairing may have hundreds of thousands of long answers. One pass reads the short columns for counts and
lengths, a second pass picks the texts of a seeded sample.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

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
    files = [path for path in sorted(folder.glob("*.parquet")) if _readable(path, notes)]
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    short = _short_columns(files)
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
        pairs=_within_budget(_pick(files, wanted), wanted, sample.characters),
    )


def _readable(path: Path, notes: list[str]) -> bool:
    """Whether a shard opens; one that does not is left out with a note."""
    try:
        pq.ParquetFile(path).close()
    except (OSError, pa.ArrowException) as error:
        notes.append(f"{path.parent.name}/{path.name} was left out: {str(error).splitlines()[0]}")
        return False
    return True


def _short_columns(files: list[Path]) -> dict[str, pa.ChunkedArray]:
    """The columns without long texts, joined over the shards; absent ones are absent."""
    wanted = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("score", "tokens", "model")]
    found: dict[str, list[pa.Array]] = {}
    for path in files:
        file = pq.ParquetFile(path)
        present = [name for name in wanted if name in file.schema_arrow.names]
        for name, column in zip(present, file.read(columns=present).columns, strict=True):
            found.setdefault(name, []).extend(column.chunks)
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


def _pick(files: list[Path], wanted: list[int]) -> dict[int, Row]:
    """The rows at the global positions `wanted`, by position, read batch by batch."""
    positions = np.sort(np.array(wanted, np.int64))
    picked: dict[int, Row] = {}
    first = 0
    for path in files:
        file = pq.ParquetFile(path)
        present = [name for name in FIELDS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=BATCH, columns=present):
            inside = positions[(positions >= first) & (positions < first + batch.num_rows)]
            rows = batch.take(pa.array(inside - first)).to_pylist() if inside.size else []
            picked.update(zip(inside.tolist(), map(clip, rows), strict=True))
            first += batch.num_rows
    return picked


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
    for position in wanted:
        sides = (picked[position][side] for side in ("prompt", "chosen", "rejected"))
        budget -= ROW + sum(len(message["content"]) for messages in sides for message in messages)
        if budget < 0 and kept:
            break
        kept.append(position)
    return tuple(picked[position] for position in sorted(kept))
