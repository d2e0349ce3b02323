"""The delta report of a pairing: what its pairs are made of, from sums over its shards. Pure.

Sources: the mean delta is that of arXiv 2507.06187, section 5.1, chosen quality is of section 5.2. The two levels of
the delta are named in arXiv 2604.08723; what they are here is said at `levels_of`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaray.pair.sums import FEATURES, RESAMPLES, Floats, Histogram, Integers, Moments

METHODS = {
    "interval": f"95 %, percentiles of {RESAMPLES} Poisson bootstrap resamples of prompts",
    "effect": "paired Cohen's d: mean of the differences by their standard deviation, every prompt once",
    "p": "paired t-test over prompts, two-sided",
    "p_adjusted": "Benjamini-Hochberg over all rows of this pairing",
}
EXAMPLES = 5
"""Of each extreme."""
EXTREMES = ("largest", "most_negative", "nearest_zero")

Place = tuple[float, int, str, int]
"""An example: its delta, its lot among equals, shard and row."""


@dataclass(frozen=True)
class Difference:
    """One number that scorers give both responses: over prompts, each of which counts once with its pairs' mean."""

    difference: Moments = field(default_factory=Moments)
    """Chosen less rejected."""
    chosen: Moments = field(default_factory=Moments)
    rejected: Moments = field(default_factory=Moments)
    higher: int = 0
    """Prompts at which the chosen response has more of it."""
    lower: int = 0

    @classmethod
    def of(cls, chosen: Floats, rejected: Floats, prompts: Integers) -> "Difference":
        """Pairs that do not have both numbers (NaN) do not count."""
        known = np.isfinite(chosen - rejected)
        _, group, sizes = np.unique(prompts[known], return_inverse=True, return_counts=True)

        def means(values: Floats) -> Floats:
            return np.bincount(group, values[known], len(sizes)) / sizes

        apart = means(chosen - rejected)
        sides = Moments.of(means(chosen)), Moments.of(means(rejected))
        return cls(Moments.of(apart), *sides, int((apart > 0).sum()), int((apart < 0).sum()))

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.difference + other.difference,
            self.chosen + other.chosen,
            self.rejected + other.rejected,
            self.higher + other.higher,
            self.lower + other.lower,
        )


@dataclass
class Collected:
    """What a shard of pairs contributes, or several."""

    sums: Floats = field(default_factory=lambda: np.zeros((1 + RESAMPLES, len(FEATURES))))
    prompts: int = 0
    deltas: Histogram = field(default_factory=Histogram)
    between: dict[tuple[str, str], Moments] = field(default_factory=dict)
    """The deltas by chosen and rejected teacher."""
    teachers: dict[str, Moments] = field(default_factory=dict)
    """The scores of all responses of a teacher, whatever became of them."""
    differences: dict[str, Difference] = field(default_factory=dict)
    extremes: dict[str, list[Place]] = field(default_factory=lambda: {name: [] for name in EXTREMES})

    def __add__(self, other: "Collected") -> "Collected":
        return Collected(
            self.sums + other.sums,
            self.prompts + other.prompts,
            self.deltas + other.deltas,
            _together(self.between, other.between, Moments()),
            _together(self.teachers, other.teachers, Moments()),
            _together(self.differences, other.differences, Difference()),
            {name: first_of(name, self.extremes[name] + other.extremes[name]) for name in EXTREMES},
        )


def _together(one: Mapping[Any, Any], other: Mapping[Any, Any], nothing: Any) -> dict[Any, Any]:
    return {key: one.get(key, nothing) + other.get(key, nothing) for key in {**one, **other}}


def first_of(extreme: str, places: list[Place]) -> list[Place]:
    """The `EXAMPLES` most extreme; among equals the lot decides, whatever the shards."""
    fits: Callable[[Place], bool] = lambda place: place[0] < 0 if extreme == "most_negative" else True  # noqa: E731
    ways: dict[str, Callable[[float], float]] = {"largest": lambda it: -it, "nearest_zero": abs}
    way = ways.get(extreme, float)
    return sorted(filter(fits, places), key=lambda place: (way(place[0]), *place[1:]))[:EXAMPLES]


