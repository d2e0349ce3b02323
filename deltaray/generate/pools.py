"""Pools of vLLM replicas side by side, as far as the cluster has room for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltaray.generate.spec import EngineSpec
from deltaray.generate.stream import stream_units
from deltaray.generate.units import Unit, load_unit
from deltaray.recipe.models import Engine, Model
from deltaray.runtime.session import STREAM_CPUS, Capacity
from deltaray.runtime.threads import side_by_side
from deltaray.store import Store

WriteUnit = Callable[[Store, Unit], dict[str, Any]]
"""Commits a unit with its `outputs`; returns at least {name, rows, tokens}."""
OnRows = Callable[[str, int, int, int], None]
"""Progress: (name, rows done, rows in all, tokens so far)."""


@dataclass(frozen=True)
class Pool:
    """The replicas of one engine and the units they work through; units with one `name` are counted together."""

    spec: EngineSpec
    units: list[Unit]

    def cpus(self) -> float:
        return self.spec.max_replicas * self.spec.cpus + STREAM_CPUS

    def gpus(self) -> float:
        return self.spec.max_replicas * self.spec.gpus


def engine_spec(model: Model, engine: Engine, capacity: Capacity) -> EngineSpec:
    """The vLLM replicas that a recipe's `engine` section asks for."""
    return EngineSpec(
        model=model.model,
        dtype=engine.dtype,
        max_model_len=engine.max_model_len,
        tensor_parallel=engine.tensor_parallel,
        pipeline_parallel=engine.pipeline_parallel,
        engine_kwargs=engine.arguments | _loading(model),
        gpus=capacity.gpus_of(engine),
        cpus=engine.cpus,
        min_replicas=engine.replicas,
        max_replicas=engine.max_replicas or engine.replicas,
    )


def _loading(model: Model) -> dict[str, Any]:
    revision = {"revision": model.revision} if model.revision else {}
    return revision | ({"trust_remote_code": True} if model.trust_remote_code else {})


def run_pools(store: Store, pools: list[Pool], capacity: Capacity, write: WriteUnit, on_rows: OnRows) -> None:
    """Works through all pools; rows are committed unit by unit as they finish."""
    counts = _Counts([unit for pool in pools for unit in pool.units], on_rows)
    for wave in waves(pools, capacity):
        side_by_side([partial(_run, store, pool, write, counts) for pool in wave])


def waves(pools: list[Pool], capacity: Capacity) -> Iterator[list[Pool]]:
    """Groups of pools that fit into the cluster together, fully grown; one that waits for another may hang. Pure."""
    wave: list[Pool] = []
    for pool in pools:
        together = [*wave, pool]
        fits = sum(item.cpus() for item in together) <= capacity.cpus
        fits = fits and sum(item.gpus() for item in together) <= capacity.gpus
        if wave and not fits:
            yield wave
            wave = []
        wave = [*wave, pool]
    if wave:
        yield wave


def _run(store: Store, pool: Pool, write: WriteUnit, counts: "_Counts") -> None:
    for summary in stream_units(pool.units, pool.spec, partial(load_unit, store), partial(write, store)):
        counts.add(summary)


class _Counts:
    """Rows and tokens by name over all pools."""

    def __init__(self, units: list[Unit], on_rows: OnRows) -> None:
        self.on_rows = on_rows
        self.total: dict[str, int] = {}
        self.done: dict[str, list[int]] = {}
        for unit in units:
            rows = len(unit["prompt_ids"]) * unit["samples"]
            self.total[unit["name"]] = self.total.get(unit["name"], 0) + rows
            self.done[unit["name"]] = [0, 0]
        for name, total in self.total.items():
            on_rows(name, 0, total, 0)

    def add(self, summary: dict[str, Any]) -> None:
        done = self.done[summary["name"]]
        done[0] += summary["rows"]
        done[1] += summary["tokens"]
        self.on_rows(summary["name"], done[0], self.total[summary["name"]], done[1])
