"""Units of generation: which responses a model still owes, shard by shard. Pure but for reading the store."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.contracts import PROMPTS
from deltaray.data.prompts.shards import read_rows, shard_name
from deltaray.data.prompts.turns import full_turns
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer, turn_end
from deltaray.data.tokens.chat import Message, Tools, render_prompts
from deltaray.failures import reason_of
from deltaray.generate.staging import failed_rows, folder_of, keys_in, unless_moved
from deltaray.recipe.models import Model, Teacher

Unit = dict[str, Any]
"""What one call of an engine answers and one commit holds. From the planner: unit_id, name (who is counted), model,
adapter, reasoning, teacher (a `Teacher` as JSON), prompts (a shard's path), rows (places in it), samples (the sample
indexes wanted), sampling (JSON in vLLM's words), destination, staged (the file it becomes), retry (whether it is a
second attempt), search (whether the model may search).

Loading adds, one entry per prompt: prompt_ids, messages, tools (function schemas or None), token_ids, refused (why it
cannot be asked, or None), answers. The engine adds outputs: per prompt one `Output` for each of `samples`."""


@dataclass(frozen=True)
class Assignment:
    """Who answers which prompts, and where the answers go."""

    name: str  # who is counted
    teacher: Teacher
    prompts: str  # the folder of prompt shards
    destination: str
    identity: str  # tells apart what was made with other settings
    unit_size: int  # most responses in a unit
    retry: bool = False  # the rows that failed instead of those that are missing
    search: bool = False  # whether the model may search


@unless_moved
def missing_units(store: Store, work: Assignment) -> list[Unit]:
    """The units that complete the destination: every (prompt, sample) that is neither published nor staged there.

    A unit holds responses of neighbouring prompts. Its file is named after them: a process that computes the unit again
    writes the same file.
    """
    waiting = list(store.listing(folder_of(work.destination, work.identity, work.retry)))
    published = store.committed(work.destination)  # listed after those that wait: what moves meanwhile is seen
    units = []
    for path in store.committed(work.prompts):
        shard = shard_name(path)
        files = [file for file in published if shard_name(file).startswith(f"{shard}-")]
        staged = [file for file in waiting if file.rpartition("/")[0].endswith(f"/{shard}")]
        units += [_unit(work, path, *todo) for todo in _todo(store, work, path, files, staged)]
    return units


def _todo(
    store: Store, work: Assignment, path: str, files: list[str], staged: list[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """(rows, samples) of each unit that a shard of prompts needs beyond its published and staged files."""
    prompts, samples = store.count(path), work.teacher.sampling.samples
    if not work.retry and sum(map(store.count, files)) == prompts * samples:
        return  # the usual case of a resumed run, told from the files' footers
    missing = np.ones((prompts, samples), dtype=bool)
    if work.retry or files or staged:
        ids = store.read_table(path, ["prompt_id"])["prompt_id"]
        done = keys_in(store, staged if work.retry else [*files, *staged])
        missing = ~_is_in(ids, done, samples)
        if work.retry:
            missing &= _is_in(ids, failed_rows(store, files), samples)
    yield from unit_blocks(missing, work.unit_size)


def _is_in(ids: pa.ChunkedArray, keys: pa.Table, samples: int) -> np.ndarray:
    """[prompts, samples], true where the key is among `keys`."""
    of_sample = [keys.filter(pc.field("sample") == sample)["prompt_id"] for sample in range(samples)]
    return np.stack([pc.is_in(ids, value_set=there.combine_chunks()).to_numpy() for there in of_sample], axis=1)


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


def _unit(work: Assignment, path: str, rows: list[int], samples: list[int]) -> Unit:
    teacher, folder = work.teacher, folder_of(work.destination, work.identity, work.retry)
    digest = hashlib.sha256(json.dumps([rows, samples]).encode()).hexdigest()[:8]
    staged = f"{folder}/{shard_name(path)}/{rows[0]:07d}-{digest}.parquet"
    return {
        "unit_id": staged,
        "name": work.name,
        "model": teacher.model,
        "adapter": teacher.adapter,
        "reasoning": teacher.reasoning,
        "teacher": teacher.model_dump_json(),
        "prompts": path,
        "rows": rows,
        "samples": samples,
        "sampling": json.dumps(teacher.sampling.model_dump(exclude={"samples"})),
        "destination": work.destination,
        "staged": staged,
        "retry": work.retry,
        "search": work.search,
    }


def responses_in(units: list[Unit]) -> int:
    """How many responses the units ask for."""
    return sum(len(unit["rows"]) * len(unit["samples"]) for unit in units)


# --- in the task that loads a unit ----------------------------------------------------------------------------------
def tokenizer_of(teacher: Teacher) -> Any:
    """The teacher's tokenizer, loaded once in a process."""
    return _tokenizer(teacher.model_dump_json(include=set(Model.model_fields)))