# --- the numbers --------------------------------------------------------------------------------------------------
def numbers_of(found: Collected) -> dict[str, Any]:
    """All numbers of `_delta.json`; null where nothing is known."""
    columns = dict(zip(FEATURES, found.sums.T, strict=True))
    scored = columns["scored"]

    def mean(name: str, by: NDArray[np.float64] = scored) -> dict[str, Any]:
        return estimate(_ratio(columns[name], by))

    return {
        "pairs": int(columns["pairs"][0]),
        "prompts": found.prompts,
        "scored": int(scored[0]),
        "delta": {
            "mean": mean("delta"),
            "deviation": sum(found.between.values(), Moments()).deviation,
            **{name: mean(name) for name in ("below", "at", "above")},
            "histogram": found.deltas.to_json(),
        },
        "chosen_score": mean("chosen"),
        "rejected_score": mean("rejected"),
        "length_gap": {"mean": mean("gap", columns["pairs"]), "correlation": estimate(_correlation(columns))},
        "levels": levels_of(found),
        "differences": ranked(found.differences),
        "methods": METHODS,
    }


def estimate(values: Floats) -> dict[str, float | None]:
    """A value and its interval, from the value of all pairs and those of the resamples."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if np.isfinite(values[0]) and len(drawn) else (np.nan, np.nan)
    return {"value": _finite(values[0]), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ratio(sums: Floats, by: Floats) -> Floats:
    return np.divide(sums, by, out=np.full(len(sums), np.nan), where=by > 0)


def _variance(sums: Floats, squares: Floats, count: Floats) -> Floats:
    """NaN where it is no more than rounding."""
    mean, square = _ratio(sums, count), _ratio(squares, count)
    found = square - mean**2
    return np.where(found > 1e-12 * square, found, np.where(found <= 1e-12 * square, 0.0, np.nan))


def _correlation(columns: dict[str, Floats]) -> Floats:
    """Pearson's, of the length gap and the delta; NaN where one of them does not vary."""
    count = columns["scored"]
    means = _ratio(columns["delta"], count) * _ratio(columns["scored gap"], count)
    both = _variance(columns["delta"], columns["delta²"], count)
    both = both * _variance(columns["scored gap"], columns["scored gap²"], count)
    return _ratio(_ratio(columns["delta gap"], count) - means, np.sqrt(both))


def levels_of(found: Collected) -> dict[str, Any]:
    """The mean delta as generator-level delta plus selection, and how far single pairs scatter around it.

    With m(t) the mean score of all scored responses of teacher t, before any rule, a pair of teachers (c, r) has the
    generator-level delta m(c) - m(r), which knows nothing of the pair but who answered; `generator` is its mean over
    the pairs. What is left of a pair's delta is its sample level. Its mean is `selection`: what policies, windows and
    filters add, so that generator + selection is the mean delta. `sample_deviation` is its standard deviation, the
    spread of deltas within prompts, and `ratio` is generator / sample_deviation.
    """
    means = {name: it.mean for name, it in found.teachers.items() if it.count}
    teachers = {name: {"mean": it.mean, "responses": it.count} for name, it in sorted(found.teachers.items())}
    between = {pair: it for pair, it in found.between.items() if it.count}
    if not between or any(name not in means for pair in between for name in pair):
        return {"generator": None, "selection": None, "sample_deviation": None, "ratio": None, "teachers": teachers}
    sample = Moments()
    for (chosen, rejected), it in between.items():
        sample = sample + Moments(it.count, it.mean - (means[chosen] - means[rejected]), it.squares)
    total = sum(it.count * it.mean for it in between.values()) / sample.count
    generator, deviation = total - sample.mean, sample.deviation
    return {
        "generator": generator,
        "selection": sample.mean,
        "sample_deviation": deviation,
        "ratio": generator / deviation if deviation else None,
        "teachers": teachers,
    }


def ranked(differences: Mapping[str, Difference]) -> list[dict[str, Any]]:
    """What differs between chosen and rejected, largest effect first; what does not vary has none and comes last."""
    rows = [_row(name, it) for name, it in sorted(differences.items()) if it.difference.count]
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, _adjusted([row["p"] for row in tested]), strict=True):
        row["p_adjusted"] = adjusted
    return sorted(rows, key=lambda row: -1 if row["effect"] is None else abs(row["effect"]), reverse=True)


def _row(name: str, it: Difference) -> dict[str, Any]:
    from scipy.special import stdtr

    count, deviation = it.difference.count, it.difference.deviation
    effect = it.difference.mean / deviation if deviation else None
    p = None if effect is None else float(2 * stdtr(count - 1, -abs(effect) * count**0.5))
    return {
        "what": name,
        "prompts": count,
        "chosen": it.chosen.mean,
        "rejected": it.rejected.mean,
        "difference": it.difference.mean,
        "chosen_higher": it.higher / count,
        "chosen_lower": it.lower / count,
        "effect": effect,
        "p": p,
        "p_adjusted": None,
    }


def _adjusted(values: list[float]) -> list[float]:
    from scipy.stats import false_discovery_control

    return [float(value) for value in false_discovery_control(values)] if values else []
