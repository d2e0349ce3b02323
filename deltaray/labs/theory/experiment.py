"""The whole experiment: one setting simulated and compared with the closed form, then other dimensions and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deltaray.errors import UserError
from deltaray.labs.theory.closed_form import ROOT, Course, chance_of_rising, course_of, largest_step_size
from deltaray.labs.theory.setting import LEAST_DIMENSION, Floats, Setting, draw_vectors
from deltaray.labs.theory.simulate import simulate

OnProgress = Callable[[str, int, int], None]

BEST_WITHIN = 4
"""By default the last step lies at so many times the mass at which the cosine is best without noise."""
USUAL_MASS = 0.5
"""The last step's mass by default where the cosine has no best."""
DIMENSIONS = (1000, 100, 10, 1)
"""The dimension is divided by these."""
BATCHES = (1 / 16, 1 / 4, 1, 4)
"""The batch is multiplied by these."""


@dataclass(frozen=True)
class Asked:
    """A setting and how it is simulated."""

    setting: Setting
    draws: int = 50
    steps: int = 200
    step_size: float = 0.0
    """0: so that the best stopping point without noise lies at a quarter of the steps."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 2 or self.steps < 1:
            raise UserError(f"--draws {self.draws}, --steps {self.steps}: write at least 2 draws and 1 step")
        if not (self.step_size >= 0 and math.isfinite(self.step_size)):
            raise UserError(f"--step-size {self.step_size:g}: must be a positive number; 0 chooses one")

    def settled(self) -> Asked:
        """With the step size written out."""
        if self.step_size:
            return self
        best = float(course_of(self.setting).best_mass)
        last = BEST_WITHIN * best if 0 < best < math.inf else USUAL_MASS
        return replace(self, step_size=last * ROOT / self.steps)


def run_theory(asked: Asked, on_progress: OnProgress = lambda _what, _step, _steps: None) -> dict[str, Any]:
    """Simulates and compares; the record is what theory.json holds."""
    asked = asked.settled()
    main = compare(asked, lambda step, steps: on_progress("steps", step, steps))
    dimensions = sorted({max(asked.setting.dimension // part, LEAST_DIMENSION) for part in DIMENSIONS})
    batches = sorted({max(round(asked.setting.batch * part), 1) for part in BATCHES})
    by_dimension, by_batch = [], []
    for place, dimension in enumerate(dimensions, 1):
        by_dimension.append(of_dimension(replace(asked, setting=replace(asked.setting, dimension=dimension))))
        on_progress("dimensions", place, len(dimensions))
    for place, batch in enumerate(batches, 1):
        same = batch == asked.setting.batch
        other = replace(asked, setting=replace(asked.setting, batch=batch))
        by_batch.append({"batch": batch, **(main if same else compare(other))})
        on_progress("batches", place, len(batches))
    settings = asdict(asked.setting) | {"draws": asked.draws, "steps": asked.steps}
    return {
        "setting": settings | {"step_size": asked.step_size, "seed": asked.seed},
        "closed_form": closed_form(asked),
        **main,
        "by_dimension": by_dimension,
        "by_batch": by_batch,
    }


def closed_form(asked: Asked) -> dict[str, Any]:
    """The numbers of the setting with errors whose cosines are exactly those asked for."""
    quiet, noisy = course_of(asked.setting), course_of(asked.setting, None, asked.step_size)
    return {
        "gap": float(quiet.gap),
        "best": _best(noisy, asked.step_size),
        "best_without_noise": _best(quiet, asked.step_size),
        "limit_without_noise": float(quiet.limit),
        "largest_step_size": _finite(largest_step_size(asked.setting)),
        "chance_of_rising": chance_of_rising(asked.setting, asked.step_size),
    }


def _best(course: Course, step_size: float) -> dict[str, float | None]:
    """The best stopping point; null where the cosine never falls."""
    mass = float(course.best_mass)
    cosine = course.at(course.best_mass) if math.isfinite(mass) else course.limit
    return {"mass": _finite(mass), "step": _finite(mass * ROOT / step_size), "cosine": float(cosine)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(asked: Asked, on_progress: Callable[[int, int], None] = lambda _step, _steps: None) -> dict[str, Any]:
    """Simulated cosines beside those that the closed form gives for the very same vectors."""
    generator = np.random.default_rng(asked.seed)
    vectors = draw_vectors(asked.setting, asked.draws, generator)
    simulated = simulate(asked.setting, vectors, asked.step_size, asked.steps, generator, on_progress)
    mass: Floats = np.arange(asked.steps + 1, dtype=np.float64) * asked.step_size / ROOT
    predicted = courses(course_of(asked.setting, vectors, asked.step_size), mass)
    quiet = courses(course_of(asked.setting, vectors), mass)
    return {
        "curve": {
            "mass": mass.tolist(),
            "simulated": simulated.mean(axis=0).tolist(),
            "stderr": _stderr(simulated).tolist(),
            "low": np.quantile(simulated, 0.05, axis=0).tolist(),
            "high": np.quantile(simulated, 0.95, axis=0).tolist(),
            "closed_form": predicted.mean(axis=0).tolist(),
            "without_noise": quiet.mean(axis=0).tolist(),
        },
        "best": _best_of(simulated),
        "agreement": agreement(simulated, predicted),
    }


def courses(course: Course, mass: Floats) -> Floats:
    """The cosines of every draw at all masses: (draws, masses)."""
    columns = (np.asarray(field)[:, None] for field in (course.cosine, course.gap, course.slope, course.square))
    return Course(*columns).at(mass)


def agreement(simulated: Floats, predicted: Floats) -> dict[str, float]:
    """How far the simulated mean lies from the predicted one.

    Args:
        simulated, predicted: (draws, steps + 1), of the same vectors.
    Returns:
        The largest difference over all steps, the standard error of the mean over draws there, and the root mean
        square over steps of the differences in standard errors (about 1 if there is nothing but chance; the steps of
        a walk are correlated, so it scatters widely around that).
    """
    left = (simulated - predicted)[:, 1:]
    mean, error = left.mean(axis=0), _stderr(left)
    worst = int(np.argmax(np.abs(mean)))
    in_errors = mean / np.where(error > 0, error, np.inf)
    return {
        "largest_difference": float(np.abs(mean[worst])),
        "its_stderr": float(error[worst]),
        "rms_in_stderrs": float(np.sqrt(np.mean(in_errors**2))),
    }


def _stderr(values: Floats) -> Floats:
    return np.asarray(values.std(axis=0, ddof=1) / math.sqrt(len(values)))


def _best_of(simulated: Floats) -> dict[str, Any]:
    """Where the simulated mean is best, and between which steps the single draws are."""
    mean, own = simulated.mean(axis=0), simulated.argmax(axis=1)
    step = int(mean.argmax())
    return {
        "step": step,
        "cosine": float(mean[step]),
        "stderr": float(_stderr(simulated)[step]),
        "share_improved": float(np.mean(simulated[:, step] > simulated[:, 0])),
        "steps_of_draws": [int(value) for value in np.quantile(own, [0.05, 0.5, 0.95])],
    }


def of_dimension(asked: Asked) -> dict[str, Any]:
    """How many draws gain in one dimension: by the expected first step, and simulated up to the best stopping point."""
    generator = np.random.default_rng(asked.seed)
    vectors = draw_vectors(asked.setting, asked.draws, generator)
    noisy = course_of(asked.setting, None, asked.step_size)
    steps = min(max(round(float(noisy.best_mass) * ROOT / asked.step_size), 1), asked.steps)
    simulated = simulate(asked.setting, vectors, asked.step_size, steps, generator)
    gain = simulated[:, -1] - simulated[:, 0]
    return {
        "dimension": asked.setting.dimension,
        "steps": steps,
        "share_rising_at_first": float(course_of(asked.setting, vectors, asked.step_size).rises.mean()),
        "chance_of_rising": chance_of_rising(asked.setting, asked.step_size),
        "share_improved": float(np.mean(gain > 0)),
        "gain": float(gain.mean()),
        "gain_stderr": float(_stderr(gain)),
        "closed_form_gain": float(noisy.at(np.asarray(steps * asked.step_size / ROOT))) - asked.setting.student,
    }
