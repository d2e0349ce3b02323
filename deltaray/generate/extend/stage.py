"""Extend: some prompts become conversations, each written once, before the teachers answer anything.

The user's prompts are read into `origins`; what is drawn from them is written about by the pools that teachers and
judges use; `prompts` then holds the extended conversations and everything that was not drawn.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import EXTENSIONS, PROMPTS
from deltaray.data.prompts.rows import PromptRow, compact
from deltaray.data.prompts.shards import prompt_table, shard_name, store_prompts
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer
from deltaray.generate.answer import Work, answer, work_of
from deltaray.generate.extend.multi_turn import KIND, TalkSpec
from deltaray.generate.extend.rules import drawn_kind, echoes, extended_row
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import OnRows, error_of
from deltaray.generate.stage import seeded
from deltaray.generate.units import Assignment, Unit, each_ids
from deltaray.recipe.extensions import Extensions
from deltaray.recipe.models import Student
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity

COUNTS = "extensions.json"
AT_ONCE = 4096


def is_extended(study: Study, store: Store) -> bool:
    """Whether `prompts` holds all that the teachers are to answer."""
    if study.extensions is None:
        return True
    return store.exists(Store.extensions_record) and store.read_json(Store.extensions_record) == _record(study, store)


def _record(study: Study, store: Store) -> dict[str, str]:
    written = [Store.extended(kind) for kind in _section(study).kinds]
    return {"inputs": store.digest([Store.origins, Store.prompts, *written])}


def draw_origins(study: Study, store: Store) -> None:
    """Writes which prompts are drawn for which kind, a file per shard of the user's prompts and kind."""
    section = _section(study)
    for path in store.committed(Store.origins):
        files = {kind: f"{Store.drawn(kind)}/{shard_name(path)}.parquet" for kind in section.kinds}
        if all(map(store.exists, files.values())):
            continue
        rows: dict[str, list[PromptRow]] = {kind: [] for kind in files}
        for row in _rows(store, path):
            if kind := drawn_kind(section, row):
                rows[kind].append(row)
        for kind, file in files.items():
            table = prompt_table(rows[kind])
            store.write_table(file, table, PROMPTS, row_group_size=study.recipe.unit_size)


def extension_work(study: Study, store: Store, retry: bool = False) -> list[Work]:
    """The conversations of every kind that are still to be written, or with `retry` those that failed."""
    return [work_of(store, _assignment(study, kind, retry)) for kind in _section(study).kinds]


def _assignment(study: Study, kind: str, retry: bool) -> Assignment:
    by = _section(study).by
    name = f"extend {kind}"
    return Assignment(
        name=name,
        teacher=seeded(name, by).model_copy(update={"system": None}),  # what is loaded is the user's prompt alone
        prompts=Store.drawn(kind),
        destination=Store.extended(kind),
        identity=identity_digest(generation_identity(by)),
        unit_size=study.recipe.unit_size,
        retry=retry,
    )


def extend(
    study: Study, store: Store, works: list[Work], capacity: Capacity, on_rows: OnRows, say: Callable[[str], None]
) -> None:
    """Writes the conversations (`extension_work`).

    Raises:
        StageError: too many of them failed; what is committed stays.
    """
    section = _section(study)
    student = next(iter(study.students.values())).model_dump_json()
    make_table = partial(extensions_table, student, section.max_tokens)
    around = partial(TalkSpec, section=section)
    answer(store, works, capacity, make_table, EXTENSIONS, study.recipe.failures, on_rows, say, around)


def _section(study: Study) -> Extensions:
    assert study.extensions is not None
    return study.extensions


# --- the rows of a unit -----------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def _tokenizer(student: str) -> Any:
    return load_tokenizer(Student.model_validate_json(student), "student")


def extensions_table(student: str, max_tokens: int, unit: Unit) -> pa.Table:
    """`contracts.EXTENSIONS` of a unit's conversations.

    Args:
        student: its section as JSON; the limit counts its tokens.
    """
    kind = unit["destination"].rpartition(KIND)[2]
    outputs = (output for (output,) in unit["outputs"])
    rows = [_row(name, output) for name, output in zip(unit["prompt_ids"], outputs, strict=True)]
    whole = [row for row in rows if row["messages"]]
    ids, refused = each_ids(_tokenizer(student), [row["messages"] for row in whole])
    for row, own, refusal in zip(whole, ids, refused, strict=True):
        row["tokens"] = None if refusal else len(own)
        row["dropped"] = f"student's template: {refusal}" if refusal else _unfit(kind, row, max_tokens)
    return pa.Table.from_pylist(rows, schema=EXTENSIONS)


