"""One run's engine and data: optimizer steps and held-out measurements over global batches."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deltaray.recipe.models import Student
from deltaray.recipe.study import TrainingRun
from deltaray.recipe.training import Training
from deltaray.train.engine import start_engine
from deltaray.train.examples import Data, Examples
from deltaray.train.experts import Routing, drift
from deltaray.train.formulas import LossSettings
from deltaray.train.forward import Cutter, Pass, sides_of
from deltaray.train.losses import LOSSES, Divisors, PairLosses, Side, contribution, kl_estimate
from deltaray.train.micro_batches import batch_at, plan_passes
from deltaray.train.packing import Item
from deltaray.train.schedule import learning_rate, steps_per_epoch
from deltaray.train.student import is_packed

Metrics = dict[str, Any]

TOTALS = (
    "logps_chosen", "logps_rejected", "rewards_chosen", "rewards_rejected", "rewards_margin", "rewards_accuracy",
)  # fmt: skip
"""What is averaged over the pairs of a batch."""


ROUTED = 512
"""Tokens whose experts are compared."""


class Trainer:
    """Every method is a collective call."""

    def __init__(
        self, training: Training, student: Student, run: TrainingRun, data: Data, pad_id: int, start: str | None = None
    ) -> None:
        """`start`: the folder of a student or adapter to go on from."""
        self.run, self.data = run.settings, data
        self.loss, self.settings = LOSSES[run.settings.loss], LossSettings.of(run.settings)
        self.both = self.loss.needs_rejected
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        disk = training.offload_folder and Path(training.offload_folder) / f"{run.name}-rank{self.rank}"
        self.engine = start_engine(student, training, run.settings, start, disk or None)
        packed, budget = is_packed(self.engine.module), training.micro_batch_tokens
        self.cutter = Cutter(self.loss, self.rank, self.workers, budget, packed, pad_id)
        self.next_batch: tuple[int, Future[list[Pass]]] | None = None
        self.ahead = ThreadPoolExecutor(1)
        self.kl: Tensor | None = None
        self.mismatched = self._mismatched_references() if self.loss.needs_kl else None
        self.routing = Routing(self.engine.module.model)
        self.routed = self._routed()  # before the first step, and before a checkpoint is loaded

    # --- a step -------------------------------------------------------------------------------------------------
    def step(self, step: int, total: int) -> Metrics:
        """One optimizer step (counted from 0); its metrics are those of the whole global batch on every worker."""
        started = time.monotonic()
        places, passes = self._batch(step), self._passes_of(step, total)
        rate = learning_rate(self.run, step, total)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((self.run.seed, step, self.rank)))  # an adapter's dropout, the same after a resume
        if self.loss.needs_kl:
            self.kl = self._kl(places)
        loss, means = self._accumulate(passes, self.cutter.divisors(self.data.train, places), len(places))
        self.engine.step()
        tokens, seconds = self._tokens(places), time.monotonic() - started
        return {
            "step": step + 1,
            "epoch": (step + 1) / steps_per_epoch(len(self.data.train), self.run),
            "learning_rate": rate,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "samples": len(places),
            "loss": loss,
            **means,
        }

    def _batch(self, step: int) -> list[int]:
        return batch_at(len(self.data.train), self.run.batch_size, self.run.seed, step)

    def _passes_of(self, step: int, total: int) -> list[Pass]:
        """This step's passes, made while the step before ran; starts on those of the next step."""
        if self.next_batch and self.next_batch[0] == step:
            passes = self.next_batch[1].result()
        else:
            passes = self.cutter.passes(self.data.train, self._batch(step))
        if step + 1 < total:
            ahead = self.ahead.submit(lambda: self.cutter.passes(self.data.train, self._batch(step + 1)))
            self.next_batch = (step + 1, ahead)
        return passes

    def _accumulate(self, passes: list[Pass], divided_by: Divisors, pairs: int) -> tuple[float, Metrics]:
        """Forward and backward passes of one global batch: (its loss, its means)."""
        sums = torch.zeros(len(TOTALS) + 1, dtype=torch.float64, device=self.engine.device)
        for number, share in enumerate(passes):
            self.engine.set_gradient_accumulation_boundary(number == len(passes) - 1)
            loss, totals = self._loss(self.data.train, share, divided_by)
            # DeepSpeed takes the mean of the workers' gradients; what is wanted is their sum.
            self.engine.backward(loss * self.workers, scale_wrt_gas=False)
            sums += totals
        return self._gathered(sums, pairs)

    def _loss(self, data: Examples, share: Pass, divided_by: Divisors) -> tuple[Tensor, Tensor]:
        """(this share's part of the batch's loss, the sums behind the metrics)."""
        chosen, rejected = sides_of(self.engine, data, share, self.engine.device)
        values = self.loss(chosen, rejected, self.settings, self.kl)
        weights = share.weights.to(self.engine.device)
        loss = contribution(values, weights, divided_by)
        return loss, torch.cat([loss.detach().double()[None], _totals(values, chosen, rejected, weights)])

    def _gathered(self, sums: Tensor, pairs: int) -> tuple[float, Metrics]:
        dist.all_reduce(sums)
        loss, *totals = sums.tolist()
        means = {name: total / pairs if self.both else None for name, total in zip(TOTALS, totals, strict=True)}
        return loss, means | {"logps_chosen": totals[0] / pairs}

    # --- held-out pairs -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Loss, accuracy and margin on the held-out pairs."""
        data = self.data.heldout
        places = list(range(len(data)))
        sums = torch.zeros(len(TOTALS) + 1, dtype=torch.float64, device=self.engine.device)
        self.engine.eval()
        for share in self.cutter.passes(data, places):
            sums += self._loss(data, share, self.cutter.divisors(data, places))[1]
        self.engine.train()
        loss, means = self._gathered(sums, len(places))
        return {
            "heldout_loss": loss,
            "heldout_accuracy": means["rewards_accuracy"],
            "heldout_margin": means["rewards_margin"],
            **self.routing_drift(),
        }

    # --- experts --------------------------------------------------------------------------------------------------
    def routing_drift(self) -> Metrics:
        """How many routing decisions on a few held-out tokens are others than when the run started."""
        if not self.routed:
            return {}
        return {"routing_drift": drift(self.routed, self._routed())}

    @torch.no_grad()
    def _routed(self) -> list[Tensor]:
        """The experts of the first held-out (or training) tokens; the same ones on every worker."""
        data = self.data.heldout if len(self.data.heldout) else self.data.train
        if not self.routing.experts or not len(data):
            return []
        costs = np.cumsum(data.costs(range(min(len(data), ROUTED)), self.both))
        count = max(1, int((costs <= ROUTED).sum()))
        inputs = self.cutter.inputs([data.item(place, self.both) for place in range(count)]).to(self.engine.device)
        self.engine.eval()
        with self.routing.watched() as chosen:
            self.engine(**inputs.arguments())
        self.engine.train()
        return chosen

    # --- kto's reference point --------------------------------------------------------------------------------------
    def _mismatched(self, place: int) -> Item:
        """A prompt with the responses to the one before it, in the order of the keys."""
        train = self.data.train
        return train.room_for(train.item(place)[0], train.item(place - 1)[1])

    @torch.no_grad()
    def _mismatched_sums(self, places: Sequence[int]) -> Tensor:
        """float64 [places]: log-probs of both mismatched responses under the weights of now."""
        items = {place: self._mismatched(place) for place in places}
        costs = [len(prompt) + sum(map(len, responses)) for prompt, responses in items.values()]
        found = torch.zeros(len(places), dtype=torch.float64, device=self.engine.device)
        at = {place: number for number, place in enumerate(places)}
        for shares in plan_passes(list(places), costs, self.workers, self.cutter.budget, not self.cutter.packed):
            share = shares[self.rank]
            inputs = self.cutter.inputs([items[place] for place, _ in share]).to(self.engine.device)
            sums = self.engine(**inputs.arguments()).view(-1, 2).sum(dim=1).double()
            weights = torch.tensor([weight for _, weight in share], dtype=torch.float64, device=sums.device)
            found[[at[place] for place, _ in share]] += sums * weights
        dist.all_reduce(found)
        return found

    def _mismatched_references(self) -> Tensor:
        """Before the first step, and before a checkpoint is loaded, the student is its own reference."""
        return self._mismatched_sums(range(len(self.data.train)))

    def _kl(self, places: list[int]) -> Tensor:
        assert self.mismatched is not None
        moved = self._mismatched_sums(places) - self.mismatched[places]
        return kl_estimate(moved.sum(), 2 * len(places)).float()

    def _tokens(self, places: list[int]) -> int:
        """Tokens of the batch's conversations, each with its prompt."""
        again = int(self.data.train.prompt_lengths[places].sum()) if self.both else 0
        return sum(self.data.train.costs(places, self.both)) + again


@torch.no_grad()
def _totals(values: PairLosses, chosen: Side, rejected: Side | None, weights: Tensor) -> Tensor:
    """float64 [len(TOTALS)]: sums over pairs; log-probabilities are each pair's mean over its response tokens."""
    none = torch.zeros_like(weights)
    good = values.rewards_chosen if values.rewards_chosen is not None else none
    bad = values.rewards_rejected if values.rewards_rejected is not None else none
    logp_rejected = rejected.logp / rejected.tokens if rejected else none
    columns = [chosen.logp / chosen.tokens, logp_rejected, good, bad, good - bad, (good > bad).float()]
    return (torch.stack(columns).double() * weights).sum(dim=1)
