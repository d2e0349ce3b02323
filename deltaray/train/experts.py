"""Mixtures of experts: where their experts are, and how far tuning has moved which tokens go to which.

Auxiliary losses of routers play no part in tuning: they are made of labels, which are never given, and no bias of a
router is updated by transformers. What tuning does to routing is measured (routing drift, arXiv 2609.00791).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def expert_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that hold experts together with their router, and experts that all tokens share."""
    return sorted({name.rpartition(".")[0] for name, _ in _experts(model)})


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with one tensor of all experts, or with a list of them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        several = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts" and len(module) > 1
        # ZeRO 3 leaves an empty shape. Three dimensions of which the middle one is 1 are a convolution's.
        shapes = [getattr(weight, "ds_shape", weight.shape) for weight in module.parameters(recurse=False)]
        if several or any(len(shape) == 3 and min(shape) > 1 for shape in shapes):
            yield name, module


class Routing:
    """Which experts a model sends the tokens of a few texts to."""

    def __init__(self, model: nn.Module) -> None:
        self.experts = [module for _, module in _experts(model)]

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """While open, fills the list with [tokens, k] sorted numbers of experts, layer after layer, on the CPU."""
        chosen: list[Tensor] = []

        def see(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [*arguments, *named.values()]
            numbers = (it for it in given if isinstance(it, Tensor) and not it.is_floating_point() and it.dim() == 2)
            chosen.extend(it.sort(dim=1).values.cpu() for it in list(numbers)[:1])

        handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in self.experts]
        try:
            yield chosen
        finally:
            for handle in handles:
                handle.remove()


def drift(before: list[Tensor], after: list[Tensor]) -> float | None:
    """The share of (token, layer) whose set of experts is another one; None where no choice was seen."""
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        return None
    return float(torch.stack([(old != new).any(dim=1).float().mean() for old, new in pairs]).mean())
