"""The reference stage: the log-probability of every response under the untouched student, block by block."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import ray

from deltaray.data.store import Store
from deltaray.failures import failure_of
from deltaray.pair.token_ids import complete_tokens
from deltaray.recipe.losses import LOSS_FACTS
from deltaray.recipe.study import Study, TrainingRun
from deltaray.recipe.training import Training
from deltaray.runtime.process_watchdog import guarded
from deltaray.runtime.session import cluster_capacity
from deltaray.runtime.stream import quiet_ray_data
from deltaray.train.reference.blocks import Block, missing_blocks

RESPONSES_PER_WORKER = 8192
"""Below so many each, another worker costs more to start than it saves."""

OnProgress = Callable[[str, int, int], None]
"""(teacher, its responses done, its responses in all)."""


def references_needed(study: Study, runs: Iterable[TrainingRun]) -> dict[str, list[str]]:
    """The teachers whose responses each student has to judge, for the runs whose loss compares with a reference."""
    needed: dict[str, dict[str, None]] = {}
    for run in runs:
        if LOSS_FACTS[run.settings.loss].needs_reference:
            teachers = (name for pairing in run.pairings for name in study.pairings[pairing].names)
            needed.setdefault(run.student, {}).update(dict.fromkeys(teachers))
    return {student: list(teachers) for student, teachers in needed.items()}


def reference(study: Study, store: Store, student: str, teachers: list[str], on_progress: OnProgress) -> None:
    """Computes what is missing of `references/student=<student>/teacher=<each>/`, on the tokens that pairing has made.

    One pool of workers, each with the student loaded once, serves all teachers. A block is committed by the worker
    that computed it, under a name that says which it is: doing it twice changes nothing.

    Raises:
        UserError: our log-probs would not be the student's own.
        StageError: a block failed; what is committed stays.
    """
    work = [block for teacher in teachers for block in missing_blocks(store, student, teacher)]
    training = study.recipe.training
    if not work or training is None:
        return
    from deltaray.train.check import check_trainable

    check_trainable(study.students[student], "student")
    complete_tokens(study, store, [(student, teacher) for teacher in teachers])  # responses may have changed since
    totals = {teacher: store.count_rows(Store.responses(teacher)) for teacher in teachers}
    done = {teacher: totals[teacher] - sum(b.rows for b in work if b.teacher == teacher) for teacher in teachers}
    for block in _stream(study, training, store, student, work):
        done[block.teacher] += block.rows
        on_progress(block.teacher, done[block.teacher], totals[block.teacher])


def _stream(study: Study, training: Training, store: Store, student: str, work: list[Block]) -> Iterator[Block]:
    """Each block as it is committed."""
    from deltaray.train.reference.worker import ReferenceWorker

    quiet_ray_data()
    capacity = cluster_capacity(study.recipe.cluster)
    gpus = capacity.gpus_per_worker(training.gpus_per_worker)
    rows = [asdict(block) for block in work]
    kind: dict[str, Any] = {"accelerator_type": training.accelerator} if training.accelerator else {}
    if hidden := capacity.hidden_gpus(gpus):
        kind["runtime_env"] = {"env_vars": hidden}
    workers = min(training.workers, len(rows), math.ceil(sum(block.rows for block in work) / RESPONSES_PER_WORKER))
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        guarded(ReferenceWorker),
        fn_constructor_args=(store, student, study.students[student], training),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=training.cpus_per_worker,
        num_gpus=gpus or None,
        **kind,
    )
    stream.set_name(f"reference of {student}")
    try:
        for row in stream.iter_rows():
            yield Block(**row)
    except (ray.exceptions.RayError, ValueError) as error:
        raise failure_of(f"reference pass of {student}", error) from error
