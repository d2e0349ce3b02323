"""Pools of replicas side by side, as far as the cluster has room for them, and what becomes of their units."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.generate.stream import Spec, in_flight_of, stream_units
from deltaray.generate.units import Unit, load_unit
from deltaray.recipe.recipe import Failures
from deltaray.runtime.session import STREAM_CPUS, Capacity
from deltaray.runtime.tally import SHOWN, Tally, broken
from deltaray.runtime.threads import as_room_allows, startable

MakeTable = Callable[[Unit], pa.Table]
"""The rows of a unit with its `outputs`; the table's schema is the destination's."""
Load = Callable[[Store, Unit], Unit]
"""Adds what `units.Unit` says that loading adds."""
OnRows = Callable[[str, int, int, int, str], None]
"""Progress: (name, rows done, rows in all, tokens so far, what failed among them or "")."""
OnUnit = Callable[[Unit], None]
"""Told of every unit that is committed."""
REMEDY = (
    "the failed rows are recorded: fix the cause and run `deltaray generate RECIPE --retry-failed` (`deltaray score` "
    "where a judge failed), or raise failures.max_share"
)

EMPTY = "empty answer"
"""The kind of error of a model that had nothing to say."""
AGAIN = "fix the cause and run the same command, which does it again, or raise failures.max_share"


@dataclass(frozen=True)
class Pool:
    """The replicas of one engine and the units they work through; units with one `name` are counted together."""

    spec: Spec
    units: list[Unit]
    units_in_flight: int | None = None

    def needs(self) -> Capacity:
        """What it takes, fully grown."""
        most = self.spec.max_replicas
        return Capacity(most * self.spec.cpus + STREAM_CPUS, most * self.spec.gpus)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(unit["name"] for unit in self.units))

    @property
    def in_flight(self) -> int:
        """Responses that are asked for and not committed at one moment, at most: what a crash can cost."""
        each = in_flight_of(self.units, self.spec, self.units_in_flight)
        largest = max(len(unit["rows"]) * len(unit["samples"]) for unit in self.units)
        return largest * each * min(self.spec.max_replicas, len(self.units))


def describe(pools: list[Pool], capacity: Capacity) -> str:
    """Which pools start at once, which wait for room, and what a crash can cost. Pure."""
    first = startable(list(range(len(pools))), [], [pool.needs() for pool in pools], capacity)
    together = ", ".join("+".join(pools[number].names) for number in first)
    later = ", ".join("+".join(pool.names) for number, pool in enumerate(pools) if number not in first)
    wait = f"; then, as room gets free: {later}" if later else ""
    return f"pools at once: {together}{wait}; at most {sum(pool.in_flight for pool in pools):,} responses in flight"


def run_pools(
    store: Store,
    pools: list[Pool],
    capacity: Capacity,
    make_table: MakeTable,
    failures: Failures,
    on_rows: OnRows,
    on_unit: OnUnit,
    load: Load = load_unit,
) -> None:
    """Works through all pools; rows are committed unit by unit as they finish.

    A pool starts as soon as there is room for it beside those that run; the order is the given one.

    Raises:
        StageError: too large a share of some name's rows failed (see `Failures`).
    """
    progress = _Progress([unit for pool in pools for unit in pool.units], failures, on_rows)

    def run(pool: Pool) -> None:
        write = partial(commit_unit, store, make_table)
        for summary in stream_units(pool.units, pool.spec, partial(load, store), write, pool.units_in_flight):
            progress.add(summary)
            on_unit(summary)

    as_room_allows([partial(run, pool) for pool in pools], [pool.needs() for pool in pools], capacity)


def commit_unit(store: Store, make_table: MakeTable, unit: Unit) -> dict[str, Any]:
    """Commits a unit where units wait; returns what the driver counts."""
    table = make_table(unit)
    store.write_table(unit["staged"], table, table.schema)
    outputs = [output for answers in unit["outputs"] for output in answers]
    errors = [error for error in map(error_of, outputs) if error]
    return {
        "name": unit["name"],
        "destination": unit["destination"],
        "staged": unit["staged"],
        "retry": unit["retry"],
        "rows": len(outputs),
        "tokens": sum(output["tokens"] for output in outputs),
        "failed": len(errors),
        "errors": list(dict.fromkeys(errors))[:SHOWN],
    }


def error_of(output: dict[str, Any]) -> str | None:
    """Why a response counts as failed, as `kind: words`; None if it does not. Pure."""
    if output["error"] is not None:
        known = output["error"].startswith("prompt refused:")
        return output["error"] if known else f"engine error: {output['error']}"
    if output["text"].strip():
        return None
    cut = output["reasoning"] is not None and output["finish_reason"] == "length"
    return f"{EMPTY}: the reasoning was cut at max_tokens" if cut else EMPTY


class _Progress:
    """Rows, tokens and failures by name over all pools."""

    def __init__(self, units: list[Unit], failures: Failures, on_rows: OnRows) -> None:
        self.failures, self.on_rows = failures, on_rows
        self.lock = threading.Lock()
        self.total: Counter[str] = Counter()
        for unit in units:
            self.total[unit["name"]] += len(unit["rows"]) * len(unit["samples"])
        self.tallies = {name: Tally(name) for name in self.total}
        self.tokens: Counter[str] = Counter()
        for name, total in self.total.items():
            on_rows(name, 0, total, 0, "")

    def add(self, summary: dict[str, Any]) -> None:
        name = summary["name"]
        with self.lock:
            tally = self.tallies[name]
            tally.add(summary["rows"], summary["failed"], summary["errors"])
            self.tokens[name] += summary["tokens"]
        self.on_rows(name, tally.rows, self.total[name], self.tokens[name], tally.note())
        # of a second attempt that most fails again is to be expected: the others did not
        early = tally.rows >= self.failures.after and not summary["retry"]
        if early and tally.failed > self.failures.max_share * tally.rows:
            raise StageError(broken([tally], self.failures.max_share, REMEDY))
