"""The delta landscape: gain over the untouched student against the measured delta, and where it saturates. Pure.

arXiv 2507.06187, section 5.1: the gain grows with the mean delta of the pairs and is flat from some delta on; section
5.2: the quality of the chosen responses matters little beside it; some pairs hurt in spite of a positive delta, with
the likelihoods of both responses falling.

Three curves are fitted by least squares: a straight line, a line that is flat above a knee, and one that goes on above
it with a slope of its own. A knee is believed where the second explains so much more than the first that a straight
line with the same scatter would do so in less than 5 % of cases. That is an F test whose distribution is simulated:
under a straight line the knee means nothing, so that F's tables do not hold. A curve that bends need not be flat: it
saturates unless the third, growing on, explains more than the second by the same test.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_POINTS = 6
"""Below, four numbers cannot be told from noise."""
KNEES = 101
"""Places between the points at which a knee is looked for."""
RESAMPLES = 1000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Point:
    """One pairing: means over seeds, on the scales of the scorer (delta, quality) and of the evaluation (gain)."""

    label: str
    trial: str
    delta: float
    delta_low: float | None
    delta_high: float | None
    gain: float
    gain_low: float
    gain_high: float
    quality: float | None  # mean score of the chosen responses
    chosen_change: float | None  # of the log-prob per token while training, nats
    rejected_change: float | None
    gains: tuple[float, ...] = ()

    @property
    def both_fell(self) -> bool:
        changes = (self.chosen_change, self.rejected_change)
        return all(change is not None and change < 0 for change in changes)

    @property
    def outlier(self) -> str | None:
        """`hurts`: a delta plainly above zero and a gain plainly below; `helps`: the reverse."""
        low = self.delta if self.delta_low is None else self.delta_low
        high = self.delta if self.delta_high is None else self.delta_high
        if low > 0 and self.gain_high < 0:
            return "hurts"
        return "helps" if high < 0 and self.gain_low > 0 else None


@dataclass(frozen=True)
class Curve:
    """gain = level + slope * min(delta, knee) + after * max(delta - knee, 0); a straight line has no knee."""

    level: float
    slope: float
    knee: float | None
    residual: float  # sum of squares
    after: float = 0.0  # the slope above the knee

    def at(self, deltas: Floats) -> Floats:
        if self.knee is None:
            return self.level + self.slope * deltas
        bent = self.slope * np.minimum(deltas, self.knee) + self.after * np.maximum(deltas - self.knee, 0)
        return self.level + bent


# --- fitting ----------------------------------------------------------------------------------------------------
def _lines(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Least-squares lines of every row of y [draws, points] on every row of x [rows, points].

    Returns:
        levels, slopes and residual sums of squares, [draws, rows].
    """
    centred, up = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread, shared = (centred**2).sum(axis=1), up @ centred.T
    slopes = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 0)
    residuals = np.maximum((up**2).sum(axis=1, keepdims=True) - slopes * shared, 0)
    return y.mean(axis=1, keepdims=True) - slopes * x.mean(axis=1), slopes, residuals


def _kinks(deltas: Floats) -> tuple[Floats, Floats]:
    """The places where a knee is looked for, with two different deltas or more on each side, and the bent deltas."""
    levels = np.unique(deltas)
    low, high = (levels[1], levels[-2]) if len(levels) >= 4 else (levels[-1], levels[-1])
    knees = np.linspace(low, high, KNEES)
    return knees, np.minimum(deltas[None], knees[:, None])


def straight(deltas: Floats, gains: Floats) -> Curve:
    """The best straight line."""
    levels, slopes, residuals = _lines(deltas[None], gains[None])
    return Curve(float(levels[0, 0]), float(slopes[0, 0]), None, float(residuals[0, 0]))


def kinked(deltas: Floats, gains: Floats) -> Curve:
    """The best line that is flat above a knee.

    Every place is tried: the sum of squares has many minima in the knee, and one in the rest.
    """
    knees, bent = _kinks(deltas)
    levels, slopes, residuals = _lines(bent, gains[None])
    best = int(np.argmin(residuals[0]))
    return Curve(float(levels[0, best]), float(slopes[0, best]), float(knees[best]), float(residuals[0, best]))


