"""From token ids to one packed row without padding, in which responses to one prompt share the prompt's tokens.

The prompt is computed once and each response attends to it and to itself: the tokens that go through the model are
prompt + chosen + rejected instead of 2 x prompt + chosen + rejected, padded. Pure but for moving tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaray.train.attention_layout import Layout

Ids = NDArray[np.int32]
Item = tuple[Ids, list[Ids]]
"""(prompt ids, the ids of each response to it)."""


@dataclass(frozen=True)
class Inputs:
    """What `ResponseLogProbs` gets for R responses with N tokens altogether; in the order of the items."""

    input_ids: Tensor  # int64 [1, T] packed, or [R, T] padded on the right
    predictors: Tensor  # int64 [N]: where the hidden state that predicts each response token stands, rows flattened
    targets: Tensor  # int64 [N]: the response tokens
    lengths: Tensor  # int64 [R]: response tokens, end token included
    position_ids: Tensor | None = None  # packed: int64 [1, T]
    layout: Layout | None = None  # packed: which tokens each token attends to
    attention_mask: Tensor | None = None  # padded: int64 [R, T]

    def to(self, device: torch.device | str) -> "Inputs":
        return replace(self, **{name: value.to(device) for name, value in self.arguments().items()})

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the forward pass."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.input_ids.numel()


def pack(items: Sequence[Item], shared: bool = True) -> Inputs:
    """All items in one row; with `shared`, the prompt of several responses is computed once."""
    segments = _Segments()
    for prompt, responses in items:
        if shared and len(responses) > 1:
            start = segments.add(prompt)
            for response in responses:
                segments.add(response, after=(start, len(prompt)))
        else:
            for response in responses:
                segments.add_response(prompt, response)
    return segments.inputs()


class _Segments:
    """Collects the row piece by piece: a segment's tokens attend to a prefix, if it has one, and to themselves."""

    def __init__(self) -> None:
        self.length = 0
        self.ids: list[Ids] = []
        self.positions: list[Ids] = []
        self.keys: list[Ids] = []
        self.queries: list[int] = []
        self.predictors: list[Ids] = []
        self.targets: list[Ids] = []

    def add(self, ids: Ids, after: tuple[int, int] | None = None) -> int:
        """Appends a prompt, or the response to the prompt of (start, length); returns where it starts."""
        start, prefix = self.length, _span(*after) if after else _span(0, 0)
        own = _span(start, len(ids))
        self.ids.append(ids)
        self.positions.append(_span(len(prefix), len(ids)))
        self.keys.append(np.concatenate([prefix, own]))
        self.queries.append(len(ids))
        self.length += len(ids)
        if after:
            self._predict(np.concatenate([prefix[-1:], own[:-1]]), ids)
        return start

    def add_response(self, prompt: Ids, response: Ids) -> None:
        """Appends a prompt and its only response as one segment."""
        start = self.add(np.concatenate([prompt, response]))
        self._predict(_span(start + len(prompt) - 1, len(response)), response)

    def _predict(self, predictors: Ids, targets: Ids) -> None:
        self.predictors.append(predictors)
        self.targets.append(targets)

    def inputs(self) -> Inputs:
        return Inputs(
            input_ids=_tensor(self.ids)[None],
            predictors=_tensor(self.predictors),
            targets=_tensor(self.targets),
            lengths=torch.tensor([len(ids) for ids in self.targets]),
            position_ids=_tensor(self.positions)[None],
            layout=Layout(self.queries, [len(keys) for keys in self.keys], _tensor(self.keys)),
        )


def pad(items: Sequence[Item], pad_id: int) -> Inputs:
    """One row per response, padded on the right: for models whose layers cannot be told what to attend to."""
    rows = [(prompt, response) for prompt, responses in items for response in responses]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = _tensor([prompt, response])
        attention_mask[row, :end] = 1
    starts = [row * width + len(prompt) - 1 for row, (prompt, _) in enumerate(rows)]
    return Inputs(
        input_ids=input_ids,
        predictors=_tensor([_span(at, len(response)) for at, (_, response) in zip(starts, rows, strict=True)]),
        targets=_tensor([response for _, response in rows]),
        lengths=torch.tensor([len(response) for _, response in rows]),
        attention_mask=attention_mask,
    )


def _span(start: int, length: int) -> Ids:
    return np.arange(start, start + length, dtype=np.int32)


def _tensor(parts: Sequence[Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
