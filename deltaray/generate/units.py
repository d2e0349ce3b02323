"""Units of generation: which prompts one model still has to answer, shard by shard. Pure but for reading the store."""

import hashlib
import json
from functools import lru_cache
from typing import Any

import pyarrow.compute as pc

from deltaray.chat import load_tokenizer, prompt_ids
from deltaray.contracts import PROMPTS
from deltaray.prompts.shards import shard_name
from deltaray.recipe.models import Model, Sampling
from deltaray.store import Store, keys_of

Unit = dict[str, Any]
"""One row of the stream and one Parquet file: unit_id, model, tokenizer (a `Model` as JSON), prompts (a shard's path),
prompt_ids, samples, sampling (JSON), destination, and what the stage that made it wants back when it is written."""


def missing_units(
    store: Store, prompts: str, destination: str, model: Model, sampling: Sampling, **extra: Any
) -> list[Unit]:
    """The units that complete `destination`: one per shard of `prompts` that lacks answers there.

    A unit holds only the prompts that miss a sample, and its file is named after them: whoever computes it again
    writes the same file.
    """
    units = []
    committed = store.committed(destination)
    for path in store.committed(prompts):
        shard = shard_name(path)
        done: set[str] = set()
        for file in committed:
            if shard_name(file).startswith(f"{shard}-"):
                done |= set(keys_of(store.read_table(file, ["prompt_id", "sample"])).to_pylist())
        ids = store.read_table(path, ["prompt_id"])["prompt_id"].to_pylist()
        todo = [item for item in ids if any(f"{item}#{n}" not in done for n in range(sampling.samples))]
        if todo:
            name = f"{shard}-{_digest(todo)}"
            units.append(
                {
                    "unit_id": f"{destination}/{name}",
                    "model": model.model,
                    "tokenizer": model.model_dump_json(include=set(Model.model_fields)),
                    "prompts": path,
                    "prompt_ids": todo,
                    "samples": sampling.samples,
                    "sampling": json.dumps(sampling.model_dump(exclude={"samples"})),
                    "destination": f"{destination}/{name}.parquet",
                    **extra,
                }
            )
    return units


def read_prompts_of(store: Store, unit: Unit) -> list[dict[str, Any]]:
    """The prompt rows of a unit, in the order of its prompt_ids."""
    table = store.read_table(unit["prompts"], PROMPTS.names)
    wanted = list(unit["prompt_ids"])
    rows = {row["prompt_id"]: row for row in table.filter(pc.field("prompt_id").isin(wanted)).to_pylist()}
    return [rows[item] for item in wanted]


@lru_cache(maxsize=8)
def _tokenizer(model: str) -> Any:
    return load_tokenizer(Model.model_validate_json(model), "model")


def load_unit(store: Store, unit: Unit) -> Unit:
    """Adds the prompts' token ids, rendered by the model's own template, and their answers."""
    tokenizer = _tokenizer(unit["tokenizer"])
    rows = read_prompts_of(store, unit)
    token_ids = [prompt_ids(tokenizer, row["messages"]) for row in rows]
    return {**unit, "token_ids": token_ids, "answers": [row["answer"] for row in rows]}


def _digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:8]
