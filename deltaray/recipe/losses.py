"""What a recipe may ask of a loss, and what the program must know about each: no formulas here, and no torch.

The formulas are `deltaray/train/losses.py`. Planning, checking a recipe and the reference stage need only these facts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

LossName = Literal[
    "dpo_norm", "dpo", "robust", "ipo", "hinge", "simpo", "orpo", "cpo", "kto", "apo_zero", "apo_down", "sft"
]

SETTINGS = ("beta", "label_smoothing", "simpo_gamma", "nll_weight", "desirable_weight", "undesirable_weight")
"""The keys of `training.runs.<name>` that only a loss reads."""


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """How a loss is fed and divided."""

    defaults: Mapping[str, float]
    """The settings it reads, each with the value that holds where a recipe is silent."""
    score: Literal["sum", "mean"]
    """What it compares: log-probs summed over a response's tokens, or their mean."""
    needs_reference: bool = True
    """The score is a log-ratio to the untouched student; otherwise it is a plain log-prob."""
    needs_rejected: bool = True
    needs_kl: bool = False
    """It wants one number per global batch before any gradient: see `kl_estimate` in `train/losses.py`."""
    per: Literal["pair", "response", "token"] = "pair"
    """What the batch's loss is a mean over: pairs, responses (two a pair), or the tokens of the chosen responses."""


def _paired(beta: float, score: Literal["sum", "mean"], reference: bool = True, **more: float) -> LossFacts:
    defaults = MappingProxyType({"beta": beta, "nll_weight": 0.0} | more)
    return LossFacts(defaults=defaults, score=score, needs_reference=reference)


LOSS_FACTS: Mapping[str, LossFacts] = MappingProxyType(
    {
        "dpo_norm": _paired(5.0, "mean", label_smoothing=0.0),
        "dpo": _paired(0.1, "sum", label_smoothing=0.0),
        "robust": _paired(0.1, "sum", label_smoothing=0.1),
        "ipo": _paired(0.1, "mean"),
        "hinge": _paired(0.1, "sum"),
        "simpo": _paired(2.0, "mean", reference=False, label_smoothing=0.0, simpo_gamma=0.5),
        "orpo": _paired(0.1, "mean", reference=False, nll_weight=1.0),
        "cpo": _paired(0.1, "sum", reference=False, nll_weight=1.0, label_smoothing=0.0),
        "kto": LossFacts(
            defaults=MappingProxyType(
                {"beta": 0.1, "nll_weight": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}
            ),
            score="sum",
            needs_kl=True,
            per="response",
        ),
        "apo_zero": _paired(0.1, "sum"),
        "apo_down": _paired(0.1, "sum"),
        "sft": LossFacts(
            defaults=MappingProxyType({}), score="sum", needs_reference=False, needs_rejected=False, per="token"
        ),
    }
)


def readers(setting: str) -> list[str]:
    """The losses that read a setting."""
    return [name for name, facts in LOSS_FACTS.items() if setting in facts.defaults]
