"""Learning rates and steps as pure functions, so that a resumed run needs no scheduler state."""

import math

from deltaray.recipe.training import Run


def steps_per_epoch(pairs: int, run: Run) -> int:
    return math.ceil(pairs / run.batch_size)


def total_steps(pairs: int, run: Run) -> int:
    """Optimizer steps of a run over so many pairs."""
    steps = run.epochs * steps_per_epoch(pairs, run)
    return min(steps, run.max_steps) if run.max_steps else steps


def learning_rate(run: Run, step: int, total: int) -> float:
    """The rate of step 0 … total-1.

    Warm-up rises in equal parts and never starts at zero (a step at rate zero would be wasted); it reaches the peak at
    the first step after it. From there the rate falls from the peak towards the floor, which the step after the last
    would reach, as in transformers' schedules.
    """
    assert isinstance(run.learning_rate, float)
    warmup = math.ceil(run.warmup_ratio * total)
    if step < warmup:
        return run.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    floor = run.min_learning_rate_ratio
    return run.learning_rate * (floor + (1 - floor) * _decay(run.schedule, progress))


def _decay(schedule: str, progress: float) -> float:
    """1 at progress 0, 0 at progress 1 (but for `constant`)."""
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
