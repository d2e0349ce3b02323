"""How fast a replica goes when its batch is full, from when each row was asked and answered. Pure.

A short run is not a long one in small: at its end the batch runs empty, which in a long run hardly counts. What counts
there is the pace while rows still wait for a place in the batch. So it is worked out first when each row got a place
(first come, first served, `slots` of them at once), then how fast rows went at which time, and only the time before
the last row got its place is looked at. If all find a place at once there is no such time; then it is the time until
half of them are answered, and the pace is that of a batch which was not full.

Eight windows of equal length over this time show how much the pace varies; they are taken as independent.
"""

import heapq

import numpy as np
from numpy.typing import NDArray

from deltaray.evaluate.statistics import mean_and_stderr
from deltaray.study.calibrate.records import Mean

Floats = NDArray[np.float64]
WINDOWS = 8
ITERATIONS = 50


def beginnings(asked: Floats, answered: Floats, slots: int) -> Floats:
    """When each row got a place: as soon as it was asked and one of the `slots` was free."""
    begun = np.empty_like(asked)
    places: list[float] = []
    for row in np.argsort(asked, kind="stable"):
        free = heapq.heappop(places) if len(places) == slots else asked[row]
        begun[row] = min(max(asked[row], free), answered[row])
        heapq.heappush(places, answered[row])
    return begun


def seconds_per_token(asked: Floats, answered: Floats, tokens: Floats, slots: int) -> Mean:
    """The pace of one replica.

    Args:
        asked, answered: [rows] in seconds, of rows that use the same weights of one replica.
        tokens: [rows] of the responses. `slots`: rows in the batch at once.
    Raises:
        ValueError: the rows have no tokens or took no time.
    """
    begun = beginnings(asked, answered, slots)
    first, last = float(begun.min()), max(float(begun.max()), float(np.median(answered)))
    if last <= first or tokens.sum() <= 0:
        raise ValueError("no tokens, or no time between asking and answering")
    windows = np.linspace(first, last, WINDOWS + 1)
    emptying = np.linspace(last, max(float(answered.max()), last), WINDOWS + 1)[1:]
    made = tokens_made(begun, answered, tokens, np.concatenate([windows, emptying]))[:WINDOWS]
    rate, error = mean_and_stderr(made * WINDOWS / (last - first))
    return Mean(mean=1 / rate, error=error / rate**2)


def tokens_made(begun: Floats, answered: Floats, tokens: Floats, edges: Floats) -> Floats:
    """Tokens made between each two edges, if all rows that run at one time go equally fast.

    Tokens spread evenly over a row's time would be wrong at the end: in an emptying batch rows go faster. The speeds
    that make the rows' tokens likeliest are found by expectation maximisation from a constant one.

    Args:
        begun, answered, tokens: [rows]. `edges`: [windows + 1], over all the rows' time.
    """
    ends = np.maximum(answered, begun + 1e-9)
    within = np.minimum(ends[:, None], edges[1:]) - np.maximum(begun[:, None], edges[:-1])
    within = np.maximum(within, 0)  # [rows, windows]: seconds that a row ran in a window
    running = within.sum(axis=0)
    speed = np.ones(len(running))
    for _ in range(ITERATIONS):
        expected = np.maximum(within @ speed, 1e-12)
        speed = speed * (within.T @ (tokens / expected)) / np.maximum(running, 1e-12)
    return speed * running


def per_row(values: Floats, prompts: NDArray[np.str_]) -> Mean:
    """The mean over rows, its error over prompts: all have equally many samples, which are not independent.

    Args:
        values: [rows]. `prompts`: [rows], the id of each row's prompt.
    """
    _, of_row = np.unique(prompts, return_inverse=True)
    mean, error = mean_and_stderr(np.bincount(of_row, values) / np.bincount(of_row))
    return Mean(mean=mean, error=error)
