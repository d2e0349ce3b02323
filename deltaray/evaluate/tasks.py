"""The tasks of a study: where their prompts come from, and what decides their answers and scores."""

from typing import Any

from deltaray.data.prompts.source import PromptSource
from deltaray.data.prompts.view import View
from deltaray.evaluate.harness import harness_definition
from deltaray.evaluate.local import task_scorer
from deltaray.generate.search.retrievers import search_identity
from deltaray.recipe.evaluation import Task
from deltaray.recipe.scorers import scorer_part
from deltaray.recipe.study import Study
from deltaray.score.identity import scorer_identity


def task_sources(study: Study) -> dict[str, PromptSource]:
    """The prompts of all evaluation tasks by name, those for the selection included."""
    return {
        name: PromptSource(task.path, f"evaluation.{section}.{name}.path", task.limit, view=View.of(task))
        for section in ("tasks", "selection")
        for name, task in tasks_of(study, section).items()
    }


def tasks_of(study: Study, section: str) -> dict[str, Task]:
    """The tasks of a section of the evaluation: `tasks` or `selection`."""
    return getattr(study.recipe.evaluation, section, {})


def task_definitions(study: Study) -> dict[str, dict[str, Any]]:
    """What decides the answers and scores of every task and benchmark, by their artifact's name."""
    searched, found = search_identity(study.recipe), {}
    for section in ("tasks", "selection"):
        for name, task in tasks_of(study, section).items():
            scored = {"scorer": scorer_identity(task_scorer(study, task)), "part": scorer_part(task.scorer or "")}
            asked = {"sampling": task.sampling.model_dump(mode="json"), **(searched if task.search else {})}
            found[f"evaluation/task={name}"] = asked | scored
    if study.recipe.evaluation is not None:
        for name, benchmark in study.recipe.evaluation.harness_tasks.items():
            found[f"evaluation/harness={name}"] = harness_definition(study, benchmark)
    return found