def bent(deltas: Floats, gains: Floats) -> Curve:
    """The best line that goes on above a knee with another slope."""
    knees, low = _kinks(deltas)
    y, means = gains - gains.mean(), low.mean(axis=1, keepdims=True)
    high = np.maximum(deltas[None] - knees[:, None], 0)
    a, b = low - means, high - high.mean(axis=1, keepdims=True)
    aa, ab, bb, ay, by = (a * a).sum(1), (a * b).sum(1), (b * b).sum(1), a @ y, b @ y
    whole = np.maximum(aa * bb - ab**2, 1e-300)
    slopes, afters = (bb * ay - ab * by) / whole, (aa * by - ab * ay) / whole
    left = ((y - slopes[:, None] * a - afters[:, None] * b) ** 2).sum(axis=1)
    best = int(np.argmin(left))
    level = gains.mean() - slopes[best] * means[best, 0] - afters[best] * high[best].mean()
    return Curve(float(level), float(slopes[best]), float(knees[best]), float(left[best]), float(afters[best]))


Fit = Callable[[Floats, Floats], Curve]


def p_of(simple: Fit, rich: Fit, numbers: int, deltas: Floats, gains: Floats, seed: int = 0) -> float:
    """How often the rich curve explains at least as much more where the simple one is true (parametric bootstrap).

    Args:
        numbers: how many the simple one is fitted with; the rich one has one more.
    """
    curve, count = simple(deltas, gains), len(deltas)
    noise = np.random.default_rng(seed).normal(0, np.sqrt(curve.residual / (count - numbers)), (RESAMPLES, count))

    def f(values: Floats) -> float:
        left = rich(deltas, values).residual
        return (simple(deltas, values).residual - left) / max(left / (count - numbers - 1), 1e-300)

    seen = f(gains)
    return (sum(f(curve.at(deltas) + its) >= seen for its in noise) + 1) / (RESAMPLES + 1)


def _bootstrap(deltas: Floats, gains: Floats, seed: int = 0) -> list[list[float]]:
    """95 % intervals over resampled pairings: the straight line's slope, the knee, the bent line's knee and slope
    above it."""
    chance, drawn = np.random.default_rng(seed), list[tuple[float, ...]]()
    for _ in range(RESAMPLES):
        rows = chance.integers(0, len(deltas), len(deltas))
        x, y = deltas[rows], gains[rows]
        if len(np.unique(x)) < 4:
            continue
        on = bent(x, y)
        drawn.append((straight(x, y).slope, float(kinked(x, y).knee or 0), float(on.knee or 0), on.after))
    return [[float(it) for it in np.percentile(values, [2.5, 97.5])] for values in zip(*drawn, strict=True)]


# --- the whole --------------------------------------------------------------------------------------------------
def landscape(points: Sequence[Point]) -> dict[str, Any]:
    """Points, curve, outliers and a summary in words, as JSON. Points without a measured delta are not in it."""
    found: dict[str, Any] = {
        "points": [asdict(it) | {"both_fell": it.both_fell, "outlier": it.outlier} for it in points],
        "outliers": [it.label for it in points if it.outlier],
        "curve": None,
        "line": None,
        "knee": None,
        "bend": None,
        "quality": None,
    }
    deltas, gains = (np.array([getattr(it, name) for it in points]) for name in ("delta", "gain"))
    if len(points) >= LEAST_POINTS and len(np.unique(deltas)) >= 4:
        line, flat, on = straight(deltas, gains), kinked(deltas, gains), bent(deltas, gains)
        slopes, flats, knees, afters = _bootstrap(deltas, gains)
        p, p_on = p_of(straight, kinked, 2, deltas, gains), p_of(kinked, bent, 3, deltas, gains)
        bends = p < SIGNIFICANT and flat.slope > 0
        saturates = bends and not (p_on < SIGNIFICANT and on.after > 0)
        found["line"] = _line_json(line) | {"slope_interval": slopes}
        found["knee"] = _line_json(flat) | {"interval": flats, "p": p, "saturates": saturates}
        found["bend"] = _line_json(on) | {"interval": knees, "after_interval": afters, "p": p_on, "bends": bends}
        best = flat if saturates else on if bends else line
        found["curve"] = _line_json(best)
        found["quality"] = _quality(points, gains - best.at(deltas))
    return found | {"summary": summary_of(points, found)}


