"""The recipe's `training.watch` section: when a run's metrics count as a sign of failure."""

from typing import Literal

from pydantic import Field

from deltaray.recipe.models import Section

SignatureName = Literal[
    "not_finite", "collapse", "stagnant_loss", "no_heldout_gain", "length_drift", "margin_without_accuracy"
]


class Watch(Section):
    """Thresholds of the failure signatures. Each is warned about once a run; a very large threshold (1e9) silences it.

    What is noisy from step to step is compared as means over `window` steps: the run's first (the start), its last.
    """

    stop_on: list[SignatureName] = ["not_finite"]
    """Signatures that stop a run. The others are only warned about."""
    window: int = Field(20, ge=1)
    collapse_nats: float = Field(0.2, gt=0)
    """`collapse`: log-probs per token of chosen and of rejected responses are both this much below the start."""
    stagnant_share: float = Field(0.01, ge=0)
    """`stagnant_loss`: over the second half of the steps done the loss is not below the start by this share of it …"""
    stagnant_errors: float = Field(2.0, ge=0)
    """… not even if so many standard errors of the two means hide a fall (batches differ most under sft) …"""
    stagnant_from: float = Field(0.5, ge=0, le=1)
    """… once this share of the run is done; before, warm-up keeps losses flat."""
    no_gain_evaluations: int = Field(4, ge=1)
    """`no_heldout_gain`: so many evaluations on held-out pairs in a row brought neither …"""
    no_gain_loss: float = Field(0.005, ge=0)
    """… a held-out loss below the best before them by this share of it …"""
    no_gain_accuracy: float = Field(0.005, ge=0)
    """… nor a held-out accuracy above the best before them by this much."""
    length_factor: float = Field(1.5, gt=1)
    """`length_drift`: answers generated during training are longer or shorter than the first by this factor."""
    margin_factor: float = Field(1.5, gt=1)
    """`margin_without_accuracy`: the reward margin grew by this factor since half as many steps were done …"""
    margin_accuracy: float = Field(0.01, ge=0)
    """… while reward accuracy rose by no more than this …"""
    margin_saturated: float = Field(0.95, gt=0, le=1)
    """… and is still below this: above it there is little left to rise."""
