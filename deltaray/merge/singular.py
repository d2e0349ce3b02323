"""Merges of singular vectors across adapters. All of them see the updates only: they do not depend on LoRA's gauge.

They are exact in the joint frame, because every direction they make lies in it: that is the idea of Core Space
(arXiv 2509.17786), without which they would need the SVD of d x k matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaray.merge.factors import Factors, Joint, Svd, decompose, decompose_dense

COMMON = 0.8
"""Iso-CTS: the share of directions that come from the sum of the updates."""


def tsv(joint: Joint, rank: int | None = None) -> Factors:
    """TSV-Merge (Gargiulo et al., arXiv 2412.00081): each adapter's leading singular triples, decorrelated.

    Each of the n adapters gives its leading rank / n triples (`rank` is by default the largest of the adapters');
    their singular vectors, side by side, are replaced by the nearest orthonormal ones.
    """
    parts = [decompose(core) for core in joint.cores]
    share = max(1, (rank or max(part.rank for part in parts)) // len(parts))
    return _orthogonal([part.cut(share) for part in parts])


def iso_c(joint: Joint, rank: int | None = None) -> Factors:
    """Iso-C (Marczak et al., arXiv 2502.04959): the sum with all its singular values set to their mean.

    The mean is over the directions that the sum has; the paper's is over min(d, k) of a full fine-tuning.
    """
    part = decompose_dense(joint.total(), joint.scale)
    return _isotropic(part.cut(part.rank if rank is None else rank)).factors()


def iso_cts(joint: Joint, rank: int | None = None) -> Factors:
    """Iso-CTS (same paper): common directions from the sum, the rest from each adapter alone.

    Of R directions (`rank`; by default the sum's rank) 0.8 R are the sum's leading ones; each adapter adds its share
    of the rest, from what the common ones leave of it. Then all are made orthonormal, and their values equal.
    """
    whole = decompose_dense(joint.total(), joint.scale)
    size = whole.rank if rank is None else min(rank, whole.rank)
    each = (size - round(COMMON * size)) // len(joint.cores)
    common = whole.cut(size - each * len(joint.cores))
    rests = [decompose_dense(_without(core, common.left), joint.scale).cut(each) for core in joint.cores]
    return _orthogonal([common, *rests], isotropic=True)


def _without(core: Factors, left: Tensor) -> Tensor:
    return (core.left - left @ (left.T @ core.left)) @ core.right


def _orthogonal(parts: Sequence[Svd], isotropic: bool = False) -> Factors:
    """Singular triples side by side, with each side's vectors replaced by their polar factor."""
    left, right = (_polar(torch.cat([getattr(part, side) for part in parts], 1)) for side in ("left", "right"))
    joined = Svd(left, torch.cat([part.values for part in parts]), right)
    return (_isotropic(joined) if isotropic else joined).factors()


def _isotropic(part: Svd) -> Svd:
    return Svd(part.left, part.values.mean().expand_as(part.values) if part.rank else part.values, part.right)


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, [p, r]; of dependent columns the nearest partial isometry."""
    part = decompose_dense(matrix, 0.0)
    return part.left @ part.right.T
