"""One file of responses in, one file of scores out, a slice of rows at a time."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import SCORES
from deltaray.data.prompts.shards import shard_name, shard_of
from deltaray.data.prompts.turns import full_turns
from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store
from deltaray.score.response import Response, Score, scale_of, unscored

AT_ONCE = 2048
"""Responses that are Python objects at the same time."""

Unit = dict[str, Any]
"""A file to score: the fields of a `Scoring`, with `responses` and `destination` files instead of folders."""
Key = tuple[str, int]
Asked = tuple[Key, Response | None, str | None]
"""(key, what to score, or why it is not scored)."""


@dataclass(frozen=True)
class Scoring:
    """Whose responses a scorer scores, and the folders in which all that concerns them lies."""

    scorer: str
    spec: dict[str, Any]  # the scorer's section, as JSON
    teacher: str
    prompts: str
    responses: str
    destination: str
    questions: str  # what a judge is asked, until it is scored
    judgements: str
    others: str | None  # the responses that a judge compares with; None where it compares with nothing else
    failed: bool = False  # responses that failed are scored for the text that they have, an empty one


def missing_units(store: Store, scoring: Scoring) -> list[Unit]:
    """One unit per responses file that is not scored yet as it is; its scores file has the same name.

    Scores that do not say what they are made from are taken for current: an earlier version wrote them.
    """
    scored = store.committed(scoring.destination)
    sources = dict(zip(map(shard_name, scored), together(store.source, scored), strict=True))
    units = []
    for path, made_from in _made_from(store, scoring).items():
        name = shard_name(path)
        if name not in sources or sources[name] not in (None, made_from):
            destination = f"{scoring.destination}/{name}.parquet"
            units.append(asdict(scoring) | {"responses": path, "destination": destination, "made_from": made_from})
    return units


def _made_from(store: Store, scoring: Scoring) -> dict[str, str]:
    """By file of responses a digest of its content, and of those that it is compared with."""
    others = [] if scoring.others is None else store.committed(scoring.others)
    paths = [*store.committed(scoring.responses), *others]
    contents = dict(zip(paths, together(store.content, paths), strict=True))
    found = {}
    for path in paths[: len(paths) - len(others)]:
        shard = f"{shard_of(path)}-"
        read = [path, *(it for it in others if shard_name(it).startswith(shard))]
        found[path] = hashlib.sha256(" ".join(contents[it] for it in read).encode()).hexdigest()[:16]
    return found


def read_slices(store: Store, unit: Unit, messages: bool = False) -> Iterator[list[Asked]]:
    """The responses of a file in slices; with `messages` they bring the conversation before them."""
    columns = ["prompt_id", "sample", "text", "error"]
    table = store.read_table(unit["responses"], columns)
    prompts = _prompts(store, unit, messages)
    for start in range(0, len(table), AT_ONCE):
        rows = table.slice(start, AT_ONCE).to_pylist()
        yield [_asked(unit, row, prompts[row["prompt_id"]]) for row in rows]


def _prompts(store: Store, unit: Unit, messages: bool) -> dict[str, dict[str, Any]]:
    """The prompts that a file of responses answers, by id."""
    columns = ["prompt_id", "answer", "source", *(["messages", "conversation"] if messages else [])]
    rows = store.read_table(f"{unit['prompts']}/{shard_of(unit['responses'])}.parquet", columns)
    return {row["prompt_id"]: row for batch in rows.to_batches(AT_ONCE) for row in batch.to_pylist()}


def _asked(unit: Unit, row: dict[str, Any], prompt: dict[str, Any]) -> Asked:
    key, spec = (row["prompt_id"], row["sample"]), unit["spec"]
    if row["error"] is not None and not unit["failed"]:
        return key, None, "failed response"
    if spec["sources"] is not None and prompt["source"] not in spec["sources"]:
        return key, None, "other source"
    if not is_drawn(row["prompt_id"], spec["share"]):
        return key, None, "not drawn"
    try:
        turns, _ = full_turns(prompt.get("messages") or [], prompt.get("conversation"))
    except BaseException as error:
        return key, None, unscored(error).note
    return key, Response(unit["teacher"], row["text"], prompt["answer"], turns), None


def is_drawn(prompt_id: str, share: float) -> bool:
    """Whether a prompt is in the seeded draw; a larger share's draw holds a smaller one's. Pure."""
    number = int.from_bytes(hashlib.sha256(f"share#{prompt_id}".encode()).digest()[:8])
    return number < share * 2**64


def write_scores(store: Store, unit: Unit, scored: Iterator[list[tuple[Key, Score]]]) -> dict[str, Any]:
    """Commits a file of scores; returns what the driver counts."""
    tables, notes, count = [SCORES.empty_table()], Counter[str](), 0
    for part in scored:
        tables.append(_table(part, scale_of(unit["spec"])))
        known = [score is not None for score in tables[-1]["score"].to_pylist()]
        count += sum(known)
        unscored = [note for note, there in zip(tables[-1]["note"].to_pylist(), known, strict=True) if not there]
        notes.update(str(note).partition(":")[0] for note in unscored)
    table = pa.concat_tables(tables)
    store.write_table(unit["destination"], table, SCORES, made_from=unit["made_from"])
    told = {"scorer": unit["scorer"], "teacher": unit["teacher"]}
    return {**told, "rows": len(table), "scored": count, "unscored": dict(notes)}


def _table(part: Sequence[tuple[Key, Score]], scale: tuple[float, float]) -> pa.Table:
    rows = [{"prompt_id": key[0], "sample": key[1], **score.within(*scale).row()} for key, score in part]
    return pa.Table.from_pylist(rows, schema=SCORES)
