"""Weaker selves of a model: the same weights with some layers left out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

LADDER: Mapping[str, tuple[int, ...]] = {"student": (), "less-1": (16,), "less-2": (12, 16)}
"""Member -> the layers of the thirty that it lacks."""


def without_layers(model: Any, left_out: Sequence[int]) -> Any:
    """A copy of a decoder of Llama's kind that lacks the layers of these indices; it shares the other weights.

    Raises:
        ValueError: the model has no such layer, or none would be left.
    """
    layers = model.model.layers
    if not set(left_out) < set(range(len(layers))):
        raise ValueError(f"of {len(layers)} layers {sorted(left_out)} cannot be left out")
    kept = [index for index in range(len(layers)) if index not in left_out]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    weaker = type(model)(config).to(model.dtype)
    state = model.state_dict()
    weaker.load_state_dict({name: state[_named_before(name, kept)] for name in weaker.state_dict()}, assign=True)
    weaker.tie_weights()
    weaker.generation_config = copy.deepcopy(model.generation_config)
    return weaker.eval()


def _named_before(name: str, kept: Sequence[int]) -> str:
    """What a tensor of the copy is called in the whole model."""
    start, dot, rest = name.partition(".layers.")
    if not dot:
        return name
    index, _, end = rest.partition(".")
    return f"{start}.layers.{kept[int(index)]}.{end}"
