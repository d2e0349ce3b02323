"""From pairs to the sides that a loss compares: a worker's share of a forward pass, and the pass itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaray.train.examples import Examples
from deltaray.train.losses import Divisors, Loss, Side, divisors
from deltaray.train.micro_batches import plan_passes
from deltaray.train.packing import Inputs, Item, pack, pad


@dataclass(frozen=True)
class Pass:
    """One worker's share of a forward pass: B pairs."""

    places: list[int]
    weights: Tensor  # float32 [B]: 1, or 0 for a pair that only fills up
    inputs: Inputs


@dataclass(frozen=True)
class Cutter:
    """How one worker of several makes its passes, for one loss and model."""

    loss: Loss
    rank: int
    workers: int
    budget: int  # tokens of a pass
    packed: bool  # the model takes packed rows
    pad_id: int

    def passes(self, data: Examples, places: Sequence[int]) -> list[Pass]:
        """This worker's shares of the passes over some pairs; all workers get the same number."""
        costs = data.costs(places, self.loss.needs_rejected)
        plan = plan_passes(places, costs, self.workers, self.budget, not self.packed)
        return [self._pass(data, shares[self.rank]) for shares in plan]

    def _pass(self, data: Examples, share: list[tuple[int, float]]) -> Pass:
        places = [place for place, _ in share]
        items = [data.item(place, self.loss.needs_rejected) for place in places]
        return Pass(places, torch.tensor([weight for _, weight in share]), self.inputs(items))

    def inputs(self, items: Sequence[Item]) -> Inputs:
        return pack(items) if self.packed else pad(items, self.pad_id)

    def divisors(self, data: Examples, places: Sequence[int]) -> Divisors:
        """What the sums over a global batch are divided by."""
        chosen, rejected = (lengths[list(places)].tolist() for lengths in data.response_lengths)
        return divisors(self.loss, chosen, rejected if self.loss.needs_rejected else [])


def sides_of(module: nn.Module, data: Examples, share: Pass, device: torch.device | str) -> tuple[Side, Side | None]:
    """The forward pass: (chosen, rejected), or the chosen side alone where the items hold no other."""
    inputs = share.inputs.to(device)
    logp = module(**inputs.arguments()).view(len(share.places), -1)
    tokens = inputs.lengths.view(len(share.places), -1)
    sides = [
        Side(logp[:, side], tokens[:, side], torch.from_numpy(data.reference(side, share.places)).to(logp))
        for side in range(logp.shape[1])
    ]
    return sides[0], sides[1] if len(sides) > 1 else None
