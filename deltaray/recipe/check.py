"""What a recipe's single values cannot tell: names that must exist elsewhere in it, sections that need another."""

import re
from collections.abc import Iterator, Mapping

from deltaray.limits import NAME_CHARACTERS
from deltaray.recipe.check_evaluation import check_evaluation
from deltaray.recipe.check_exploration import check_exploration
from deltaray.recipe.check_extensions import check_extensions
from deltaray.recipe.check_merging import check_after, check_merging
from deltaray.recipe.check_pairing import Problem, check_pairing, unknown
from deltaray.recipe.check_size import check_size
from deltaray.recipe.losses import LOSS_FACTS, SETTINGS, readers
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.scorers import Given, Judge, RewardModel, Size
from deltaray.recipe.training import Run

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FOLDERS = f"names become folders: use letters, digits, '.', '_' and '-' only, {NAME_CHARACTERS} at most"


def is_name(text: str) -> bool:
    """Whether it can be a folder's everywhere."""
    return len(text) <= NAME_CHARACTERS and NAME.fullmatch(text) is not None


def check_recipe(recipe: Recipe) -> Iterator[Problem]:
    """All contradictions of a recipe, in the order of its sections."""
    if too_much := list(check_size(recipe)):
        yield from too_much
        return
    yield from _check_sections(recipe)
    yield from _check_names(recipe)
    yield from check_extensions(recipe)
    yield from _check_teachers(recipe)
    yield from _check_scorers(recipe)
    yield from _check_pairings(recipe)
    yield from _check_training(recipe)
    yield from check_merging(recipe)
    yield from check_evaluation(recipe)
    yield from check_exploration(recipe)


def _check_names(recipe: Recipe) -> Iterator[Problem]:
    sections: dict[str, Mapping[str, object]] = {
        "teachers": recipe.teachers,
        "scorers": recipe.scorers,
        "pairings": recipe.pairings,
        "training.runs": recipe.training.runs if recipe.training else {},
        "evaluation.tasks": recipe.evaluation.tasks if recipe.evaluation else {},
        "evaluation.selection": recipe.evaluation.selection if recipe.evaluation else {},
        "evaluation.harness.tasks": recipe.evaluation.harness_tasks if recipe.evaluation else {},
        "merging.methods": recipe.merging.methods if recipe.merging else {},
    }
    if recipe.student and not is_name(recipe.student.name):
        yield ("student", "name"), FOLDERS
    for section, entries in sections.items():
        same: dict[str, str] = {}
        for name in entries:
            at, before = (*section.split("."), name), same.setdefault(name.lower(), name)
            if not is_name(name):
                yield at, FOLDERS
            elif before != name:
                yield at, f"differs from {before} in case only, and some disks have one folder for both; rename one"
    taken: set[str] = {recipe.student.name} if recipe.student else set()
    for name, run in (recipe.training.runs if recipe.training else {}).items():
        for result in (name, *(f"{name}-step{step}" for step in run.intermediate_checkpoints)):
            if result in taken or result in recipe.teachers:
                yield ("training", "runs", name), f"{result} is the name of another model already; choose another"
            taken.add(result)


def _check_teachers(recipe: Recipe) -> Iterator[Problem]:
    for name, teacher in recipe.teachers.items():
        at = ("teachers", name)
        gpus = teacher.engine.gpus
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            yield (*at, "engine", "gpus"), f"{gpus:g} GPUs: write a fraction below 1 or a whole number"
        most = teacher.engine.max_replicas
        if most is not None and most < teacher.engine.replicas:
            yield (*at, "engine", "max_replicas"), f"is less than replicas ({teacher.engine.replicas})"
        for key in ("adapter", "chat_template", "chat_template_arguments", "revision"):
            if teacher.endpoint is not None and getattr(teacher, key):
                yield (*at, key), "a teacher behind an endpoint has its own; leave it out"


def _check_sections(recipe: Recipe) -> Iterator[Problem]:
    if recipe.prompts is None and recipe.preferences is None:
        yield ("prompts",), "is missing; add it, or `preferences:` with an existing preference data set"
    if recipe.prompts is not None and recipe.preferences is not None:
        yield ("preferences",), "brings its own prompts; write either `prompts` or `preferences`"
    if not recipe.teachers and recipe.preferences is None:
        yield ("teachers",), "is missing; name at least one teacher"
    for side in ("chosen", "rejected"):
        name = getattr(recipe.preferences, side, "")
        if recipe.preferences is not None and not is_name(name):
            yield ("preferences", side), FOLDERS
        if name in recipe.teachers:
            yield ("preferences", side), f"a teacher is called {name!r} already; choose another name"


