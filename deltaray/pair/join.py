"""The join at the heart of deltaray: two teachers' responses to one prompt become a candidate pair. Pure."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deltaray.store import keys_of

JOIN_KEYS = ["prompt_id", "sample"]


def join_responses(
    prompts: pa.Table, chosen: pa.Table, rejected: pa.Table, at_once: int = 2048
) -> Iterator[list[dict[str, Any]]]:
    """Candidate pairs in the order of the prompts: sample i of one teacher against sample i of the other.

    They come in lists of at most `at_once`, so that a large shard never stands in memory as Python objects.

    Args:
        prompts: rows of `contracts.PROMPTS`.
        chosen, rejected: rows of `contracts.RESPONSES`, with a `score` column (null where not scored).
    Returns:
        rows of `contracts.PAIRS` without the token counts, which need the student's tokenizer, and with
        `chosen_finish`, `rejected_finish`, `chosen_error` and `rejected_error`, which only the rules look at.
    """
    rejected = rejected.rename_columns(
        [name if name in JOIN_KEYS else f"{name}_rejected" for name in rejected.column_names]
    )
    sides = _join_by_row(chosen, rejected)
    place = pc.index_in(sides["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    sides = sides.append_column("place", place).sort_by([("place", "ascending"), ("sample", "ascending")])
    sides = sides.filter(pc.is_valid(sides["place"]))
    for start in range(0, len(sides), at_once):
        rows = sides.slice(start, at_once)
        asked = prompts.take(rows["place"]).to_pylist()
        yield [_candidate(prompt, row) for prompt, row in zip(asked, rows.to_pylist(), strict=True)]


def _join_by_row(chosen: pa.Table, rejected: pa.Table) -> pa.Table:
    """The rows of both sides with equal keys, side by side; the keys of each side are unique."""
    partner = pc.index_in(keys_of(chosen), value_set=keys_of(rejected).combine_chunks())
    found = pc.is_valid(partner)
    chosen, rejected = chosen.filter(found), rejected.take(partner.filter(found))
    for name in rejected.column_names:
        if name not in JOIN_KEYS:
            chosen = chosen.append_column(name, rejected[name])
    return chosen


def _candidate(prompt: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    scores = row["score"], row["score_rejected"]
    return {
        "prompt_id": prompt["prompt_id"],
        "prompt": prompt["messages"],
        "chosen": _turn(row["text"]),
        "rejected": _turn(row["text_rejected"]),
        "chosen_model": row["teacher"],
        "rejected_model": row["teacher_rejected"],
        "chosen_score": scores[0],
        "rejected_score": scores[1],
        "delta": None if None in scores else scores[0] - scores[1],
        "source": prompt["source"],
        "answer": prompt["answer"],
        "chosen_sample": row["sample"],
        "rejected_sample": row["sample"],
        "chosen_finish": row["finish_reason"],
        "rejected_finish": row["finish_reason_rejected"],
        "chosen_error": row["error"],
        "rejected_error": row["error_rejected"],
    }


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
