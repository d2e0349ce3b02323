"""The theory at full size: whole inputs of 20,000 coordinates against the simulation in their span, and its time.

    .venv/bin/python tests/benchmarks/theory.py

For each of 24 draws every coordinate of every input is drawn, labelled by both teachers and added up, in float32 and in
blocks; `simulate` does the same steps 400 times for the same vectors. Then `deltaray theory` runs with its defaults
(20,000 dimensions, 50 draws). Writes `results/theory.json`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from miniature_seeds import hardware, installed

from deltaray.labs.theory.closed_form import ROOT, Course, course_of
from deltaray.labs.theory.setting import SPAN, Setting, Vectors, draw_vectors
from deltaray.labs.theory.simulate import simulate

SETTING = Setting(20_000, 0.8, 0.6, 0.2, batch=2048)
DRAWS, STEPS, REPEATS, BLOCK = 24, 12, 400, 256
STEP_SIZE = 0.01
RESULT = Path(__file__).parent / "results" / "theory.json"


def whole_inputs(vectors: Vectors, draw: int, generator: np.random.Generator) -> float:
    """The last cosine of one draw's student, all coordinates followed."""
    room = np.zeros(SETTING.dimension - SPAN, dtype=np.float32)
    student, chosen, rejected = (
        np.concatenate([each[draw].astype(np.float32), room])
        for each in (vectors.student, vectors.chosen, vectors.rejected)
    )
    theta = student.astype(np.float64)
    for _ in range(STEPS):
        change = np.zeros_like(theta)
        for _ in range(SETTING.batch // BLOCK):
            inputs = generator.standard_normal((BLOCK, SETTING.dimension), dtype=np.float32)
            labels = (np.sign(inputs @ chosen) - np.sign(inputs @ rejected)) / 2
            change += labels @ inputs
        theta += STEP_SIZE * change / SETTING.batch
    return float(theta[0] / np.linalg.norm(theta))


def of_draw(vectors: Vectors, draw: int) -> Vectors:
    """One draw's vectors, `REPEATS` times."""
    one = (np.repeat(each[draw : draw + 1], REPEATS, axis=0) for each in vars(vectors).values())
    return Vectors(*one)


def compare() -> dict[str, Any]:
    """Per draw: the whole simulation's cosine, mean and deviation of the one in the span, the closed form."""
    vectors = draw_vectors(SETTING, DRAWS, np.random.default_rng(0))
    course = course_of(SETTING, vectors, STEP_SIZE)
    rows = []
    for draw in range(DRAWS):
        started = time.perf_counter()
        whole = whole_inputs(vectors, draw, np.random.default_rng([1, draw]))
        seconds = time.perf_counter() - started
        many = simulate(SETTING, of_draw(vectors, draw), STEP_SIZE, STEPS, np.random.default_rng([2, draw]))[:, -1]
        own = Course(*(np.asarray(each)[draw] for each in (course.cosine, course.gap, course.slope, course.square)))
        rows.append(
            {
                "whole_inputs": whole,
                "in_the_span": float(many.mean()),
                "deviation": float(many.std(ddof=1)),
                "closed_form": float(own.at(np.asarray(STEPS * STEP_SIZE / ROOT))),
                "deviations_apart": float((whole - many.mean()) / many.std(ddof=1)),
                "seconds_of_whole_inputs": round(seconds, 1),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    apart = [row["deviations_apart"] for row in rows]
    return {"draws": rows, "root_mean_square_apart": math.sqrt(sum(value**2 for value in apart) / DRAWS)}


def command_seconds() -> float:
    """Wall time of `deltaray theory`, start of Python and the page included."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "deltaray", "theory", "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return round(time.perf_counter() - started, 1)


def main() -> None:
    record = {
        "command": "python tests/benchmarks/theory.py",
        "hardware": hardware() | {"load_at_start": os.getloadavg()},
        "versions": {name: installed(name) for name in ("numpy", "scipy")},
        "seconds_of_deltaray_theory": command_seconds(),
        "setting": vars(SETTING) | {"steps": STEPS, "step_size": STEP_SIZE, "repeats": REPEATS},
        **compare(),
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
