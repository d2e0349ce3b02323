"""Chance in a model's forward pass, off while tuning: dropout, dropped layers, jitter before a router."""

from torch import nn

CHANCES = ("drop", "jitter")


def switch_noise_off(model: nn.Module) -> None:
    """Not by eval(): gradient checkpointing works in training mode only. The probe tells what this does not reach."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in CHANCES):
                vars(module)[name] = 0.0
