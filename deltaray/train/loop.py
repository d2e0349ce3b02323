"""The training loop, inside a worker of Ray Train: one worker group trains any number of students one after another."""

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from deltaray.chat import load_tokenizer
from deltaray.contracts import METRICS
from deltaray.errors import StageError, UserError
from deltaray.recipe.models import Student
from deltaray.recipe.study import TrainingRun
from deltaray.recipe.training import Training
from deltaray.store import Store
from deltaray.train.batches import Example, batch_at, collate, denominator, pad_id_of, read_examples, slice_batch
from deltaray.train.engine import join_process_group, save_student, start_engine, stop_engine
from deltaray.train.losses import LOSSES, PairLosses, Side, split_sides
from deltaray.train.schedule import learning_rate, steps_per_epoch, total_steps

REPORT_INTERVAL = 0.2
"""Seconds between two progress messages of a run; metrics.jsonl has every step."""

Metrics = dict[str, float | int | None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    store: Store
    training: Training
    students: dict[str, Student]
    runs: list[TrainingRun]
    progress: Any  # handle of the `Progress` actor


def train_runs(job: Job) -> None:
    """Trains every run whose student is not committed yet. Called on all workers at once.

    Data that cannot be trained on is told to the driver instead of raised: trying again would not mend it.
    """
    join_process_group()
    for run in _missing(job):
        refusal = _train(job, run)
        if refusal is not None:
            if dist.get_rank() == 0:
                ray.get(job.progress.refuse.remote(refusal))
            return


def _missing(job: Job) -> list[TrainingRun]:
    """As rank 0 sees it: workers that looked for themselves could disagree, and then wait for each other for ever."""
    names = [[run.name for run in job.runs if not job.store.has_student(run.name)]]
    dist.broadcast_object_list(names, src=0)
    return [run for run in job.runs if run.name in names[0]]


def _train(job: Job, run: TrainingRun) -> Exception | None:
    if dist.get_rank() == 0:
        job.progress.start.remote(run.name)
    tokenizer, examples, refusal = _read(job, run)
    if refusal is not None:
        return refusal
    total = total_steps(len(examples), run.settings)
    report = _Reporter(job, run.name, total)
    trainer = Trainer(job.training, job.students[run.student], run, examples, pad_id_of(tokenizer))
    for step in range(total):
        report(trainer.step(step, total))
    report.commit()
    save_student(trainer.engine, tokenizer, job.store, run.name)
    stop_engine(trainer.engine)
    return None


def _read(job: Job, run: TrainingRun) -> tuple[Any, list[Example], Exception | None]:
    """(tokenizer, examples, what any worker refused): all workers agree, so that none waits for one that gave up."""
    student, tokenizer = job.students[run.student], None
    examples: list[Example] = []
    refusal: Exception | None = None
    try:
        tokenizer = load_tokenizer(student, "student")
        examples, dropped = read_examples(job.store, tokenizer, run, student.max_length)
        log.info("%s: %d pairs, %d dropped because their prompt leaves no room", run.name, len(examples), dropped)
        if not examples:
            refusal = StageError(f"{run.name}: no pairs to train on in {run.pairing} ({dropped} prompts are too long)")
    except (UserError, StageError) as error:
        refusal = error
    refusals: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    return tokenizer, examples, next((item for item in refusals if item is not None), None)


class Trainer:
    """One run's engine and data. Every method is a collective call."""

    def __init__(
        self,
        training: Training,
        student: Student,
        run: TrainingRun,
        examples: list[Example],
        pad_id: int,
        **overrides: Any,
    ) -> None:
        torch.manual_seed(run.settings.seed)
        self.micro_batch_size, self.pad_id = training.micro_batch_size, pad_id
        self.run, self.examples = run.settings, examples
        self.loss = LOSSES[run.settings.loss]
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.engine = start_engine(student, training, run.settings, **overrides)

    def step(self, step: int, total: int) -> Metrics:
        """One optimizer step (counted from 0); its metrics are those of the whole global batch on every rank."""
        started = time.monotonic()
        indices = batch_at(len(self.examples), self.run.batch_size, self.run.seed, step)
        batch = [self.examples[index] for index in indices]
        rate = learning_rate(self.run, step, total)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = self._accumulate(indices, denominator(self.loss, batch))
        self.engine.step()
        tokens, seconds = sum(row.tokens(self.loss.needs_rejected) for row in batch), time.monotonic() - started
        return {
            "step": step + 1,
            "epoch": (step + 1) / steps_per_epoch(len(self.examples), self.run),
            "learning_rate": rate,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "samples": len(batch),
            "loss": float(sums[0]) / denominator(self.loss, batch),
            **self._means(sums, len(batch)),
        }

    def _accumulate(self, indices: list[int], divisor: int) -> Tensor:
        """Forward and backward passes of one global batch; returns the sums of `_totals` over all workers."""
        lengths = [self.examples[index].length(self.loss.needs_rejected) for index in indices]
        slices = slice_batch(indices, lengths, self.workers, self.micro_batch_size)
        sums = torch.zeros(len(TOTALS), dtype=torch.float64, device=self.engine.device)
        for number, share in enumerate(slices):
            self.engine.set_gradient_accumulation_boundary(number == len(slices) - 1)
            sums += self._pass(share[self.rank], divisor)
        dist.all_reduce(sums)
        return sums.cpu()

    def _pass(self, share: list[tuple[int, float]], divisor: int) -> Tensor:
        rows = [self.examples[index] for index, _ in share]
        batch = collate(rows, [weight for _, weight in share], self.pad_id, self.loss.needs_rejected)
        batch = batch.to(self.engine.device)
        logp, tokens = self.engine(**batch.inputs)
        chosen, rejected = split_sides(logp, tokens, batch.reference, self.loss.needs_rejected)
        values = self.loss.function(chosen, rejected, self.run.beta)
        # DeepSpeed takes the mean of the workers' gradients; what is wanted is their sum.
        loss = (values.losses * batch.weights).sum() * (self.workers / divisor)
        self.engine.backward(loss, scale_wrt_gas=False)
        return _totals(values, chosen, rejected, batch.weights)

    def _means(self, sums: Tensor, pairs: int) -> Metrics:
        values = {name: float(total) / pairs for name, total in zip(TOTALS[1:], sums[1:], strict=True)}
        rejected, rewards = self.loss.needs_rejected, self.loss.needs_reference
        known = {"logps_chosen": True, "logps_rejected": rejected}
        return {name: value if known.get(name, rewards) else None for name, value in values.items()}


TOTALS = (
    "loss", "logps_chosen", "logps_rejected", "rewards_chosen", "rewards_rejected", "rewards_margin",
    "rewards_accuracy",
)  # fmt: skip
"""What is summed over pairs and workers in a step."""


@torch.no_grad()
def _totals(values: PairLosses, chosen: Side, rejected: Side | None, weights: Tensor) -> Tensor:
    """float64 [len(TOTALS)]; log-probabilities are each pair's mean over its response tokens."""
    none = torch.zeros_like(weights)
    good = values.rewards_chosen if values.rewards_chosen is not None else none
    bad = values.rewards_rejected if values.rewards_rejected is not None else none
    logp_rejected = rejected.logp / rejected.tokens if rejected else none
    columns = [values.losses, chosen.logp / chosen.tokens, logp_rejected, good, bad, good - bad, (good > bad).float()]
    return (torch.stack(columns).double() * weights).sum(dim=1)


class _Reporter:
    """Rank 0's metrics: live to the driver's actor, and as one file once the run is trained."""

    def __init__(self, job: Job, name: str, total: int) -> None:
        self.job, self.name, self.total = job, name, total
        self.lines: list[str] = []
        self.sent = 0.0
        self._send(0, {})

    def __call__(self, metrics: Metrics) -> None:
        self.lines.append(json.dumps({key: metrics[key] for key in (*METRICS, "samples")}))
        step = len(self.lines)
        if step == self.total or time.monotonic() - self.sent >= REPORT_INTERVAL:
            self._send(step, metrics)

    def _send(self, step: int, metrics: Metrics) -> None:
        if dist.get_rank() == 0:
            self.job.progress.put.remote(self.name, step, self.total, metrics)
            self.sent = time.monotonic()

    def commit(self) -> None:
        if dist.get_rank() == 0:
            path = f"{Store.training(self.name)}/metrics.jsonl"
            self.job.store.write_bytes(path, "".join(f"{line}\n" for line in self.lines).encode())
