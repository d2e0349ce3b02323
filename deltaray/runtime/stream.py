"""Small units of CPU work as a Ray Data stream: one row is one unit, and its result one row."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from deltaray.runtime.session import cpus_of_a_core


def map_units(
    units: list[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Runs `work` on every unit somewhere in the cluster; yields the results as they finish.

    Units and results travel as JSON, so that an empty list or a null keeps its type on the way. Each takes a core.
    """
    import ray

    if not units:
        return
    quiet_ray_data()
    rows = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units], override_num_blocks=len(units))
    named = _JsonWork(work)
    results = rows.map(named, num_cpus=cpus_of_a_core())
    results.set_name(named.__name__)
    for row in results.iter_rows():
        yield json.loads(row["result"])


class _JsonWork:
    def __init__(self, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.work = work
        self.__name__ = getattr(work, "func", work).__name__

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(self.work(json.loads(row["unit"])))}


def quiet_ray_data() -> None:
    """Our own progress replaces Ray Data's."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The default fails a stream of which nothing ends for half an hour; a file of programs to be tested takes longer.
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.WARNING)
