"""From finished units to published shards: each response visible exactly once, whatever dies in between.

Units are committed one by one under `Store.units`/<destination>/<identity>/<shard>/, where no reader looks. When
nothing of a shard is missing any more, they become one file of `<destination>`, and only then are they deleted. A
crash between the two leaves units whose keys are published already: publishing drops such keys, so it can be repeated
at any time. The identity (`generate/identity.py`) keeps what was made with other settings apart.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts.shards import shard_name
from deltaray.data.storage.filesystem import together
from deltaray.data.storage.parquet import parquet_writer
from deltaray.data.store import Store, keys_of
from deltaray.generate.fingerprint import identity_digest
from deltaray.runtime.tally import Tally

ROW_GROUP = 8192
"""Rows of a published file's row groups: few enough to hold in memory, enough to compress well."""
KEYS = ["prompt_id", "sample"]
RETRY = "-retry"
LOOKS = 10
P = ParamSpec("P")
R = TypeVar("R")


def unless_moved(function: Callable[P, R]) -> Callable[P, R]:
    """The function, repeated when a unit that it has listed is gone before it is read.

    Somebody else has published it meanwhile: this command while `status` counts, or a task of a killed command that
    lives on for a moment. Then it is visible, and a new look finds it there.
    """

    @wraps(function)
    def repeated(*arguments: P.args, **named: P.kwargs) -> R:
        for _ in range(LOOKS - 1):
            with suppress(FileNotFoundError):
                return function(*arguments, **named)
            time.sleep(0.5)
        return function(*arguments, **named)

    return repeated


def folder_of(destination: str, identity: str, retry: bool = False) -> str:
    """Where units wait, in a folder per shard; second attempts at failed rows wait apart."""
    return f"{Store.units}/{destination}/{identity}{RETRY if retry else ''}"


def keys_in(store: Store, files: list[str]) -> pa.Table:
    """Columns prompt_id and sample of all rows of the files."""
    empty = pa.schema([RESPONSES.field(name) for name in KEYS]).empty_table()
    return pa.concat_tables([empty, *(store.read_table(file, KEYS) for file in files)])


def failed_rows(store: Store, files: list[str]) -> pa.Table:
    """The keys of all rows that count as failed."""
    tables = (store.read_table(file, [*KEYS, "error"]) for file in files)
    return pa.concat_tables(
        [keys_in(store, []), *(table.filter(pc.field("error").is_valid()).select(KEYS) for table in tables)]
    )


def waiting_folders(store: Store, destination: str, identity: str) -> Iterator[tuple[str, bool]]:
    """(folder, retry) of every shard of a destination of which units wait."""
    for retry in (False, True):
        units = store.listing(folder_of(destination, identity, retry))
        yield from ((folder, retry) for folder in dict.fromkeys(path.rpartition("/")[0] for path in units))


@unless_moved
def rows_done(store: Store, destination: str) -> int:
    """Rows that are published, and those that wait: not second attempts, and of a teacher only its present settings."""
    definition = store.definition(destination)
    present = None if definition is None else identity_digest(definition)
    waiting = [
        file
        for file in store.listing(f"{Store.units}/{destination}")
        if (identity := file.removeprefix(f"{Store.units}/{destination}/").partition("/")[0]) == present
        or (present is None and not identity.endswith(RETRY))
    ]
    return store.count_rows(destination) + sum(map(store.count, waiting))


# --- publishing -------------------------------------------------------------------------------------------------
@unless_moved
def publish(store: Store, destination: str, folder: str, retry: bool, schema: pa.Schema) -> int:
    """Makes the units in the folder of a shard visible as one file and deletes them; returns how many rows that were.

    Second attempts replace the rows that failed, in the files in which these are.
    """
    shard = folder.rpartition("/")[2]
    staged = store.committed(folder)
    published = [path for path in store.committed(destination) if shard_name(path).startswith(f"{shard}-")]
    if retry:
        rows = sum(_replace(store, path, staged, schema) for path in published)
    else:
        rows = _publish_new(store, destination, shard, staged, published, schema)
    store.delete(staged)
    return rows


