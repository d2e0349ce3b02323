"""What the numbers say, in words.

"Better" is used for one thing only: a checked claim that holds and whose interval stays above zero. Everything
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
        sentences.append(f"{plural(len(study.runs), 'training run')} ({listed(groups)}) logged, nothing evaluated yet.")
    return " ".join(sentences) or "Nothing has been produced in this folder yet."


def where(task: str, evaluations: Evaluations) -> str:
    """A task as a phrase: the mean of several tasks, or the task itself."""
    if task != "mean":
        return f"on {task}"
    return f"on the mean of {len(evaluations.tasks)} tasks" if len(evaluations.tasks) > 1 else "on average"


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


def _scores(evaluations: Evaluations) -> list[str]:
    """The untouched student and the span of the trained ones."""
    scale, place = Scale.of(evaluations), where("mean", evaluations).removeprefix("on ")
    untouched = [model for model in evaluations.with_role("untouched") if model.mean.mean is not None]
    trained = sorted(
        (model for model in evaluations.with_role("student") if model.mean.mean is not None),
        key=lambda model: -(model.mean.mean or 0.0),
    )
    parts = [f"the untouched student ({model.name}) scores {_measured(model, scale)}" for model in untouched]
    if len(trained) == 1:
        parts.append(f"the trained student {trained[0].name} scores {_measured(trained[0], scale)}")
    elif trained:
        top, last = trained[0], trained[-1]
        span = f"from {_measured(top, scale)} ({top.name}) to {_measured(last, scale)} ({last.name})"
        parts.append(f"the {len(trained)} trained students measure {span}")
    return [f"Taking {place}, {', and '.join(parts)}." if place != "average" else f"On average, {', and '.join(parts)}."] if parts else []


def _claims(evaluations: Evaluations) -> list[str]:
    """How many claims hold, and each of them in brief."""
    checked = claims(evaluations)
    if not checked:
        return []
    scale = Scale.of(evaluations)
    holding = [claim.comparison for claim in checked if claim.verdict == "holds"]
    sentences = [f"Of {plural(len(checked), 'checked claim')}, {len(holding) or 'none'} hold{'s' * (len(holding) == 1)}."]
    if holding:
        brief = tuple(f"{_named(item)} ({scale.signed(item.difference or 0.0)} points)" for item in holding)
        sentences.append(f"Measured as better: {listed(brief)}.")
    for kind, opening in (("open", "Not shown"), ("reverse", "Measured the other way round"), ("unknown", "Not checked")):
        names = tuple(_named(claim.comparison) for claim in checked if claim.verdict == kind)
        if names:
            sentences.append(f"{opening}: {listed(names)}.")
    return sentences


def _named(item: Comparison) -> str:
    """A claim in few words; the task is named only when it is not the mean."""
    return f"{item.better} over {item.worse}" + ("" if item.task == "mean" else f" on {item.task}")


def _teachers(evaluations: Evaluations) -> list[str]:
    scale = Scale.of(evaluations)
    known = [model for model in evaluations.with_role("teacher") if model.mean.mean is not None]
    scores = tuple(f"{_measured(model, scale)} ({model.name})" for model in known)
    return [f"The teacher{'s' * (len(known) > 1)} themselves score {listed(scores)}." if len(known) > 1
            else f"The teacher itself scores {scores[0]}."] if known else []


def _seeds(evaluations: Evaluations) -> str:
    """What the errors do and do not cover."""
    if len(evaluations.seeds) > 1:
        return f"Scores of trained students are means over {len(evaluations.seeds)} training seeds."
    return "Each student was trained once, so the errors do not cover differences between training runs."
