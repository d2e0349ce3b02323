"""What is impossible in the exploration section, given the rest of the recipe."""

from collections.abc import Iterator
from importlib.util import find_spec

from pydantic import ValidationError

from deltaray.recipe.check_pairing import Problem, check_pairing, unknown
from deltaray.recipe.exploration import Exploration, Range
from deltaray.recipe.losses import LOSS_FACTS, SETTINGS, readers
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.training import Run

HERE = "exploration"


def check_exploration(recipe: Recipe) -> Iterator[Problem]:
    """All contradictions of the section; key paths are whole."""
    exploration = recipe.exploration
    if exploration is None:
        return
    if recipe.training is None or recipe.student is None:
        missing = "training" if recipe.training is None else "student"
        yield (HERE,), f"trains students: add a `{missing}:` section"
        return
    problems = [*_check_pairings(recipe, exploration), *_check_search(exploration), *_check_run(exploration)]
    problems += [*_check_objectives(recipe, exploration), *_check_asha(recipe, exploration)]
    yield from (((HERE, *at), text) for at, text in problems)
    if not problems:
        yield from _check_trials(recipe, exploration)


def _check_pairings(recipe: Recipe, exploration: Exploration) -> Iterator[Problem]:
    space, known = exploration.space, recipe.answering
    for number, scorer in enumerate(space.scorer):
        if scorer.partition("/")[0] not in recipe.scorers:
            yield ("space", "scorer", number), unknown("scorer", scorer, recipe.scorers)
    if space.pairings != "ordered":
        for number, name in enumerate(space.pairings):
            if name not in recipe.pairings:
                yield ("space", "pairings", number), unknown("pairing", name, recipe.pairings)
        if not space.pairings:
            yield ("space", "pairings"), "is empty: name at least one, or write `ordered`"
        if exploration.pairing.model_fields_set:
            yield ("pairing",), "belongs to `space.pairings: ordered`; named pairings have their own rules"
        return
    teachers = space.teachers or known
    for number, name in enumerate(space.teachers):
        if name not in known:
            yield ("space", "teachers", number), unknown("teacher", name, known)
    if len(teachers) < 2:
        yield ("space", "pairings"), f"an ordered pair needs two teachers, here are {len(teachers)}: add teachers"
    if exploration.pairing.policy != "by_sample" or exploration.pairing.names != ["", ""]:
        yield ("pairing",), "`ordered` pairs two teachers sample by sample: leave policy, chosen and rejected out"


def _check_search(exploration: Exploration) -> Iterator[Problem]:
    space, grid = exploration.space, exploration.search == "grid"
    for name in type(space).model_fields:
        if grid and isinstance(getattr(space, name), Range):
            yield ("space", name), "a grid needs a list of choices; write one, or `search: random` or `optuna`"
    if grid and exploration.samples is not None:
        yield ("samples",), "a grid tries every combination; leave it out, or write `search: random` or `optuna`"
    if not grid and exploration.samples is None:
        yield ("samples",), f"is missing: say how many trials `search: {exploration.search}` makes"
    for name in exploration.loggers:
        if find_spec(name) is None:
            yield ("loggers",), f"the package {name} is not installed: `pip install {name}`"


def _check_run(exploration: Exploration) -> Iterator[Problem]:
    run = exploration.run
    if run.pairing:
        yield ("run", "pairing"), "the space says which; leave it out"
    for key in ("after", "intermediate_checkpoints"):
        if getattr(run, key):
            yield ("run", key), "is not for trials; leave it out"
    if isinstance(run.learning_rate, list):
        yield ("run", "learning_rate"), "write the list as exploration.space.learning_rate"


def _check_objectives(recipe: Recipe, exploration: Exploration) -> Iterator[Problem]:
    known = possible_objectives(recipe)
    if not known:
        yield ("objectives",), "nothing tells which student is the best: add `evaluation:` or `training.heldout: 0.05`"
    for number, name in enumerate(exploration.objectives):
        if name not in known:
            yield ("objectives", number), unknown("objective", name, known)


def possible_objectives(recipe: Recipe) -> list[str]:
    """What trials can be compared on, the default first."""
    evaluation, training = recipe.evaluation, recipe.training
    found = ["selection"] if evaluation and evaluation.selection else []
    found += ["mean", *evaluation.tasks, *evaluation.selection] if evaluation else []
    return found + (["heldout_accuracy"] if training and training.heldout else [])


def objectives_of(recipe: Recipe) -> list[str]:
    """The exploration's objectives, or the default."""
    assert recipe.exploration is not None
    return recipe.exploration.objectives or possible_objectives(recipe)[:1]


def _check_asha(recipe: Recipe, exploration: Exploration) -> Iterator[Problem]:
    asha, training = exploration.asha, recipe.training
    if asha is None or training is None:
        return
    if not training.heldout:
        yield ("asha",), "goes by held-out prompts, of which there are none; write `training.heldout: 0.05` or the like"
    if asha.grace >= training.heldout_evaluations:
        yield (
            ("asha", "grace"),
            f"no rung is left: training.heldout_evaluations is {training.heldout_evaluations}; write a smaller number",
        )
    if asha.metric == "generated_score" and not (training.generation and training.generation.scorer):
        yield ("asha", "metric"), "needs answers that are scored: add `training.generation` with a `scorer`"
    losses = exploration.space.loss or [exploration.run.loss]
    if asha.metric == "heldout_accuracy" and any(not LOSS_FACTS[loss].needs_rejected for loss in losses):
        yield ("asha", "metric"), "the loss 'sft' has no accuracy on pairs; leave it out, or go by generated_score"


def _check_trials(recipe: Recipe, exploration: Exploration) -> Iterator[Problem]:
    """Trials at the corners of the space: every choice and both ends of a range are in one of them."""
    from deltaray.recipe.search_space import axes, drawn, grid, trial_of

    ends = {name: [it.low, it.high] if isinstance(it, Range) else it for name, it in axes(recipe).items()}
    first = {name: values[0] for name, values in ends.items()}
    found: dict[Problem, None] = {}
    for corner in (first | {name: value} for name, values in ends.items() for value in values):
        try:
            trial = trial_of(recipe, corner)
        except ValidationError as error:
            issue = error.errors()[0]
            found[(HERE, "space", str(issue["loc"][0])), f"{issue['input']!r}: {issue['msg'].lower()}"] = None
            continue
        if trial is not None:
            found |= dict.fromkeys(_check_trial(recipe, trial.pairing, trial.run))
    if not found and not (grid(recipe) if exploration.search == "grid" else drawn(recipe, 1)):
        yield (HERE, "space"), "is empty: every min_delta is above every max_delta, so that no pair can pass"
    yield from found


def _check_trial(recipe: Recipe, pairing: Pairing, run: Run) -> Iterator[Problem]:
    for at, text in check_pairing(pairing, recipe.answering, recipe.scorers):
        yield (HERE, "pairing", *at), text
    for key in SETTINGS:
        if getattr(run, key) is not None and key not in LOSS_FACTS[run.loss].defaults:
            others = ", ".join(readers(key))
            yield (HERE, "run", key), f"the loss {run.loss!r} does not read it; leave it out, or write one of {others}"
    if recipe.student and recipe.student.quantize and run.lora is None:
        yield (HERE, "run", "lora"), "a student with `quantize` is frozen: train an adapter, such as `{rank: 64}`"
