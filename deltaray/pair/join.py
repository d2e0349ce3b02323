"""The join at the heart of deltaray: two teachers' responses to one prompt become a candidate pair. Pure."""

from typing import Any

import pyarrow as pa

JOIN_KEYS = ["prompt_id", "sample"]


def join_responses(prompts: pa.Table, chosen: pa.Table, rejected: pa.Table) -> list[dict[str, Any]]:
    """Candidate pairs in the order of the prompts: sample i of one teacher against sample i of the other.

    Args:
        prompts: rows of `contracts.PROMPTS`.
        chosen, rejected: rows of `contracts.RESPONSES`, with a `score` column (null where not scored).
    Returns:
        rows of `contracts.PAIRS` without the token counts, which need the student's tokenizer, and with
        `chosen_finish` and `rejected_finish`, which only the rules look at.
    """
    sides = chosen.join(rejected, JOIN_KEYS, join_type="inner", right_suffix="_rejected")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in sides.to_pylist():
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    return [
        _candidate(prompt, row)
        for prompt in prompts.to_pylist()
        for row in sorted(by_prompt.get(prompt["prompt_id"], []), key=lambda row: row["sample"])
    ]


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
    }


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
