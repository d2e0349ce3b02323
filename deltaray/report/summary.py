"""What the numbers say, in words.

"Better" is used for one thing only: a checked claim that holds and whose interval stays above zero. All
else is reported as measured, with its uncertainty, and no ranking is read into it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .format import Scale, listed, plural
from .model import Comparison, Evaluations, Model, Study


@dataclass(frozen=True)
class Claim:
    """A comparison as the page shows it: a verdict word, a sentence, and its numbers for the drawing."""

    verdict: str
    label: str
    sentence: str
    comparison: Comparison


LABELS = {
    "holds": "Holds",
    "open": "Not shown",
    "reverse": "Reverse measured",
    "unknown": "Not checked",
}
OPENINGS = {"open": "Not shown", "reverse": "Measured the other way round", "unknown": "Not checked"}


def verdict(comparison: Comparison) -> str:
    """holds, open (the interval includes zero), reverse (it lies below zero) or unknown (no numbers)."""
    if comparison.difference is None or comparison.low is None or comparison.high is None:
        return "unknown"
    if comparison.low > 0 and comparison.holds is not False:
        return "holds"
    return "reverse" if comparison.high < 0 else "open"


def claims(evaluations: Evaluations) -> list[Claim]:
    """Every checked comparison with its sentence, in the order of the summary file."""
    scale = Scale.of(evaluations)
    return [
        Claim(kind := verdict(item), LABELS[kind], _claim_sentence(item, kind, scale), item)
        for item in evaluations.comparisons
    ]


def summarize(study: Study) -> str:
    """One paragraph about the whole study, from whatever part of it exists."""
    evaluations = study.evaluations
    sentences = [*_data(study), *_scores(evaluations), *_claims(evaluations), *_teachers(evaluations)]
    if evaluations.models:
        sentences.append(_seeds(evaluations))
    if not sentences and study.runs:
        groups = tuple(dict.fromkeys(run.group for run in study.runs))
        runs = plural(len(study.runs), "training run")
        sentences.append(f"{runs} ({listed(groups)}) logged, nothing evaluated yet.")
    return " ".join(sentences) or "Nothing has been produced in this folder yet."


def _interval(item: Comparison, scale: Scale) -> str:
    """Only for comparisons that have numbers."""
    low, high = scale.signed(item.low or 0.0), scale.signed(item.high or 0.0)
    return f"{scale.signed(item.difference or 0.0)} points, interval {low} to {high}"


def _claim_sentence(item: Comparison, kind: str, scale: Scale) -> str:
    place = "on the mean of all tasks" if item.task == "mean" else f"on {item.task}"
    pair = f"{item.better} above {item.worse} {place}"
    if kind == "unknown":
        return f"{pair}: no interval was computed."
    numbers = _interval(item, scale)
    if kind == "holds":
        return f"{item.better} is better than {item.worse} {place}: {numbers}."
    if kind == "reverse":
        return f"{pair} is contradicted: {numbers}, all below zero."
    spans = (item.low or 0.0) <= 0 <= (item.high or 0.0)
    reason = "which includes no difference" if spans else "which the check did not accept"
    return f"{pair} is not shown: {numbers}, {reason}."


def _data(study: Study) -> list[str]:
    """The pairs and where they come from."""
    if not study.pairings:
        return []
    filled = [pairing for pairing in study.pairings if pairing.rows]
    empty = [pairing.name for pairing in study.pairings if not pairing.rows]
    teachers = tuple(sorted({teacher for pairing in filled for teacher in pairing.teachers}))
    source = f" from answers of {listed(teachers)}" if teachers else ""
    total = plural(sum(pairing.rows for pairing in filled), "preference pair")
    sentences = [f"The study made {total} in {plural(len(study.pairings), 'pairing')}{source}."]
    if empty:
        sentences.append(f"{'Pairing' if len(empty) == 1 else 'Pairings'} {listed(empty)} came out empty.")
    return sentences


def _measured(model: Model, scale: Scale) -> str:
    """`48.3 % ± 1.1`, the error only where it is known."""
    error = f" ± {scale.digits(model.mean.stderr)}" if model.mean.stderr is not None else ""
    return scale.score(model.mean.mean) + error


def _apart(model: Model) -> str:
    """The untouched student's name, when it says more than "student"."""
    return "" if model.name == "student" else f" {model.name}"


def _scores(evaluations: Evaluations) -> list[str]:
    """The untouched student and the span of the trained ones."""
    scale = Scale.of(evaluations)
    untouched = _known(evaluations, "untouched")
    trained = sorted(_known(evaluations, "student"), key=lambda model: -(model.mean.mean or 0.0))
    parts = [f"the untouched student{_apart(model)} scores {_measured(model, scale)}" for model in untouched]
    if len(trained) == 1:
        parts.append(f"the trained student {trained[0].name} scores {_measured(trained[0], scale)}")
    elif trained:
        top, last = (f"{_measured(model, scale)} ({model.name})" for model in (trained[0], trained[-1]))
        parts.append(f"the {len(trained)} trained students measure from {top} to {last}")
    tasks = len(evaluations.tasks)
    opening = f"On the mean of {tasks} tasks" if tasks > 1 else f"On {listed(evaluations.tasks)}"
    return [f"{opening}, {', and '.join(parts)}."] if parts else []


def _known(evaluations: Evaluations, role: str) -> list[Model]:
    """The models of a role that have a mean."""
    return [model for model in evaluations.with_role(role) if model.mean.mean is not None]


def _claims(evaluations: Evaluations) -> list[str]:
    """How many claims hold, and each claim in brief."""
    checked = claims(evaluations)
    if not checked:
        return []
    scale = Scale.of(evaluations)
    holding = [claim.comparison for claim in checked if claim.verdict == "holds"]
    verb = "holds" if len(holding) == 1 else "hold"
    sentences = [f"Of {plural(len(checked), 'checked claim')}, {len(holding) or 'none'} {verb}."]
    if holding:
        brief = [f"{_named(item)} ({scale.signed(item.difference or 0.0)} points)" for item in holding]
        sentences.append(f"Measured as better: {listed(brief)}.")
    for kind, opening in OPENINGS.items():
        names = [_named(claim.comparison) for claim in checked if claim.verdict == kind]
        if names:
            sentences.append(f"{opening}: {listed(names)}.")
    return sentences


def _named(item: Comparison) -> str:
    """A claim in few words; the task is named only when it is not the mean."""
    return f"{item.better} over {item.worse}" + ("" if item.task == "mean" else f" on {item.task}")


def _teachers(evaluations: Evaluations) -> list[str]:
    """What the teachers score; no claim is made about them here."""
    scale = Scale.of(evaluations)
    scores = [f"{_measured(model, scale)} ({model.name})" for model in _known(evaluations, "teacher")]
    if not scores:
        return []
    subject = "The teachers themselves score" if len(scores) > 1 else "The teacher itself scores"
    return [f"{subject} {listed(scores)}."]


def _seeds(evaluations: Evaluations) -> str:
    """What the errors do and do not cover."""
    if len(evaluations.seeds) > 1:
        return f"Scores of trained students are means over {len(evaluations.seeds)} training seeds."
    return "Each student was trained once, so the errors do not cover differences between training runs."
