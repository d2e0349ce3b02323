"""The order of the pairs, and how a global batch is cut into forward passes. Pure; no worker count in the order."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Share = list[tuple[int, float]]
"""(place, weight) of the pairs of one worker in one forward pass; weight 0 only fills up."""


def batch_at(pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Places of the pairs of one optimizer step; an epoch's last batch may be smaller."""
    per_epoch = math.ceil(pairs / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(pairs)
    return [int(place) for place in order[position * batch_size : (position + 1) * batch_size]]


def plan_passes(
    places: Sequence[int], costs: Sequence[int], workers: int, budget: int, padded: bool = False
) -> list[list[Share]]:
    """passes[forward pass][worker]: every place once with weight 1, in as few passes as the budget allows.

    All workers make the same number of passes, as collective calls demand. Pairs of similar cost go together (across
    workers, too: they wait for each other), the longest come first, so that a lack of memory shows at once, and the
    cut balances the costs. A worker without a pair in the last pass gets the cheapest one with weight 0.

    Args:
        places, costs: the pairs and their tokens.
        budget: tokens of one pass; a pair that alone is longer goes alone.
        padded: a share costs its longest pair times its number instead of the sum.
    """
    ranked = sorted(zip(costs, places, strict=True), key=lambda item: (-item[0], item[1]))
    ordered = [cost for cost, _ in ranked]
    shares = math.ceil(len(_cut(ordered, budget, padded)) / workers) * workers
    low, high = 1, budget
    while low < high:  # the least that the fullest share can cost with so many shares
        middle = (low + high) // 2
        if len(_cut(ordered, middle, padded)) <= shares:
            high = middle
        else:
            low = middle + 1
    cuts = [0, *_cut(ordered, high, padded)]
    filled = [[(place, 1.0) for _, place in ranked[start:end]] for start, end in pairwise(cuts)]
    filled += [[(ranked[-1][1], 0.0)]] * (shares - len(filled))
    return [filled[start : start + workers] for start in range(0, shares, workers)]


def _cut(costs: Sequence[int], most: int, padded: bool) -> list[int]:
    """Where consecutive shares end if none may cost more than `most`; costs fall."""
    ends: list[int] = []
    start = total = 0
    for at, cost in enumerate(costs):
        total += cost
        spent = costs[start] * (at - start + 1) if padded else total
        if at > start and spent > most:
            ends.append(at)
            start, total = at, cost
    return [*ends, len(costs)]
