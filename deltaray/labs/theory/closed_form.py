"""What the preference update does to the student's cosine, in closed form.

Inputs are x ~ N(0, I_d); a teacher u labels x with sign <u, x>. The objective log sigma(y_c z) - log sigma(y_r z), with
z = <theta, x>, is (y_c - y_r) z / 2 exactly, because log sigma(z) - log sigma(-z) = z: its gradient g does not depend
on theta. With v = chosen - rejected (unit vectors),

    E g = v / sqrt(2 pi),    E |g|^2 = d P,    P = arccos <chosen, rejected> / pi  (how often the labels differ).

After k steps of size eta on batches of B, at the mass s = k eta / sqrt(2 pi), for unit student and truth:

    E <theta, truth> = cos_0 + s D                        D = <v, truth>, the gap of the teachers' cosines
    E |theta|^2      = 1 + s (2 p + q) + s^2 w            p = <v, student>,  w = |v|^2
    q = eta sqrt(2 pi) (d P - w / (2 pi)) / B             what the noise of the batches adds

The cosine is taken as the ratio of the first to the root of the second, which both concentrate as d grows. It rises at
first if and only if D > cos_0 (p + q / 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from deltaray.labs.theory.setting import Floats, Setting, Vectors

Booleans = NDArray[np.bool_]

ROOT = math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Course:
    """The cosine as a function of the mass s: (cosine + s gap) / sqrt(1 + s slope + s^2 square).

    Every field is a number, or an array with one entry per draw.
    """

    cosine: Floats
    gap: Floats
    slope: Floats
    square: Floats

    def at(self, mass: Floats) -> Floats:
        """Cosines at masses; arrays broadcast."""
        return (self.cosine + mass * self.gap) / np.sqrt(1.0 + mass * self.slope + mass**2 * self.square)

    @property
    def _first(self) -> Floats:
        """The derivative at s = 0."""
        return self.gap - self.cosine * self.slope / 2

    @property
    def rises(self) -> Booleans:
        """Whether the first step, in expectation, raises the cosine."""
        return np.asarray(self._first > 0)

    @property
    def best_mass(self) -> Floats:
        """Where the cosine is largest: 0 if it falls at first, infinite if it never falls."""
        bend = self.cosine * self.square - self.gap * self.slope / 2
        rising = np.where(bend > 0, self._first / np.where(bend > 0, bend, 1.0), np.inf)
        return np.where(self.rises, rising, 0.0)

    @property
    def limit(self) -> Floats:
        """The cosine after endless training; with two equal teachers that of the start."""
        still = self.square < 1e-12
        return np.where(still, self.cosine, self.gap / np.sqrt(np.where(still, 1.0, self.square)))


def course_of(setting: Setting, vectors: Vectors | None = None, step_size: float = 0.0) -> Course:
    """The course of every draw, or with no vectors that of errors whose cosines are exactly those asked for.

    Args:
        step_size: eta; 0: without the noise of the batches.
    """
    v_truth, v_student, square, between = _products(setting) if vectors is None else _products_of(vectors)
    differ = np.arccos(np.clip(between, -1.0, 1.0)) / math.pi
    noise = step_size * ROOT * (setting.dimension * differ - square / ROOT**2) / setting.batch
    return Course(np.full_like(square, setting.student), v_truth, 2 * v_student + noise, square)


def _products(setting: Setting) -> tuple[Floats, ...]:
    """<v, truth>, <v, student>, |v|^2 and <chosen, rejected>."""
    cosines = np.array([setting.student, setting.chosen, setting.rejected])
    sines = np.sqrt(1.0 - cosines**2)
    products = np.outer(cosines, cosines) + np.outer(sines, sines) * setting.error_cosines
    between = products[1, 2]
    return cosines[1] - cosines[2], products[0, 1] - products[0, 2], 2 - 2 * between, between


def _products_of(vectors: Vectors) -> tuple[Floats, ...]:
    """The same of every draw: arrays (draws,)."""
    difference = vectors.chosen - vectors.rejected
    along_student = np.sum(difference * vectors.student, axis=1)
    between = np.sum(vectors.chosen * vectors.rejected, axis=1)
    return difference[:, 0], along_student, np.sum(difference**2, axis=1), between


def largest_step_size(setting: Setting) -> float:
    """The step size above which the noise of the batches eats up what the first step gains; 0 if nothing is gained."""
    quiet, noisy = (course_of(setting, None, size) for size in (0.0, 1.0))
    gained = float(quiet.gap - quiet.cosine * quiet.slope / 2)
    lost = float(noisy.slope - quiet.slope) * setting.student / 2
    return math.inf if lost <= 0 else max(gained, 0.0) / lost


def chance_of_rising(setting: Setting, step_size: float = 0.0) -> float:
    """The share of draws in which the first step raises the cosine, for large dimensions.

    <v, student> scatters with the sample cosines of the errors, which are asymptotically normal with the covariances
    of sample correlations (Olkin and Siotani 1976).
    """
    course = course_of(setting, None, step_size)
    spread = setting.student * math.sqrt(1 - setting.student**2) * _overlap_deviation(setting)
    margin = float(course.gap - course.cosine * course.slope / 2)
    if spread == 0:
        return float(margin > 0)
    return NormalDist().cdf(margin / spread)


def _overlap_deviation(setting: Setting) -> float:
    """Standard deviation of sin_c <e_c, e_0> - sin_r <e_r, e_0>."""
    a, b, c = setting.chosen_overlap, setting.rejected_overlap, setting.teacher_overlap
    chosen, rejected = math.sqrt(1 - setting.chosen**2), math.sqrt(1 - setting.rejected**2)
    covariance = c * (1 - a**2 - b**2) - a * b * (1 - a**2 - b**2 - c**2) / 2
    variance = (chosen * (1 - a**2)) ** 2 + (rejected * (1 - b**2)) ** 2 - 2 * chosen * rejected * covariance
    return math.sqrt(max(variance, 0.0) / (setting.dimension - 1))
