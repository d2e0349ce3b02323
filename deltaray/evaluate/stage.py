"""Evaluate: untouched students, trained students and teachers answer the tasks; the best of each grid is chosen.

Models of one architecture share one vLLM engine, whose weights are swapped between their units.
"""

from typing import Any

import pyarrow as pa

from deltaray.contracts import EVALUATIONS
from deltaray.evaluate.results import evaluation_of, summarise
from deltaray.evaluate.select import choose_candidates
from deltaray.generate.pools import OnRows, run_pools
from deltaray.generate.share import shared_pools
from deltaray.generate.units import Unit, missing_units
from deltaray.prompts import read_prompts, store_prompts
from deltaray.recipe.models import Engine, Model, Task
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.score.scorers import SCORERS
from deltaray.store import Store


def store_task_prompts(study: Study, store: Store) -> None:
    """Brings the tasks' prompts into the store."""
    for name, task in all_tasks(study).items():
        rows = read_prompts(task.path, f"evaluation.tasks.{name}.path", task.limit)
        store_prompts(store, rows, study.recipe.shard_size, Store.evaluation_prompts(name))


def all_tasks(study: Study) -> dict[str, Task]:
    evaluation = study.recipe.evaluation
    return {**evaluation.tasks, **evaluation.selection} if evaluation else {}


def models_to_evaluate(study: Study, store: Store) -> dict[str, tuple[Model, Engine, list[str]]]:
    """Name -> (model, engine, tasks) of every model that exists by now, the candidates of grids included."""
    evaluation, student = study.recipe.evaluation, study.recipe.student
    assert evaluation is not None
    found: dict[str, tuple[Model, Engine, list[str]]] = {}
    for evaluated in study.evaluated.values():
        if evaluated.role == "untouched":
            untouched = study.students[evaluated.name]
            found[evaluated.name] = (untouched, untouched.engine, list(evaluation.tasks))
        elif evaluated.role == "teacher":
            teacher = study.teachers[evaluated.name]
            found[evaluated.name] = (teacher, teacher.engine, list(evaluation.tasks))
    for run in study.runs.values():
        if student and store.has_student(run.name):
            tasks = [*evaluation.tasks, *(evaluation.selection if run.candidate_of else {})]
            trained = Model(model=store.local_folder(Store.student(run.name)))
            found[run.name] = (trained, student.engine, tasks)
    return found


def evaluation_work(study: Study, store: Store) -> list[tuple[Model, Engine, list[Unit]]]:
    """What every model still has to answer."""
    tasks, work = all_tasks(study), []
    for name, (model, engine, names) in models_to_evaluate(study, store).items():
        units = [unit for task in names for unit in _task_units(store, name, model, task, tasks[task])]
        if units:
            work.append((model, engine, units))
    return work


def _task_units(store: Store, name: str, model: Model, task: str, spec: Task) -> list[Unit]:
    destination, prompts = Store.evaluation_responses(name, task), Store.evaluation_prompts(task)
    return missing_units(store, prompts, destination, model, spec.sampling, name=name, metric=spec.metric)


def evaluate(study: Study, store: Store, capacity: Capacity, on_rows: OnRows) -> dict[str, Any]:
    """Completes all evaluations; returns the summary."""
    store_task_prompts(study, store)
    pools = shared_pools(evaluation_work(study, store), capacity)
    run_pools(store, pools, capacity, write_evaluation, on_rows)
    return conclude(study, store)


def is_concluded(study: Study, store: Store) -> bool:
    """Whether the summary covers every model and claim of the recipe."""
    if study.recipe.evaluation is None or not store.exists("evaluation/summary.json"):
        return False
    summary = store.read_json("evaluation/summary.json")
    covered = {model.base for model in study.evaluated.values()} <= summary["names"].keys()
    return covered and summary["claims"] == study.recipe.evaluation.claims


def conclude(study: Study, store: Store) -> dict[str, Any]:
    """Writes every model's evaluation, the grids' winners and the summary from the stored answers."""
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    for name in models_to_evaluate(study, store):
        store.write_json(Store.evaluation(name), evaluation_of(store, name, name, evaluation.tasks))
    choose_candidates(study, store)
    summary = summarise(study, store)
    store.write_json("evaluation/summary.json", summary)
    return summary


def write_evaluation(store: Store, unit: Unit) -> dict[str, Any]:
    """Scores and commits a unit's answers as one file."""
    function = SCORERS[unit["metric"]]
    rows = [
        {
            "prompt_id": prompt_id,
            "sample": sample,
            "text": output["text"],
            "finish_reason": output["finish_reason"],
            "answer": answer,
            "score": function(output["text"], answer),
        }
        for prompt_id, answer, outputs in zip(unit["prompt_ids"], unit["answers"], unit["outputs"], strict=True)
        for sample, output in enumerate(outputs)
    ]
    store.write_table(unit["destination"], pa.Table.from_pylist(rows, schema=EVALUATIONS), EVALUATIONS)
    tokens = sum(len(output["token_ids"]) for outputs in unit["outputs"] for output in outputs)
    return {"name": unit["name"], "rows": len(rows), "tokens": tokens}
