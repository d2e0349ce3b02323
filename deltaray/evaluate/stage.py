"""Evaluate: untouched students, trained students and teachers answer the tasks; the best of each grid is chosen.

Models of one architecture share one vLLM engine, whose weights are swapped between their units.
"""

import hashlib
import json
from functools import lru_cache
from typing import Any

import pyarrow as pa

from deltaray.chat import load_tokenizer
from deltaray.contracts import EVALUATIONS
from deltaray.evaluate.results import evaluation_of, summarise
from deltaray.evaluate.select import choose_candidates
from deltaray.generate.pools import OnRows, Pool, engine_spec, run_pools
from deltaray.generate.spec import COSMETIC
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


def evaluation_units(study: Study, store: Store) -> dict[str, list[Unit]]:
    """Engine key -> the units that its replicas still have to answer."""
    tasks = all_tasks(study)
    groups: dict[str, list[Unit]] = {}
    for name, (model, engine, names) in models_to_evaluate(study, store).items():
        for task in names:
            destination = Store.evaluation_responses(name, task)
            prompts = Store.evaluation_prompts(task)
            units = missing_units(
                store, prompts, destination, model, tasks[task].sampling, name=name, metric=tasks[task].metric
            )
            if units:
                groups.setdefault(_engine_key(model, engine), []).extend(units)
    return groups


def evaluate(study: Study, store: Store, capacity: Capacity, on_rows: OnRows) -> dict[str, Any]:
    """Completes all evaluations; returns the summary."""
    store_task_prompts(study, store)
    models = models_to_evaluate(study, store)
    pools = []
    for units in evaluation_units(study, store).values():
        model, engine, _ = models[units[0]["name"]]
        pools.append(Pool(engine_spec(model, engine, capacity), units))
    run_pools(store, pools, capacity, write_evaluation, on_rows)
    return _conclude(study, store, models)


def is_concluded(study: Study, store: Store) -> bool:
    """Whether the summary covers every model and claim of the recipe."""
    if study.recipe.evaluation is None or not store.exists("evaluation/summary.json"):
        return False
    summary = store.read_json("evaluation/summary.json")
    covered = {model.base for model in study.evaluated.values()} <= summary["names"].keys()
    return covered and summary["claims"] == study.recipe.evaluation.claims


def _conclude(study: Study, store: Store, models: dict[str, Any]) -> dict[str, Any]:
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    for name in models:
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


def _engine_key(model: Model, engine: Engine) -> str:
    """Equal for models that differ in their weights only."""
    return f"{_architecture(model.model_dump_json(include=set(Model.model_fields)))} {engine.model_dump_json()}"


@lru_cache(maxsize=256)
def _architecture(model: str) -> str:
    from transformers import AutoConfig

    spec = Model.model_validate_json(model)
    config = AutoConfig.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
    ).to_dict()
    for name in COSMETIC:
        config.pop(name, None)
    tokenizer = load_tokenizer(spec, "model").backend_tokenizer.to_str()
    text = json.dumps(config, sort_keys=True, default=str) + tokenizer
    return hashlib.sha256(text.encode()).hexdigest()[:16]
