"""The training loop, inside a worker of Ray Train: one worker group trains any number of students one after another."""

import os
from typing import Any

import ray
import torch
import torch.distributed as dist

from deltaray.data.tokens import load_tokenizer, turn_end
from deltaray.errors import StageError, UserError
from deltaray.recipe.study import TrainingRun
from deltaray.recipe.training import Training
from deltaray.train.engine import join_process_group
from deltaray.train.examples import Data, read_data
from deltaray.train.run_session import Job, RunSession


def train_runs(job: Job) -> None:
    """Trains every run that is not committed yet. Called on all workers at once.

    What trying again would not fix is told to the driver instead of raised.
    """
    if ray.get(job.progress.refused.remote()) is not None:  # by the worker group before this one
        return
    join_process_group()
    _share_cores(job.training)
    for run in _missing(job):
        refusal = _train(job, run)
        if refusal is not None:
            if dist.get_rank() == 0:
                ray.get(job.progress.refuse.remote(refusal))
            return


def _share_cores(training: Training) -> None:
    """Ray gives a worker one thread per reserved CPU; with offloading the optimizer's steps are made by all cores."""
    if training.offload != "none" and torch.cuda.is_available():
        beside = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))


def _missing(job: Job) -> list[TrainingRun]:
    """As rank 0 sees it: workers that looked for themselves could disagree, and then wait for each other for ever."""
    names = [[run.name for run in job.runs if not job.store.trained(run.name)]]
    dist.broadcast_object_list(names, src=0)
    return [run for run in job.runs if run.name in names[0]]


def _train(job: Job, run: TrainingRun) -> Exception | None:
    if dist.get_rank() == 0:
        job.progress.start.remote(run.name)
    tokenizer, data, refusal = _read(job, run)
    if refusal is not None or data is None:
        return refusal
    try:
        RunSession(job, run, tokenizer, data).run_to_the_end()
    except torch.cuda.OutOfMemoryError as error:
        refusal = StageError(_out_of_memory(run.name, job.training, error))
        ray.get(job.progress.refuse.remote(refusal))
        raise refusal from error  # the other workers wait for this one: the group has to end
    except (StageError, UserError) as error:
        return error
    return None


def _out_of_memory(name: str, training: Training, error: Exception) -> str:
    return (
        f"training {name}: a GPU is out of memory: {str(error).splitlines()[0]}\n"
        f"in `training:`, lower micro_batch_tokens (now {training.micro_batch_tokens}), set "
        f"gradient_checkpointing: true (now {str(training.gradient_checkpointing).lower()}), or move state to the "
        f"machine's memory with offload: optimizer or all (now {training.offload}), or to a disk with offload_folder; "
        f"more workers under zero_stage: 3 help, too"
    )


def _read(job: Job, run: TrainingRun) -> tuple[Any, Data | None, Exception | None]:
    """(tokenizer, data, what any worker refused): all workers agree, so that none waits for one that gave up."""
    student, tokenizer, data = job.students[run.student], None, None
    refusal: Exception | None = None
    try:
        tokenizer = load_tokenizer(student, "student")
        data = read_data(job.store, run, student, turn_end(tokenizer), job.training.heldout)
        if not len(data.train):
            refusal = StageError(
                f"{run.name}: no pairs to train on in {', '.join(run.pairings)}: {_what_became(data.counts)}"
            )
    except (UserError, StageError) as error:
        refusal = error
    refusals: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    return tokenizer, data, next((item for item in refusals if item is not None), None)


def _what_became(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in counts.items())
