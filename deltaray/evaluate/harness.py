"""Tasks of lm-evaluation-harness: every model's requests, their answers from the vLLM pools, and their scores.

Three passes, each over what the one before has left: tasks ask (`harness_tasks.ask`), engines answer (the pools of
generation), tasks score (`harness_tasks.score`). Every unit of answers and every (model, task) is committed by itself.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import REPLIES, REQUESTS
from deltaray.data.prompts.shards import read_rows
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.evaluate.samples import is_done
from deltaray.failures import reason_of
from deltaray.generate.answer import Work, answer, work_of
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import OnRows
from deltaray.generate.units import Assignment, Unit
from deltaray.recipe.evaluation import HarnessTask
from deltaray.recipe.models import Sampling, Teacher
from deltaray.recipe.recipe import Failures
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.runtime.stream import map_units


def harness_definition(study: Study, task: HarnessTask) -> dict[str, Any]:
    """What decides a task's value besides the model."""
    harness = study.recipe.evaluation and study.recipe.evaluation.harness
    assert harness
    return {
        **task.model_dump(mode="json"),
        "system": harness.system,
        "seed": harness.seed,
        "lm_eval": version("lm_eval"),
    }


def missing_benchmarks(study: Study, store: Store, models: dict[str, Teacher]) -> list[dict[str, Any]]:
    """One `harness_tasks.AskUnit` per (model, task) without results; a server gives no log-probs and is left out."""
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    units = [
        _unit(study, name, model, task, spec)
        for name, model in models.items()
        if model.endpoint is None
        for task, spec in evaluation.harness_tasks.items()
    ]
    return [unit for unit in units if not is_done(store, unit["model"], unit["task"], unit["identity"])]


def _unit(study: Study, name: str, model: Teacher, task: str, spec: HarnessTask) -> dict[str, Any]:
    evaluation = study.recipe.evaluation
    assert evaluation is not None and evaluation.harness is not None
    asked = model.model_copy(update={"sampling": Sampling()})
    identity = identity_digest(generation_identity(asked) | harness_definition(study, spec))
    include = [str(Path(folder).expanduser().absolute()) for folder in evaluation.harness.include]
    section = evaluation.harness.model_copy(update={"tasks": {}, "include": include})
    return {
        "model": name,
        "teacher": asked.model_dump_json(),
        "task": task,
        "spec": spec.model_dump(mode="json"),
        "harness": section.model_dump(mode="json"),
        "identity": identity,
        "folder": Store.harness(name, task, identity),
        "unit_size": study.recipe.unit_size,
    }


def run_benchmarks(
    store: Store, units: list[dict[str, Any]], capacity: Capacity, on_rows: OnRows, say: Callable[[str], None]
) -> None:
    """Completes the results of (model, task)s (of `missing_benchmarks`).

    Raises:
        UserError, StageError: tasks cannot ask or score, each with its reason; all others are done before.
    """
    from deltaray.evaluate import harness_tasks

    broken: list[str] = []
    asked = _done(broken, map_units(units, partial(_alone, harness_tasks.ask, store)))
    units = [unit for unit in units if (unit["model"], unit["task"]) in asked]
    works = [_work(store, unit, asked[unit["model"], unit["task"]]["samples"]) for unit in units]
    if not all(work.finished for work in works):
        # what an engine refuses makes its task fail, with the reason, once all the rest is answered
        answer(store, works, capacity, replies_table, REPLIES, Failures(max_share=1), on_rows, say, load=load_requests)
    _done(broken, map_units(units, partial(_alone, harness_tasks.score, store)))
    if broken:
        raise StageError("\n".join([*broken, "fix the cause and run the same command: it goes on with these tasks"]))


def _alone(work: Callable[[Store, dict[str, Any]], dict[str, Any]], store: Store, unit: dict[str, Any]) -> Any:
    """What a task of a model comes to, or why it comes to nothing; a mistake in the recipe ends them all."""
    told = {"model": unit["model"], "task": unit["task"]}
    try:
        return work(store, unit)
    except StageError as error:
        return {**told, "broken": str(error)}
    except BaseException as error:
        return {**told, "broken": f"{unit['model']} on {unit['task']}: {reason_of(error)}"}


def _done(broken: list[str], results: Iterator[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The results by model and task; what broke goes to `broken`."""
    found = {}
    for result in results:
        if "broken" in result:
            broken.append(result["broken"])
        else:
            found[result["model"], result["task"]] = result
    return found


def _work(store: Store, unit: dict[str, Any], samples: int) -> Work:
    teacher = Teacher.model_validate_json(unit["teacher"])
    return work_of(
        store,
        Assignment(
            name=f"{unit['model']} {unit['task']}",
            teacher=teacher.model_copy(update={"sampling": Sampling(samples=samples)}),
            prompts=f"{unit['folder']}/requests",
            destination=f"{unit['folder']}/replies",
            identity=unit["identity"],
            unit_size=unit["unit_size"],
        ),
    )


# --- in the tasks around an engine --------------------------------------------------------------------------------
def load_requests(store: Store, unit: Unit) -> Unit:
    """What `units.Unit` says that loading adds, of requests that are token ids already, and `scored` of each."""
    rows = read_rows(store, unit["prompts"], unit["rows"], REQUESTS.names).to_pylist()
    return {
        **unit,
        "prompt_ids": [row["prompt_id"] for row in rows],
        "messages": [[] for _ in rows],
        "tools": [None for _ in rows],
        "token_ids": [row["token_ids"] for row in rows],
        "refused": [None for _ in rows],
        "answers": [None for _ in rows],
        "scored": [row["scored"] for row in rows],
        "sampling": rows[0]["sampling"],
    }


def replies_table(unit: Unit) -> pa.Table:
    """The rows of an answered unit, samples innermost. Pure."""
    rows = [
        {"prompt_id": prompt_id, "sample": sample, **_reply(output, scored)}
        for prompt_id, scored, outputs in zip(unit["prompt_ids"], unit["scored"], unit["outputs"], strict=True)
        for sample, output in zip(unit["samples"], outputs, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=REPLIES)


def _reply(output: dict[str, Any], scored: int) -> dict[str, Any]:
    tokens = output.get("prompt_logprobs", [])[-scored:] if scored else []
    return {
        "text": output["text"],
        "logprob": sum(logprob for logprob, _ in tokens) if scored else None,
        "greedy": all(rank == 1 for _, rank in tokens) if scored else None,
        "finish_reason": output["finish_reason"],
        "error": output["error"],
    }
