"""Trials as studies: what all of them share, and how much of the cluster one of them takes. Pure."""

from dataclasses import replace

from deltaray.errors import UserError
from deltaray.recipe.expand import expand
from deltaray.recipe.search_space import Choice, Trial, axes, explored, known_trials, trial_of
from deltaray.recipe.study import Study
from deltaray.runtime.demands import demands
from deltaray.runtime.session import TRIAL_CPUS, Capacity


def study_of(base: Study, trials: list[Trial]) -> Study:
    """These trials as a study: their pairings and runs at every seed, nothing else to train or to evaluate.

    Args:
        base: the recipe's study, whose models have been found on this machine.
    """
    recipe = base.recipe
    assert recipe.training is not None
    training = recipe.training.model_copy(update={"runs": {trial.name: trial.run for trial in trials}, "groups": 1})
    pairings = {trial.pairing_name: trial.pairing for trial in trials}
    update = {"training": training, "pairings": pairings, "merging": None, "exploration": None}
    study = expand(recipe.model_copy(update=update))
    selection = recipe.evaluation.selection if recipe.evaluation else {}
    runs = {name: replace(run, candidate_of=name if selection else None) for name, run in study.runs.items()}
    evaluated = {name: model for name, model in study.evaluated.items() if model.role == "student"}
    return replace(
        study, teachers=base.teachers, students=base.students, scorers=base.scorers, extensions=base.extensions,
        runs=runs, evaluated=evaluated,
    )  # fmt: skip


def sharing_trials(base: Study) -> list[Trial]:
    """Trials that need all responses, scores and references that the exploration can need.

    All trials, where they are known beforehand; otherwise every pairing with every scorer and loss once.
    """
    known = known_trials(base.recipe)
    if known is not None:
        return known
    space = axes(base.recipe)
    free: Choice = {name: it[0] for name, it in space.items() if isinstance(it, list) and name in ("scorer", "loss")}
    choices: list[Choice] = [free | {"pairing": pairing} for pairing in _listed(space["pairing"])]
    for name in free:
        choices = [choice | {name: value} for choice in choices for value in _listed(space[name])]
    trials = [trial_of(base.recipe, choice) for choice in choices]
    return list({trial.name: trial for trial in trials if trial is not None}.values())


def _listed(values: object) -> list[object]:
    return values if isinstance(values, list) else []


def count_of(base: Study) -> int:
    """How many trials the exploration makes."""
    known = known_trials(base.recipe)
    return explored(base.recipe).samples or 1 if known is None else len(known)


# --- room -------------------------------------------------------------------------------------------------------
def trial_demand(study: Study, capacity: Capacity) -> Capacity:
    """What one trial takes while it does what takes most: its workers and then its engines, and its own tasks."""
    parts = [it.total(it.least) for it in demands(study, capacity) if it.stage in ("train", "evaluate")]
    return Capacity(max(it.cpus for it in parts) + TRIAL_CPUS, max(it.gpus for it in parts))


def at_once(study: Study, capacity: Capacity) -> int:
    """Trials that run side by side: as many as are asked for and have room, each as a whole.

    A trial holds its workers or its engines, never some of both while it waits for the rest, so trials that all have
    room cannot wait for each other.

    Raises:
        UserError: not even one has.
    """
    asked, needs = explored(study.recipe).trials_at_once, trial_demand(study, capacity)
    kinds = (("CPU", needs.cpus, capacity.cpus), ("GPU", needs.gpus, capacity.gpus))
    room = {kind: int(has / wanted + 1e-9) for kind, wanted, has in kinds if wanted}
    short = [f"{wanted:g} {kind}s, the cluster has {has:g}" for kind, wanted, has in kinds if room.get(kind) == 0]
    if short:
        raise UserError(
            f"exploration: a trial needs {' and '.join(short)}; lower training.workers or student.engine, or give the "
            "cluster more (cluster.cpus, cluster.gpus, cluster.address)"
        )
    return min(asked, *room.values())
