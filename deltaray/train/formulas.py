"""The losses' formulas, each written once, with its paper. How they are fed and divided: `losses.py`.

A formula sees scores: `LossFacts.score` and `.needs_reference` (`recipe/losses.py`) say whether they are log-probs or
log-ratios to the reference, sums or means over tokens. So `dpo`, `dpo_norm` and `cpo` are one formula. Names of TRL's
losses are those of TRL 1.16; tests/test_losses_trl.py compares with its code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from deltaray.recipe.losses import SETTINGS
from deltaray.recipe.training import Run


@dataclass(frozen=True)
class LossSettings:
    """The numbers of a loss; a loss reads those in its `defaults` and no other."""

    beta: float = 1.0
    """How far the student may move from the reference; the weight of the odds ratio in orpo."""
    label_smoothing: float = 0.0
    """The share of pairs that are thought to be labelled the wrong way round."""
    simpo_gamma: float = 0.0
    """By how much a chosen response's reward should exceed the rejected one's (SimPO's gamma)."""
    nll_weight: float = 0.0
    """Weight of the chosen responses' negative log-likelihood, a mean over all their tokens in the batch."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @classmethod
    def of(cls, run: Run) -> "LossSettings":
        """Those of a recipe's run, where the loss's defaults are written out already."""
        return cls(**{name: getattr(run, name) for name in SETTINGS if getattr(run, name) is not None})


@dataclass(frozen=True)
class Scores:
    """What a formula compares, shape [B], and which rows have the response at all."""

    chosen: Tensor
    rejected: Tensor
    has_chosen: Tensor
    has_rejected: Tensor
    kl: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


Formula = Callable[[Scores, LossSettings], Tensor]


def dpo(scores: Scores, settings: LossSettings) -> Tensor:
    """The logistic loss of the margin: `dpo`, `dpo_norm`, `cpo`.

    On summed log-ratios it is DPO (Rafailov et al., arXiv 2305.18290, equation 7; TRL's `sigmoid`). On means it is
    the length-normalised DPO of Delta Learning (arXiv 2507.06187, section 4; OLMo 3, arXiv 2512.13961, appendix A.6.2;
    TRL's `sigmoid_norm`). On summed log-probs, with an NLL term, it is CPO (Xu et al., arXiv 2401.08417, equation 3).

    `label_smoothing` makes it the conservative DPO of Mitchell's note (ericmitchell.ai/cdpo.pdf, equation 3).
    """
    return _smoothed(settings.beta * scores.margin, settings.label_smoothing)


def robust(scores: Scores, settings: LossSettings) -> Tensor:
    """DPO whose mean over label flips of probability `label_smoothing` is DPO on the true labels.

    rDPO's unbiased loss (Chowdhury, Kini and Natarajan, arXiv 2403.00409, section 3). TRL's `robust`.
    """
    flipped, margin = settings.label_smoothing, settings.beta * scores.margin
    return (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)


def ipo(scores: Scores, settings: LossSettings) -> Tensor:
    """Squared distance of the margin from 1 / (2 beta) (Azar et al., arXiv 2310.12036, equation 17).

    On means over tokens, as the paper's own experiments and TRL's `ipo` take it.
    """
    return (scores.margin - 1 / (2 * settings.beta)) ** 2


def hinge(scores: Scores, settings: LossSettings) -> Tensor:
    """Hinge loss of the margin: SLiC (Zhao et al., arXiv 2305.10425) in DPO's log-ratios. TRL's `hinge`.

    The form is that of RSO (Liu et al., arXiv 2309.06657, section 3: `hinge-norm`).
    """
    return relu(1 - settings.beta * scores.margin)


def simpo(scores: Scores, settings: LossSettings) -> Tensor:
    """Mean log-probs compared, with a target margin (Meng et al., arXiv 2405.14734, equation 6). No reference."""
    return _smoothed(settings.beta * scores.margin - settings.simpo_gamma, settings.label_smoothing)


def orpo(scores: Scores, settings: LossSettings) -> Tensor:
    """The odds-ratio term of ORPO (Hong et al., arXiv 2403.07691, equation 7), times beta, the paper's lambda.

    The NLL term (`nll_weight` 1) completes equation 6. It covers the response's tokens, as the paper has it; TRL's
    trainer adds those of the prompt. The odds are those of the tokens' geometric mean probability.
    """
    return -settings.beta * logsigmoid(_log_odds(scores.chosen) - _log_odds(scores.rejected))


def kto(scores: Scores, settings: LossSettings) -> Tensor:
    """Each response against the batch's KL, by itself (Ethayarajh et al., arXiv 2402.01306, equation 7 in TRL's count).

    A pair is one desirable and one undesirable example; a row without one of them adds nothing for it.
    """
    desirable = torch.sigmoid(settings.beta * (scores.kl - scores.chosen))
    undesirable = torch.sigmoid(settings.beta * (scores.rejected - scores.kl))
    good = settings.desirable_weight * desirable * scores.has_chosen
    return good + settings.undesirable_weight * undesirable * scores.has_rejected


def apo_zero(scores: Scores, settings: LossSettings) -> Tensor:
    """Raises the chosen, lowers the rejected: for responses better than the student's own.

    D'Oosterlinck et al., arXiv 2408.06266, equation 7.
    """
    return torch.sigmoid(-settings.beta * scores.chosen) + torch.sigmoid(settings.beta * scores.rejected)


def apo_down(scores: Scores, settings: LossSettings) -> Tensor:
    """Lowers both, the rejected more: for chosen responses worse than the student's own, as weak teachers' may be.

    D'Oosterlinck et al., arXiv 2408.06266, equation 8.
    """
    return torch.sigmoid(settings.beta * scores.chosen) + torch.sigmoid(-settings.beta * scores.margin)


def sft(scores: Scores, settings: LossSettings) -> Tensor:
    """Negative log-likelihood of the chosen response, nats summed over its tokens (`per` = token makes the mean)."""
    return -scores.chosen


def _smoothed(margin: Tensor, flipped: float) -> Tensor:
    losses = -logsigmoid(margin)
    return (1 - flipped) * losses - flipped * logsigmoid(-margin) if flipped else losses


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p. A probability that rounds to 1 counts as the largest below it: its odds are finite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "dpo_norm": dpo,
        "dpo": dpo,
        "robust": robust,
        "ipo": ipo,
        "hinge": hinge,
        "simpo": simpo,
        "orpo": orpo,
        "cpo": dpo,
        "kto": kto,
        "apo_zero": apo_zero,
        "apo_down": apo_down,
        "sft": sft,
    }
)
"""By the name that a recipe gives in `training.runs.<name>.loss`."""
