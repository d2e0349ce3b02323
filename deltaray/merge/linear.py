"""Merges that are sums of the updates, exact and without the cross terms that averaging B and A apart would bring."""

from collections.abc import Sequence

import torch

from deltaray.merge.factors import Factors, Joint, decompose_dense


def total(joint: Joint) -> Factors:
    """Task arithmetic (Ilharco et al., arXiv 2212.04089): the sum of the updates, in the joint frame.

    Exact, at the rank that the sum has.
    """
    return decompose_dense(joint.total(), joint.scale).factors()


def mean(joint: Joint) -> Factors:
    """The plain mean of the updates, likewise."""
    return total(joint).times(1 / len(joint.cores))


def concatenate(updates: Sequence[Factors]) -> Factors:
    """The sum with the factors side by side as they are: PEFT's combination type `cat`, of rank sum(r_i)."""
    return Factors(torch.cat([update.left for update in updates], 1), torch.cat([update.right for update in updates]))
