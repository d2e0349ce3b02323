"""How long and how much for a million pairs on 1 to 512 GPUs: a simulation, held against runs that were measured.

    python tests/benchmarks/scale.py [--measure]

Every replica (one GPU here) starts, works on units of 256 prompts, several at once, and, on spot machines, is taken
away and replaced. A pool starts with one; the others are asked for when its first unit has told Ray Data its pace. The
command hands out units no faster than it was measured to (`results/data-plane.json`). With `--measure` a fake engine on
real Ray is timed first, 1 to 6 replicas with short and longer units, beside the simulation of the same. Writes
`results/scale.json`. What is assumed and not measured is in `GPUS` and `SPOT`: put the pace that
`deltaray plan --calibrate` finds in its place.
"""

import argparse
import heapq
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "scale.json"


@dataclass(frozen=True)
class Gpu:
    """Assumed: generated tokens/s at a full batch by billions of parameters, prices per hour."""

    pace: dict[float, float]
    price: float
    spot: float


GPUS = {
    # a fifth of the peak of dense bfloat16 (2 FLOPs per parameter and token) on the large ones, memory on the small
    "H100": Gpu({3.0: 30_000, 1.5: 55_000}, 3.00, 1.80),
    "A100": Gpu({3.0: 10_000, 1.5: 19_000}, 1.80, 0.90),
    "L4": Gpu({3.0: 1_600, 1.5: 3_000}, 0.70, 0.28),
}
TOKENS = {3.0: 420.0, 1.5: 400.0}
"""Assumed: mean tokens of an answer."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PROMPTS, UNIT = 1_000_000, 256
ASKED_EVERY = 10.0
"""Seconds from one request for nodes to the next, in Ray Data."""


@dataclass(frozen=True)
class Pool:
    """The replicas of one teacher and their work."""

    units: int
    unit_seconds: float  # of one unit, if the replica worked on it alone at its full pace
    replicas: int
    at_once: int = 1  # replicas that are asked for in the beginning; the others follow the first unit
    in_flight: int = 8
    start: float = 240.0  # a node, its image, the weights, vLLM
    spread: float = 0.1  # relative standard deviation of units and starts
    lost_per_hour: float = 0.0  # how often a replica is taken away
    dispatch: float = 0.0  # seconds of the command per unit


@dataclass(frozen=True)
class Outcome:
    seconds: float
    gpu_seconds: float
    lost_units: int
    taken: int  # replicas that were taken away


def simulate(pool: Pool, seed: int) -> Outcome:
    """One pool from its first start to its last unit.

    A replica works its units off at its pace one after the other; being taken away costs the half-done ones: with k in
    flight k/2 units' work, and k units go back.
    """
    draw = random.Random(seed)
    left, dispatched = pool.units, 0.0
    lost = taken = 0
    gpu_seconds, end = 0.0, 0.0
    # units in flight share the pace of the first replica, so the first of them is done when nearly all are
    asked = pool.start + pool.in_flight * pool.unit_seconds + ASKED_EVERY
    born = {number: 0.0 if number < pool.at_once else asked for number in range(pool.replicas)}
    events = [(at + _around(draw, pool.start, pool.spread), number) for number, at in born.items()]
    dies = {number: at + _death(draw, pool) for number, at in born.items()}
    first: dict[int, int] = {}
    heapq.heapify(events)
    while events:
        now, number = heapq.heappop(events)
        if now >= dies[number]:  # what it had open goes back; a new one starts
            at = dies[number]
            back = min(pool.in_flight, first.get(number, 0))
            gpu_seconds += at - born[number]
            left, lost, taken = left + (back + 1) // 2, lost + (back + 1) // 2, taken + 1
            born[number], first[number] = at, 0
            dies[number] = at + _death(draw, pool)
            heapq.heappush(events, (at + _around(draw, pool.start, pool.spread), number))
            continue
        if first.get(number, 0):
            end = max(end, now)
        if left <= 0:
            gpu_seconds += now - born[number]
            continue
        left -= 1
        first[number] = first.get(number, 0) + 1
        dispatched = max(dispatched + pool.dispatch, now)
        heapq.heappush(events, (dispatched + _around(draw, pool.unit_seconds, pool.spread), number))
    return Outcome(end, gpu_seconds, lost, taken)


def _around(draw: random.Random, mean: float, spread: float) -> float:
    return max(0.0, draw.gauss(mean, spread * mean))


def _death(draw: random.Random, pool: Pool) -> float:
    return draw.expovariate(pool.lost_per_hour / 3600) if pool.lost_per_hour else float("inf")


# --- a million pairs ----------------------------------------------------------------------------------------------
def dispatch_seconds() -> float:
    """Of the command for a unit, as measured with engines that answer at once."""
    scale = json.loads((RESULTS / "data-plane.json").read_text())["scales"]["1000000"]
    return UNIT / float(scale["rows_per_second"]["generate"])


def share(gpus: int, gpu: Gpu) -> dict[float, int]:
    """The GPUs over the teachers, so that both end together; one GPU serves one after the other."""
    if gpus == 1:
        return dict.fromkeys(TOKENS, 1)
    work = {size: TOKENS[size] / gpu.pace[size] for size in TOKENS}
    large = min(range(1, gpus), key=lambda count: max(work[3.0] / count, work[1.5] / (gpus - count)))
    return {3.0: large, 1.5: gpus - large}


def million(name: str, gpus: int, lost_per_hour: float, growing: bool = True, seeds: int = 5) -> dict[str, Any]:
    gpu, pools = GPUS[name], []
    for size, replicas in share(gpus, GPUS[name]).items():
        seconds = UNIT * TOKENS[size] / gpu.pace[size]
        first = 1 if growing else replicas
        pools.append(Pool(-(-PROMPTS // UNIT), seconds, replicas, first, lost_per_hour=lost_per_hour))
    together = 1 if gpus == 1 else len(pools)  # pools side by side share the command
    runs = [
        [simulate(replace(pool, dispatch=together * dispatch_seconds()), seed) for pool in pools]
        for seed in range(seeds)
    ]
    walls = [(sum if gpus == 1 else max)(run.seconds for run in runs_of) for runs_of in runs]
    hours = statistics.fmean(sum(run.gpu_seconds for run in runs_of) for runs_of in runs) / 3600
    price = gpu.spot if lost_per_hour else gpu.price
    return {
        "hours": round(statistics.fmean(walls) / 3600, 3),
        "gpu_hours": round(hours, 2),
        "cost": round(hours * price, 2),
        "lost_units": round(statistics.fmean(sum(run.lost_units for run in runs_of) for runs_of in runs), 1),
        "taken": round(statistics.fmean(sum(run.taken for run in runs_of) for runs_of in runs), 1),
    }


# --- against what was measured ------------------------------------------------------------------------------------
def measure() -> Iterator[dict[str, Any]]:
    """A fake engine on real Ray: from when all replicas are up to the end, which takes 24 s by the simulation."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import fake_engine
    import ray
    from fake_engine import Behaviour, FakeSpec
    from tiny_model import save_tiny

    from deltaray.data.contracts import RESPONSES
    from deltaray.data.prompts import store_prompts
    from deltaray.data.store import Store
    from deltaray.generate import engine_sharing
    from deltaray.generate.answer import answer, work_of
    from deltaray.generate.stage import responses_table
    from deltaray.generate.units import Assignment
    from deltaray.recipe.models import Teacher
    from deltaray.recipe.recipe import Failures
    from deltaray.runtime.session import Capacity

    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="warning")
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    for unit_seconds, replicas in itertools.product((0.5, 2.0), (1, 2, 4, 6)):
        units = round(24 / unit_seconds) * replicas
        pool = Pool(units, unit_seconds, replicas, at_once=replicas, in_flight=2, start=0.0, spread=0.0)
        with tempfile.TemporaryDirectory() as folder:
            store, marks = Store(f"{folder}/out"), Path(folder, "marks")
            marks.mkdir()
            same = {"answer": None, "source": None, "error": None}
            rows: list[Any] = [
                {"prompt_id": f"p{n}", "messages": [{"role": "user", "content": str(n)}], **same}
                for n in range(4 * pool.units)
            ]
            store_prompts(store, rows, 64)
            # two units in flight, each of which waits for itself alone: twice the delay keeps the pace
            behaviour = Behaviour(delay=2 * unit_seconds, marks=str(marks))
            spec = FakeSpec(behaviour, cpus=0.5, min_replicas=replicas, max_replicas=replicas)
            engine_sharing.pool_spec = lambda teachers, capacity, spec=spec: spec  # type: ignore[assignment]
            teacher = Teacher.model_validate(
                {"model": save_tiny(Path(folder, "model")), "engine": {"units_in_flight": 2}}
            )
            work = work_of(store, Assignment("t", teacher, Store.prompts, Store.responses("t"), "identity", 4))
            answer(
                store, [work], Capacity(16, 0), responses_table, RESPONSES, Failures(), lambda *_: None, lambda _: None
            )
            ended = time.time()
            begun = [[json.loads(line)["at"] for line in path.read_text().splitlines()] for path in marks.iterdir()]
            assert len(begun) == replicas
            up = max(min(times) for times in begun)
            left = sum(at >= up for times in begun for at in times)
            expected = simulate(replace(pool, units=left), 0).seconds
            found = {
                "unit_seconds": unit_seconds,
                "units": left,
                "measured": round(ended - up, 2),
                "simulated": round(expected, 2),
            }
            yield {"replicas": replicas, **found}
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time a fake engine on real Ray first")
    arguments = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if arguments.measure:
        record["against_real_runs"] = list(measure())
        record |= {"hardware": hardware(), "versions": {name: found for name in PACKAGES if (found := installed(name))}}
    record["assumed"] = {"gpus": {name: asdict(gpu) for name, gpu in GPUS.items()}, "tokens": TOKENS, "start": 240.0}
    record["seconds_of_the_command_per_unit"] = round(dispatch_seconds(), 4)
    record["million"] = {
        name: {str(gpus): {kind: million(name, gpus, lost) for kind, lost in SPOT.items()} for gpus in COUNTS}
        for name in GPUS
    }
    record["all_replicas_at_once"] = {
        name: {str(gpus): million(name, gpus, 0.0, growing=False) for gpus in COUNTS} for name in GPUS
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    for name in GPUS:
        for gpus, found in record["million"][name].items():
            print(
                f"{name:5} {gpus:>4}",
                *(f"{kind}: {it['hours']:8.2f} h {it['cost']:8.2f}" for kind, it in found.items()),
                "at once: {hours:8.2f} h {cost:8.2f}".format(**record["all_replicas_at_once"][name][gpus]),
            )


SPOT = {"on demand": 0.0, "spot, lost every 20 h": 0.05, "spot, lost every 2 h": 0.5}
"""Assumed: how often an hour one machine is taken away."""

if __name__ == "__main__":
    main()
