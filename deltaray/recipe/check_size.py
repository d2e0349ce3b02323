"""A recipe that would write itself out to more than anything could work through (`deltaray/limits.py`)."""

from collections.abc import Iterator
from math import perm

from deltaray.limits import NAME_CHARACTERS, SEEDS, STUDY_ITEMS, TRIALS
from deltaray.recipe.check_pairing import Problem
from deltaray.recipe.exploration import Exploration
from deltaray.recipe.recipe import Recipe


def check_size(recipe: Recipe) -> Iterator[Problem]:
    """What is too many or too long. Comes before all checks that go through them."""
    if len(recipe.seeds) > SEEDS:
        yield ("seeds",), f"{len(recipe.seeds):,} seeds; write {SEEDS:,} at most"
    elif (items := _items(recipe) * len(recipe.seeds)) > STUDY_ITEMS:
        yield (
            ("seeds",) if len(recipe.seeds) > 1 else (),
            f"the study would have {items:,} models, pairings, runs and merges over all seeds; {STUDY_ITEMS:,} "
            "are the most: make several studies of it",
        )
    if recipe.exploration and (trials := _trials(recipe, recipe.exploration)) > TRIALS:
        yield ("exploration",), f"would make {trials:,} trials; {TRIALS:,} are the most: write fewer choices or samples"
    if len(recipe.name) > NAME_CHARACTERS:
        yield ("name",), f"has {len(recipe.name):,} characters; {NAME_CHARACTERS} are the most"


def _items(recipe: Recipe) -> int:
    """How many of all kinds one seed has, at most."""
    runs = recipe.training.runs.values() if recipe.training else ()
    grids = sum(len(run.learning_rate) if isinstance(run.learning_rate, list) else 1 for run in runs)
    early = sum(len(run.intermediate_checkpoints) for run in runs)
    merges = len(recipe.merging.methods) * len(recipe.merging.sizes()) if recipe.merging else 0
    return 2 * len(recipe.teachers) + len(recipe.pairings) + 2 * (grids + early + merges)


def _trials(recipe: Recipe, exploration: Exploration) -> int:
    if exploration.samples is not None:
        return exploration.samples
    space = exploration.space
    teachers = len(space.teachers or recipe.answering)
    trials = perm(teachers, 2) if space.pairings == "ordered" else len(space.pairings)
    for name in type(space).model_fields:
        values = getattr(space, name)
        if name not in ("pairings", "teachers") and isinstance(values, list):
            trials *= max(len(values), 1)
    return trials
