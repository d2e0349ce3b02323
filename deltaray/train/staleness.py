"""Which pairs a student was trained on: pairs change when rows that failed are tried again, students do not."""

from collections.abc import Iterator, Sequence

from deltaray.data.store import Store
from deltaray.recipe.study import Study, TrainingRun


def note_pairs(store: Store, name: str, pairings: Sequence[str]) -> None:
    """Remembers what the pairs are made from that a student is committed with."""
    store.write_json(Store.trained_from(name), _made_from(store, pairings))


def outdated(store: Store, run: TrainingRun) -> str | None:
    """What to tell the user if a trained run's pairs are others by now."""
    path = store.trained(run.name)
    if path is None or not store.exists(Store.trained_from(run.name)):
        return None
    before, now = store.read_json(Store.trained_from(run.name)), _made_from(store, run.pairings)
    changed = [pairing for pairing in run.pairings if before.get(pairing) != now[pairing]]
    if not changed:
        return None
    return f"{run.name} was trained before the pairs of {', '.join(changed)} changed; remove {path} to train it again"


def outdated_in(study: Study, store: Store) -> Iterator[str]:
    """What to tell the user of all trained runs: their pairs are others by now, or would be if they were made."""
    from deltaray.pair.stage import is_paired

    stale: dict[str, bool] = {}
    for run in study.runs.values():
        if note := outdated(store, run):
            yield note
        elif path := store.trained(run.name):
            for name in run.pairings:
                if name not in stale:
                    stale[name] = store.made_from(name) is not None and not is_paired(study, store, name)
            if old := [name for name in run.pairings if stale[name]]:
                yield (
                    f"{run.name} was trained on pairs of {', '.join(old)} whose responses or scores changed since; "
                    f"run `deltaray pair`, and remove {path} to train it again"
                )


def _made_from(store: Store, pairings: Sequence[str]) -> dict[str, str | None]:
    return {pairing: store.made_from(pairing) for pairing in pairings}
