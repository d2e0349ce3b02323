"""A pool's engine with a stop-watch: the same answers, and with each when it was asked and when it came."""

import asyncio
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import RESPONSES
from deltaray.generate.requests import Output
from deltaray.generate.stage import responses_table
from deltaray.generate.stream import Answering, SpecAround
from deltaray.generate.units import Unit

TIMES = ("ready", "asked", "answered")
"""Of a row, in seconds since the epoch: when its weights had given their first token, when it went to the engine, when
its answer came back. Null for prompts that are not asked."""
TIMED = pa.schema([*RESPONSES, *(pa.field(name, pa.float64()) for name in TIMES)])
PARTS = 256
"""A unit is asked in at most so many parts, each with its own times: finer costs the small models' engine time."""
PER_PROMPT = ("prompt_ids", "messages", "tools", "token_ids")


@dataclass(frozen=True)
class TimedSpec(SpecAround):
    """One replica of a pool, with the stop-watch."""

    @property
    def min_replicas(self) -> int:
        return 1

    @property
    def max_replicas(self) -> int:
        return 1

    def start(self) -> "_Timed":
        return _Timed(self.spec.start())


class _Timed:
    def __init__(self, engine: Answering) -> None:
        self.engine = engine
        self.readiness: dict[tuple[str, str | None], asyncio.Task[float]] = {}

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        ready = await self._ready(unit)
        size = math.ceil(len(unit["prompt_ids"]) / PARTS)
        starts = range(0, len(unit["prompt_ids"]), size)
        parts = await asyncio.gather(*(self._part(_slice(unit, start, start + size), ready) for start in starts))
        return [answers for part in parts for answers in part]

    async def _part(self, unit: Unit, ready: float) -> list[list[Output]]:
        asked = time.time()
        answers = await self.engine.generate(unit)
        times = {"ready": ready, "asked": asked, "answered": time.time()}
        return [[output | times for output in outputs] for outputs in answers]

    async def _ready(self, unit: Mapping[str, Any]) -> float:
        """Asks one token of weights that are new to the engine, so that no row has to wait while they are loaded."""
        weights = (unit["model"], unit["adapter"])
        if weights not in self.readiness:
            self.readiness[weights] = asyncio.create_task(self._first_token(unit))
        return await self.readiness[weights]

    async def _first_token(self, unit: Mapping[str, Any]) -> float:
        sampling = json.dumps(json.loads(unit["sampling"]) | {"max_tokens": 1})
        await self.engine.generate(_slice(unit, 0, 1) | {"samples": unit["samples"][:1], "sampling": sampling})
        return time.time()

    def close(self) -> None:
        self.engine.close()


def timed_table(unit: Unit) -> pa.Table:
    """The rows of an answered unit with their times. Pure."""
    outputs = [output for outputs in unit["outputs"] for output in outputs]
    times = [pa.array([output.get(name) for output in outputs], pa.float64()) for name in TIMES]
    return pa.Table.from_arrays([*responses_table(unit).columns, *times], schema=TIMED)


def _slice(unit: Mapping[str, Any], start: int, stop: int) -> Unit:
    """The unit with some of its prompts."""
    return {**unit, **{key: unit[key][start:stop] for key in PER_PROMPT}}