def _check_scorers(recipe: Recipe) -> Iterator[Problem]:
    known = recipe.answering
    for name, scorer in recipe.scorers.items():
        at = ("scorers", name)
        if isinstance(scorer, Size):
            for teacher in scorer.sizes:
                if teacher not in known:
                    yield (*at, "sizes", teacher), unknown("teacher", teacher, known)
        if isinstance(scorer, Judge) and scorer.against is not None:
            models = [*known, *([recipe.student.name] if recipe.student else [])]
            yield from (((*at, "against"), text) for text in _check_against(recipe, scorer.against, models))
        if isinstance(scorer, Given) and recipe.preferences is None:
            yield (*at, "kind"), "only `preferences:` bring scores along"


def _check_against(recipe: Recipe, teacher: str, known: list[str]) -> Iterator[str]:
    if teacher not in known:
        yield unknown("teacher", teacher, known)
    elif len(recipe.seeds) > 1 and teacher in recipe.teachers and "{seed}" in recipe.teachers[teacher].model:
        yield "is another model at each seed; compare at one seed, or with a teacher that stays"


def _check_pairings(recipe: Recipe) -> Iterator[Problem]:
    if recipe.pairings and recipe.student is None:
        yield ("pairings",), "lengths are counted in the student's tokens: add a `student:` section"
    for name, pairing in recipe.pairings.items():
        at = ("pairings", name)
        yield from ((at + where, text) for where, text in check_pairing(pairing, recipe.answering, recipe.scorers))


def _check_training(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training is None:
        return
    if recipe.student is None:
        yield ("training",), "there is nothing to train: add a `student:` section"
    if recipe.training.offload_folder is not None and recipe.training.zero_stage != 3:
        yield ("training", "offload_folder"), "needs `zero_stage: 3`; stages 0 to 2 offload to memory only"
    if not recipe.training.runs and recipe.exploration is None:
        yield ("training", "runs"), "is missing; name at least one run, or add an `exploration:` section"
    for name, run in recipe.training.runs.items():
        at = ("training", "runs", name)
        for number, pairing in enumerate(run.pairings):
            if pairing not in recipe.pairings:
                place = (number,) if isinstance(run.pairing, list) else ()
                yield (*at, "pairing", *place), unknown("pairing", pairing, recipe.pairings)
        if not run.pairings:
            yield (*at, "pairing"), "is empty; name at least one"
        if run.after is not None:
            yield from (((*at, "after"), text) for text in check_after(name, recipe.training.runs))
        grid = isinstance(run.learning_rate, list)
        if grid and not (recipe.evaluation and recipe.evaluation.selection):
            yield (*at, "learning_rate"), "a grid needs `evaluation.selection` tasks to choose on, or write one number"
        if grid and run.intermediate_checkpoints:
            yield (
                (*at, "intermediate_checkpoints"),
                "a grid keeps no intermediate checkpoints: write one learning_rate",
            )
        if recipe.student and recipe.student.quantize and run.lora is None:
            yield (
                (*at, "lora"),
                "a student with `quantize` is frozen: train an adapter, such as `lora: {rank: 64}`",
            )
        for key, problem in _check_loss(run):
            yield (*at, key), problem
    yield from _check_generation(recipe)


def _check_generation(recipe: Recipe) -> Iterator[Problem]:
    training, at = recipe.training, ("training", "generation")
    if training is None or training.generation is None:
        return
    if not training.heldout:
        yield at, "answers held-out prompts, of which there are none; write `training.heldout: 0.05` or the like"
    scorer = training.generation.scorer
    if scorer is None:
        return
    if scorer not in recipe.scorers:
        yield (*at, "scorer"), unknown("scorer", scorer, recipe.scorers)
    elif isinstance(recipe.scorers[scorer], Given | Judge | RewardModel | Size):
        yield (*at, "scorer"), f"a scorer of kind {recipe.scorers[scorer].kind} cannot score new answers on the spot"


def _check_loss(run: Run) -> Iterator[tuple[str, str]]:
    for key in SETTINGS:
        if getattr(run, key) is not None and key not in LOSS_FACTS[run.loss].defaults:
            others = ", ".join(readers(key))
            yield key, f"the loss {run.loss!r} does not read it; leave it out, or write a loss that does: {others}"