def _row(prompt_id: str, output: dict[str, Any]) -> dict[str, Any]:
    """A row of `contracts.EXTENSIONS`; what is not whole has no messages but a reason."""
    row = {"prompt_id": prompt_id, "sample": 0, "messages": [], "tokens": None, "dropped": None, "error": None}
    if output["finish_reason"] == "length":
        return row | {"dropped": "cut: a turn reached the writer's max_tokens"}
    error = error_of(output)
    return row | ({"error": error} if error else {"messages": json.loads(output["text"])})


def _unfit(kind: str, row: dict[str, Any], max_tokens: int) -> str | None:
    """Why a conversation that was written is not used."""
    if kind != "repeat" and echoes(row["messages"]):
        return "echo: the user says the same twice"
    return f"too long: {row['tokens']} tokens, more than {max_tokens}" if row["tokens"] > max_tokens else None


# --- what the teachers answer -----------------------------------------------------------------------------------
@dataclass
class Counts:
    """What became of the prompts drawn for one kind; reasons by what stands before their colon."""

    drawn: int = 0
    extended: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


def store_extended(study: Study, store: Store) -> dict[str, Counts]:
    """Appends to `prompts` what it lacks: prompts that stay as they are, and conversations; says what became of all.

    Called again it adds nothing, or what has been added to the user's file or tried again meanwhile.
    """
    counts = {kind: Counts() for kind in _section(study).kinds}
    rows = _once(_final_rows(study, store, counts), counts)
    store_prompts(store, rows, study.recipe.shard_size, unit_size=study.recipe.unit_size)
    store.write_json(COUNTS, {kind: vars(count) for kind, count in counts.items()})
    store.write_json(Store.extensions_record, _record(study, store))
    return counts


def _final_rows(study: Study, store: Store, counts: dict[str, Counts]) -> Iterator[tuple[str | None, PromptRow]]:
    """(kind, row) of every prompt to answer, in the order of the user's file."""
    section = _section(study)
    for path in store.committed(Store.origins):
        written = {kind: _written(store, kind, shard_name(path)) for kind in counts}
        for row in _rows(store, path):
            kind = drawn_kind(section, row)
            if kind is None:
                yield None, row
            elif messages := _count(counts[kind], written[kind][row["prompt_id"]]):
                yield kind, extended_row(kind, row, messages)


def _written(store: Store, kind: str, shard: str) -> dict[str, dict[str, Any]]:
    table = store.read_tables(Store.extended(kind), EXTENSIONS, EXTENSIONS.names, prefix=f"{shard}-")
    return {row["prompt_id"]: row for row in table.to_pylist()}


def _count(count: Counts, row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The conversation, if there is one that is not dropped."""
    count.drawn += 1
    for reasons, reason in ((count.failed, row["error"]), (count.dropped, row["dropped"])):
        if reason is not None:
            reasons[reason.partition(":")[0]] += 1
            return None
    return list(row["messages"])


def _once(rows: Iterator[tuple[str | None, PromptRow]], counts: dict[str, Counts]) -> Iterator[PromptRow]:
    """The rows without a second conversation of the same words, which prompts with ids of their own can lead to."""
    seen: set[bytes] = set()
    for kind, row in rows:
        key = compact(row["prompt_id"])
        if kind and key in seen:
            counts[kind].dropped["same conversation"] += 1
        elif kind:
            counts[kind].extended += 1
        if key not in seen:
            seen.add(key)
            yield row


def _rows(store: Store, path: str) -> Iterator[PromptRow]:
    for batch in store.read_table(path, PROMPTS.names).to_batches(AT_ONCE):
        yield from batch.to_pylist()


def conclusion(counts: dict[str, Counts]) -> str:
    """One line on what became of the drawn prompts."""
    lost = [
        f"{number:,} {reason}" for count in counts.values() for reason, number in (count.dropped + count.failed).items()
    ]
    done = ", ".join(f"{kind} {count.extended:,} of {count.drawn:,}" for kind, count in counts.items())
    return f"extended: {done}" + (f"; without: {', '.join(lost)}" if lost else "")
