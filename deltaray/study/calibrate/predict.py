"""What the whole generation will take, from a calibration. Pure.

A pool's seconds: those of its sample, and for every further token the pace of a full batch, divided by the replicas.
So the start, the first and the last seconds of a pool are taken as they were measured, once per pool, also where
several teachers share it. Pools run side by side or one after another just as `runtime.threads` will start them.

The 95 % intervals are percentiles of `DRAWS` draws with a fixed seed, independent of each other: tokens per row and
pace from Student's t around what was measured, starts from a normal distribution. Assumed: replicas of one pool do
not slow each other, engines and not the loading and writing around them are the bottleneck, the prompts of the sample
are like the others (it is a random draw), and the machine is as busy as it was.
"""

import math

import numpy as np
from numpy.typing import NDArray

from deltaray.runtime.session import Capacity
from deltaray.runtime.threads import startable
from deltaray.study.calibrate.pace import WINDOWS
from deltaray.study.calibrate.records import Calibration, Mean, Measure, PoolMeasure, Record

Floats = NDArray[np.float64]
DRAWS = 4000
START_SPREAD = 0.15
"""By how much two starts of a pool differ, as a relative standard deviation: assumed, since one was measured."""


class Interval(Record):
    """A prediction with its 95 % interval."""

    value: float
    low: float
    high: float


class TeacherPrediction(Record):
    rows: int
    prompt_tokens: Interval | None
    tokens: Interval
    seconds: Interval
    """Of generating alone."""


class PoolPrediction(Record):
    teachers: list[str]
    replicas: int
    begins: float
    """Seconds after the first pool."""
    seconds: Interval


class Prediction(Record):
    """Of the stage as a whole; the teachers' own tokens and seconds beside it."""

    teachers: dict[str, TeacherPrediction]
    pools: list[PoolPrediction]
    tokens: Interval
    seconds: Interval
    gpu_hours: Interval
    cost: Interval | None


def predict(calibration: Calibration, prompts: int, gpu_hour_price: float | None = None) -> Prediction:
    """Predicts a generation from nothing to its end.

    Args:
        prompts: how many each teacher will answer. `gpu_hour_price`: in any currency; None: no cost.
    """
    draws = _Draws(calibration, prompts)
    pools = calibration.pools
    seconds = [draws.pool_seconds(pool) for pool in pools]
    ends = _ends(calibration, seconds)
    total = calibration.session_seconds + ends.max(axis=0) + calibration.publish_seconds
    hours = np.array([pool.gpus * draws.replicas(pool) for pool in pools]) @ np.stack(seconds) / 3600
    return Prediction(
        teachers={name: draws.teacher(name, pool) for pool in pools for name in pool.teachers},
        pools=[
            PoolPrediction(
                teachers=pool.teachers,
                replicas=draws.replicas(pool),
                begins=float(end[0] - lasted[0]),
                seconds=interval(lasted),
            )
            for pool, lasted, end in zip(pools, seconds, ends, strict=True)
        ],
        tokens=interval(np.sum([*draws.tokens.values()], axis=0)),
        seconds=interval(total),
        gpu_hours=interval(hours),
        cost=None if gpu_hour_price is None else interval(hours * gpu_hour_price),
    )


def interval(draws: Floats) -> Interval:
    """The first value is the prediction itself, the others are draws around it."""
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Interval(value=float(draws[0]), low=float(low), high=float(high))


class _Draws:
    """Everything uncertain, as arrays of [1 + DRAWS]: the measured value first, then draws."""

    def __init__(self, calibration: Calibration, prompts: int) -> None:
        self.calibration, self.prompts = calibration, prompts
        self.generator = np.random.default_rng(0)
        self.tokens: dict[str, Floats] = {}
        self.prompt_tokens: dict[str, Floats] = {}
        self.pace: dict[str, Floats] = {}
        for name, measure in calibration.teachers.items():
            self.tokens[name] = self._in_all(measure, measure.tokens)
            if measure.prompt_tokens is not None:
                self.prompt_tokens[name] = self._in_all(measure, measure.prompt_tokens)
        for pool in calibration.pools:
            paces = dict.fromkeys(calibration.teachers[name].seconds_per_token for name in pool.teachers)
            drawn = {pace: self._around(pace.mean, pace.error, WINDOWS - 1) for pace in paces}
            self.pace |= {name: drawn[calibration.teachers[name].seconds_per_token] for name in pool.teachers}

    def replicas(self, pool: PoolMeasure) -> int:
        """No more than there are units."""
        rows = [self.prompts * self.calibration.teachers[name].samples for name in pool.teachers]
        return min(pool.replicas, sum(math.ceil(count / self.calibration.unit_size) for count in rows))

    def pool_seconds(self, pool: PoolMeasure) -> Floats:
        noise = np.concatenate([[0.0], self.generator.standard_normal(DRAWS)])
        seconds = pool.seconds + START_SPREAD * pool.start_seconds * noise
        for name in pool.teachers:
            measure = self.calibration.teachers[name]
            further = self.tokens[name] / self.replicas(pool) - measure.rows * measure.tokens.mean
            seconds = seconds + further * self.pace[name]
        return np.maximum(seconds, pool.start_seconds / 2)

    def teacher(self, name: str, pool: PoolMeasure) -> TeacherPrediction:
        return TeacherPrediction(
            rows=self.prompts * self.calibration.teachers[name].samples,
            prompt_tokens=interval(self.prompt_tokens[name]) if name in self.prompt_tokens else None,
            tokens=interval(self.tokens[name]),
            seconds=interval(self.tokens[name] * self.pace[name] / self.replicas(pool)),
        )

    def _in_all(self, measure: Measure, each: Mean) -> Floats:
        """Tokens of all rows; what was measured of them is certain."""
        rows, unseen = self.prompts * measure.samples, max(0.0, 1 - measure.prompts / self.prompts)
        return rows * self._around(each.mean, each.error * np.sqrt(unseen), max(measure.prompts - 1, 1))

    def _around(self, mean: float, error: float, freedom: int) -> Floats:
        drawn = mean + error * self.generator.standard_t(freedom, DRAWS)
        return np.concatenate([[mean], np.maximum(drawn, 0)])


def _ends(calibration: Calibration, seconds: list[Floats]) -> Floats:
    """[pools, draws]: when each pool ends, if the first starts at 0."""
    capacity = Capacity(calibration.cpus, calibration.gpus)
    needs = [
        Capacity(pool.replicas * pool.cpus + pool.stream_cpus, pool.replicas * pool.gpus) for pool in calibration.pools
    ]
    return np.array([schedule(list(draw), needs, capacity) for draw in np.stack(seconds).T]).T


def schedule(seconds: list[float], needs: list[Capacity], capacity: Capacity) -> list[float]:
    """When each job ends, as `as_room_allows` starts them."""
    waiting, running, ends, now = list(range(len(seconds))), dict[int, float](), [0.0] * len(seconds), 0.0
    while waiting or running:
        for job in startable(waiting, [needs[other] for other in running], needs, capacity):
            waiting.remove(job)
            running[job] = ends[job] = now + seconds[job]
        first = min(running, key=lambda job: running[job])
        now = running.pop(first)
    return ends