@lru_cache(maxsize=8)
def _tokenizer(model: str) -> Any:
    return load_tokenizer(Model.model_validate_json(model), "model")


def load_unit(store: Store, unit: Unit) -> Unit:
    """Adds the prompts and their token ids, rendered by the teacher's own template."""
    teacher = Teacher.model_validate_json(unit["teacher"])
    rows = read_rows(store, unit["prompts"], unit["rows"], PROMPTS.names).to_pylist()
    chats = [_chat(row, teacher.system) for row in rows]
    good = [place for place, (*_, reason) in enumerate(chats) if reason is None]
    messages, tools = [turns for turns, *_ in chats], [given for _, given, _ in chats]
    token_ids: list[list[int]] = [[] for _ in rows]
    refused = [reason for *_, reason in chats]
    rendered = render(teacher, [messages[place] for place in good], [tools[place] for place in good])
    for place, ids, reason in zip(good, *rendered, strict=True):
        token_ids[place], refused[place] = ids, reason
    return {
        **unit,
        "sampling": ended(teacher, unit["sampling"]),
        "prompt_ids": [row["prompt_id"] for row in rows],
        "messages": messages,
        "tools": tools,
        "token_ids": token_ids,
        "refused": [row["error"] or reason for row, reason in zip(rows, refused, strict=True)],
        "answers": [row["answer"] for row in rows],
    }


def _chat(row: dict[str, Any], system: str | None) -> tuple[list[Message], Tools | None, str | None]:
    """(turns, tools, why there are none) of a prompt."""
    try:
        turns, tools = full_turns(row["messages"], row["conversation"])
        return with_system(turns, system), tools, None
    except BaseException as error:
        return [], None, reason_of(error)


def render(
    teacher: Teacher, messages: Sequence[list[Message]], tools: Sequence[Tools | None] | None = None
) -> tuple[list[list[int]], list[str | None]]:
    """(token ids, refusals) by the teacher's own template; of a server, which has its own, there are neither."""
    if teacher.endpoint is not None:
        return [[] for _ in messages], [None for _ in messages]
    return each_ids(tokenizer_of(teacher), messages, tools)


def each_ids(
    tokenizer: Any, messages: Sequence[list[Message]], tools: Sequence[Tools | None] | None = None
) -> tuple[list[list[int]], list[str | None]]:
    """As `render_prompts`, also where what one prompt raises is not an `Exception`, as a panic of Rust code is none."""
    try:
        return render_prompts(tokenizer, messages, tools)
    except BaseException as error:
        if len(messages) == 1:
            return [[]], [reason_of(error)]
        reason_of(error)  # raises what concerns more than a row
    one_by_one = range(len(messages))
    each = [each_ids(tokenizer, messages[at : at + 1], tools and tools[at : at + 1]) for at in one_by_one]
    return [ids for of, _ in each for ids in of], [reason for _, of in each for reason in of]


def ended(teacher: Teacher, sampling: str) -> str:
    """The sampling settings with the token that ends a turn of the teacher's template, where it has one.

    vLLM also stops at the ends in the model's `generation_config.json`, but not every model names this one there.
    """
    if teacher.endpoint is not None:
        return sampling
    try:
        end = turn_end(tokenizer_of(teacher))
    except ValueError:  # of a template that takes no answers
        return sampling
    return json.dumps(json.loads(sampling) | {"stop_token_ids": [end]})


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with the teacher's system prompt before it, unless it brings its own. Pure."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]
