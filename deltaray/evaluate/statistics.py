"""Values with their uncertainty, and when one model may be called better than another. Pure."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000


def mean_and_stderr(values: Floats) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt(n)); the error of a single value is 0."""
    spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(np.mean(values)), spread


def paired_bootstrap(better: Floats, worse: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Difference of two means over the same prompts with its 95 % interval.

    Args:
        better, worse: [prompts], the two models' scores on the same prompts in the same order.
    Returns:
        (difference, low, high): percentile bootstrap over prompts, `RESAMPLES` draws.
    """
    difference = better - worse
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(difference), size=(RESAMPLES, len(difference)), dtype=np.int32)
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


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
