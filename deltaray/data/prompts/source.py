"""A prompt file as a recipe names it, brought into the store; what was stored already is not read again.

A file is read twice: once to check all of it, with nothing written, and once to write its shards. The record of what
was read is written last, and only if the shards are all there and the file is still the same: a kill at any moment
costs another reading, never a prompt.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaray.data.prompts.formats import Say, files_of, kind_of, silent
from deltaray.data.prompts.read import read_prompts
from deltaray.data.prompts.rows import PromptRow
from deltaray.data.prompts.shards import refuse_changed_prompts, store_prompts
from deltaray.data.prompts.view import WHOLE, View
from deltaray.data.store import Store
from deltaray.errors import UserError


@dataclass(frozen=True)
class PromptSource:
    """Which prompts, and the recipe's key that names them."""

    path: str
    key: str
    limit: int | None = None
    drop_duplicates: bool = False
    view: View = WHOLE

    def rows(self, say: Say = silent) -> Iterator[PromptRow]:
        """All prompts, as `read_prompts` gives them."""
        return read_prompts(self.path, self.key, self.limit, self.drop_duplicates, self.view, say)


def check_source(store: Store, source: PromptSource, folder: str = Store.prompts, say: Say = silent) -> int:
    """Reads all prompts and compares them with those in the store; writes nothing. Returns how many there are.

    `say` is told what the user should know of what is read.

    Raises:
        UserError: the first mistake in the file, or a prompt of the store that is missing or changed in it.
    """
    record = _stored_record(store, source, folder)
    return refuse_changed_prompts(store, source.rows(say), folder) if record is None else int(record["rows"])


def store_source(
    store: Store, source: PromptSource, shard_size: int, unit_size: int, folder: str = Store.prompts
) -> None:
    """Brings the prompts that the store lacks into it.

    Raises:
        UserError: as `check_source`, which is to be called first: by now something may have been written.
    """
    if _stored_record(store, source, folder) is not None:
        return
    before = _reading(source)
    store_prompts(store, source.rows(), shard_size, folder, unit_size)
    if before is not None and _reading(source) == before:
        store.write_json(Store.prompts_record(folder), before | {"path": source.path, "rows": store.count_rows(folder)})


def _stored_record(store: Store, source: PromptSource, folder: str) -> dict[str, Any] | None:
    """The record of an earlier reading if it was the same and its shards are there."""
    if not store.exists(Store.prompts_record(folder)):
        return None
    record: dict[str, Any] = store.read_json(Store.prompts_record(folder), {"rows": int})
    if record["rows"] != store.count_rows(folder):
        return None
    now = _reading(source)
    return record if now is not None and now.items() <= record.items() else None


def _reading(source: PromptSource) -> dict[str, Any] | None:
    """What decides which prompts are read; None if no files hold them."""
    content = reading_of(source.path, source.key, source.view)
    asked = {"limit": source.limit, "drop_duplicates": source.drop_duplicates, **asdict(source.view)}
    return content and content | asked


def reading_of(path: str, key: str, view: View = WHOLE) -> dict[str, Any] | None:
    """The content behind a path; None if no files hold it."""
    files = files_of(path, key, view)
    if not files or not all(file.is_file() for file in files):
        return None
    return {"format": kind_of(path), "sha256": [_sha256(file) for file in files]}


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
