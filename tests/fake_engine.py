"""An engine that says at once what it must say, and the real command line over it in place of vLLM.

    FAKE_ENGINE='{"delay": 0.1}' python tests/fake_engine.py generate RECIPE

What a row must hold follows from its key, the teacher's name and the temperature (`answer_text`), so a checker can
work it out again. The variable FAKE_ENGINE holds a `Behaviour` as JSON.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltaray.runtime import last_words

VARIABLE = "FAKE_ENGINE"
SLOW = 15.0
"""Seconds a unit takes in a pool that has not grown yet."""


@dataclass(frozen=True)
class Behaviour:
    """How the fake engine behaves."""

    delay: float = 0.0  # seconds per unit
    failing: float = 0.0  # share of the rows that fail, always the same ones
    marks: str | None = None  # a folder in which every unit leaves a line when it starts
    freezes: bool = False  # whoever starts the first unit stops his process in the middle of it; needs marks
    breaks: str | None = None  # every process ends itself at its first unit, with these words
    replicas: int = 1  # a replica answers two units quickly, and more when the pool has so many that have marked one

    def variable(self) -> dict[str, str]:
        """The environment of a command that behaves so."""
        return {VARIABLE: json.dumps(asdict(self))}


@dataclass(frozen=True)
class FakeSpec:
    """A pool of fakes; satisfies `deltaray.generate.stream.Spec`."""

    behaviour: Behaviour = Behaviour()
    cpus: float = 0.5
    gpus: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1
    requests_in_flight: int = 64
    environment: dict[str, str] = field(default_factory=dict)
    ray_options: dict[str, Any] = field(default_factory=dict)
    stall_seconds: float = 600.0

    def start(self) -> "FakeEngine":
        return FakeEngine(self.behaviour)


class FakeEngine:
    """Answers every prompt of a unit after the delay."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.units = behaviour, 0

    async def generate(self, unit: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        self.units += 1
        if self.behaviour.breaks:
            last_words.leave("the fake engine broke", RuntimeError(self.behaviour.breaks))
            os._exit(1)
        if self.behaviour.marks:
            _mark(Path(self.behaviour.marks), unit)
            if self.behaviour.freezes:
                _freeze_once(Path(self.behaviour.marks))
            if self.units > 2:  # Ray Data asks for nodes when it knows how fast the present ones are
                await self._company(Path(self.behaviour.marks), unit["name"])
        if self.behaviour.delay:
            await asyncio.sleep(self.behaviour.delay)
        temperature = json.loads(unit["sampling"])["temperature"]
        share = self.behaviour.failing
        return [
            [_output(unit["name"], prompt_id, sample, temperature, share) for sample in unit["samples"]]
            for prompt_id in unit["prompt_ids"]
        ]

    async def _company(self, marks: Path, name: str) -> None:
        """Wait for the other replicas, not for ever: Ray Data sees an engine that waits as fast as it was before."""
        deadline = time.monotonic() + SLOW
        while sum(f'"{name}"' in file.read_text() for file in marks.iterdir()) < self.behaviour.replicas:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.1)

    def close(self) -> None:
        pass


def answer_text(name: str, prompt_id: str, sample: int, temperature: float) -> str:
    """What the teacher `name` answers."""
    return f"{name} says {prompt_id}#{sample} at {temperature:g}"


def failure(name: str, prompt_id: str, sample: int, share: float) -> str | None:
    """How a row fails (`error` or `empty`), None if it does not."""
    if not share:
        return None
    number = int.from_bytes(hashlib.sha256(f"{name} {prompt_id} {sample}".encode()).digest()[:4]) / 2**32
    return None if number >= share else "error" if number < share / 2 else "empty"


def _output(name: str, prompt_id: str, sample: int, temperature: float, share: float) -> dict[str, Any]:
    how = failure(name, prompt_id, sample, share)
    if how == "error":
        blank = {"token_ids": [], "tokens": 0, "text": "", "reasoning": None}
        return blank | {"finish_reason": "error", "error": f"this row always fails: {prompt_id}"}
    text = "" if how == "empty" else answer_text(name, prompt_id, sample, temperature)
    ids = [len(name), sample, 1]
    return {
        "token_ids": ids, "tokens": len(ids), "text": text, "reasoning": None, "finish_reason": "stop", "error": None
    }  # fmt: skip


def _mark(folder: Path, unit: Mapping[str, Any]) -> None:
    """One line per unit, in one write, so that a kill leaves it whole or leaves it out."""
    temperature = json.loads(unit["sampling"])["temperature"]
    line = {key: unit[key] for key in ("name", "prompt_ids", "samples")}
    line |= {"temperature": temperature, "at": time.time()}
    with (folder / f"{os.getpid()}.jsonl").open("ab", buffering=0) as sink:
        sink.write(json.dumps(line).encode() + b"\n")


def _freeze_once(folder: Path) -> None:
    with suppress(FileExistsError), folder.with_suffix(".frozen").open("x") as sink:
        sink.write(str(os.getpid()))
        sink.flush()
        os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    """`deltaray` with fakes in every pool of teachers."""
    from deltaray import cli
    from deltaray.generate import engine_sharing

    behaviour = Behaviour(**json.loads(os.environ.get(VARIABLE, "{}")))

    def fake_pool(teachers: Any, capacity: Any) -> FakeSpec:
        engine = teachers[0].engine
        return FakeSpec(
            behaviour,
            cpus=engine.cpus,
            gpus=capacity.gpus_of(engine),
            min_replicas=engine.replicas,
            max_replicas=engine.max_replicas or engine.replicas,
            stall_seconds=engine.stall_seconds,
        )

    engine_sharing.pool_spec = fake_pool
    cli.main()


if __name__ == "__main__":
    main()
