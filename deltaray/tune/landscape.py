"""The delta landscape: gain over the untouched student against the measured delta, and where it saturates. Pure.

arXiv 2507.06187, section 5.1: the gain grows with the mean delta of the pairs and is flat from some delta on; section
5.2: the quality of the chosen responses matters little beside it; some pairs hurt in spite of a positive delta, with
the likelihoods of both responses falling.

Two curves are fitted by least squares: a straight line, and a line that is flat above a knee. The knee is believed
where the second explains so much more that a straight line with the same scatter would do so in less than 5 % of
cases. That is an F test whose distribution is simulated: under a straight line the knee means nothing, so that F's
tables do not hold.
"""

from collections.abc import Sequence
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
    """gain = level + slope * min(delta, knee); a straight line has no knee."""

    level: float
    slope: float
    knee: float | None
    residual: float  # sum of squares

    def at(self, deltas: Floats) -> Floats:
        return self.level + self.slope * (deltas if self.knee is None else np.minimum(deltas, self.knee))


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


def _f(line: Floats, knee: Floats, points: int) -> Floats:
    """How much the knee explains, by what it leaves: one more parameter, points - 3 degrees of freedom."""
    return (line - knee) / np.maximum(knee / (points - 3), 1e-300)


def knee_p(deltas: Floats, gains: Floats, seed: int = 0) -> float:
    """How often a straight line with the observed scatter looks at least as kinked (parametric bootstrap)."""
    line, count, bent = straight(deltas, gains), len(deltas), _kinks(deltas)[1]
    scatter = np.sqrt(line.residual / (count - 2))
    noise = np.random.default_rng(seed).normal(0, scatter, (RESAMPLES, count))
    drawn = np.vstack([gains, line.at(deltas) + noise])  # what was seen comes first
    left = [_lines(x, drawn)[2].min(axis=1) for x in (deltas[None], bent)]
    found = _f(left[0], left[1], count)
    return float((found[1:] >= found[0]).sum() + 1) / (RESAMPLES + 1)


def _bootstrap(deltas: Floats, gains: Floats, seed: int = 0) -> tuple[list[float], list[float]]:
    """95 % intervals of the straight line's slope and of the knee, over resampled pairings."""
    chance, slopes, knees = np.random.default_rng(seed), list[float](), list[float]()
    for _ in range(RESAMPLES):
        rows = chance.integers(0, len(deltas), len(deltas))
        x, y = deltas[rows], gains[rows]
        if len(np.unique(x)) < 4:
            continue
        slopes.append(straight(x, y).slope)
        curve = kinked(x, y)
        if curve.knee is not None:
            knees.append(curve.knee)
    return [[float(it) for it in np.percentile(values, [2.5, 97.5])] for values in (slopes, knees)]  # type: ignore[return-value]


# --- the whole --------------------------------------------------------------------------------------------------
def landscape(points: Sequence[Point]) -> dict[str, Any]:
    """Points, curve, outliers and a summary in words, as JSON. Points without a measured delta are not in it."""
    found: dict[str, Any] = {
        "points": [asdict(it) | {"both_fell": it.both_fell, "outlier": it.outlier} for it in points],
        "outliers": [it.label for it in points if it.outlier],
        "curve": None,
        "line": None,
        "knee": None,
        "quality": None,
    }
    deltas, gains = (np.array([getattr(it, name) for it in points]) for name in ("delta", "gain"))
    if len(points) >= LEAST_POINTS and len(np.unique(deltas)) >= 4:
        line, knee = straight(deltas, gains), kinked(deltas, gains)
        slope_interval, knee_interval = _bootstrap(deltas, gains)
        p = knee_p(deltas, gains)
        saturates = p < SIGNIFICANT and knee.slope > 0
        found["line"] = _line_json(line) | {"slope_interval": slope_interval}
        found["knee"] = _line_json(knee) | {"interval": knee_interval, "p": p, "saturates": saturates}
        found["curve"] = _line_json(knee if saturates else line)
        found["quality"] = _quality(points, gains - (knee if saturates else line).at(deltas))
    return found | {"summary": summary_of(points, found)}


def _line_json(curve: Curve) -> dict[str, Any]:
    return {"level": curve.level, "slope": curve.slope, "knee": curve.knee, "residual": curve.residual}


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
    line, knee = found["line"], found["knee"]
    if line is None:
        return [f"Too few for a curve: it needs {LEAST_POINTS} pairings and four different deltas."]
    low, high = line["slope_interval"]
    slope = f"{line['slope']:+.3g} per unit of delta, 95 % interval {low:+.3g} to {high:+.3g}"
    if not low > 0:
        way = "falls" if high < 0 else "is not shown to grow"
        return [f"The gain {way} with the delta (straight line: {slope})."]
    grows = f"The gain grows with the delta (straight line: {slope})"
    if not knee["saturates"]:
        return [f"{grows}; the data show no saturation (simulated F test against the line: p = {knee['p']:.2g})."]
    ends = f"{knee['interval'][0]:.3g} to {knee['interval'][1]:.3g}"
    return [
        f"{grows} and is flat from a delta of {knee['knee']:.3g} on (95 % interval {ends}; simulated F test against "
        f"the line: p = {knee['p']:.2g})."
    ]


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
