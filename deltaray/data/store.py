"""The store under `out`: where every artifact lives, and which definition each artifact belongs to.

A file appears under its final name only when it is complete. Names are deterministic, so a retried unit of work
overwrites itself instead of adding a second copy.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.paths import Paths
from deltaray.data.storage.files import COMPLETE, Files
from deltaray.data.storage.filesystem import together
from deltaray.errors import UserError
from deltaray.recipe.renamed import RENAMED


class Store(Paths, Files):
    """One study's outputs on a local folder or an object store."""

    def digest(self, folders: Iterable[str], *others: object) -> str:
        """Tells apart what something is made from: the files of some folders by name and content, and other values."""
        paths = [path for folder in folders for path in self.committed(folder)]
        files = [f"{path} {content}" for path, content in zip(paths, together(self.content, paths), strict=True)]
        return hashlib.sha256("\n".join([*files, *map(str, others)]).encode()).hexdigest()[:16]

    def made_from(self, pairing: str) -> str | None:
        """The digest of what a pairing's pairs were made from; None before they are complete."""
        record = Store.paired_from(pairing)
        return str(self.read_json(record, {"inputs": str})["inputs"]) if self.exists(record) else None

    def trained(self, name: str) -> str | None:
        """Where a run's result is, complete: `students/<name>` or `adapters/<name>`; None if it is not trained."""
        places = (Store.student(name), Store.adapter(name))
        return next((path for path in places if self.exists(f"{path}/{COMPLETE}")), None)

    # --- definitions ------------------------------------------------------------------------------------------
    def claim(self, definitions: dict[str, dict[str, Any]], write: bool = True) -> None:
        """Binds artifacts to the definitions that they are made from, so that two never mix under one name.

        Raises:
            UserError: an artifact here was made from another definition; nothing is written then.
        """
        changed = [line for name, value in definitions.items() for line in self._changes(name, value)]
        if changed:
            raise UserError(
                f"{self.out} belongs to another recipe:\n" + "\n".join(f"  {line}" for line in changed)
                + "\nuse another `out` (--set out=FOLDER), another name for what changed, or undo the change"
            )  # fmt: skip
        for name, value in definitions.items() if write else []:
            if not self.exists(Store.definition_path(name)):
                self.write_json(Store.definition_path(name), value)

    def definition(self, name: str) -> dict[str, Any] | None:
        """What an artifact here is made from; None if there is none yet."""
        path = Store.definition_path(name)
        return dict(self.read_json(path, dict)) if self.exists(path) else None

    def define(self, name: str, value: dict[str, Any]) -> None:
        """Binds an artifact to what it is made from, in place of an earlier definition."""
        self.write_json(Store.definition_path(name), value)

    def _changes(self, name: str, value: dict[str, Any]) -> Iterable[str]:
        if not self.exists(Store.definition_path(name)):
            return []
        before, after = self.read_json(Store.definition_path(name), dict), json.loads(json.dumps(value))
        before = {RENAMED.get(key, key): old for key, old in before.items()}
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return [f"{name}: {key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in keys]


def keys_of(table: pa.Table) -> pa.ChunkedArray:
    """The key of each row, `<prompt_id>#<sample>`, for joins and for finding what is missing."""
    return pc.binary_join_element_wise(table["prompt_id"], pc.cast(table["sample"], pa.string()), "#")


def numbers_of(numbers: list[dict[str, Any]] | None) -> dict[str, float]:
    """A value of `contracts.NUMBERS` by its names."""
    return {item["key"]: item["value"] for item in numbers or []}


def number_of(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """One number of each value of a column of `contracts.NUMBERS`; null where it is not there."""
    values = column.combine_chunks()
    items, rows = pc.list_flatten(values), pc.list_parent_indices(values)
    mine = pc.equal(pc.struct_field(items, "key"), name)
    places = pc.index_in(pa.array(range(len(values)), rows.type), value_set=rows.filter(mine))
    return pa.chunked_array([pc.struct_field(items, "value").filter(mine).take(places)])
