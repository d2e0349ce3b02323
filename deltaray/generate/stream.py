"""Units of work through Ray Data: load -> a pool of engines -> write, each unit as soon as it is done.

A row of the Dataset is one unit, pickled into one binary column. So Ray can never split what is written together,
a lost worker costs its units in flight and nothing else, and no value passes through Arrow's type guessing (an
error column that is null throughout one block, token lists that happen to be equally long, …).
"""

import math
import pickle
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deltaray.errors import StageError
from deltaray.failures import cause_of, is_told, told_in
from deltaray.generate.requests import Output, failed, sound
from deltaray.generate.units import Unit, responses_in
from deltaray.runtime import last_words
from deltaray.runtime.process_watchdog import guard
from deltaray.runtime.stream import persistent

Packed = dict[str, bytes]

TASK_CPUS = 0.25  # what a load or write task reserves in Ray
ENGINE_RETRIES = 3  # how often a unit is repeated after its engine died; then the stream fails, not for ever
QUEUE = 2  # units handed to a replica of a pool that can grow, as a multiple of those it runs at once
DIED = "fix that (memory, engine settings, the model's files), then run the same command again to resume"
DEATHS = re.compile(r"(?:Actor(?:Died|Unavailable)|RayActor|WorkerCrashed|NodeDied|LocalRayletDied|OutOfMemory)Error\b")
"""What Ray says of a process that is gone."""
WORDLESS = "out of memory (the kernel or Ray then ends it), a crash inside a library, or a lost node"
MOST_IN_FLIGHT = 16  # units in one engine at once: each is a thread of the actor and a unit in its memory


class Answering(Protocol):
    """What a replica runs."""

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]: ...

    def close(self) -> None: ...


class Spec(Protocol):
    """Describes the replicas of a pool; pickled into their processes."""

    @property
    def cpus(self) -> float: ...

    @property
    def gpus(self) -> float: ...

    @property
    def min_replicas(self) -> int: ...

    @property
    def max_replicas(self) -> int: ...

    @property
    def requests_in_flight(self) -> int:
        """Requests that keep one replica busy."""

    @property
    def stall_seconds(self) -> float:
        """A replica that stands still for so long is ended."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a replica's process."""

    @property
    def ray_options(self) -> dict[str, Any]:
        """Further options of Ray for a replica's actor."""

    def start(self) -> Answering:
        """Called in the replica's process; returns when it is ready."""


@dataclass(frozen=True)
class SpecAround:
    """A pool's replicas with something of ours around each engine, which `start` puts there."""

    spec: Spec

    @property
    def cpus(self) -> float:
        return self.spec.cpus

    @property
    def gpus(self) -> float:
        return self.spec.gpus

    @property
    def min_replicas(self) -> int:
        return self.spec.min_replicas

    @property
    def max_replicas(self) -> int:
        return self.spec.max_replicas

    @property
    def requests_in_flight(self) -> int:
        return self.spec.requests_in_flight

    @property
    def stall_seconds(self) -> float:
        return self.spec.stall_seconds

    @property
    def environment(self) -> dict[str, str]:
        return self.spec.environment

    @property
    def ray_options(self) -> dict[str, Any]:
        return self.spec.ray_options


def stream_units(
    units: list[Unit],
    spec: Spec,
    load: Callable[[Unit], Unit],
    write: Callable[[Unit], Unit],
    units_in_flight: int | None = None,
) -> Iterator[Unit]:
    """Runs units through load -> engine pool -> write; yields write's small summary of each finished unit.

    `load` and `write` are called in small tasks on any node; see `units.Unit` for what is added where. `write` must
    write the unit under a name of its own by rename: a unit may be run twice (a lost worker), and must then replace
    itself. Summaries come in the order of completion.

    Ending or closing the iterator ends the pool. Raises what load, write or the engine raised (as Ray wraps it), and
    StageError with its last words where the engine's process has ended itself.
    Streams may run at the same time in several threads; the cluster's CPUs must then exceed the sum of
    max_replicas * cpus over them by at least `TASK_CPUS`, or they wait for each other for ever.
    """
    key = f"engine {uuid.uuid4().hex}"
    try:
        yield from persistent(units, partial(_stream, key, spec, load, write, units_in_flight))
    except Exception as error:
        words = None if told_in(error) is not None or is_told(error) else last_words.left(key)
        if words is None and not DEATHS.match(cause_of(error)):
            raise
        raise _died(_label(units), words, error) from error
    finally:
        last_words.forget(key)


def _died(label: str, words: tuple[str, str] | None, error: Exception) -> StageError:
    """What is said of a replica whose process is gone; all that it had to say goes to the log."""
    if words is None:
        return StageError(f"a process of the {label} died without a word: {cause_of(error)}\n{WORDLESS}\n{DIED}")
    cause, everything = words
    print(everything, file=sys.stderr)
    return StageError(f"{cause}\n{DIED}")


def _stream(
    key: str,
    spec: Spec,
    load: Callable[[Unit], Unit],
    write: Callable[[Unit], Unit],
    units_in_flight: int | None,
    units: dict[int, Unit],
    patience: float,
) -> Generator[tuple[int, Unit], None, None]:
    few_swaps = dict(sorted(units.items(), key=lambda item: item[1]["model"]))
    dataset = _dataset(few_swaps, key, spec, load, write, units_in_flight, patience)
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        for batch in batches:
            yield from (pickle.loads(packed) for packed in batch["unit"].to_pylist())
    finally:
        batches.close()  # shuts the executor down now, not when it is garbage-collected


