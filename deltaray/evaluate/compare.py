"""One model against another: the difference on a task, or on the mean of all, with its interval."""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from deltaray.data.shapes import EVALUATION
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.statistics import bootstrap_over_tasks, difference_over_seeds
from deltaray.evaluate.values import TaskValues
from deltaray.recipe.check_pairing import unknown
from deltaray.recipe.study import Study

MEAN = "mean"
ALL_PAIRS = 12
"""Up to so many models each is compared with each; more are compared with the untouched student alone."""


def compare(study: Study, values: TaskValues, better: list[str], worse: list[str], task: str = MEAN) -> dict[str, Any]:
    """The difference of two models on a task or on the mean of the tasks, with its interval.

    Args:
        better, worse: the two models' names, one for each seed of the study.
    """
    if len(study.recipe.seeds) == 1:
        tasks = values.tasks if task == MEAN else [task]
        shared = [_differences(values, better[0], worse[0], name) for name in tasks]
        difference, low, high = bootstrap_over_tasks(shared)
        method = "paired bootstrap over prompts, 95 %"
    else:
        sides = ([values.value(name, task) for name in side] for side in (better, worse))
        difference, low, high = difference_over_seeds(*map(np.array, sides))
        method = f"{len(study.recipe.seeds)} seeds, 2 standard errors"
    return {"difference": difference, "low": low, "high": high, "holds": low > 0, "method": method}


def _differences(values: TaskValues, better: str, worse: str, task: str) -> dict[str, float]:
    """By prompt, for those to which both have a value."""
    ours, theirs = values.by_prompt(better, task), values.by_prompt(worse, task)
    return {prompt: value - theirs[prompt] for prompt, value in ours.items() if prompt in theirs}


def check_names(study: Study, names: Iterable[str]) -> None:
    """UserError for a name, without seeds, that no evaluated model has."""
    known = {model.base for model in study.evaluated.values()}
    for name in names:
        if name not in known:
            raise UserError(f"--compare: {unknown('evaluated model', name, known)}")


def compare_two(study: Study, store: Store, first: str, second: str) -> list[dict[str, Any]]:
    """The rows of `compare_all` for two models.

    Raises:
        UserError: one of them is not evaluated.
    """
    names = [name for base in (first, second) for name in names_by_seed(study, base)]
    for name in names:
        if not store.exists(Store.evaluation(name)):
            raise UserError(f"--compare: {name} is not evaluated yet; run the stages that make it")
    values = TaskValues(study, store, {name: store.read_json(Store.evaluation(name), EVALUATION) for name in names})
    sides = names_by_seed(study, first), names_by_seed(study, second)
    return [_row(study, values, first, second, sides, task) for task in shared_tasks(values, sides)]


def compare_all(study: Study, values: TaskValues, names: list[str], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Models against models on every task and on their mean; `names` are without seeds.

    Returns:
        rows with `first`, `second`, `task`, `difference` (first less second), `low`, `high`, `verdict`.
    """
    student = study.recipe.student
    pairs = list(combinations(names, 2))
    if len(names) > ALL_PAIRS:
        pairs = [(name, student.name) for name in names if student and student.name in names and name != student.name]
    rows = []
    for first, second in pairs:
        sides = names_by_seed(study, first), names_by_seed(study, second)
        if all(name in results for side in sides for name in side):
            rows += [_row(study, values, first, second, sides, task) for task in shared_tasks(values, sides)]
    return rows


def shared_tasks(values: TaskValues, sides: Iterable[Iterable[str]]) -> list[str]:
    """The tasks that all of some models have done, and `mean` if these are all: a server does none of the harness's."""
    names = [name for side in sides for name in side]
    tasks = [task for task in values.tasks if all(task in values.results[name]["tasks"] for name in names)]
    return [*tasks, MEAN] if tasks == values.tasks else tasks


def _row(
    study: Study, values: TaskValues, first: str, second: str, sides: tuple[list[str], list[str]], task: str
) -> dict[str, Any]:
    found = compare(study, values, *sides, task)
    interval = {key: found[key] for key in ("difference", "low", "high")}
    return {"first": first, "second": second, "task": task, **interval, "verdict": verdict(found)}


def verdict(found: Mapping[str, Any]) -> str:
    """`better` or `worse` where the whole interval of the difference says so, else `open`. Pure."""
    return "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "open"


def names_by_seed(study: Study, base: str) -> list[str]:
    """A model's name at each seed; one that does not depend on the seed serves all of them."""
    group = {model.seed: model.name for model in study.evaluated.values() if model.base == base}
    return [group.get(seed, next(iter(group.values()), base)) for seed in study.recipe.seeds]
