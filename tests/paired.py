"""Pairs of two teachers over the prompts of a store, without a cluster."""

from typing import Any

import pyarrow as pa

from deltaray.data.contracts import PAIRS, PROMPTS, RESPONSES
from deltaray.data.prompts.shards import shard_name
from deltaray.data.store import Store
from deltaray.pair.shard import pair_shard
from deltaray.pair.token_ids import files_by_shard, missing_tokens, tokenize_file
from deltaray.recipe.models import Student

TEACHERS = ("strong", "weak")


def pair_all(store: Store, student: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the pairs, how many each stage of the funnel removed); a teacher answers with its name and the prompt's id."""
    for path in store.committed(Store.prompts):
        ids = store.read_table(path, PROMPTS.names)["prompt_id"].to_pylist()
        for teacher in TEACHERS:
            table = pa.Table.from_pylist([_response(teacher, it) for it in ids], schema=RESPONSES)
            store.write_table(f"{Store.responses(teacher)}/{shard_name(path)}-x.parquet", table, RESPONSES)
    study: Any = type("Study", (), {"students": {"student": Student(model=student)}, "teachers": {}})
    for unit in missing_tokens(study, store, [("student", teacher) for teacher in TEACHERS]):
        tokenize_file(store, unit)
    tokens = files_by_shard(store, "student", list(TEACHERS))
    removed: dict[str, int] = {}
    for path in store.committed(Store.prompts):
        unit = {
            "pairing": "p", "prompts": path, "spec": {"chosen": "strong", "rejected": "weak"},
            "samples": dict.fromkeys(TEACHERS, 1), "max_length": 2048, "dropped": {}, "chosen": {}, "write": True,
            "tokens": {teacher: tokens[teacher][shard_name(path)] for teacher in TEACHERS},
        }  # fmt: skip
        for stage in pair_shard(store, unit)["funnel"]:
            removed[stage["stage"]] = removed.get(stage["stage"], 0) + stage["removed"]
    return store.read_tables(Store.pairs("p"), PAIRS).to_pylist(), removed


def _response(teacher: str, prompt_id: str) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id, "sample": 0, "teacher": teacher, "text": f"{teacher} {prompt_id}", "reasoning": None,
        "prompt_token_ids": [], "token_ids": [], "tokens": 1, "finish_reason": "stop", "error": None,
    }  # fmt: skip
