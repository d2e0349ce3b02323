"""Which pairs are kept where all must be known first: quantiles of the delta, a cap per source, a target number.

Every pair has a key in a seeded random order. A draw is then one number per source, the largest key that is kept, and
each shard can tell by itself which of its pairs are in. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaray.pair.filters import Candidate
from deltaray.pair.rules import Named, draw_key
from deltaray.recipe.pairing import Pairing

Keys = NDArray[np.uint64]


@dataclass
class Survey:
    """The pairs of a pairing that are left before the draw."""

    keys: list[int] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    """NaN where a pair has none."""
    sources: list[str | None] = field(default_factory=list)

    def add(self, pairs: Sequence[Candidate]) -> None:
        self.keys += [draw_key(pair, 0) for pair in pairs]
        self.deltas += [float("nan") if pair["delta"] is None else pair["delta"] for pair in pairs]
        self.sources += [pair["source"] for pair in pairs]

    def extend(self, other: dict[str, Any]) -> None:
        self.keys += other["keys"]
        self.deltas += other["deltas"]
        self.sources += other["sources"]


def choose(pairing: Pairing, survey: Survey) -> dict[str, Any]:
    """What each shard needs in order to know which pairs are in: a window of deltas, and ceilings.

    Ceilings are (source, largest key that is kept); a source that is missing keeps nothing.
    """
    keys = np.array(survey.keys, np.uint64)
    deltas = np.array(survey.deltas, np.float64)
    codes = {name: code for code, name in enumerate(dict.fromkeys(survey.sources))}
    names, sources = list(codes), np.array([codes[name] for name in survey.sources], np.int64)
    chosen: dict[str, Any] = {}
    left = np.ones(len(keys), bool)
    if pairing.min_quantile is not None or pairing.max_quantile is not None:
        low, high = _window(
            deltas, pairing.min_quantile or 0.0, 1.0 if pairing.max_quantile is None else pairing.max_quantile
        )
        chosen["window"] = [low, high]
        left &= (deltas >= low) & (deltas <= high)
    if pairing.max_per_source is not None:
        quotas = dict.fromkeys(range(len(names)), pairing.max_per_source)
        ceilings = _ceilings(keys, sources, left, quotas)
        chosen["cap"] = [(names[code], key) for code, key in ceilings.items()]
        left &= _under(keys, sources, ceilings)
    if pairing.limit is not None:
        chosen["limit"] = [(names[code], key) for code, key in _limit(pairing, keys, sources, left, len(names)).items()]
    return chosen


def _window(deltas: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    known = deltas[~np.isnan(deltas)]
    return (float(np.quantile(known, low)), float(np.quantile(known, high))) if known.size else (0.0, 0.0)


def _limit(
    pairing: Pairing, keys: Keys, sources: NDArray[np.int64], left: NDArray[np.bool_], count: int
) -> dict[int, int]:
    limit = pairing.limit or 0
    if pairing.stratify:
        counts = np.bincount(sources[left], minlength=count)
        return _ceilings(keys, sources, left, dict(enumerate(shares(counts.tolist(), limit))))
    ordered = np.sort(keys[left])
    ceiling = int(ordered[limit - 1]) if len(ordered) >= limit else 2**64 - 1
    return dict.fromkeys(range(count), ceiling)


def shares(counts: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to `counts` that add up to `total` (to all of `counts` if that is less)."""
    there = sum(counts)
    if there <= total:
        return list(counts)
    exact = [count * total / there for count in counts]
    floors = [int(value) for value in exact]
    by_rest = sorted(range(len(counts)), key=lambda place: (floors[place] - exact[place], place))
    for place in by_rest[: total - sum(floors)]:
        floors[place] += 1
    return floors


def _ceilings(
    keys: Keys, sources: NDArray[np.int64], left: NDArray[np.bool_], quotas: dict[int, int]
) -> dict[int, int]:
    """By source the key up to which its quota lies; a source with nothing to keep is missing."""
    found = {}
    for code, quota in quotas.items():
        ordered = np.sort(keys[left & (sources == code)])
        if quota and len(ordered):
            found[code] = int(ordered[min(quota, len(ordered)) - 1])
    return found


def _under(keys: Keys, sources: NDArray[np.int64], ceilings: dict[int, int]) -> NDArray[np.bool_]:
    kept = np.zeros(len(keys), bool)
    for code, ceiling in ceilings.items():
        kept |= (sources == code) & (keys <= np.uint64(ceiling))
    return kept


def draw_rules(chosen: dict[str, Any]) -> list[Named]:
    """The rules that `choose` has decided on, by their names in the funnel."""
    found: list[Named] = []
    if "window" in chosen:
        low, high = chosen["window"]
        found.append(("delta quantiles", lambda pair: pair["delta"] is not None and low <= pair["delta"] <= high))
    for name, key in (("cap per source", "cap"), ("limit", "limit")):
        if key in chosen:
            found.append((name, _below(dict(chosen[key]))))
    return found


def _below(ceilings: dict[str | None, int]) -> Any:
    return lambda pair: draw_key(pair, 0) <= ceilings.get(pair["source"], -1)