def _publish_new(
    store: Store, destination: str, shard: str, staged: list[str], published: list[str], schema: pa.Schema
) -> int:
    seen = keys_of(keys_in(store, published))
    sink, rows = pa.BufferOutputStream(), 0
    with parquet_writer(sink, schema) as writer:
        for table in _groups(store, staged, seen, schema):
            writer.write_table(table)
            rows += len(table)
    if rows:
        digest = hashlib.sha256("\n".join(staged).encode()).hexdigest()[:8]
        store.write_bytes(f"{destination}/{shard}-{digest}.parquet", sink.getvalue())
    return rows


def _groups(store: Store, files: list[str], seen: pa.ChunkedArray, schema: pa.Schema) -> Iterator[pa.Table]:
    """The files' rows in large groups, without those whose key was there before."""
    waiting: list[pa.Table] = []
    for file in files:
        table = store.read_table(file, schema=schema)
        keys = keys_of(table)
        waiting.append(table.filter(pc.invert(pc.is_in(keys, value_set=seen.combine_chunks()))))
        seen = pa.chunked_array([*seen.chunks, *keys.chunks])
        if sum(map(len, waiting)) >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _replace(store: Store, path: str, staged: list[str], schema: pa.Schema) -> int:
    """Puts the staged rows in the place of the rows of `path` that have their keys."""
    before = store.read_table(path, schema=schema)
    now = pa.concat_tables([schema.empty_table(), *(store.read_table(file, schema=schema) for file in staged)])
    now = now.filter(pc.is_in(keys_of(now), value_set=keys_of(before).combine_chunks()))
    if not len(now):
        return 0
    kept = before.filter(pc.invert(pc.is_in(keys_of(before), value_set=keys_of(now).combine_chunks())))
    _forget_derived(store, path)
    store.write_table(path, pa.concat_tables([kept, now]), schema, row_group_size=ROW_GROUP)
    return len(now)


def _forget_derived(store: Store, path: str) -> None:
    """Drops what was worked out from a file of responses that is about to change; it is worked out again."""
    kind, _, rest = path.partition("/")
    if kind != "responses":
        return
    teacher, _, file = rest.rpartition("/")
    derived = [
        found
        for top in ("scores", "references")
        for folder in store.folders(top)
        for found in store.committed(f"{top}/{folder}/{teacher}")
        if found.rpartition("/")[2].startswith(file.removesuffix(".parquet"))
    ]
    store.delete([*derived, *store.committed(Store.paired, suffix=".json")])


# --- what failed ------------------------------------------------------------------------------------------------
def failures(store: Store, files: list[str]) -> dict[str, int]:
    """How many rows failed, by kind (what stands before the colon of `error`), most frequent first."""
    counts = Counter(error.partition(":")[0] for error in errors_in(store, files))
    return dict(counts.most_common())


def tally_of(store: Store, name: str, folder: str, counts: Callable[[str], bool] = lambda _: True) -> Tally:
    """The rows that are published in a folder, and those whose error `counts`."""
    files = store.committed(folder)
    tally = Tally(name, rows=sum(together(store.count, files)))
    for error in filter(counts, errors_in(store, files)):
        tally.add(0, 1, [error])
    return tally


def errors_in(store: Store, files: list[str]) -> Iterator[str]:
    """The errors of all rows that failed; only columns that hold one are read."""
    footers = together(store.footer, files)
    for file in (path for path, footer in zip(files, footers, strict=True) if _may_hold_errors(footer)):
        yield from store.read_table(file, ["error"])["error"].drop_null().to_pylist()


def _may_hold_errors(footer: Any) -> bool:
    """Whether the column `error` has a value, as far as the footer's statistics tell."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    of_errors = [column for column in columns if column.path_in_schema == "error"]
    return any(
        not column.is_stats_set
        or not column.statistics.has_null_count
        or column.statistics.null_count < column.num_values
        for column in of_errors
    )
