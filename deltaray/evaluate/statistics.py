"""Values with their uncertainty, and when one model may be called better than another. Pure."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
_AT_ONCE = 1 << 22
"""Random numbers in memory at the same time."""


def mean_and_stderr(values: Floats) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n)); the error of a single value is 0."""
    spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The chance that one of k samples is right: 1 - C(n - c, k) / C(n, k), unbiased (2107.03374, equation 1).

    Args:
        correct: c of `samples` n are right; k is at most n.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def paired_bootstrap(better: Floats, worse: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Difference of two means over the same prompts with its 95 % interval.

    Args:
        better, worse: [prompts], the two models' scores on the same prompts in the same order.
    Returns:
        (difference, low, high): percentile bootstrap over prompts, `RESAMPLES` draws.
    """
    return _bootstrap([(better - worse) / len(better)], seed)


def bootstrap_over_tasks(differences: Sequence[Mapping[str, float]], seed: int = 0) -> tuple[float, float, float]:
    """Difference of two models' means over tasks, with its 95 % interval.

    A prompt that several tasks ask counts as one: its differences are drawn together. Prompts of the same tasks are
    drawn among each other, so that every task keeps its size.

    Args:
        differences: for each task, by prompt.
    Returns:
        (difference, low, high), as `paired_bootstrap`, which it is for one task.
    """
    shares: dict[str, float] = defaultdict(float)
    asked: dict[str, tuple[int, ...]] = defaultdict(tuple)
    for number, task in enumerate(differences):
        for prompt, difference in task.items():
            shares[prompt] += difference / (len(task) * len(differences))
            asked[prompt] += (number,)
    strata: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for prompt in sorted(shares):
        strata[asked[prompt]].append(shares[prompt])
    return _bootstrap([np.array(values) for values in strata.values()], seed)


def _bootstrap(strata: Sequence[Floats], seed: int) -> tuple[float, float, float]:
    """The sum of all values and its 95 % interval; values are drawn with replacement within their stratum."""
    generator = np.random.default_rng(seed)
    sums = sum(_resampled_sums(values, generator) for values in strata)
    low, high = np.percentile(sums, [2.5, 97.5])
    return float(sum(values.sum() for values in strata)), float(low), float(high)


def _resampled_sums(values: Floats, generator: np.random.Generator) -> Floats:
    """[RESAMPLES], each the sum of as many values as there are, drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    if 16 * len(distinct) < len(values):  # right and wrong answers: draw how often each difference occurs
        return generator.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct
    rows = max(1, _AT_ONCE // len(values))
    blocks = (min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows))
    picks = (generator.integers(0, len(values), size=(block, len(values)), dtype=np.int32) for block in blocks)
    return np.concatenate([values[pick].sum(axis=1) for pick in picks])


def difference_over_seeds(better: Floats, worse: Floats) -> tuple[float, float, float]:
    """Difference of two means over seeds, with two standard errors to each side.

    Of the paired and the unpaired standard error of the difference the larger one counts, so that a claim holds
    whichever a reader prefers.

    Args:
        better, worse: [seeds].
    """
    mean, paired = mean_and_stderr(better - worse)
    unpaired = float(np.hypot(mean_and_stderr(better)[1], mean_and_stderr(worse)[1]))
    error = max(paired, unpaired)
    return mean, mean - 2 * error, mean + 2 * error
