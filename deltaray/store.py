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

from deltaray.errors import UserError
from deltaray.storage.files import COMPLETE, Files
from deltaray.storage.filesystem import together

PAIRS_PREFIX = "train-"
"""Of the files of pairs: `datasets` takes files with the name of a split alone, and leaves `_funnel.json` and
`_delta.json` beside them out, as all others do whatever the files are called."""


class Store(Files):
    """One study's outputs on a local folder or an object store."""

    # --- where things are -------------------------------------------------------------------------------------
    prompts = "prompts"

    origins = ".deltaray/extensions/origins"
    """The user's prompts, where some of them are extended before they become `prompts`."""

    @staticmethod
    def drawn(kind: str) -> str:
        """The prompts that are to be extended in one way."""
        return f".deltaray/extensions/drawn/kind={kind}"

    @staticmethod
    def extended(kind: str) -> str:
        """The conversations that they became."""
        return f".deltaray/extensions/written/kind={kind}"

    @staticmethod
    def responses(teacher: str) -> str:
        return f"responses/teacher={teacher}"

    @staticmethod
    def scores(scorer: str, teacher: str) -> str:
        return f"scores/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def given(teacher: str) -> str:
        """The scores that a preference data set brought along."""
        return f".deltaray/given/teacher={teacher}"

    @staticmethod
    def questions(scorer: str, teacher: str) -> str:
        """What a judge is asked about a teacher's responses; deleted once they are scored."""
        return f".deltaray/questions/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def judgements(scorer: str, teacher: str) -> str:
        """What it answered."""
        return f".deltaray/judgements/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def references(student: str, teacher: str) -> str:
        return f"references/student={student}/teacher={teacher}"

    @staticmethod
    def pairs(pairing: str) -> str:
        return f"pairs/pairing={pairing}"

    @staticmethod
    def tokens(student: str, teacher: str) -> str:
        """A teacher's responses in a student's tokens."""
        return f".deltaray/tokens/student={student}/teacher={teacher}"

    @staticmethod
    def removed(pairing: str) -> str:
        """Which candidates of a pairing were removed, and by which rule."""
        return f".deltaray/removed/pairing={pairing}"

    @staticmethod
    def student(name: str) -> str:
        return f"students/{name}"

    @staticmethod
    def adapter(name: str) -> str:
        return f"adapters/{name}"

    @staticmethod
    def training(name: str) -> str:
        return f"training/{name}"

    trials = "tuning/trials"
    """What is known of each trial of the exploration."""

    @staticmethod
    def evaluation(name: str) -> str:
        return f"evaluation/{name}.json"

    @staticmethod
    def evaluation_prompts(task: str) -> str:
        return f"evaluation/prompts/task={task}"

    @staticmethod
    def evaluation_responses(model: str, task: str) -> str:
        return f"evaluation/responses/model={model}/task={task}"

    @staticmethod
    def evaluation_scores(model: str, task: str) -> str:
        return f"evaluation/scores/model={model}/task={task}"

    @staticmethod
    def samples(model: str, task: str) -> str:
        """The sample log of a harness task, without its suffix."""
        return f"evaluation/samples/{model}/{task}"

    @staticmethod
    def sample_results(model: str, task: str) -> str:
        """Its results; no folder of Parquet files holds others, but that of pairs."""
        return f"evaluation/results/{model}/{task}.json"

    @staticmethod
    def pair_shard(pairing: str, shard: str) -> str:
        """The pairs of a shard of prompts."""
        return f"{Store.pairs(pairing)}/{PAIRS_PREFIX}{shard}.parquet"

    @staticmethod
    def funnel(pairing: str) -> str:
        """Where the pairs went."""
        return f"{Store.pairs(pairing)}/_funnel.json"

    @staticmethod
    def harness(model: str, task: str, identity: str) -> str:
        """What a harness task asks and is answered, until its results are there."""
        return f".deltaray/harness/model={model}/task={task}/{identity}"

    def digest(self, folders: Iterable[str], *others: object) -> str:
        """Tells apart what something is made from: the files of some folders by name and content, and other values."""
        paths = [path for folder in folders for path in self.committed(folder)]
        files = [f"{path} {content}" for path, content in zip(paths, together(self.content, paths), strict=True)]
        return hashlib.sha256("\n".join([*files, *map(str, others)]).encode()).hexdigest()[:16]

    def made_from(self, pairing: str) -> str | None:
        """The digest of what a pairing's pairs were made from; None before they are complete."""
        record = f".deltaray/pairs/{pairing}.json"
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
            if not self.exists(_definition(name)):
                self.write_json(_definition(name), value)

    def definition(self, name: str) -> dict[str, Any] | None:
        """What an artifact here is made from; None if there is none yet."""
        return dict(self.read_json(_definition(name), dict)) if self.exists(_definition(name)) else None

    def define(self, name: str, value: dict[str, Any]) -> None:
        """Binds an artifact to what it is made from, in place of an earlier definition."""
        self.write_json(_definition(name), value)

    def _changes(self, name: str, value: dict[str, Any]) -> Iterable[str]:
        if not self.exists(_definition(name)):
            return []
        before, after = self.read_json(_definition(name), dict), json.loads(json.dumps(value))
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return [f"{name}: {key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in keys]


def _definition(name: str) -> str:
    return f".deltaray/definitions/{name.replace('/', '.')}.json"


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
