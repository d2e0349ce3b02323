"""From stored scores to `evaluation/<name>.json` and `evaluation/summary.json`."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deltaray.data.shapes import EVALUATION
from deltaray.data.store import Store
from deltaray.evaluate.compare import MEAN, compare, compare_all, names_by_seed, shared_tasks
from deltaray.evaluate.local import task_result
from deltaray.evaluate.samples import harness_result
from deltaray.evaluate.statistics import mean_and_stderr
from deltaray.evaluate.values import TaskValues
from deltaray.recipe.check_evaluation import CLAIM
from deltaray.recipe.evaluation import Task
from deltaray.recipe.study import Study
from deltaray.recipe.suites import missing_in


def evaluation_of(
    store: Store, name: str, model: str, tasks: Mapping[str, Task], harness: Iterable[str] = ()
) -> dict[str, Any]:
    """The content of `evaluation/<name>.json`.

    Args:
        model: the name under which the answers to `tasks` are stored; those to the `harness` tasks are under `name`.
    Raises:
        StageError: a task has no value, because none of its answers has a score.
    """
    results = {task: task_result(store, model, task, spec) for task, spec in tasks.items()}
    results |= {task: harness_result(store, name, task) for task in harness}
    mean = float(np.mean([result["value"] for result in results.values()]))
    return {"model": name, "tasks": results, "mean": mean}


def evaluations(study: Study, store: Store) -> dict[str, Any]:
    """What `evaluation_of` tells of each model that is evaluated, by name."""
    names = [name for name in study.evaluated if store.exists(Store.evaluation(name))]
    return {name: store.read_json(Store.evaluation(name), EVALUATION) for name in names}


def summarise(study: Study, store: Store) -> dict[str, Any]:
    """Mean and standard error per name over the seeds, every claim with its interval, and models against models.

    With one seed the standard errors are those over prompts and claims are decided by a paired bootstrap over
    prompts; with several both are over seeds.
    """
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    results = evaluations(study, store)
    models = [model for model in study.evaluated.values() if model.name in results]
    values = TaskValues(study, store, results)
    names: dict[str, Any] = {}
    for base in dict.fromkeys(model.base for model in models):
        group = [model for model in models if model.base == base]
        names[base] = {"role": group[0].role, **over_seeds([results[model.name] for model in group])}
    claims = [_claim(study, values, claim, results) for claim in evaluation.claims]
    return {
        "tasks": values.tasks,
        "seeds": list(study.recipe.seeds),
        "names": names,
        "claims": list(evaluation.claims),
        "comparisons": [claim for claim in claims if claim],
        "differences": compare_all(study, values, list(names), results),
        "missing": missing_in(evaluation),
    }


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of what `evaluation_of` tells of a model at each, with their standard errors."""
    tasks = {}
    for task in results[0]["tasks"]:
        single = [result["tasks"][task] for result in results]
        tasks[task] = _spread([item["value"] for item in single], single[0]["stderr"]) | {"n": single[0]["n"]}
    errors = [results[0]["tasks"][task]["stderr"] for task in results[0]["tasks"]]
    # tasks that share their prompts have correlated errors: the mean of the errors bounds the error of the mean
    return {"tasks": tasks, "mean": _spread([result["mean"] for result in results], float(np.mean(errors)))}


def _spread(values: list[float], single_stderr: float) -> dict[str, Any]:
    mean, stderr = mean_and_stderr(np.array(values))
    return {"mean": mean, "stderr": stderr if len(values) > 1 else single_stderr, "values": values}


def _claim(study: Study, values: TaskValues, claim: str, results: dict[str, Any]) -> dict[str, Any] | None:
    match = CLAIM.fullmatch(claim)
    assert match is not None
    better, worse = (names_by_seed(study, base) for base in match.groups())
    if not all(name in results for name in (*better, *worse)) or MEAN not in shared_tasks(values, (better, worse)):
        return None
    found = compare(study, values, better, worse)
    return {"better": match[1], "worse": match[2], "task": "mean", **found}
