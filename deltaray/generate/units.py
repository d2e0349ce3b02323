"""Units of generation: which responses a model still owes, shard by shard. Pure but for reading the store."""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaray.chat import Message, load_tokenizer, prompts_ids
from deltaray.contracts import PROMPTS
from deltaray.generate.staging import failed_rows, folder_of, keys_in, staged_files, unless_moved
from deltaray.prompts.shards import read_rows, shard_name
from deltaray.recipe.models import Model, Teacher
from deltaray.store import Store

Unit = dict[str, Any]
"""What one call of an engine answers and one commit holds. From the planner: unit_id, name (who is counted), model,
adapter, reasoning, teacher (a `Teacher` as JSON), prompts (a shard's path), rows (places in it), samples (the sample
indexes wanted), sampling (JSON in vLLM's words), destination, staged (the file it becomes), retry (whether it is a
second attempt).

Loading adds, one entry per prompt: prompt_ids, messages, token_ids, refused (why it cannot be asked, or None),
answers. The engine adds outputs: per prompt one `Output` for each of `samples`."""


def missing_units(
    store: Store,
    prompts: str,
    destination: str,
    name: str,
    teacher: Teacher,
    identity: str,
    unit_size: int,
    retry: bool = False,
) -> list[Unit]:
    """The units that complete `destination`: every (prompt, sample) that is neither published nor staged there.

    A unit holds at most `unit_size` responses of neighbouring prompts. Its file is named after them: whoever computes
    the unit again writes the same file.

    Args:
        prompts: the folder of prompt shards.
        identity: tells apart what was made with other settings.
        retry: the rows that failed instead of those that are missing.
    """
    return [
        _unit(store, path, destination, name, teacher, rows, samples, identity, retry)
        for path in store.committed(prompts)
        for rows, samples in _todo_of(store, path, destination, identity, teacher.sampling.samples, unit_size, retry)
    ]


@unless_moved
def _todo_of(
    store: Store, path: str, destination: str, identity: str, samples: int, unit_size: int, retry: bool
) -> list[tuple[list[int], list[int]]]:
    """(rows, samples) of each unit that a shard of prompts still needs."""
    shard = shard_name(path)
    staged = staged_files(store, folder_of(destination, identity, shard, retry))  # first: what moves meanwhile is seen
    files = [file for file in store.committed(destination) if shard_name(file).startswith(f"{shard}-")]
    return list(_todo(store, path, files, staged, samples, unit_size, retry))


def _todo(
    store: Store, path: str, files: list[str], staged: list[str], samples: int, unit_size: int, retry: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """(rows, samples) of each unit, from the shard's published and staged files."""
    prompts = store.count(path)
    if not retry and sum(map(store.count, files)) == prompts * samples:
        return  # the usual case of a resumed run, told from the files' footers
    if not retry and not files and not staged:
        yield from unit_blocks(np.ones((prompts, samples), dtype=bool), unit_size)
        return
    ids = store.read_table(path, ["prompt_id"])["prompt_id"]
    if retry:
        wanted = failed_rows(store, files)
        done = keys_in(store, staged)
    else:
        wanted, done = None, keys_in(store, [*files, *staged])
    missing = np.ones((prompts, samples), dtype=bool)
    for sample in range(samples):
        missing[:, sample] = ~_is_in(ids, done, sample)
        if wanted is not None:
            missing[:, sample] &= _is_in(ids, wanted, sample)
    yield from unit_blocks(missing, unit_size)


def _is_in(ids: pa.ChunkedArray, keys: pa.Table, sample: int) -> np.ndarray:
    of_sample = keys.filter(pc.field("sample") == sample)["prompt_id"]
    return pc.is_in(ids, value_set=of_sample.combine_chunks()).to_numpy()


def unit_blocks(missing: np.ndarray, unit_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(rows, samples) such that every missing cell is in exactly one, with at most `unit_size` cells in each. Pure.

    Prompts that miss the same samples go together. Blocks have fixed borders, so what one run has not done the next
    cuts in the same way.

    Args:
        missing: [prompts, samples], true where a response is missing.
    """
    patterns, of_row = np.unique(missing, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        samples = np.flatnonzero(pattern).tolist()
        if not samples:
            continue
        rows = np.flatnonzero(of_row.reshape(-1) == number)
        blocks = rows // max(1, unit_size // len(samples))
        for block in np.split(rows, np.flatnonzero(np.diff(blocks)) + 1):
            yield block.tolist(), samples


def _unit(
    store: Store,
    path: str,
    destination: str,
    name: str,
    teacher: Teacher,
    rows: list[int],
    samples: list[int],
    identity: str,
    retry: bool,
) -> Unit:
    folder = folder_of(destination, identity, shard_name(path), retry)
    digest = hashlib.sha256(json.dumps([rows, samples]).encode()).hexdigest()[:8]
    staged = f"{folder}/{rows[0]:07d}-{digest}.parquet"
    return {
        "unit_id": staged,
        "name": name,
        "model": teacher.model,
        "adapter": teacher.adapter,
        "reasoning": teacher.reasoning,
        "teacher": teacher.model_dump_json(),
        "prompts": path,
        "rows": rows,
        "samples": samples,
        "sampling": json.dumps(teacher.sampling.model_dump(exclude={"samples"})),
        "destination": destination,
        "staged": staged,
        "retry": retry,
    }


def responses_in(units: list[Unit]) -> int:
    """How many responses the units ask for."""
    return sum(len(unit["rows"]) * len(unit["samples"]) for unit in units)


# --- in the task that loads a unit ----------------------------------------------------------------------------------
@lru_cache(maxsize=8)
def _tokenizer(model: str) -> Any:
    return load_tokenizer(Model.model_validate_json(model), "model")


def load_unit(store: Store, unit: Unit) -> Unit:
    """Adds the prompts and their token ids, rendered by the teacher's own template."""
    teacher = Teacher.model_validate_json(unit["teacher"])
    rows = read_rows(store, unit["prompts"], unit["rows"], PROMPTS.names).to_pylist()
    messages = [with_system(row["messages"], teacher.system) for row in rows]
    token_ids: list[list[int]] = [[] for _ in rows]
    refused: list[str | None] = [None for _ in rows]
    if teacher.endpoint is None:
        tokenizer = _tokenizer(teacher.model_dump_json(include=set(Model.model_fields)))
        token_ids, refused = prompts_ids(tokenizer, messages)
    return {
        **unit,
        "prompt_ids": [row["prompt_id"] for row in rows],
        "messages": messages,
        "token_ids": token_ids,
        "refused": [row["error"] or reason for row, reason in zip(rows, refused, strict=True)],
        "answers": [row["answer"] for row in rows],
    }


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with the teacher's system prompt before it, unless it brings its own. Pure."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