def _dataset(
    numbered: dict[int, Unit],
    key: str,
    spec: Spec,
    load: Callable[[Unit], Unit],
    write: Callable[[Unit], Unit],
    units_in_flight: int | None,
    patience: float,
) -> Any:
    """The lazy plan: one block, and so one task, per unit in each of the three operators."""
    import ray

    units, packed = list(numbered.values()), [_pack(*item) for item in numbered.items()]
    dataset = ray.data.from_items(packed, override_num_blocks=len(packed))
    _configure(dataset.context, patience)
    replicas, in_flight = min(spec.max_replicas, len(units)), in_flight_of(units, spec, units_in_flight)
    # One loading and one writing task per engine keep up with it, and keep small machines small.
    tasks = {"num_cpus": TASK_CPUS, "compute": ray.data.TaskPoolStrategy(size=replicas)}
    dataset = dataset.map(_task("load", load), **tasks)
    smallest = min(spec.min_replicas, replicas)
    pool = ray.data.ActorPoolStrategy(
        min_size=smallest,
        max_size=replicas,
        # Ray Data adds replicas only while more units are handed to the present ones than these run at once
        max_tasks_in_flight_per_actor=in_flight if smallest == replicas else QUEUE * in_flight,
        max_concurrent_calls_per_actor=in_flight,
    )
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")  # no named one bounds the retries
    label = _label(units)
    worker = type(label, (_PoolWorker,), {})  # Ray's dashboard and its processes are called by it
    dataset = dataset.map(worker, fn_constructor_args=(spec, key, label), compute=pool, **_resources(spec))
    dataset = dataset.map(_task("write", write), **tasks)
    dataset.set_name(label)
    return dataset


def _label(units: list[Unit]) -> str:
    """`engine of mini-m mini-xs`: the names that a pool answers for, two of them at most."""
    names = sorted({unit["name"] for unit in units})
    return " ".join(["engine of", *names[:2], *(["..."] if len(names) > 2 else [])])


def _configure(context: Any, patience: float) -> None:
    """Ray Data's settings of this one stream (the context is the Dataset's own copy)."""
    context.execution_options.preserve_order = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0  # a failed unit fails the stream; what was written stays
    context.execution_no_progress_timeout_s = patience


def _resources(spec: Spec) -> dict[str, Any]:
    """Ray's options of an engine's actor."""
    return {
        "num_cpus": spec.cpus,
        "num_gpus": spec.gpus,
        "max_task_retries": ENGINE_RETRIES,
        "runtime_env": {"env_vars": spec.environment},
    } | spec.ray_options


def in_flight_of(units: list[Unit], spec: Spec, demanded: int | None) -> int:
    """How many units one engine has at once: enough requests that its batch stays full while units end and begin.

    Never more than its share of the units, or the first engine up would take them all. Pure.
    """
    requests = responses_in(units) / len(units)
    enough = min(max(math.ceil(2 * spec.requests_in_flight / max(requests, 1)), 2), MOST_IN_FLIGHT)
    return min(demanded or enough, math.ceil(len(units) / min(spec.max_replicas, len(units))))


def _pack(number: int, unit: Unit) -> Packed:
    return {"unit": pickle.dumps((number, unit))}


def _task(name: str, function: Callable[[Unit], Unit]) -> Callable[[Packed], Packed]:
    """The caller's function around one packed row; Ray Data names the operator by it."""

    def task(row: Packed) -> Packed:
        number, unit = pickle.loads(row["unit"])
        return _pack(number, function(unit))

    task.__name__ = name
    return task


class _PoolWorker:
    """The actor of the pool: one engine, several units in flight (Ray Data runs the coroutines side by side)."""

    def __init__(self, spec: Spec, key: str, label: str) -> None:
        """Raises StageError when the processes of this actor have ended again and again without an answer."""
        guard(frozen=spec.stall_seconds)
        last_words.sign(key)
        self.fresh = True  # has answered nothing yet
        if last_words.count_start() > last_words.STARTS:
            cause, _ = last_words.left(key) or (f"the process of the {label} ended without a word", "")
            raise StageError(f"{cause}\nit ended {last_words.STARTS} times before it had answered anything; {DIED}")
        try:
            self.engine = spec.start()
        except BaseException as error:
            last_words.leave(f"the {label} cannot start", error)
            raise

    async def __call__(self, row: Packed) -> Packed:
        number, unit = pickle.loads(row["unit"])
        asked = [place for place, reason in enumerate(unit["refused"]) if reason is None]
        answers = iter(await self.engine.generate(_only(unit, asked)) if asked else [])
        outputs = [
            next(answers) if reason is None else [failed(f"prompt refused: {reason}") for _ in unit["samples"]]
            for reason in unit["refused"]
        ]
        if self.fresh:
            self.fresh = False
            last_words.forget_starts()
        return _pack(number, unit | {"outputs": [[sound(output) for output in of] for of in outputs]})

    def __del__(self) -> None:
        if hasattr(self, "engine"):  # not when the engine never started
            self.engine.close()


def _only(unit: Unit, places: list[int]) -> Unit:
    """The unit with some of its prompts."""
    per_prompt = ("prompt_ids", "messages", "tools", "token_ids")
    return unit | {key: [unit[key][place] for place in places] for key in per_prompt}
