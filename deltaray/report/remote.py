"""The files of a study that a report is made from, on this machine."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyarrow import fs

from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store


@contextmanager
def local_copy(store: Store) -> Iterator[Path]:
    """The study's folder; of one on an object store a temporary copy of what a report reads (all pairs, no answers)."""
    if store.local is not None:
        yield store.local
        return
    with tempfile.TemporaryDirectory(prefix="deltaray-report-") as folder:
        together(partial(_fetch, store, Path(folder)), _wanted(store))
        yield Path(folder)


def _wanted(store: Store) -> list[str]:
    single = [path for path in (Store.recipe, Store.stages) if store.exists(path)]
    pairs = [
        path for suffix in (".parquet", "/_funnel.json", "/_delta.json") for path in store.listing("pairs", suffix)
    ]
    removed = store.listing(Store.all_removed)
    training = store.listing("training", "/metrics.jsonl")
    merges = store.listing("adapters", "/merge.json")
    tuning = [*store.committed(Store.trials, ".json"), *store.committed("tuning", "landscape.json")]
    return [*single, *pairs, *removed, *training, *merges, *tuning, *store.committed("evaluation", ".json")]


def state_of(store: Store) -> str:
    """Tells apart what a report is made of, by the sizes and times of the files."""
    listed = [("pairs", ".parquet"), ("pairs", ".json"), ("training", "/metrics.jsonl"), ("adapters", "/merge.json")]
    listed += [("tuning", ".json"), ("evaluation", ".json")]
    files = [item for place in listed for item in store.listing(*place).items()]
    text = "\n".join(f"{path} {it.size} {it.mtime_ns}" for path, it in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fetch(store: Store, folder: Path, path: str) -> None:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    fs.copy_files(path, str(target), store.filesystem, fs.LocalFileSystem())
