"""The reference stage: for every file of responses the file of their log-probabilities under the untouched student."""

import math
from collections.abc import Callable, Iterable, Iterator

import ray

from deltaray.errors import StageError, UserError
from deltaray.recipe.study import Study, TrainingRun
from deltaray.recipe.training import Training
from deltaray.runtime.session import Capacity, logs_of_ray
from deltaray.runtime.stream import quiet_ray_data
from deltaray.store import Store

RESPONSES_PER_WORKER = 8192
"""Below so many each, another worker costs more to start than it saves."""

OnProgress = Callable[[str, int, int], None]
"""(teacher, files of its responses done, files in all)."""


def references_needed(study: Study, runs: Iterable[TrainingRun]) -> dict[str, list[str]]:
    """The teachers whose responses each student has to judge, for the runs whose loss compares with a reference."""
    from deltaray.train.losses import LOSSES

    needed: dict[str, dict[str, None]] = {}
    for run in runs:
        if LOSSES[run.settings.loss].needs_reference:
            pairing = study.pairings[run.pairing]
            needed.setdefault(run.student, {}).update({pairing.chosen: None, pairing.rejected: None})
    return {student: list(teachers) for student, teachers in needed.items()}


def missing_files(store: Store, student: str, teacher: str) -> list[str]:
    """Names of the committed response files of a teacher that this student has not judged yet."""
    done = {path.rpartition("/")[2] for path in store.committed(Store.references(student, teacher))}
    names = [path.rpartition("/")[2] for path in store.committed(Store.responses(teacher))]
    return [name for name in names if name not in done]


def reference(study: Study, store: Store, student: str, teachers: list[str], on_progress: OnProgress) -> None:
    """Computes what is missing of `references/student=<student>/teacher=<each>/`.

    One pool of workers, each with the student loaded once, serves all teachers. A file is committed by the worker that
    computed it, under the name of the responses' file: doing it twice changes nothing.

    Raises:
        StageError: a file failed; what is committed stays.
    """
    work = [(teacher, name) for teacher in teachers for name in missing_files(store, student, teacher)]
    training = study.recipe.training
    if not work or training is None:
        return
    totals = {teacher: len(store.committed(Store.responses(teacher))) for teacher in teachers}
    done = {teacher: totals[teacher] - sum(item[0] == teacher for item in work) for teacher in teachers}
    for teacher in _stream(study, training, store, student, work):
        done[teacher] += 1
        on_progress(teacher, done[teacher], totals[teacher])


def _stream(study: Study, training: Training, store: Store, student: str, work: list[tuple[str, str]]) -> Iterator[str]:
    """The teacher of each file as it is committed."""
    from deltaray.reference.worker import ReferenceWorker

    quiet_ray_data()
    gpus = Capacity(0, ray.cluster_resources().get("GPU", 0)).gpus_per_worker(training.gpus_per_worker)
    rows = [{"teacher": teacher, "file": name} for teacher, name in work]
    responses = sum(store.count_rows(Store.responses(teacher)) for teacher in {teacher for teacher, _ in work})
    workers = min(training.workers, len(rows), math.ceil(responses / RESPONSES_PER_WORKER) or 1)
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ReferenceWorker,
        fn_constructor_args=(store, student, study.students[student], training),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=training.cpus_per_worker,
        num_gpus=gpus or None,
    )
    try:
        for row in stream.iter_rows():
            yield row["teacher"]
    except (ray.exceptions.RayError, ValueError) as error:
        raise _failure(error, student) from error


def _failure(error: BaseException, student: str) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    message = str(error).strip().splitlines()[-1]
    return StageError(
        f"reference pass of {student} failed: {message}\nlog: {logs_of_ray()}\nrun the same command to resume"
    )
