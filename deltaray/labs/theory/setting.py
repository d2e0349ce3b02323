"""The setting: unit vectors with given cosines to the truth, in as many dimensions as asked for.

Truth, student and the two teachers span a space of four dimensions. Nothing depends on the others but through their
number, so vectors are coordinates in an orthonormal basis of that space whose first axis is the truth:

    student = cos_0 truth + sin_0 e_0,   chosen = cos_c truth + sin_c e_c,   rejected = cos_r truth + sin_r e_r

The errors e are directions orthogonal to the truth, drawn as normal vectors in dimension - 1 dimensions, correlated as
asked for. Uncorrelated ones are never quite orthogonal: their cosine is of the size dimension^-1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaray.errors import UserError

Floats = NDArray[np.float64]

SPAN = 4
"""Dimensions of the space that truth, student and teachers span."""
LEAST_DIMENSION = 6
"""Their span, and two dimensions more (see `simulate.Walk`)."""


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    dimension: int
    student: float
    """Cosine of the untouched student to the truth, in (0, 1)."""
    chosen: float
    rejected: float
    """Cosines of the teachers to the truth, in (-1, 1)."""
    chosen_overlap: float = 0.0
    rejected_overlap: float = 0.0
    """Cosines of the teachers' errors to the student's error, on average over draws."""
    teacher_overlap: float = 0.0
    """Cosine of the teachers' errors to each other, on average over draws."""
    batch: int = 4096
    """Inputs per step; each is labelled by both teachers."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def error_cosines(self) -> Floats:
        """(3, 3): cosines of the errors of student, chosen and rejected, on average over draws."""
        a, b, c = self.chosen_overlap, self.rejected_overlap, self.teacher_overlap
        return np.array([[1.0, a, b], [a, 1.0, c], [b, c, 1.0]])


def _check(setting: Setting) -> None:
    if setting.dimension < LEAST_DIMENSION:
        raise UserError(f"--dimension {setting.dimension}: must be at least {LEAST_DIMENSION}")
    if setting.batch < 1:
        raise UserError(f"--batch {setting.batch}: must be at least 1")
    if not 0 < setting.student < 1:
        raise UserError(f"--student {setting.student:g}: a cosine to the truth that can rise lies between 0 and 1")
    for name in ("chosen", "rejected"):
        if not -1 < (value := getattr(setting, name)) < 1:
            raise UserError(f"--{name} {value:g}: a teacher's cosine to the truth lies between -1 and 1")
    for name in ("chosen_overlap", "rejected_overlap", "teacher_overlap"):
        if not -1 <= (value := getattr(setting, name)) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: a cosine lies between -1 and 1")
    if np.linalg.eigvalsh(setting.error_cosines)[0] < -1e-9:
        least, most = _third_cosine(setting.chosen_overlap, setting.rejected_overlap)
        raise UserError(
            f"--teacher-overlap {setting.teacher_overlap:g}: no such vectors exist; errors with the cosines "
            f"{setting.chosen_overlap:g} and {setting.rejected_overlap:g} to the student's have one between "
            f"{least:.3f} and {most:.3f} to each other"
        )


def _third_cosine(first: float, second: float) -> tuple[float, float]:
    """The least and largest cosine of two directions whose cosines to a third are known."""
    room = float(np.sqrt((1 - first**2) * (1 - second**2)))
    return first * second - room, first * second + room


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of every draw in coordinates of their span, (draws, SPAN); the truth is (1, 0, 0, 0)."""

    student: Floats
    chosen: Floats
    rejected: Floats


def draw_vectors(setting: Setting, draws: int, generator: np.random.Generator) -> Vectors:
    """Students and teachers of `draws` worlds, each with errors of its own.

    The coordinates of three normal vectors in an orthonormal basis of their span are a triangular matrix of chi and
    normal variates (Bartlett's decomposition), whatever their dimension.
    """
    triangle = np.zeros((draws, 3, 3))
    for row in range(3):
        triangle[:, row, row] = np.sqrt(generator.chisquare(setting.dimension - 1 - row, draws))
        triangle[:, row, :row] = generator.standard_normal((draws, row))
    values, axes = np.linalg.eigh(setting.error_cosines)
    mixed = (axes * np.sqrt(np.clip(values, 0.0, None))) @ axes.T @ triangle
    errors = mixed / np.linalg.norm(mixed, axis=2, keepdims=True)
    cosines = (setting.student, setting.chosen, setting.rejected)
    return Vectors(*(_unit_vectors(cosine, errors[:, row]) for row, cosine in enumerate(cosines)))


def _unit_vectors(cosine: float, errors: Floats) -> Floats:
    along = np.full((len(errors), 1), cosine)
    return np.hstack([along, np.sqrt(1.0 - cosine**2) * errors])
