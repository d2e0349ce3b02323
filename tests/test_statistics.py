"""Statistics that decide what may be called better, against numbers and behaviour that can be checked."""

import numpy as np
import pytest

from deltaray.evaluate.statistics import difference_over_seeds, mean_and_stderr, paired_bootstrap


def test_standard_error_is_the_textbook_one() -> None:
    assert mean_and_stderr(np.array([1.0, 2.0, 3.0, 4.0])) == (2.5, pytest.approx(np.sqrt(5 / 3) / 2))
    assert mean_and_stderr(np.array([3.0])) == (3.0, 0.0)


def test_the_bootstrap_interval_agrees_with_the_normal_one() -> None:
    generator = np.random.default_rng(0)
    worse = generator.random(2000)
    better = worse + generator.normal(0.1, 0.5, 2000)
    difference, low, high = paired_bootstrap(better, worse)
    mean, error = mean_and_stderr(better - worse)
    assert difference == pytest.approx(mean)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_no_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        _, low, high = paired_bootstrap(generator.normal(size=200), generator.normal(size=200))
        covered += low <= 0 <= high
    assert 88 <= covered <= 100


def test_over_seeds_the_wider_error_counts() -> None:
    together = np.array([0.1, 0.5, 0.9])
    mean, low, high = difference_over_seeds(together + 0.2, together)  # paired error 0, unpaired large
    assert mean == pytest.approx(0.2) and low < 0 < high
    apart = np.array([0.5, 0.5, 0.5])
    assert difference_over_seeds(apart + 0.2, apart) == pytest.approx((0.2, 0.2, 0.2))
