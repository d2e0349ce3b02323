"""Every response in a student's tokens, once: for all pairings that use it and for the reference pass.

A file of tokens has the rows of its file of responses, in the same order. Its name holds a digest of that file's
content and of the rule by which text becomes ids: what changed is tokenised again.
"""

import hashlib
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import TOKENS
from deltaray.data.prompts.shards import shard_name, shard_of
from deltaray.data.prompts.turns import full_turns
from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer
from deltaray.data.tokens.chat import refusal_of, render_prompt
from deltaray.data.tokens.response_tokens import Written, response_ids
from deltaray.errors import UserError
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units

RULE = 3
"""Of `response_tokens`; to be raised when the same texts become other ids."""
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
        digest = hashlib.sha256(f"{RULE} {content}".encode()).hexdigest()[:8]
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
        spec, writer = study.students[student].model_dump_json(), _model_json(study.teachers.get(teacher))
        units += [
            {"responses": path, "student": spec, "teacher": writer, "destination": tokens}
            for path, tokens in token_files(store, student, teacher).items()
            if tokens not in there
        ]
    return units


def _model_json(teacher: Teacher | None) -> str | None:
    """The model whose tokenizer the stored ids of a teacher belong to; None where there are none."""
    if teacher is None or teacher.endpoint is not None:
        return None
    return teacher.model_dump_json(include=set(Model.model_fields))


def tokenize_file(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """Commits the tokens of one file of responses, and removes those of an earlier file of its name."""
    prompts = store.read_table(
        f"{Store.prompts}/{shard_of(unit['responses'])}.parquet", ["prompt_id", "messages", "conversation"]
    )
    ids, *asked = (prompts[name] for name in prompts.column_names)
    chats = dict(zip(ids.to_pylist(), zip(*asked, strict=True), strict=True))  # still Arrow's values
    shared = _shared_tokenizer(unit["student"], unit["teacher"])
    table = store.read_table(unit["responses"], ["prompt_id", "error", *(OWN if shared else TEXTS)])
    tables = [TOKENS.empty_table()]
    for start in range(0, len(table), AT_ONCE):
        rows = table.slice(start, AT_ONCE).to_pylist()
        tokens = [_tokens(_tokenizer(unit["student"]), chats[row["prompt_id"]], row) for row in rows]
        tables.append(pa.Table.from_pylist(tokens, schema=TOKENS))
    store.write_table(unit["destination"], pa.concat_tables(tables), TOKENS)
    folder, _, own = unit["destination"].rpartition("/")
    stem = f"{shard_name(unit['responses'])}-"
    names = {path: path.rpartition("/")[2] for path in store.committed(folder)}
    store.delete(path for path, it in names.items() if it.startswith(stem) and len(it) == len(own) and it != own)
    return {}


TEXTS = ("text", "reasoning")
OWN = (*TEXTS, "prompt_token_ids", "token_ids")
"""Columns of a response that its tokens are made from, without and with the teacher's own."""


@lru_cache(maxsize=8)
def _tokenizer(student: str) -> Any:
    return load_tokenizer(Student.model_validate_json(student), "student")


@lru_cache(maxsize=64)
def _shared_tokenizer(student: str, teacher: str | None) -> bool:
    """Whether the ids that a teacher wrote mean the same to the student."""
    if teacher is None:
        return False
    try:
        other = load_tokenizer(Model.model_validate_json(teacher), "teacher")
    except UserError:
        return False
    own, theirs = (getattr(it, "backend_tokenizer", None) for it in (_tokenizer(student), other))
    return own is not None and theirs is not None and own.to_str() == theirs.to_str()


def _tokens(tokenizer: Any, chat: tuple[Any, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of `TOKENS`; a failed response has none. `chat`: the prompt's `messages` and `conversation`."""
    if row["error"] is not None:
        return {"prompt_token_ids": [], "token_ids": [], "refusal": None}
    written = Written(row["text"], row["reasoning"], row.get("token_ids", ()), row.get("prompt_token_ids", ()))
    try:
        turns, tools = full_turns(*(column.as_py() for column in chat))
        prompt = render_prompt(tokenizer, turns, tools)
        ids = response_ids(tokenizer, prompt, written)
    except BaseException as error:
        return {"prompt_token_ids": [], "token_ids": [], "refusal": refusal_of(error)}
    return {"prompt_token_ids": prompt, "token_ids": ids, "refusal": None}
