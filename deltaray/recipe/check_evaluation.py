"""What is impossible in the evaluation section: names that do not exist, tasks without answers, claims of nobody."""

import re
from collections.abc import Iterator

from deltaray.recipe.check_pairing import Problem, unknown
from deltaray.recipe.evaluation import Evaluation, Task
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.scorers import Given, Size, scorer_name
from deltaray.recipe.suites import SUITES

CLAIM = re.compile(r"\s*(\S+)\s*>\s*(\S+)\s*")


def check_evaluation(recipe: Recipe) -> Iterator[Problem]:
    """All contradictions of the section; key paths are whole."""
    evaluation = recipe.evaluation
    if evaluation is None:
        return
    for number, name in enumerate(evaluation.suites):
        if name not in SUITES:
            yield ("evaluation", "suites", number), unknown("suite", name, SUITES)
    if not (evaluation.tasks or evaluation.suites or evaluation.harness_tasks):
        yield ("evaluation",), "has no task: write `tasks`, `harness.tasks` or `suites`"
    for section in ("tasks", "selection"):
        for name, task in getattr(evaluation, section).items():
            yield from ((("evaluation", section, name, *at), text) for at, text in _check_task(recipe, task))
    yield from _check_search(recipe, evaluation)
    yield from _check_twice(evaluation)
    yield from _check_claims(recipe, evaluation)


def _check_task(recipe: Recipe, task: Task) -> Iterator[Problem]:
    if task.metric is not None and task.scorer is not None:
        yield ("metric",), "the task has a `scorer`; write one of the two"
    if task.scorer is not None and (name := scorer_name(task.scorer)) not in recipe.scorers:
        yield ("scorer",), unknown("scorer", name, recipe.scorers)
    elif task.scorer is not None and isinstance(found := recipe.scorers[name], Given | Size):
        yield ("scorer",), f"a scorer of kind {found.kind} knows teachers and data sets, not answers; name another"
    if task.k and max(task.k) > task.sampling.samples:
        yield ("k",), f"pass@{max(task.k)} takes so many samples: write `sampling: {{samples: {max(task.k)}}}` or more"
    if task.sampling.samples > 1 and task.sampling.temperature == 0:
        yield ("sampling", "temperature"), "samples of temperature 0 are all the same; write a higher one"
    if task.answer is not None and task.answers:
        yield ("answers",), "`answer` is that of every prompt already; leave one of the two out"


def _check_search(recipe: Recipe, evaluation: Evaluation) -> Iterator[Problem]:
    """Tasks that search and what they search go together."""
    own = {**evaluation.tasks, **evaluation.selection}
    suites = [suite for name in evaluation.suites if (suite := SUITES.get(name))]
    searching = [name for name, task in own.items() if task.search]
    searching += [name for suite in suites for name, task in suite.local.items() if task.search and name not in own]
    if searching and evaluation.search is None:
        yield (
            ("evaluation",),
            f"{searching[0]} searches: write `search: {{corpus: {{path: FILE}}}}` with a passage per row as `text`, or "
            "`search: {url: ADDRESS}` of a server that answers as Search-R1's does",
        )
    if evaluation.search is not None and not searching:
        yield ("evaluation", "search"), "no task searches; write `search: true` in one, or remove the section"
    if searching and evaluation.teachers:
        for name, teacher in recipe.teachers.items():
            if teacher.endpoint is not None:
                yield (
                    ("evaluation", "teachers"),
                    f"{name} is a server, which answers without searches; write `teachers: false`",
                )


def _check_twice(evaluation: Evaluation) -> Iterator[Problem]:
    """Names of results that two tasks would share."""
    for name in evaluation.selection:
        if name in evaluation.tasks:
            yield ("evaluation", "selection", name), "a task of `evaluation.tasks` has this name; choose another"
    for name in evaluation.harness_tasks:
        if name in evaluation.tasks or name in evaluation.selection:
            yield (
                ("evaluation", "harness", "tasks", name),
                "another task has this name; choose one, and name the harness's as `task`",
            )
    if "mean" in evaluation.names:
        yield ("evaluation",), "`mean` is what the mean of all tasks is called; give the task of this name another"


def _check_claims(recipe: Recipe, evaluation: Evaluation) -> Iterator[Problem]:
    runs = recipe.training.runs if recipe.training else {}
    known = {
        *recipe.teachers,
        *runs,
        *(f"{name}-step{step}" for name, run in runs.items() for step in run.intermediate_checkpoints),
    }
    known |= {recipe.student.name} if recipe.student else set()
    known |= recipe.merging.names().keys() if recipe.merging else set()
    for index, claim in enumerate(evaluation.claims):
        at = ("evaluation", "claims", index)
        match = CLAIM.fullmatch(claim)
        if match is None:
            yield at, f"{claim!r} is not a claim; write `better > worse` with two model names"
            continue
        for name in match.groups():
            if name not in known:
                yield at, unknown("model", name, known)
