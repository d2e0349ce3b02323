"""A teacher that changes: what it said before steps aside, and comes back if the change is undone.

Responses of two settings never mix under one name, and none is lost: what is published, and what was worked out from
it, moves to `Store.archive`/<identity>/ under the same path, and back when its identity is asked for again.
"""

from collections.abc import Iterator

from deltaray.data.store import Store
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.recipe.study import Study


def changed_teachers(study: Study, store: Store) -> dict[str, str]:
    """Name -> earlier identity of the teachers whose responses were made with other settings and may step aside.

    Where a student was trained on them, or the teacher itself was evaluated, they may not: these would then stand for
    something else than their names say, and the store refuses the change.
    """
    found = {}
    for name in study.teachers:
        before = store.definition(Store.responses(name))
        if before is None or _stands_on(study, store, name):
            continue
        digest = identity_digest(before)
        if digest != identity_digest(generation_identity(study.teachers[name])):
            found[name] = digest
    return found


def _stands_on(study: Study, store: Store, teacher: str) -> bool:
    pairings = [name for name, pairing in study.pairings.items() if teacher in pairing.names]
    trained = any(store.trained(run.name) for run in study.runs.values() if {*run.pairings} & {*pairings})
    return trained or bool(store.folders(f"evaluation/responses/model={teacher}"))


def supersede(study: Study, store: Store) -> None:
    """Moves the earlier responses of changed teachers aside, and those of the present settings, if any, back.

    Between the two the new definition is written: a kill before it repeats the first move, a kill after it the second.
    """
    for name, earlier in changed_teachers(study, store).items():
        store.delete(store.committed(Store.paired, suffix=".json"))  # made from what is about to move
        for path in _files_of(store, name, ""):
            store.move(path, f"{Store.archive}/{earlier}/{path}")
        store.define(Store.responses(name), generation_identity(study.teachers[name]))
    for name, teacher in study.teachers.items():
        aside = f"{Store.archive}/{identity_digest(generation_identity(teacher))}/"
        for path in _files_of(store, name, aside):
            store.move(path, path.removeprefix(aside))


def _files_of(store: Store, teacher: str, prefix: str) -> Iterator[str]:
    """Files of a teacher's responses, and of all scores and references of them."""
    yield from store.committed(f"{prefix}{Store.responses(teacher)}")
    for top in ("scores", "references"):
        for folder in store.folders(f"{prefix}{top}"):
            yield from store.committed(f"{prefix}{top}/{folder}/teacher={teacher}")
