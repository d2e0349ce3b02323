"""Agreement of two scorers: the counts, the interval, kappa."""

from collections import Counter

import numpy as np
import pytest

from deltaray.score.agreement import agreement_of, kappa, outcome_of
from deltaray.score.compare import length_bin


def test_outcomes_count_signs_not_sizes() -> None:
    assert outcome_of([(1, 0.1), (-1, -9), (1, -1), (0, 1), (1, 0), (0, 0)]) == (2, 1, 1, 1, 1)


def test_kappa_does_not_depend_on_who_is_written_first() -> None:
    assert kappa(80, 20, 0, 0, 0) == pytest.approx(0.6)  # also where one scorer always says the same
    assert kappa(10, 0, 0, 0, 5) == pytest.approx(1) and kappa(0, 10, 0, 0, 0) == pytest.approx(-1)
    assert kappa(0, 0, 0, 0, 5) is None and kappa(0, 0, 0, 0, 0) is None
    generator = np.random.default_rng(0)
    chance = Counter(outcome_of([pair]) for pair in generator.integers(-1, 2, size=(40_000, 2)).tolist())
    assert abs(agreement_of(chance)["kappa"]) < 0.02


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    generator = np.random.default_rng(1)
    prompts = [[(1.0, float(sign)) for sign in generator.choice([-1, 1], p=[0.2, 0.8], size=3)] for _ in range(400)]
    found = agreement_of(Counter(map(outcome_of, prompts)))
    alike = np.array([[first == second for first, second in pairs] for pairs in prompts]).mean(axis=1)
    drawn = alike[generator.integers(0, 400, size=(4000, 400))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found["agreement"] == pytest.approx(alike.mean()) and found["pairs"] == 1200 and found["prompts"] == 400
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))


def test_nothing_decided_is_nothing_claimed() -> None:
    found = agreement_of(Counter({(0, 0, 2, 0, 1): 5}))
    assert (found["agreement"], found["low"], found["decided"], found["pairs"]) == (None, None, 0, 15)


def test_length_bins_cover_everything_and_sort() -> None:
    names = [length_bin(tokens) for tokens in (0, 127, 128, 511, 512, 2047, 2048, 10**6)]
    assert names == sorted(names) and len(set(names)) == 4
