"""Preference updates on batches of Gaussian inputs, exact in law at a cost that does not depend on the dimension.

The labels of an input depend on its SPAN coordinates in the space of truth, student and teachers alone: these are
drawn, labelled and summed. Its other coordinates are independent of them. In a step in which n inputs are labelled
differently the gradient's part outside the span is therefore normal with variance n / B^2 in each of dimension - SPAN
directions, whatever the labels; the cosine needs only the length of the sum of such parts, and that is drawn, too. No
approximation is made but float32 for inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaray.labs.theory.setting import SPAN, Floats, Setting, Vectors

BLOCK = 2**19
"""Inputs that are drawn at once, over all draws: 8 MiB."""

Progress = Callable[[int, int], None]


def simulate(
    setting: Setting,
    vectors: Vectors,
    step_size: float,
    steps: int,
    generator: np.random.Generator,
    on_progress: Progress = lambda _step, _steps: None,
) -> Floats:
    """Cosines of the student to the truth before training and after every step: (draws, steps + 1)."""
    walk = Walk(vectors.student.copy(), np.zeros(len(vectors.student)), setting.dimension - SPAN)
    cosines = [walk.cosines()]
    for step in range(steps):
        walk.move(step_size, setting.batch, *batch_gradient(vectors, setting.batch, generator), generator)
        cosines.append(walk.cosines())
        on_progress(step + 1, steps)
    return np.stack(cosines, axis=1)


def batch_gradient(vectors: Vectors, batch: int, generator: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """The gradient of one batch within the span, (draws, SPAN), and how many inputs the teachers label differently."""
    draws = len(vectors.student)
    teachers = np.stack([vectors.chosen, vectors.rejected], axis=2).astype(np.float32)
    total, differing = np.zeros((draws, SPAN)), np.zeros(draws, dtype=np.int64)
    block = max(1, BLOCK // draws)
    for start in range(0, batch, block):
        inputs = generator.standard_normal((draws, min(block, batch - start), SPAN), dtype=np.float32)
        positive = inputs @ teachers > 0
        labels = positive[..., 0].astype(np.float32) - positive[..., 1]  # (y_c - y_r) / 2
        total += (labels[:, None, :] @ inputs)[:, 0]
        differing += np.count_nonzero(labels, axis=1)
    return total / batch, differing


@dataclass
class Walk:
    """Where the students of all draws are: their part within the span, and the length of their part outside it."""

    within: Floats
    outside: Floats
    dimensions: int
    """Of the space outside the span, at least 2."""

    def move(
        self,
        step_size: float,
        batch: int,
        gradient: Floats,
        differing: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> None:
        """One step: along the gradient within the span, and a normal step outside it.

        The normal step's component along the part that is there is normal; what is across has a chi-squared length.
        """
        self.within += step_size * gradient
        size = step_size * np.sqrt(differing) / batch
        along = self.outside + size * generator.standard_normal(len(size))
        across = size**2 * generator.chisquare(self.dimensions - 1, len(size))
        self.outside = np.sqrt(along**2 + across)

    def cosines(self) -> Floats:
        """To the truth, (draws,)."""
        return self.within[:, 0] / np.sqrt(np.sum(self.within**2, axis=1) + self.outside**2)