def _line_json(curve: Curve) -> dict[str, Any]:
    return asdict(curve)


def _quality(points: Sequence[Point], left: Floats) -> dict[str, float] | None:
    """Rank correlation (Spearman) of the chosen responses' quality with what the delta does not explain of the gain."""
    from scipy.stats import spearmanr

    known = [(it.quality, rest) for it, rest in zip(points, left, strict=True) if it.quality is not None]
    if len(known) < LEAST_POINTS or len({quality for quality, _ in known}) < 2:
        return None
    result = spearmanr(*zip(*known, strict=True))
    return {"correlation": float(result.statistic), "p": float(result.pvalue)}


# --- words ------------------------------------------------------------------------------------------------------
def summary_of(points: Sequence[Point], found: dict[str, Any]) -> str:
    """What the numbers say, in sentences."""
    sentences = [_counted(points), *_of_curve(points, found), *_of_quality(found), *_of_outliers(points)]
    return " ".join(sentences)


def _counted(points: Sequence[Point]) -> str:
    negative = sum(it.delta < 0 for it in points)
    better, worse = sum(it.gain_low > 0 for it in points), sum(it.gain_high < 0 for it in points)
    counts = {"made the student better": better, "made it worse": worse}
    said = [f"{number or 'none'} {what}" for what, number in counts.items()]
    said += [f"{rest} did neither beyond doubt"] if (rest := len(points) - better - worse) else []
    return f"{len(points)} pairings, {negative or 'none'} of them with a negative delta: {', '.join(said)}."


def _of_curve(points: Sequence[Point], found: dict[str, Any]) -> list[str]:
    line, knee, bend = found["line"], found["knee"], found["bend"]
    if line is None:
        return [f"Too few for a curve: it needs {LEAST_POINTS} pairings and four different deltas."]
    low, high = line["slope_interval"]
    slope = f"{line['slope']:+.3g} per unit of delta, 95 % interval {low:+.3g} to {high:+.3g}"
    if not low > 0:
        way = "falls" if high < 0 else "is not shown to grow"
        return [f"The gain {way} with the delta (straight line: {slope})."]
    grows = f"The gain grows with the delta (straight line: {slope})"
    test = f"simulated F test against the line: p = {knee['p']:.2g}"
    if not bend["bends"]:
        return [f"{grows}; the data show no saturation ({test})."]
    on = f"{bend['after']:+.3g} per unit, 95 % interval {_ends(bend['after_interval'])}; p = {bend['p']:.2g}"
    if not knee["saturates"]:
        return [
            f"{grows}, more slowly from a delta of {bend['knee']:.3g} on (95 % interval {_ends(bend['interval'])}; "
            f"{test}), but it does not end there ({on}): the data show no saturation."
        ]
    return [
        f"{grows} and saturates at a delta of {knee['knee']:.3g} (95 % interval {_ends(knee['interval'])}; {test}): "
        f"above its bend no growth is shown ({on})."
    ]


def _ends(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}"


def _of_quality(found: dict[str, Any]) -> list[str]:
    quality = found["quality"]
    if quality is None:
        return []
    shown = "" if quality["p"] < SIGNIFICANT else "no "
    numbers = f"rank correlation {quality['correlation']:+.2f}, p = {quality['p']:.2g}"
    return [f"What the delta does not explain shows {shown}relation to the quality of the chosen answers ({numbers})."]


def _of_outliers(points: Sequence[Point]) -> list[str]:
    hurting = [it for it in points if it.outlier == "hurts"]
    helping = [it.label for it in points if it.outlier == "helps"]
    named = [it.label + (" (both likelihoods fell)" if it.both_fell else "") for it in hurting]
    sentences = [f"Harmful in spite of a positive delta: {', '.join(named)}."] if named else []
    return sentences + ([f"Helpful in spite of a negative delta: {', '.join(helping)}."] if helping else [])
