"""Failure signatures: what a run's metrics look like when it goes wrong. Pure, no torch; thresholds in `Watch`.

A history is the lines of a run's metrics.jsonl. Some lines also have `heldout_loss`, `heldout_accuracy` and
`heldout_margin` (pairs that are not trained on) or `generated_tokens` (mean length of answers sampled from the student
so far). A detector looks at the two ends of what has been seen and says what is wrong there, or None.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, pvariance
from typing import Any

from deltaray.recipe.watch import SignatureName, Watch

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Signature:
    name: SignatureName
    step: int
    """The first step at which it was seen."""
    message: str


@dataclass
class History:
    """What has been seen of a run so far, sorted by what a line has."""

    total: int
    """Steps that the run will have."""
    steps: list[Line] = field(default_factory=list)
    heldout: list[Line] = field(default_factory=list)
    generated: list[Line] = field(default_factory=list)
    last: Line = field(default_factory=dict)

    def add(self, line: Line) -> None:
        self.last = line
        for rows, key in ((self.steps, "loss"), (self.heldout, "heldout_loss"), (self.generated, "generated_tokens")):
            if line.get(key) is not None:
                rows.append(line)


Detector = Callable[[History, Watch], str | None]


class Watcher:
    """Sees a run's lines one by one. After a resume, the lines before the checkpoint are to be seen again."""

    def __init__(self, watch: Watch, total: int) -> None:
        self.watch, self.history = watch, History(total)
        self.found: dict[SignatureName, Signature] = {}

    def see(self, line: Line) -> list[Signature]:
        """The signatures that this line shows for the first time."""
        self.history.add(line)
        shown = [self._look(name, detector) for name, detector in DETECTORS.items() if name not in self.found]
        new = [signature for signature in shown if signature is not None]
        self.found |= {signature.name: signature for signature in new}
        return new

    def _look(self, name: SignatureName, detector: Detector) -> Signature | None:
        message = detector(self.history, self.watch)
        return None if message is None else Signature(name, int(self.history.last["step"]), message)


# --- detectors --------------------------------------------------------------------------------------------------
def not_finite(history: History, watch: Watch) -> str | None:
    """NaN or infinity in a loss or in the gradient: the weights are lost, or will be with the next step."""
    for key in ("loss", "grad_norm", "heldout_loss"):
        value = history.last.get(key)
        if value is not None and not math.isfinite(value):
            return f"{key} is {value}: lower learning_rate or max_grad_norm, or train in float32"
    return None


def collapse(history: History, watch: Watch) -> str | None:
    """Chosen and rejected responses both become unlikely: the student forgets how to write either."""
    drops = [_drop(history, watch, key) for key in ("logps_chosen", "logps_rejected")]
    if None in drops or min(drop for drop in drops if drop is not None) <= watch.collapse_nats:
        return None
    chosen, rejected = drops
    return (
        f"log-probs per token fell by {chosen:.2f} (chosen) and {rejected:.2f} (rejected) nats since the start: "
        "lower learning_rate, raise beta, or give the chosen responses an nll_weight"
    )


def stagnant_loss(history: History, watch: Watch) -> str | None:
    """The loss stays where it started: chosen and rejected may not differ enough, or the steps are too small.

    The end is the second half of what is done, for losses get noisier as they move (at most 25 windows: it is cheap).
    """
    done = len(history.steps)
    ends = _ends(history, watch, "loss", min(done // 2, 25 * watch.window))
    if ends is None or done < watch.stagnant_from * history.total:
        return None
    start, end = (fmean(values) for values in ends)
    noise = watch.stagnant_errors * math.sqrt(sum(pvariance(values) / len(values) for values in ends))
    if start - end + noise > watch.stagnant_share * abs(start):
        return None
    return (
        f"the loss is {end:.4g} after {done} steps, {start:.4g} at the start: raise learning_rate, "
        "or look whether chosen and rejected differ enough"
    )


def no_heldout_gain(history: History, watch: Watch) -> str | None:
    """Held-out pairs gain nothing any more, in loss or accuracy."""
    recent = watch.no_gain_evaluations
    losses, accuracies = (_finite(history.heldout, f"heldout_{key}") for key in ("loss", "accuracy"))
    if history.last.get("heldout_loss") is None or len(losses) <= recent:
        return None
    best = min(losses[:-recent])
    gained = min(losses[-recent:]) < best - watch.no_gain_loss * abs(best)
    if len(accuracies) > recent:
        gained |= max(accuracies[-recent:]) > max(accuracies[:-recent]) + watch.no_gain_accuracy
    if gained:
        return None
    return (
        f"no gain on held-out pairs in {recent} evaluations: the loss is {losses[-1]:.4g}, the best was {best:.4g}; "
        "an earlier checkpoint may be better"
    )


def length_drift(history: History, watch: Watch) -> str | None:
    """The student's answers get much longer or shorter than they were."""
    lengths = [max(length, 1.0) for length in _finite(history.generated, "generated_tokens")]
    if len(lengths) < 2 or 1 / watch.length_factor <= lengths[-1] / lengths[0] <= watch.length_factor:
        return None
    return (
        f"generated answers have {lengths[-1]:.0f} tokens on average, {lengths[0]:.0f} at the start: look at what they "
        "became; a length-normalised loss or pairs of like lengths keep them"
    )


def margin_without_accuracy(history: History, watch: Watch) -> str | None:
    """A growing margin that orders no more pairs: it grows on those that were right already."""
    done, now = len(history.steps), history.steps[-watch.window :]
    if done < 4 * watch.window:  # the two windows lie apart, and the earlier one is not the start, where margins are 0
        return None
    half = history.steps[done // 2 - watch.window : done // 2]
    margins, accuracies = ([_mean(rows, f"rewards_{key}") for rows in (half, now)] for key in ("margin", "accuracy"))
    if margins[0] is None or margins[1] is None or accuracies[0] is None or accuracies[1] is None:
        return None
    grew = 0 < margins[0] * watch.margin_factor < margins[1]
    rose = accuracies[1] - accuracies[0] > watch.margin_accuracy
    if not grew or rose or accuracies[1] >= watch.margin_saturated:
        return None
    return (
        f"the reward margin grew from {margins[0]:.3g} to {margins[1]:.3g} in the second half of {done} steps, "
        f"accuracy went from {accuracies[0]:.1%} to {accuracies[1]:.1%}: stop earlier, or raise beta"
    )


DETECTORS: Mapping[SignatureName, Detector] = {
    "not_finite": not_finite,
    "collapse": collapse,
    "stagnant_loss": stagnant_loss,
    "no_heldout_gain": no_heldout_gain,
    "length_drift": length_drift,
    "margin_without_accuracy": margin_without_accuracy,
}


# --- means ------------------------------------------------------------------------------------------------------
def _finite(rows: Iterable[Line], key: str) -> list[float]:
    values = (row.get(key) for row in rows)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _mean(rows: Iterable[Line], key: str) -> float | None:
    values = _finite(rows, key)
    return fmean(values) if values else None


def _ends(history: History, watch: Watch, key: str, last: int) -> tuple[list[float], list[float]] | None:
    """Values of the first window and of the `last` steps; None before two windows are full, or without values."""
    if len(history.steps) < 2 * watch.window:
        return None
    start, end = (_finite(rows, key) for rows in (history.steps[: watch.window], history.steps[-last:]))
    return (start, end) if start and end else None


def _drop(history: History, watch: Watch, key: str) -> float | None:
    ends = _ends(history, watch, key, watch.window)
    return None if ends is None else fmean(ends[0]) - fmean(ends[1])
