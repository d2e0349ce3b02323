"""The losses, as pure functions of per-sequence log-probability sums: one implementation of each.

A loss of a global batch is `sum of per-pair losses / denominator`, and the denominator (pairs, or chosen tokens) is
known before any forward pass. That makes the mean exact however the batch is cut into workers and micro-batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of B pairs; log-probabilities in nats, all tensors of shape [B]."""

    logp: Tensor  # sum over response tokens, end token included
    tokens: Tensor  # response tokens summed over
    reference: Tensor  # the untouched student's sum; zeros where the loss needs none


@dataclass(frozen=True)
class PairLosses:
    """Per-pair values, shape [B]; rewards are None for losses that know no reference."""

    losses: Tensor
    rewards_chosen: Tensor | None = None
    rewards_rejected: Tensor | None = None


LossFunction = Callable[[Side, Side | None, float], PairLosses]


@dataclass(frozen=True)
class Loss:
    """A loss function with what the rest of the program must know about it."""

    function: LossFunction
    needs_reference: bool
    needs_rejected: bool
    per: Literal["pair", "token"]
    """What the batch's loss is a mean over: pairs, or the tokens of the chosen responses."""


def dpo_norm(chosen: Side, rejected: Side | None, beta: float) -> PairLosses:
    """Length-normalised DPO: log-ratios are means over response tokens.

    Delta Learning's training objective (arXiv 2507.06187, section 4; OLMo 3, arXiv 2512.13961, appendix A.6.2).
    TRL calls it `sigmoid_norm`.
    """
    assert rejected is not None
    ratio_chosen = (chosen.logp - chosen.reference) / chosen.tokens
    ratio_rejected = (rejected.logp - rejected.reference) / rejected.tokens
    return _bradley_terry(ratio_chosen, ratio_rejected, beta)


def dpo(chosen: Side, rejected: Side | None, beta: float) -> PairLosses:
    """DPO on summed log-ratios (Rafailov et al., arXiv 2305.18290, equation 7). TRL calls it `sigmoid`."""
    assert rejected is not None
    return _bradley_terry(chosen.logp - chosen.reference, rejected.logp - rejected.reference, beta)


def sft(chosen: Side, rejected: Side | None, beta: float) -> PairLosses:
    """Negative log-likelihood of the chosen response, nats summed over its tokens (`per` = token makes the mean)."""
    return PairLosses(-chosen.logp)


def _bradley_terry(ratio_chosen: Tensor, ratio_rejected: Tensor, beta: float) -> PairLosses:
    losses = -logsigmoid(beta * (ratio_chosen - ratio_rejected))
    return PairLosses(losses, beta * ratio_chosen.detach(), beta * ratio_rejected.detach())


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "dpo_norm": Loss(dpo_norm, needs_reference=True, needs_rejected=True, per="pair"),
        "dpo": Loss(dpo, needs_reference=True, needs_rejected=True, per="pair"),
        "sft": Loss(sft, needs_reference=False, needs_rejected=False, per="token"),
    }
)
"""By the name that a recipe gives in `training.runs.<name>.loss`."""


def split_sides(logp: Tensor, tokens: Tensor, reference: Tensor, both: bool) -> tuple[Side, Side | None]:
    """(chosen, rejected) of tensors that stack all chosen above all rejected rows; [2B] or, with chosen only, [B]."""
    if not both:
        return Side(logp, tokens, reference), None
    halves = [torch.chunk(tensor, 2) for tensor in (logp, tokens, reference)]
    return Side(*(half[0] for half in halves)), Side(*(half[1] for half in halves))
