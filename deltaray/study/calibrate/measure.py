"""A sample of the prompts through every teacher's real pool: what its rows cost, and how fast they go."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from deltaray.data.prompts import PromptRow, store_prompts
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.generate.answer import answer
from deltaray.generate.engine_sharing import shared_pools
from deltaray.generate.pools import OnRows, Pool, describe, run_pools
from deltaray.generate.stage import teacher_work
from deltaray.recipe.recipe import Failures
from deltaray.recipe.study import Study
from deltaray.runtime.session import STREAM_CPUS, Capacity
from deltaray.runtime.threads import as_room_allows
from deltaray.study.calibrate.pace import per_row, seconds_per_token
from deltaray.study.calibrate.records import Mean, Measure, PoolMeasure, engine_of, identity_of
from deltaray.study.calibrate.timed import TIMED, TimedSpec, timed_table

ANY = Failures(max_share=1)
"""A teacher that fails is a result of a calibration."""
CLOCKS = 2.0
"""Seconds by which clocks of nodes may differ."""
COLUMNS = ["prompt_id", "prompt_token_ids", "tokens", "error", "ready", "asked", "answered"]


@dataclass(frozen=True)
class Measured:
    """What a run of the sample showed."""

    teachers: dict[str, Measure]
    pools: list[PoolMeasure]
    publish_seconds: float


def sample_prompts(rows: Iterable[PromptRow], number: int, seed: int = 0) -> tuple[list[PromptRow], int]:
    """(a random draw of `number` rows, or all if there are fewer; how many there are). Holds no more than the draw."""
    generator, drawn, count = random.Random(seed), list[PromptRow](), 0
    for row in rows:
        count += 1
        place = len(drawn) if len(drawn) < number else generator.randrange(count)
        drawn[place : place + 1] = [row] if place < number else []
    return drawn, count


def measure(
    study: Study, work: Store, sample: list[PromptRow], capacity: Capacity, on_rows: OnRows, say: Callable[[str], None]
) -> Measured:
    """Every teacher answers the sample, with one replica per pool.

    Args:
        work: an empty store, to be thrown away.
        say: told how the work is spread over the cluster.
    Raises:
        StageError: a teacher answered no prompt at all.
    """
    store_prompts(work, sample, study.recipe.shard_size, unit_size=study.recipe.unit_size)
    works = teacher_work(study, work)
    pools = shared_pools([(item.assignment.teacher, item.units) for item in works], capacity)
    say(describe(pools, capacity))
    spans = _run(work, pools, capacity, on_rows)
    began = time.time()
    answer(work, teacher_work(study, work), capacity, timed_table, TIMED, ANY, on_rows, say)
    published = time.time() - began
    teachers: dict[str, Measure] = {}
    measured = []
    for pool, span in zip(pools, spans, strict=True):
        rows = {name: _rows(work, name) for name in pool.names}
        teachers |= _teachers(study, pool, rows)
        measured.append(_pool(pool, span, rows))
    return Measured({name: teachers[name] for name in study.paired_teachers()}, measured, published)


def _run(work: Store, pools: list[Pool], capacity: Capacity, on_rows: OnRows) -> list[tuple[float, float]]:
    """When each pool began and ended; they start as those of the real run do."""
    spans = [(0.0, 0.0)] * len(pools)

    def run(number: int) -> None:
        began = time.time()
        timed = replace(pools[number], spec=TimedSpec(pools[number].spec))
        run_pools(work, [timed], capacity, timed_table, ANY, on_rows, lambda summary: None)
        spans[number] = began, time.time()

    as_room_allows([partial(run, number) for number in range(len(pools))], [pool.needs() for pool in pools], capacity)
    return spans


def _pool(pool: Pool, span: tuple[float, float], rows: dict[str, pa.Table]) -> PoolMeasure:
    check_clocks(span, [_floats(_asked(table), name) for table in rows.values() for name in ("ready", "answered")])
    return PoolMeasure(
        teachers=list(rows),
        cpus=pool.spec.cpus,
        gpus=pool.spec.gpus,
        replicas=pool.spec.max_replicas,
        stream_cpus=STREAM_CPUS,
        start_seconds=min(_floats(_asked(table), "ready").min() for table in rows.values()) - span[0],
        seconds=span[1] - span[0],
    )


def check_clocks(span: tuple[float, float], moments: list[np.ndarray]) -> None:
    """Refuses times that nodes have taken down outside the seconds in which it happened, by this node's clock.

    Raises:
        StageError: what is worked out of such times would mean nothing.
    """
    wrong = max(span[0] - min(it.min() for it in moments), max(it.max() for it in moments) - span[1])
    if wrong > CLOCKS:
        raise StageError(f"the nodes' clocks differ by {wrong:,.0f} s or more: set them (NTP), then calibrate again")


def _teachers(study: Study, pool: Pool, rows: dict[str, pa.Table]) -> dict[str, Measure]:
    """The measures of the teachers of one pool. Those that share weights run mixed, and so at one pace."""
    weights = {unit["name"]: unit["model"] for unit in pool.units}
    found = {}
    for name, table in rows.items():
        together = pa.concat_tables([rows[other] for other in rows if weights[other] == weights[name]])
        pace = _pace(name, _asked(together), pool.spec.requests_in_flight)
        full = len(_asked(together)) >= 2 * pool.spec.requests_in_flight
        found[name] = _teacher(study, name, table, pace, full)
    return found


def _pace(name: str, table: pa.Table, slots: int) -> Mean:
    try:
        return seconds_per_token(_floats(table, "asked"), _floats(table, "answered"), _floats(table, "tokens"), slots)
    except ValueError as error:
        raise StageError(f"{name}: its pace cannot be measured: {error}; take more prompts") from None


def _teacher(study: Study, name: str, table: pa.Table, pace: Mean, full: bool) -> Measure:
    teacher, prompts = study.teachers[name], table["prompt_id"].to_numpy()
    lengths = np.array([len(ids) for ids in table["prompt_token_ids"]], dtype=np.float64)
    return Measure(
        identity=identity_of(teacher),
        engine=engine_of(teacher),
        samples=teacher.sampling.samples,
        prompts=len(np.unique(prompts)),
        rows=len(table),
        failed=len(table) - table["error"].null_count,
        prompt_tokens=None if teacher.endpoint else per_row(lengths, prompts),
        tokens=per_row(_floats(table, "tokens"), prompts),
        seconds_per_token=pace,
        full_batch=full,
    )


def _rows(work: Store, name: str) -> pa.Table:
    table = work.read_tables(Store.responses(name), TIMED, COLUMNS)
    if table["error"].null_count == 0:
        raise StageError(f"{name}: all {len(table):,} responses failed; the first error: {table['error'][0]}")
    return table


def _asked(table: pa.Table) -> pa.Table:
    """Without the rows that no engine saw."""
    return table.filter(table["asked"].is_valid())


def _floats(table: pa.Table, column: str) -> np.ndarray:
    return table[column].to_numpy().astype(np.float64)
