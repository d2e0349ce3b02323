"""The merging stage: the deltas answer the selection tasks, then each merge is made of the best of them.

A merge is bound to what it is made of (the adapters' contents in their order, method, options). It is made once, and
again when any of that has changed; its earlier answers are deleted then.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.stage import evaluation_work
from deltaray.generate.answer import Work
from deltaray.generate.fingerprint import fingerprint
from deltaray.merge.aggregate.ranking import merged_deltas
from deltaray.merge.arguments import Merge
from deltaray.merge.methods import Options
from deltaray.merge.run import Report, merge_adapters
from deltaray.recipe.merging import MergeMethod
from deltaray.recipe.study import AdapterMerge, Study


def demand_adapters(study: Study, store: Store) -> None:
    """UserError if a delta is not trained."""
    for name in study.deltas():
        if not store.trained(name):
            raise UserError(f"{store.out}: run {name} is not trained yet; run `deltaray train` first")


def selection_work(study: Study, store: Store) -> list[Work]:
    """What the deltas still have to answer in the selection tasks."""
    wanted = {Store.evaluation_responses(name, task) for name in study.deltas() for task in study.selected_on(name)}
    return [work for work in evaluation_work(study, store) if work.assignment.destination in wanted]


def missing_merges(study: Study, store: Store, scores: Mapping[str, float]) -> list[AdapterMerge]:
    """The merges that are not there, or that are made of something else by now."""
    prints = {name: fingerprint(Path(_folder(store, name))) for name in study.deltas()}
    return [
        merge for merge in study.merges.values() if not _is_made(store, merge, merged_deltas(merge, scores), prints)
    ]


def make_merge(
    store: Store, merge: AdapterMerge, scores: Mapping[str, float], progress: Callable[[int, int], None]
) -> Report:
    """Merges and commits `adapters/<name>/`.

    Raises:
        UserError: the adapters cannot be merged this way.
    """
    deltas = merged_deltas(merge, scores)
    folders = [Path(_folder(store, name)) for name in deltas]
    reference = str(folders[0]) if merge.method == "gam" else None
    asked = Merge(folders, merge.method, merge_options(merge.settings), reference)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / merge.name
        report = merge_adapters(asked, made, progress)
        _forget_answers(store, merge.name)
        store.put_folder(made, Store.adapter(merge.name))
    prints = {name: fingerprint(folder) for name, folder in zip(deltas, folders, strict=True)}
    store.define(Store.adapter(merge.name), _definition(merge, deltas, prints))  # last: a kill before it repeats all
    return report


def merge_options(settings: MergeMethod) -> Options:
    """The options that a recipe asks for."""
    return Options(**settings.model_dump(exclude={"method"}))


def _folder(store: Store, name: str) -> str:
    return store.local_folder(Store.adapter(name))


def _is_made(store: Store, merge: AdapterMerge, deltas: list[str], prints: Mapping[str, str]) -> bool:
    if not store.trained(merge.name):
        return False
    return store.definition(Store.adapter(merge.name)) == _definition(merge, deltas, prints)


def _definition(merge: AdapterMerge, deltas: list[str], prints: Mapping[str, str]) -> dict[str, Any]:
    """What a merge is made of, as JSON holds it."""
    options = merge_options(merge.settings).given()
    return {"method": merge.method, "options": options, "adapters": [[name, prints[name]] for name in deltas]}


def _forget_answers(store: Store, name: str) -> None:
    """Deletes what an earlier merge of this name has answered."""
    answers = (f"evaluation/{kind}/model={name}" for kind in ("responses", "scores"))
    tasks = [f"{folder}/{task}" for folder in answers for task in store.folders(folder)]
    store.delete([Store.evaluation(name), *(path for task in tasks for path in store.committed(task))])
