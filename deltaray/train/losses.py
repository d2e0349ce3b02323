"""The losses: formulas (`formulas.py`) fed with per-sequence log-probability sums, and divided over a global batch.

A loss of a global batch is `sum of per-pair losses / divisor`, with the NLL term, where one is asked for, as a second
sum with a divisor of its own. Both divisors are known before any forward pass (`divisors`). That makes the means exact
however the batch is cut into workers and micro-batches; `contribution` is the part that some of its rows add.

For every loss `beta * score` is the reward that the metrics show, so a pair counts as accurate when its loss sees it
as ordered rightly. Those are the rewards that TRL logs, but for `dpo_norm` and `ipo`: TRL logs sums there although the
loss takes means; here they are the means, as in the code of the Delta Learning paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from deltaray.recipe.losses import LOSS_FACTS, LossFacts
from deltaray.train.formulas import FORMULAS, Formula, LossSettings, Scores


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of B pairs; log-probabilities in nats, all tensors of shape [B]."""

    logp: Tensor  # sum over response tokens, end token included
    tokens: Tensor  # response tokens summed over; 0 where an unpaired row (kto) has no such response
    reference: Tensor  # the untouched student's sum; zeros where the loss needs none


@dataclass(frozen=True)
class PairLosses:
    """Per-pair values, shape [B]; rewards are None for the side that a loss does not look at."""

    losses: Tensor
    nll: Tensor | None = None
    """The NLL term, `nll_weight` included, summed over the chosen response's tokens; None without such a term."""
    rewards_chosen: Tensor | None = None
    rewards_rejected: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Loss(LossFacts):
    """A formula with what the rest of the program must know about it. Call it on the sides of a micro-batch."""

    formula: Formula

    def __call__(
        self, chosen: Side, rejected: Side | None, settings: LossSettings, kl: Tensor | None = None
    ) -> PairLosses:
        """Per-pair losses, with gradients to `logp`.

        Args:
            rejected: None if the loss does not look at it, or (kto) if no row has one.
            kl: the batch's `kl_estimate`, for losses that need it.
        """
        if self.needs_kl and kl is None:
            raise ValueError("this loss needs the batch's KL estimate: pass `kl`")
        absent = torch.zeros_like(chosen.logp)
        scores = Scores(
            self._score(chosen),
            self._score(rejected) if rejected else absent,
            chosen.tokens > 0,
            rejected.tokens > 0 if rejected else absent.bool(),
            absent if kl is None else kl.detach(),
        )
        return PairLosses(
            self.formula(scores, settings),
            -settings.nll_weight * chosen.logp if settings.nll_weight else None,
            settings.beta * scores.chosen.detach() if self.needs_rejected else None,
            settings.beta * scores.rejected.detach() if self.needs_rejected else None,
        )

    def _score(self, side: Side) -> Tensor:
        total = side.logp - side.reference if self.needs_reference else side.logp
        return total / side.tokens.clamp(min=1) if self.score == "mean" else total


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {name: Loss(**vars(facts), formula=FORMULAS[name]) for name, facts in LOSS_FACTS.items()}
)
"""By the name that a recipe gives in `training.runs.<name>.loss`."""


# --- of a global batch ------------------------------------------------------------------------------------------
class Divisors(NamedTuple):
    """What the two sums of a global batch are divided by."""

    losses: int
    nll: int


def divisors(loss: Loss, chosen_tokens: Sequence[int], rejected_tokens: Sequence[int]) -> Divisors:
    """From the lengths of a global batch's responses (0: the row has none), before any forward pass."""
    responses = sum(count > 0 for count in (*chosen_tokens, *rejected_tokens))
    tokens = sum(chosen_tokens)
    counts = {"pair": len(chosen_tokens), "response": responses, "token": tokens}
    return Divisors(max(1, counts[loss.per]), max(1, tokens))


def contribution(values: PairLosses, weights: Tensor, divisors: Divisors) -> Tensor:
    """What these rows add to the loss of their global batch; `weights` is 0 for rows that only fill up."""
    total = (values.losses * weights).sum() / divisors.losses
    return total if values.nll is None else total + (values.nll * weights).sum() / divisors.nll


def kl_estimate(log_ratio_sum: Tensor, responses: int) -> Tensor:
    """kto's reference point: how far the student has moved, in nats per response; no gradient, never below 0.

    `log_ratio_sum` is the sum, over a global batch's responses, of student minus reference log-prob of mismatched
    conversations: each prompt with the response of another row (TRL: the row before, the last one's for the first).
    The mean is cut at 0, not its terms. Sums of workers add up before this is called.
    """
    return (log_ratio_sum.detach() / responses).clamp(min=0)
