"""TIES and DARE, which look at single numbers: on the weights themselves, or in a space that aligns the adapters.

On the weights the result has full rank. It is made block of rows by block of rows in float32 (one d x k matrix at a
time), then cut to the wished rank. In the spaces of KnOTS and Core Space nothing of that size exists.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from deltaray.merge.factors import VANISHING, Factors, Joint, Svd, decompose

ROWS = 1024
"""Rows of the weight matrix at a time."""
EXACT_SVD = 768
"""A smaller side of the weights up to this: their SVD is exact. Beyond: randomised (Halko et al., arXiv 0909.4061)."""
TIE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative to the magnitudes: sums below are zero."""
OVERSAMPLING, ITERATIONS = 16, 4

Inner = Literal["mean", "ties", "dare"]


@dataclass(frozen=True)
class Rule:
    """An elementwise merge of n tensors of one shape.

    density: the share of numbers that each adapter keeps. seed: of DARE, from it and an adapter's place its mask.
    """

    name: Inner
    density: float
    seed: int = 0

    def merge(self, values: Sequence[Tensor]) -> Tensor:
        """The merge of n tensors [a, b]."""
        return torch.cat(list(self.blocks([partial(_rows, value) for value in values])))

    def blocks(self, values: "Sequence[Rows]") -> Iterator[Tensor]:
        """The same by blocks of rows, from functions that give each adapter's blocks (TIES reads them twice)."""
        if self.name == "ties":
            floors = [_floor(torch.cat(list(rows())), self.density) for rows in values]
            for block in zip(*(rows() for rows in values), strict=True):
                yield elect_and_merge(torch.stack([_trim(*each) for each in zip(block, floors, strict=True)]))
            return
        dice = [torch.Generator().manual_seed(_seed(self.seed, place)) for place in range(len(values))]
        for block in zip(*(rows() for rows in values), strict=True):
            if self.name == "dare":
                block = tuple(_drop(value, self.density, die) for value, die in zip(block, dice, strict=True))
            yield torch.stack(block).mean(0)


Rows = Callable[[], Iterator[Tensor]]


def _rows(value: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(value), ROWS):
        yield value[start : start + ROWS]


def _dense_rows(update: Factors) -> Iterator[Tensor]:
    right = update.right.float()
    for left in _rows(update.left.float()):
        yield left @ right


def _seed(seed: int, place: int) -> int:
    return (seed * 1_000_003 + place) % 2**63


# --- the rules ------------------------------------------------------------------------------------------------
def _floor(value: Tensor, density: float) -> Tensor:
    """The magnitude that the share `density` of the numbers reaches."""
    magnitudes = value.abs_().flatten()
    kept = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - kept + 1).values


def _trim(value: Tensor, floor: Tensor) -> Tensor:
    return torch.where(value.abs() >= floor, value, 0)


def elect_and_merge(values: Tensor) -> Tensor:
    """TIES (Yadav et al., arXiv 2306.01708) after trimming: [n, …] to […].

    The sign of the sum wins; the mean is over those that have it. A sum that is only rounding has no sign.
    """
    total = values.sum(0)
    agree = (values * total > 0) & (total.abs() > TIE[values.dtype] * values.abs().sum(0))
    return (values * agree).sum(0) / agree.sum(0).clamp(min=1)


def _drop(value: Tensor, density: float, die: torch.Generator) -> Tensor:
    """DARE (Yu et al., arXiv 2311.03099): drops at random and scales the rest up; the mean stays."""
    return torch.where(torch.rand(value.shape, generator=die) < density, value / density, 0)


# --- where they are applied -----------------------------------------------------------------------------------
def on_weights(updates: Sequence[Factors], rule: Rule, rank: int) -> tuple[Factors, float]:
    """A rule on the weights themselves, then the nearest update of that rank; and the share of its energy kept."""
    blocks = rule.blocks([partial(_dense_rows, update) for update in updates])
    merged = torch.empty(updates[0].left.shape[0], updates[0].right.shape[1])
    for number, block in enumerate(blocks):
        merged[number * ROWS : number * ROWS + len(block)] = block
    part = _leading(merged, rank)
    energy = float(torch.linalg.vector_norm(merged)) ** 2
    return part.factors(), float(part.values.square().sum()) / energy if energy else 1.0


def _leading(matrix: Tensor, rank: int) -> Svd:
    """The leading singular triples of a dense matrix, in float64."""
    smaller = min(matrix.shape)
    if smaller <= EXACT_SVD or 2 * rank > smaller:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Svd(left, values, right.T).cut(rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, q=rank + OVERSAMPLING, niter=ITERATIONS)
    return Svd(left.double(), values.double(), right.double()).cut(rank)


def knots(joint: Joint, rule: Rule) -> Factors:
    """KnOTS (Stoica et al., arXiv 2410.19735): the rule on aligned right factors, under one left basis.

    [dW_1 | … | dW_n] = U S [V_1^T | … | V_n^T]; the rule merges the blocks S V_i^T, [rank, k].

    Returns:
        the update itself, [d, k], of rank at most sum(r_i).
    """
    parts = [decompose(core) for core in joint.cores]
    basis, values, _ = torch.linalg.svd(torch.cat([part.left * part.values for part in parts], 1), full_matrices=False)
    basis = basis[:, values > VANISHING * values[0]]
    blocks = [basis.T @ core.dense() @ joint.right.T for core in joint.cores]
    return Factors(joint.left @ basis, rule.merge(blocks))


def core_space(joint: Joint, rule: Rule) -> Factors:
    """Core Space (Panariello et al., arXiv 2509.17786): the rule on n r x n r cores, in the joint frame.

    The bases are the singular vectors of [B_1 | … | B_n] and of the stacked A_i as the adapters hold them, so with
    TIES or DARE the result depends on LoRA's gauge (B G, G^-1 A), unlike all else here.
    """
    left = torch.linalg.svd(torch.cat([core.left for core in joint.cores], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([core.right for core in joint.cores]).T, full_matrices=False)[0]
    merged = rule.merge([left.T @ core.dense() @ right for core in joint.cores])
    return Factors(left @ merged, right.T)
