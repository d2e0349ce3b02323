"""Answering: models, their units, and shards that become visible as soon as nothing of them is missing.

Generation and evaluation both end here; they differ in what a row looks like and where it goes.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.generate.engine_sharing import shared_pools
from deltaray.generate.pools import REMEDY, Load, MakeTable, OnRows, describe, run_pools
from deltaray.generate.staging import publish, tally_of, waiting_folders
from deltaray.generate.stream import TASK_CPUS, Spec
from deltaray.generate.units import Assignment, Unit, load_unit, missing_units
from deltaray.recipe.recipe import Failures
from deltaray.runtime.session import Capacity
from deltaray.runtime.stream import PATIENCE
from deltaray.runtime.tally import broken


@dataclass(frozen=True)
class Work:
    """What of an assignment is left to do."""

    assignment: Assignment
    units: list[Unit]
    waiting: list[tuple[str, bool]]  # folders of committed units that no run has published yet

    @property
    def finished(self) -> bool:
        return not self.units and not self.waiting


def work_of(store: Store, assignment: Assignment) -> Work:
    """What is missing at the assignment's destination, or what failed there; see `units.missing_units`."""
    waiting = waiting_folders(store, assignment.destination, assignment.identity)
    return Work(assignment, missing_units(store, assignment), list(waiting))


def answer(
    store: Store,
    works: list[Work],
    capacity: Capacity,
    make_table: MakeTable,
    schema: pa.Schema,
    failures: Failures,
    on_rows: OnRows,
    say: Callable[[str], None],
    around: Callable[[Spec], Spec] = lambda spec: spec,
    load: Load = load_unit,
) -> None:
    """Does the work: afterwards every response is published exactly once.

    Args:
        make_table: the rows of an answered unit, in `schema`.
        say: told how the work is spread over the cluster.
        around: puts something of the caller's around the engines, such as what asks them turn after turn.
        load: fetches what a unit asks, where that is not a prompt in chat turns.
    Raises:
        StageError: too many rows of one model failed; what is committed stays.
    """
    publisher = _Publisher(store, schema, works)
    pools = shared_pools([(work.assignment.teacher, work.units) for work in works if work.units], capacity)
    pools = [replace(pool, spec=around(pool.spec)) for pool in pools]
    if pools:
        say(describe(pools, capacity))
    run_pools(store, pools, capacity, make_table, failures, on_rows, publisher.committed, load)
    publisher.finish()


def refuse_failed(
    store: Store,
    works: list[Work],
    failures: Failures,
    say: Callable[[str], None],
    remedy: str = REMEDY,
    counts: Callable[[str], bool] = lambda _: True,
) -> None:
    """Says what failed of all that is stored; however few rows there are.

    Args:
        counts: which errors count as failures.
    Raises:
        StageError: all rows of a destination failed, or too large a share of them.
    """
    tallies = [tally_of(store, work.assignment.name, work.assignment.destination, counts) for work in works]
    too_many = [tally for tally in tallies if tally.is_too_much(failures.max_share)]
    if too_many:
        raise StageError(broken(too_many, failures.max_share, remedy))
    for tally in tallies:
        if tally.failed:
            say(tally.line())


class _Publisher:
    """Counts the units that a shard still misses; publishes it in a task of its own when there are none."""

    def __init__(self, store: Store, schema: pa.Schema, works: list[Work]) -> None:
        """Starts with what earlier runs had completed, or had tried again, and not published."""
        self.store, self.schema = store, schema
        self.missing = Counter(_folder(unit) for work in works for unit in work.units)
        self.tasks: list[Any] = []
        for work in works:
            for folder, retry in work.waiting:
                if not self.missing[folder]:
                    self._publish(work.assignment.destination, folder, retry)

    def committed(self, summary: Unit) -> None:
        folder = _folder(summary)
        self.missing[folder] -= 1
        if self.missing[folder] == 0:
            self._publish(summary["destination"], folder, summary["retry"])

    def finish(self) -> None:
        """Waits until all is published.

        Raises:
            StageError: nothing is any more; a task that is sent to a node which dies then is forgotten by Ray.
        """
        import ray

        waiting = self.tasks
        while waiting:
            done, waiting = ray.wait(waiting, timeout=PATIENCE)
            ray.get(done)
            if not done:
                raise StageError(
                    f"{len(waiting)} shards wait to be published and nothing happens: run the same command again"
                )

    def _publish(self, destination: str, folder: str, retry: bool) -> None:
        import ray

        task = ray.remote(num_cpus=TASK_CPUS)(publish)
        self.tasks.append(task.remote(self.store, destination, folder, retry, self.schema))


def _folder(unit: Unit) -> str:
    """Where the units of one shard wait."""
    return str(unit["staged"]).rpartition("/")[0]
