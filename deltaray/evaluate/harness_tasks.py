"""In a worker: one task of lm-evaluation-harness asks one model, and scores what it replied.

lm_eval is imported here and nowhere before; that takes seconds, and finding a task among its fifteen thousand as well.
"""

import os
import random
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager

from deltaray.data.contracts import REPLIES, REQUESTS
from deltaray.data.shapes import ASKED
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer
from deltaray.errors import StageError, UserError
from deltaray.evaluate.harness_limits import limited_scoring
from deltaray.evaluate.harness_model import HarnessModel, Reply
from deltaray.evaluate.samples import sample_rows, store_samples, task_summary
from deltaray.recipe.evaluation import Harness, HarnessTask
from deltaray.recipe.models import Teacher

AskUnit = dict[str, Any]
"""One (model, task): model (its name), teacher (a `Teacher` as JSON), task (its name here), spec (a resolved
`HarnessTask`), harness (the section), identity, folder, unit_size."""
BOOTSTRAPS = 1000
"""For the harness's own errors of metrics that are not means."""


@cache
def task_manager(include: tuple[str, ...], wanted: str) -> TaskManager:
    """An index of tasks that has `wanted`: of the given folders, and only where these lack it of the harness's own."""
    if include:
        own = TaskManager(include_path=list(include), include_defaults=False)
        if wanted in own.all_tasks:
            return own
    return _all_tasks(include)


@cache
def _all_tasks(include: tuple[str, ...]) -> TaskManager:
    return TaskManager(include_path=list(include) or None)


def ask(store: Store, unit: AskUnit) -> dict[str, Any]:
    """Writes what the task asks the model, unless that is there; the number of samples of each request comes last."""
    record = f"{unit['folder']}/requests.json"
    if not store.exists(record):
        spec, harness, teacher = _sections(unit)
        model = _model(unit, teacher, harness)
        for task in _load(spec, harness)["tasks"].values():
            _build(task, model, spec, harness, teacher)
            for instances in _by_type(task.instances).items():
                _note(model, *instances, unit)
        _write_requests(store, unit, list(model.requests.values()))
        truncated = sum(request["truncated"] for request in model.requests.values())
        store.write_json(record, {"samples": model.samples, "requests": len(model.requests), "truncated": truncated})
    return {"model": unit["model"], "task": unit["task"], **store.read_json(record, ASKED)}


def score(store: Store, unit: AskUnit) -> dict[str, Any]:
    """Scores the replies as the harness does and commits the sample log and, last, the results.

    Raises:
        StageError: the engine has not answered all requests; they are asked again by the next command.
    """
    spec, harness, teacher = _sections(unit)
    replies = _replies(store, unit)
    model = _model(unit, teacher, harness, replies)
    loaded = _load(spec, harness)
    with limited_scoring(loaded["tasks"].values()) as over:
        found = evaluate(
            model,
            loaded,
            limit=spec.limit,
            bootstrap_iters=BOOTSTRAPS,
            system_instruction=harness.system or teacher.system,
            apply_chat_template=bool(spec.chat),
            fewshot_as_multiturn=bool(spec.chat),
            confirm_run_unsafe_code=harness.unsafe_code,
        )
    rows, metric = sample_rows(unit["task"], found, spec)
    record = store.read_json(f"{unit['folder']}/requests.json", ASKED)
    summary = task_summary(rows, metric, found, replies.values(), record["truncated"]) | {"identity": unit["identity"]}
    if over:
        summary["answers"]["unscored"] = len(over)
        summary["answers"]["notes"] |= {"check took too much time or memory, counted as empty": len(over)}
    store_samples(store, unit["model"], unit["task"], rows, summary)
    store.delete(store.listing(unit["folder"], suffix=""))
    return {"model": unit["model"], "task": unit["task"]}


# --- the task ---------------------------------------------------------------------------------------------------
def _sections(unit: AskUnit) -> tuple[HarnessTask, Harness, Teacher]:
    return (
        HarnessTask.model_validate(unit["spec"]),
        Harness.model_validate(unit["harness"]),
        Teacher.model_validate_json(unit["teacher"]),
    )


def _model(
    unit: AskUnit, teacher: Teacher, harness: Harness, replies: Mapping[tuple[str, int], Reply] | None = None
) -> HarnessModel:
    tokenizer = load_tokenizer(teacher, unit["model"])
    return HarnessModel(tokenizer, _max_length(teacher, tokenizer), harness.seed, replies)


def _max_length(teacher: Teacher, tokenizer: Any) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
    )
    return teacher.engine.max_model_len or int(resolve_max_length(config, tokenizer))


def _load(spec: HarnessTask, harness: Harness) -> dict[str, Any]:
    """What a name stands for, `tasks` with the recipe's settings and `groups`; seeded as the harness does it."""
    if harness.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the same consent, in the words of the package that runs it
    random.seed(0)
    np.random.seed(harness.seed)
    loaded = dict(task_manager(tuple(harness.include), str(spec.task)).load([spec.task]))
    for task in loaded["tasks"].values():
        _configure(task, spec, harness.seed)
    return loaded


def _configure(task: Task, spec: HarnessTask, seed: int) -> None:
    """What the harness's own command line would set."""
    if spec.num_fewshot is not None:
        task.set_config("num_fewshot", spec.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    if spec.generation and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", spec.generation, update=True)
    if spec.samples is not None:
        task.set_config("repeats", spec.samples)
    task.set_fewshot_seed(seed=seed)


def _build(task: Task, model: HarnessModel, spec: HarnessTask, harness: Harness, teacher: Teacher) -> None:
    task.build_all_requests(
        limit=spec.limit,
        rank=0,
        world_size=1,
        system_instruction=harness.system or teacher.system,
        apply_chat_template=bool(spec.chat),
        fewshot_as_multiturn=bool(spec.chat),
        chat_template=model.apply_chat_template if spec.chat else None,
        tokenizer_name=model.tokenizer_name if spec.chat else "",
    )


def _by_type(instances: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for instance in instances:
        found.setdefault(instance.request_type, []).extend([instance] * instance.repeats)
    return found


def _note(model: HarnessModel, kind: str, instances: list[Any], unit: AskUnit) -> None:
    try:
        getattr(model, kind)(instances)
    except UserError as error:
        raise UserError(f"evaluation.harness.tasks.{unit['task']}: {unit['model']}: {error}") from None


# --- files ------------------------------------------------------------------------------------------------------
def _write_requests(store: Store, unit: AskUnit, requests: list[dict[str, Any]]) -> None:
    """One file per sampling setting, so that a unit has one."""
    for number, sampling in enumerate(sorted({request["sampling"] for request in requests})):
        rows = [request for request in requests if request["sampling"] == sampling]
        path = f"{unit['folder']}/requests/part-{number:05d}.parquet"
        store.write_table(path, pa.Table.from_pylist(rows, schema=REQUESTS), REQUESTS, row_group_size=unit["unit_size"])


def _replies(store: Store, unit: AskUnit) -> dict[tuple[str, int], Reply]:
    """All replies by request and sample."""
    folder = f"{unit['folder']}/replies"
    rows = store.read_tables(folder, REPLIES, REPLIES.names).to_pylist()
    failed = [row["error"] for row in rows if row["error"] is not None]
    if failed:
        store.delete(store.committed(folder))
        raise StageError(
            f"{unit['model']}: {len(failed):,} of {len(rows):,} requests of {unit['task']} were not answered; the "
            f"first reason: {failed[0]}; the same command asks them again"
        )
    return {(row["prompt_id"], row["sample"]): row for row in rows}
