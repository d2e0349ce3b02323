"""Every response in a student's tokens, once: for all pairings that use it and for the reference pass.

A file of tokens has the rows of its file of responses, in the same order. Its name holds a digest of that file's
content: responses that changed under their name are tokenised again.
"""

import hashlib
import json
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError

from deltaray.chat import conversation_ids, load_tokenizer
from deltaray.contracts import TOKENS
from deltaray.prompts.shards import shard_name, shard_of
from deltaray.prompts.turns import full_turns
from deltaray.recipe.models import Student
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units
from deltaray.storage.filesystem import together
from deltaray.store import Store

AT_ONCE = 2048
"""Responses that are Python objects at the same time."""

Files = dict[str, dict[str, list[str]]]
"""By teacher and shard the files of tokens, in the order of the files of responses."""


def token_files(store: Store, student: str, teacher: str) -> dict[str, str]:
    """File of responses -> its file of tokens, whether that is there or not."""
    folder = Store.tokens(student, teacher)
    found = {}
    paths = store.committed(Store.responses(teacher))
    for path, content in zip(paths, together(store.content, paths), strict=True):
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        found[path] = f"{folder}/{shard_name(path)}-{digest}.parquet"
    return found


def files_by_shard(store: Store, student: str, teachers: list[str]) -> Files:
    files: Files = {}
    for teacher in teachers:
        files[teacher] = {}
        for path, tokens in token_files(store, student, teacher).items():
            files[teacher].setdefault(shard_of(path), []).append(tokens)
    return files


Side = tuple[str, str]
"""(student, teacher)."""


def paired_sides(study: Study, pairings: list[str]) -> list[Side]:
    """Whose tokens some pairings use."""
    return sorted({(study.student_of(name), teacher) for name in pairings for teacher in study.pairings[name].names})


def complete_tokens(study: Study, store: Store, sides: list[Side]) -> None:
    """Tokenises on the cluster what is missing."""
    for _ in map_units(missing_tokens(study, store, sides), partial(tokenize_file, store)):
        pass


def missing_tokens(study: Study, store: Store, sides: list[Side]) -> list[dict[str, Any]]:
    """One unit per file of responses of a teacher that is not in the tokens of a student."""
    units = []
    for student, teacher in sides:
        there = set(store.committed(Store.tokens(student, teacher)))
        spec = study.students[student].model_dump(mode="json")
        units += [
            {"responses": path, "student": spec, "destination": tokens}
            for path, tokens in token_files(store, student, teacher).items()
            if tokens not in there
        ]
    return units


def tokenize_file(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """Commits the tokens of one file of responses, and removes those of an earlier file of its name."""
    student = Student(**unit["student"])
    table = store.read_table(unit["responses"], ["prompt_id", "text", "error"])
    columns = ["prompt_id", "messages", "conversation"]
    prompts = store.read_table(f"{Store.prompts}/{shard_of(unit['responses'])}.parquet", columns)
    ids, *asked = (prompts[name] for name in columns)
    chats = dict(zip(ids.to_pylist(), zip(*asked, strict=True), strict=True))  # still Arrow's values
    tables = [TOKENS.empty_table()]
    for start in range(0, len(table), AT_ONCE):
        rows = table.slice(start, AT_ONCE).to_pylist()
        tokens = [_tokens(student, chats[row["prompt_id"]], row) for row in rows]
        tables.append(pa.Table.from_pylist(tokens, schema=TOKENS))
    store.write_table(unit["destination"], pa.concat_tables(tables), TOKENS)
    folder, _, own = unit["destination"].rpartition("/")
    stem = f"{shard_name(unit['responses'])}-"
    names = {path: path.rpartition("/")[2] for path in store.committed(folder)}
    digits = len(own) - len(stem)
    store.delete(
        path for path, it in names.items() if it != own and it.startswith(stem) and len(it) == len(stem) + digits
    )
    return {}


@lru_cache(maxsize=8)
def _tokenizer(student: str) -> Any:
    return load_tokenizer(Student(**json.loads(student)), "student")


def _tokens(student: Student, chat: tuple[Any, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of `TOKENS`; a failed response has none. `chat`: the prompt's `messages` and `conversation`."""
    if row["error"] is not None:
        return {"prompt_token_ids": [], "token_ids": [], "refused": False}
    try:
        turns, tools = full_turns(*(column.as_py() for column in chat))
        prompt, (ids,) = conversation_ids(_tokenizer(student.model_dump_json()), turns, [row["text"]], tools)
    except TemplateError:
        return {"prompt_token_ids": [], "token_ids": [], "refused": True}
    return {"prompt_token_ids": prompt, "token_ids": ids, "refused": False}
