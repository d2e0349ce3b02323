"""Prompts in the store: fixed shards that every later stage works through one by one.

A shard never changes once it is written, so it names the unit of work of generation, scoring, reference pass and
pairing alike: `part-00007-….parquet` of every table holds answers to the prompts of `prompts/part-00007.parquet`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deltaray.data.contracts import PROMPTS
from deltaray.data.prompts.rows import PromptRow, compact, content
from deltaray.data.store import Store
from deltaray.errors import UserError

SHARD_CHARACTERS = 1 << 27
"""A shard ends here though it has fewer rows: it is held in memory until it is written."""
BATCH_ROWS, BATCH_CHARACTERS = 4096, 1 << 24
"""Rows that are Python objects at once."""


def store_prompts(
    store: Store, rows: Iterable[PromptRow], shard_size: int, folder: str = Store.prompts, unit_size: int = 256
) -> int:
    """Appends the prompts that the store does not have yet as new shards; returns how many.

    Args:
        rows: all prompts, the stored ones included, each id once.
        shard_size: rows per shard. `unit_size`: rows per row group, which is what is read at once.
    Raises:
        UserError: as `refuse_changed_prompts`, which finds it out before anything is written.
    """
    stored = 0
    shards = _shards(_new_rows(store, rows, folder), shard_size)
    for number, table in enumerate(shards, start=_next_number(store, folder)):
        store.write_table(f"{folder}/part-{number:05d}.parquet", table, PROMPTS, row_group_size=unit_size)
        stored += len(table)
    return stored


def refuse_changed_prompts(store: Store, rows: Iterable[PromptRow], folder: str = Store.prompts) -> int:
    """Prompts can be added, but what is answered already must still be the same question. Returns how many there are.

    Raises:
        UserError: a prompt of the store is no longer in `rows`, or has another text or answer under its id.
    """
    return store.count_rows(folder) + sum(1 for _ in _new_rows(store, rows, folder))


def read_rows(store: Store, path: str, rows: list[int], columns: list[str]) -> pa.Table:
    """Rows of a shard by their place in it, in the order asked for; reads the row groups that hold them, no more.

    Raises:
        IndexError: the shard has no such row.
    """
    with store.filesystem.open_input_file(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        starts = list(accumulate(sizes, initial=0))
        if rows and not 0 <= min(rows) <= max(rows) < starts[-1]:
            raise IndexError(f"{path} has {starts[-1]} rows, asked for rows {min(rows)} … {max(rows)}")
        groups = sorted({bisect_right(starts, row) - 1 for row in rows})
        table = file.read_row_groups(groups, columns=columns)
    there = [row for group in groups for row in range(starts[group], starts[group + 1])]
    place_of = {row: place for place, row in enumerate(there)}
    return table.take(pa.array([place_of[row] for row in rows], pa.int64()))


def shard_name(path: str) -> str:
    """`part-00007` of `prompts/part-00007.parquet`."""
    return path.rpartition("/")[2].removesuffix(".parquet")


def shard_of(path: str) -> str:
    """The shard of prompts that a file of responses (`<shard>-<unit>.parquet`) answers."""
    return shard_name(path).rpartition("-")[0]


# --- writing ----------------------------------------------------------------------------------------------------
def _next_number(store: Store, folder: str) -> int:
    last = store.committed(folder)[-1:]
    return int(shard_name(last[0]).removeprefix("part-")) + 1 if last else 0


def _shards(rows: Iterable[PromptRow], shard_size: int) -> Iterator[pa.Table]:
    rows = iter(rows)
    while batches := list(_batches(rows, shard_size)):
        yield pa.concat_tables(batches)


def _batches(rows: Iterator[PromptRow], most: int) -> Iterator[pa.Table]:
    """The next rows, up to `most` or as many as one shard may hold in memory, in small tables."""
    characters = SHARD_CHARACTERS
    while most > 0 and characters > 0:
        batch, size = _take(rows, min(BATCH_ROWS, most), min(BATCH_CHARACTERS, characters))
        if not batch:
            return
        yield prompt_table(batch)
        most, characters = most - len(batch), characters - size


def _take(rows: Iterator[PromptRow], most: int, characters: int) -> tuple[list[PromptRow], int]:
    """(the next rows, their characters): stops at whichever limit is reached first."""
    batch: list[PromptRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.get("conversation") or "")
        for turn in row["messages"]:
            size += len(turn["content"])
        if len(batch) == most or size >= characters:
            break
    return batch, size


def prompt_table(rows: list[PromptRow]) -> pa.Table:
    """Rows as a table of `contracts.PROMPTS`, built column by column: ten times as fast as from nested rows."""
    turns = [turn for row in rows for turn in row["messages"]]
    kind = PROMPTS.field("messages").type
    struct = pa.StructArray.from_arrays(
        [pa.array([turn[field.name] for turn in turns], pa.string()) for field in kind.value_type],
        fields=list(kind.value_type),
    )
    offsets = pa.array(accumulate((len(row["messages"]) for row in rows), initial=0), pa.int32())
    messages = pa.ListArray.from_arrays(offsets, struct, type=kind)
    plain = {
        name: [row.get(name) for row in rows] for name in ("prompt_id", "answer", "source", "error", "conversation")
    }
    columns = {name: pa.array(values, pa.string()) for name, values in plain.items()} | {"messages": messages}
    return pa.Table.from_arrays([columns[name] for name in PROMPTS.names], schema=PROMPTS)


# --- what is stored already -------------------------------------------------------------------------------------
def _new_rows(store: Store, rows: Iterable[PromptRow], folder: str) -> Iterator[PromptRow]:
    """The rows that are not stored; those that are must be as they are stored."""
    stored = _stored_contents(store, folder)
    for row in rows:
        before = stored.pop(compact(row["prompt_id"]), None) if stored else None
        if before is None:
            yield row
        elif before != content(row["messages"], row["answer"], row.get("conversation")):
            raise _changed(store, row["prompt_id"], "has another text or answer now")
    if stored:
        tables = (store.read_table(path, ["prompt_id"]) for path in store.committed(folder))
        lost = next(item for table in tables for item in table["prompt_id"].to_pylist() if compact(item) in stored)
        raise _changed(store, lost, "is no longer in the prompts")


def _stored_contents(store: Store, folder: str) -> dict[bytes, bytes]:
    """Compact id -> compact content of all stored prompts."""
    found: dict[bytes, bytes] = {}
    for path in store.committed(folder):
        for batch in store.read_table(path, ["prompt_id", "messages", "answer", "conversation"]).to_batches(BATCH_ROWS):
            others = (batch[name].to_pylist() for name in ("answer", "conversation"))
            contents = map(content, _conversations(batch["messages"]), *others)
            found.update(zip(map(compact, batch["prompt_id"].to_pylist()), contents, strict=True))
    return found


def _conversations(messages: pa.ListArray) -> Iterator[list[dict[str, str]]]:
    """The column's values, several times as fast as Arrow makes them."""
    turns = messages.flatten()
    roles, contents = turns.field("role").to_pylist(), turns.field("content").to_pylist()
    flat = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
    ends = list(accumulate(pc.list_value_length(messages).to_pylist(), initial=0))
    return (flat[start:end] for start, end in pairwise(ends))


def _changed(store: Store, prompt_id: str, what: str) -> UserError:
    return UserError(
        f"{store.out} belongs to another recipe: prompt {prompt_id} {what}; prompts can be added, not changed: use "
        "another `out` (--set out=FOLDER)"
    )
