"""Small units of CPU work as a Ray Data stream: one row is one unit, and its result one row."""

import json
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

from deltaray.runtime.session import cpus_of_a_core

log = logging.getLogger(__name__)

PATIENCE = 3600.0
"""Seconds in which one of the units under way must end, at first; a file of programs to be tested takes long."""

Unit = dict[str, Any]
Stream = Callable[[dict[int, Unit], float], Generator[tuple[int, Unit], None, None]]
"""(units by number, seconds without progress after which it ends) -> numbers and results."""


def map_units(units: list[Unit], work: Callable[[Unit], Unit]) -> Iterator[Unit]:
    """Runs `work` on every unit somewhere in the cluster; yields the results as they finish.

    Units and results travel as JSON, so that an empty list or a null keeps its type on the way. Each takes a core.
    `work` must bear to be done twice.
    """
    return persistent(units, partial(_stream, _JsonWork(work)))


def persistent(units: list[Unit], stream: Stream) -> Iterator[Unit]:
    """The result of every unit once, as they come; where none comes for a while the rest is asked for again.

    Ray may forget a task that is sent to a node which dies at that moment (ray-project/ray#63405). What is only slow is
    given twice as long each time.

    Args:
        stream: called with the units that are missing and the seconds of patience, which it gives to Ray Data.
    """
    from ray.data.exceptions import ExecutionTimeoutError

    missing, patience = dict(enumerate(units)), PATIENCE
    while missing:
        try:
            with closing(stream(dict(missing), patience)) as results:
                for number, result in results:
                    del missing[number]
                    yield result
        except ExecutionTimeoutError:
            log.warning("%d units are asked for again: none has ended for %g s", len(missing), patience)
            patience *= 2


def _stream(work: "_JsonWork", units: dict[int, Unit], patience: float) -> Generator[tuple[int, Unit], None, None]:
    import ray

    quiet_ray_data()
    asked = [{"number": number, "unit": json.dumps(unit)} for number, unit in units.items()]
    results = ray.data.from_items(asked, override_num_blocks=len(asked)).map(work, num_cpus=cpus_of_a_core())
    results.set_name(work.__name__)
    results.context.execution_no_progress_timeout_s = patience
    for row in results.iter_rows():
        yield row["number"], json.loads(row["result"])


class _JsonWork:
    def __init__(self, work: Callable[[Unit], Unit]) -> None:
        self.work = work
        self.__name__ = getattr(work, "func", work).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "result": json.dumps(self.work(json.loads(row["unit"])))}


def quiet_ray_data() -> None:
    """Our own progress replaces Ray Data's."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The default fails a stream of which nothing ends for half an hour; see `persistent` for those that may wait.
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.WARNING)
