"""The training stage, on the driver: all missing students in one worker group of Ray Train."""

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from deltaray.data.store import Store
from deltaray.failures import failure_of
from deltaray.imports import quick_imports
from deltaray.recipe.study import Study, TrainingRun
from deltaray.recipe.training import Training
from deltaray.runtime.placement_groups import release_groups
from deltaray.runtime.process_watchdog import guard
from deltaray.runtime.session import Capacity, beside_driver, cluster_capacity
from deltaray.runtime.threads import Job, as_room_allows
from deltaray.train.network import NodeNetwork

OnProgress = Callable[[str, int, int, dict[str, Any]], None]
"""(run, steps done, steps in all, the last step's metrics); a run starts with step 0 and no metrics."""

POLL_INTERVAL = 0.25
ORPHANED = 10.0
"""Seconds in which Ray knows that an actor is dead whose death was met."""
COLLECTIVE_TIMEOUT = 7200
"""Seconds that a worker waits for the others; rank 0 alone uploads a student meanwhile."""


def train(
    study: Study, store: Store, runs: list[TrainingRun], on_progress: OnProgress, say: Callable[[str], None]
) -> list[str]:
    """Trains the runs that are not trained yet and returns their names; progress comes on another thread.

    A retried worker group skips what is committed and goes on from the interrupted run's newest checkpoint.

    Raises:
        StageError: a run failed more often than it is retried, or its pairs and references do not fit together; what
            is committed stays.
    """
    missing = [run for run in runs if not store.trained(run.name)]
    training = study.recipe.training
    if not missing or training is None:
        return []
    progress = ray.remote(**beside_driver())(Progress).remote()
    name, capacity = f"train-{uuid.uuid4().hex[:8]}", cluster_capacity(study.recipe.cluster)
    groups = in_groups(missing, training.groups)
    fits: list[Job] = [
        partial(
            _fit,
            partial(_trainer, study, training, store, group, progress, f"{name}-{number}"),
            progress,
            group,
            training.max_failures,
        )
        for number, group in enumerate(groups)
    ]
    try:
        with _watched(progress, on_progress, say):
            # in threads: on the main one Ray Train would take Ctrl-C for itself and end the program with code 0
            as_room_allows(fits, [_needs(training, capacity)] * len(groups), capacity)
        refusal = ray.get(progress.refused.remote())
    finally:
        ray.kill(progress)
        for number in range(len(groups)):
            with suppress(OSError):  # worth nothing any more
                store.delete_folder(f"{Store.train_state}/{name}-{number}")
    if refusal is not None:
        raise refusal
    return [run.name for run in missing]


def in_groups(runs: list[TrainingRun], most: int) -> list[list[TrainingRun]]:
    """Shares the runs out to groups of workers; one that goes on from another stays in its group, behind it. Pure."""
    chains: list[list[TrainingRun]] = []
    for run in runs:
        chain = next((chain for chain in chains if run.after in [before.name for before in chain]), None)
        if chain is None:
            chains.append(chain := [])
        chain.append(run)
    groups: list[list[TrainingRun]] = [[] for _ in range(min(most, len(chains)))]
    for chain in sorted(chains, key=len, reverse=True):
        min(groups, key=len).extend(chain)
    return groups


def _needs(training: Training, capacity: Capacity) -> Capacity:
    """What one group takes."""
    gpus = capacity.gpus_per_worker(training.gpus_per_worker)
    return Capacity(training.workers * training.cpus_per_worker, training.workers * gpus)


def _fit(trainer: Callable[[], TorchTrainer], progress: Any, group: list[TrainingRun], repeats: int) -> None:
    """Ray Train repeats what fails in its workers, but neither its controller nor a start in which a worker dies."""
    for again in range(1, repeats + 2):
        release_groups(patience=ORPHANED if again > 1 else 0)
        try:
            trainer().fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            begun = ray.get(progress.started.remote())
            run = next((run.name for run in reversed(group) if run.name in begun), group[0].name)
            died = isinstance(getattr(error, "controller_failure", error), RayActorError)
            if not died or again > repeats:
                raise failure_of(f"training {run}", error) from error
            ray.get(progress.note.remote(run, f"an actor of Ray Train died; starting the workers again ({again})"))


def _trainer(
    study: Study, training: Training, store: Store, runs: list[TrainingRun], progress: Any, name: str
) -> TorchTrainer:
    capacity = cluster_capacity(study.recipe.cluster)
    gpus = capacity.gpus_per_worker(training.gpus_per_worker)
    resources = {"CPU": training.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    asked = training.generation
    folder, filesystem = store.place(Store.train_state)
    job = {
        "store": store,
        "training": training,
        "students": study.students,
        "runs": runs,
        "progress": progress,
        "scorer": study.scorers[asked.scorer] if asked and asked.scorer else None,
    }
    return TorchTrainer(
        _work,
        train_loop_config=job,
        torch_config=NodeNetwork(timeout_s=COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
            accelerator_type=training.accelerator,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            worker_runtime_env={"env_vars": _environment(gpus) | capacity.hidden_gpus(gpus)},
        ),
    )


def _work(job: dict[str, Any]) -> None:
    guard()
    with quick_imports():  # torch and DeepSpeed are imported in the workers only
        from deltaray.train.loop import train_runs
        from deltaray.train.run_session import Job

    train_runs(Job(**job))


def _environment(gpus: int) -> dict[str, str]:
    """Rows of every length come along; segments that grow keep what is free between them usable."""
    if gpus:
        allocation = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        return {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_ALLOC_CONF": allocation}
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- progress ---------------------------------------------------------------------------------------------------
class Progress:
    """An actor between the workers and the driver: what has happened since the driver last asked."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int, dict[str, Any]]] = []
        self.notes: list[str] = []
        self.begun: list[str] = []
        self.refusal: Exception | None = None

    def start(self, run: str) -> None:
        self.begun.append(run)

    def put(self, run: str, step: int, total: int, metrics: dict[str, Any]) -> None:
        self.events.append((run, step, total, metrics))

    def note(self, run: str, text: str) -> None:
        self.notes.append(f"{run}: {text}")

    def take(self) -> tuple[list[tuple[str, int, int, dict[str, Any]]], list[str]]:
        events, notes, self.events, self.notes = self.events, self.notes, [], []
        return events, notes

    def refuse(self, refusal: Exception) -> None:
        self.refusal = refusal

    def refused(self) -> Exception | None:
        return self.refusal

    def started(self) -> list[str]:
        return self.begun


@contextmanager
def _watched(progress: Any, on_progress: OnProgress, say: Callable[[str], None]) -> Iterator[None]:
    """Passes the actor's events on while the block runs, and the last ones after it."""
    over = threading.Event()

    def watch() -> None:
        while True:
            last = over.wait(POLL_INTERVAL)
            events, notes = ray.get(progress.take.remote())
            for event in events:
                on_progress(*event)
            for note in notes:
                say(note)
            if last:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
