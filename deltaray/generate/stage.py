"""Generate: every teacher answers every prompt once, each with its own chat template and its own vLLM pool."""

import zlib
from typing import Any

import pyarrow as pa

from deltaray.contracts import RESPONSES
from deltaray.generate.pools import OnRows, run_pools
from deltaray.generate.share import shared_pools
from deltaray.generate.units import Unit, missing_units
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.store import Store


def teacher_units(study: Study, store: Store, name: str) -> list[Unit]:
    """What a teacher still has to answer.

    Its name goes into its seed: two teachers that draw with the same random numbers would give the same answers
    wherever they agree on the likely ones, and identical pairs teach nothing.
    """
    teacher = study.teachers[name]
    seed = zlib.crc32(f"{name}#{teacher.sampling.seed}".encode())
    sampling = teacher.sampling.model_copy(update={"seed": seed})
    return missing_units(store, Store.prompts, Store.responses(name), teacher, sampling, name=name)


def generate(study: Study, store: Store, capacity: Capacity, on_rows: OnRows) -> int:
    """Completes the responses of all teachers that a pairing uses; returns how many were made."""
    work = [(study.teachers[name], teacher_units(study, store, name)) for name in study.paired_teachers()]
    pools = shared_pools([(teacher, teacher.engine, units) for teacher, units in work if units], capacity)
    run_pools(store, pools, capacity, write_responses, on_rows)
    return sum(len(unit["prompt_ids"]) * unit["samples"] for pool in pools for unit in pool.units)


def write_responses(store: Store, unit: Unit) -> dict[str, Any]:
    """Commits a unit's responses as one file."""
    rows = [
        {
            "prompt_id": prompt_id,
            "sample": sample,
            "teacher": unit["name"],
            "text": output["text"],
            "prompt_token_ids": token_ids,
            "token_ids": output["token_ids"],
            "tokens": len(output["token_ids"]),
            "finish_reason": output["finish_reason"],
            "error": output["error"],
        }
        for prompt_id, token_ids, outputs in zip(unit["prompt_ids"], unit["token_ids"], unit["outputs"], strict=True)
        for sample, output in enumerate(outputs)
    ]
    store.write_table(unit["destination"], pa.Table.from_pylist(rows, schema=RESPONSES), RESPONSES)
    return {"name": unit["name"], "rows": len(rows), "tokens": sum(row["tokens"] for row in rows)}
