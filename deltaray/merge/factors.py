"""The update of one weight matrix as two LoRA factors, and the updates of several adapters in one small frame.

Nothing here is ever of the size d x k of the weight matrix: n adapters of rank r cost two thin QRs, of [d, n r] and
[k, n r], after which every one of them is a matrix of at most [n r, n r]. All in float64, whatever the files hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Relative to the largest input: singular values below are rounding errors of float64."""
VANISHING = 1e-7
"""Relative to the update's largest: singular values below are beneath the resolution of float32 files."""


@dataclass(frozen=True)
class Factors:
    """An update `left @ right`: [d, r] @ [r, k]. Of a LoRA adapter B and A, with the scaling in B."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of `left`; the rank of the product may be lower."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The update itself, [d, k]."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm of the product, from the r x r Gram matrices."""
        gram = (self.left.T @ self.left) * (self.right @ self.right.T).T
        return float(gram.sum().clamp(min=0).sqrt())

    def times(self, factor: float) -> "Factors":
        return Factors(self.left * factor, self.right)

    def balanced(self) -> "Factors":
        """The same product from factors of equal Frobenius norm, which suits files of low precision."""
        left, right = self.left.norm(), self.right.norm()
        if left == 0 or right == 0:
            return Factors(torch.zeros_like(self.left), torch.zeros_like(self.right))
        balance = (right / left).sqrt()
        return Factors(self.left * balance, self.right / balance)


@dataclass(frozen=True)
class Svd:
    """left [d, rank], values [rank] (falling), right [k, rank] of an update left @ diag(values) @ right.T."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return len(self.values)

    def cut(self, rank: int) -> "Svd":
        """The leading `rank` directions: the nearest update of that rank (Eckart and Young)."""
        return Svd(self.left[:, :rank], self.values[:rank], self.right[:, :rank])

    def factors(self) -> Factors:
        return Factors(self.left * self.values, self.right.T)


def decompose(update: Factors) -> Svd:
    """Thin SVD by a QR of each factor; directions of vanishing singular values are left out."""
    left, lower = torch.linalg.qr(update.left)
    right, upper = torch.linalg.qr(update.right.T)
    small = decompose_dense(lower @ upper.T, 0.0)
    return Svd(left @ small.left, small.values, right @ small.right)


def decompose_dense(matrix: Tensor, scale: float) -> Svd:
    """SVD of a matrix without what vanishes: beside the largest value, or in the rounding of inputs of norm `scale`."""
    if 0 in matrix.shape:
        return Svd(matrix[:, :0], matrix.new_zeros(0), matrix.T[:, :0])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    floor = ROUNDING * scale if scale else VANISHING * values[0]
    return Svd(left, values, right.T).cut(int((values > floor).sum()))


@dataclass(frozen=True)
class Joint:
    """Updates of one weight matrix in a common orthonormal frame: update i is left @ cores[i].dense() @ right.T.

    left [d, p] spans all columns and right [k, q] all rows of the n updates, with p and q at most n r; cores[i] is
    [p, r_i] @ [r_i, q]. Norms, angles and singular values of cores are those of the updates.
    """

    left: Tensor
    right: Tensor
    cores: list[Factors]

    @classmethod
    def of(cls, updates: Sequence[Factors]) -> "Joint":
        ranks = [update.rank for update in updates]
        left, lower = torch.linalg.qr(torch.cat([update.left for update in updates], 1))
        right, upper = torch.linalg.qr(torch.cat([update.right for update in updates]).T)
        parts = zip(lower.split(ranks, 1), upper.split(ranks, 1), strict=True)
        return cls(left, right, [Factors(low, up.T) for low, up in parts])

    @property
    def scale(self) -> float:
        """The sum of the updates' norms: what rounding errors of their sums are measured by."""
        return sum(core.norm() for core in self.cores)

    def total(self) -> Tensor:
        """The sum of all cores, [p, q]."""
        return torch.cat([core.left for core in self.cores], 1) @ torch.cat([core.right for core in self.cores])

    def expand(self, core: Factors) -> Factors:
        """What a core stands for: [d, r] @ [r, k]."""
        return Factors(self.left @ core.left, core.right @ self.right.T)
