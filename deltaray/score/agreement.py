"""How far two scorers agree about which of two responses is better. Pure.

For every pair of responses to one prompt a scorer says first, second or tie. What is counted keeps the number of
prompts by outcome, because the pairs of one prompt are not independent: the bootstrap draws prompts, and prompts of
one outcome are alike, so that millions of them resample in milliseconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

RESAMPLES = 10_000

Outcome = tuple[int, int, int, int, int]
"""Of the pairs of one prompt: how many both decide alike, both decide differently, only the first scorer calls tied,
only the second does, both do."""
Counted = Counter[Outcome]
"""Prompts by outcome."""


def sign(delta: float) -> int:
    return (delta > 0) - (delta < 0)


def outcome_of(pairs: Iterable[tuple[float, float]]) -> Outcome:
    """The outcome of one prompt, from the two scorers' differences of every pair."""
    counts = [0, 0, 0, 0, 0]
    for first, second in pairs:
        signs = sign(first), sign(second)
        if 0 in signs:
            counts[4 if signs == (0, 0) else 2 if signs[0] == 0 else 3] += 1
        else:
            counts[0 if signs[0] == signs[1] else 1] += 1
    return counts[0], counts[1], counts[2], counts[3], counts[4]


def agreement_of(counted: Mapping[Outcome, int], seed: int = 0) -> dict[str, Any]:
    """Agreement rate over the pairs that both scorers decide, with its 95 % interval; ties; Cohen's kappa."""
    outcomes = np.array(list(counted), np.int64).reshape(-1, 5)
    prompts = np.array(list(counted.values()), np.int64)
    alike, unlike, first, second, both = (int(value) for value in prompts @ outcomes)
    decided = alike + unlike
    low, high = _interval(outcomes, prompts, seed) if decided else (None, None)
    return {
        "prompts": int(prompts.sum()),
        "pairs": decided + first + second + both,
        "decided": decided,
        "agreement": alike / decided if decided else None,
        "low": low,
        "high": high,
        "ties": {"first": first, "second": second, "both": both},
        "kappa": kappa(alike, unlike, first, second, both),
    }


def _interval(outcomes: Any, prompts: Any, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over prompts: how often each outcome is drawn is multinomial."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(int(prompts.sum()), prompts / prompts.sum(), size=RESAMPLES)
    alike, decided = drawn @ outcomes[:, 0], drawn @ (outcomes[:, 0] + outcomes[:, 1])
    low, high = np.percentile(alike[decided > 0] / decided[decided > 0], [2.5, 97.5])
    return float(low), float(high)


def kappa(alike: int, unlike: int, first: int, second: int, both: int) -> float | None:
    """Cohen's kappa over better, worse and tied; None where it is not defined.

    Every pair counts in both orders, so that it does not matter which response is written first: without ties kappa
    is then twice the agreement less one, also for a scorer that always prefers the larger teacher.
    """
    pairs = alike + unlike + first + second + both
    if not pairs:
        return None
    tied = (first + both) / pairs, (second + both) / pairs
    chance = tied[0] * tied[1] + (1 - tied[0]) * (1 - tied[1]) / 2
    observed = (alike + both) / pairs
    return None if chance == 1 else (observed - chance) / (1 - chance)
