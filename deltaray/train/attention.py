"""Attention over a packed row, as an attention function of transformers.

A model can pack if it asks transformers' registry for its attention and has no layer through which one text hears of
another; `probe.py` finds that out.

On GPUs one variable-length FlashAttention call of PyTorch; elsewhere, and in float32, padded batches of segments of
similar size, where padding costs attention only and never a matrix product with weights.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from deltaray.train.attention_layout import Layout

PACKED = "deltaray_packed"
"""The name under which transformers finds it."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attends within the layout's segments.

    Args:
        query: [1, H, T, D]; key, value: [1, G, T, D], with G dividing H.

    Returns:
        [1, T, H, D], and no weights.

    Raises:
        ValueError: the layer asks for more than plain attention, or no layout came through to it.
    """
    if layout is None:
        raise ValueError("the model does not hand the layout to its attention layers")
    extra = sorted(name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None)
    if extra:
        raise ValueError(f"packed attention knows no {extra[0]}")
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    attend = _flash if flash else _grouped
    return attend(query, key, value, layout, scaling, sliding_window)[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """[T, H, D] from query [T, H, D] and key, value [T, G, D]; FlashAttention lets the last query see all keys."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = layout.bounds
    repeats = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped = {"enable_gqa": repeats > 1}
    elif repeats > 1:  # before torch 2.12
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    found: Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        key[layout.places],
        value[layout.places],
        queries,
        keys,
        max(layout.query_counts),
        max(layout.key_counts),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return found


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """The same with padded batches and masks."""
    heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    parts = []
    for group in layout.groups(window):
        count, longest, widest = group.size
        asked = query[group.queries].view(count, longest, heads, -1).transpose(1, 2)
        keys, values = (
            states[group.keys].view(count, widest, heads // repeats, -1).transpose(1, 2) for states in (key, value)
        )
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        found = nn.functional.scaled_dot_product_attention(asked, keys, values, attn_mask=group.mask, scale=scaling)
        parts.append(found.transpose(1, 2).flatten(0, 1)[group.used])
    return torch.cat(parts)[layout.order]


AttentionInterface.register(PACKED, packed_attention)
