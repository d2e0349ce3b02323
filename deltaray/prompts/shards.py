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
        UserError: a prompt of the store is no longer in `rows`, or has another text under its id.
    """
    stored = store.read_tables(folder, PROMPTS).to_pylist()
    _refuse_changes(store, stored, {row["prompt_id"]: row for row in rows})
    known = {row["prompt_id"] for row in stored}
    new = [row for row in rows if row["prompt_id"] not in known]
    first = len(store.committed(folder))
    for number, start in enumerate(range(0, len(new), shard_size), start=first):
        table = pa.Table.from_pylist(new[start : start + shard_size], schema=PROMPTS)
        store.write_table(f"{folder}/part-{number:05d}.parquet", table, PROMPTS)
    return len(new)


def _refuse_changes(store: Store, stored: list[PromptRow], wanted: dict[str, PromptRow]) -> None:
    for row in stored:
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
