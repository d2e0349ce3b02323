"""Prompts in the store: fixed shards that every later stage works through one by one.

A shard never changes once it is written, so it names the unit of work of generation, scoring, reference pass and
pairing alike: `part-00007.parquet` of every table holds answers to the prompts of `prompts/part-00007.parquet`.
"""

import pyarrow as pa

from deltaray.contracts import PROMPTS
from deltaray.errors import UserError
from deltaray.prompts.read import PromptRow
from deltaray.store import Store


def store_prompts(store: Store, rows: list[PromptRow], shard_size: int, folder: str = Store.prompts) -> int:
    """Appends the prompts that the store does not have yet as new shards; returns how many.

    Raises:
        UserError: see `refuse_changed_prompts`.
    """
    refuse_changed_prompts(store, rows, folder)
    known = set(store.read_tables(folder, PROMPTS, ["prompt_id"])["prompt_id"].to_pylist())
    new = [row for row in rows if row["prompt_id"] not in known]
    first = len(store.committed(folder))
    for number, start in enumerate(range(0, len(new), shard_size), start=first):
        table = pa.Table.from_pylist(new[start : start + shard_size], schema=PROMPTS)
        store.write_table(f"{folder}/part-{number:05d}.parquet", table, PROMPTS)
    return len(new)


def refuse_changed_prompts(store: Store, rows: list[PromptRow], folder: str = Store.prompts) -> None:
    """Prompts can be added, but what is answered already must still be the same question.

    Raises:
        UserError: a prompt of the store is no longer in `rows`, or has another text or answer under its id.
    """
    wanted = {row["prompt_id"]: row for row in rows}
    for row in store.read_tables(folder, PROMPTS).to_pylist():
        now = wanted.get(row["prompt_id"])
        if now is None or now["messages"] != row["messages"] or now["answer"] != row["answer"]:
            what = "is no longer in the prompts" if now is None else "has another text or answer now"
            raise UserError(
                f"{store.out} belongs to another recipe: prompt {row['prompt_id']} {what}; prompts can be added, not "
                "changed: use another `out` (--set out=FOLDER)"
            )


def shard_name(path: str) -> str:
    """`part-00007` of `prompts/part-00007.parquet`."""
    return path.rpartition("/")[2].removesuffix(".parquet")
