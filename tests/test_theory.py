"""The theory: the simulation against plain loops over whole inputs, the closed form against the simulation."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT as CHECKOUT
from scipy import optimize, stats

from deltaray import cli
from deltaray.errors import UserError
from deltaray.labs.theory.closed_form import ROOT, chance_of_rising, course_of, largest_step_size
from deltaray.labs.theory.experiment import Asked, compare, courses
from deltaray.labs.theory.setting import SPAN, Floats, Setting, Vectors, draw_vectors
from deltaray.labs.theory.simulate import batch_gradient, simulate

OVERLAPPING = Setting(12, 0.7, 0.6, 0.3, chosen_overlap=0.3, rejected_overlap=0.5, teacher_overlap=0.2, batch=16)


def vectors_of(setting: Setting, draws: int, seed: int = 0) -> Vectors:
    return draw_vectors(setting, draws, np.random.default_rng(seed))


def repeated(vectors: Vectors, times: int) -> Vectors:
    """The first draw's vectors as those of so many draws."""
    return Vectors(
        *(np.repeat(each[:1], times, axis=0) for each in (vectors.student, vectors.chosen, vectors.rejected))
    )


def walk_over_whole_inputs(vectors: Vectors, setting: Setting, step_size: float, steps: int, times: int) -> list[float]:
    """The first draw's student, `times` times, one input after another and every coordinate of it."""
    generator = np.random.default_rng(1)
    padding = [0.0] * (setting.dimension - SPAN)
    student, chosen, rejected = (
        np.array([*each[0], *padding]) for each in (vectors.student, vectors.chosen, vectors.rejected)
    )
    found = []
    for _ in range(times):
        theta = student.copy()
        for _ in range(steps):
            change = np.zeros(setting.dimension)
            for x in generator.standard_normal((setting.batch, setting.dimension)):
                change += (np.sign(chosen @ x) - np.sign(rejected @ x)) / 2 * x
            theta += step_size * change / setting.batch
        found.append(theta[0] / math.sqrt(theta @ theta))
    return found


def test_the_simulation_has_the_law_of_a_loop_over_whole_inputs() -> None:
    vectors, step_size, steps, times = vectors_of(OVERLAPPING, 1), 0.3, 6, 1000
    slow = walk_over_whole_inputs(vectors, OVERLAPPING, step_size, steps, times)
    many = repeated(vectors, 20_000)
    fast = simulate(OVERLAPPING, many, step_size, steps, np.random.default_rng(2))[:, -1]
    assert stats.ks_2samp(slow, fast).pvalue > 0.01
    other = simulate(OVERLAPPING, many, 1.1 * step_size, steps, np.random.default_rng(2))[:, -1]
    assert stats.ks_2samp(slow, other).pvalue < 0.01, "the test tells ten per cent more apart"


def test_the_update_is_the_gradient_of_the_preference_objective() -> None:
    setting = Setting(50, 0.7, 0.6, 0.3, batch=300)
    vectors = vectors_of(setting, 2)
    gradient, differing = batch_gradient(vectors, setting.batch, np.random.default_rng(3))
    inputs = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 300, SPAN), dtype=np.float32)).double()
    theta = torch.randn(2, SPAN, dtype=torch.float64, requires_grad=True)
    z = torch.einsum("nbd,nd->nb", inputs, theta)
    labels = [torch.sign(torch.einsum("nbd,nd->nb", inputs, torch.from_numpy(teacher))) for teacher in (
        vectors.chosen, vectors.rejected)]  # fmt: skip
    gain = torch.nn.functional.logsigmoid(labels[0] * z) - torch.nn.functional.logsigmoid(labels[1] * z)
    gain.mean(dim=1).sum().backward()  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    np.testing.assert_allclose(gradient, theta.grad.numpy(), atol=1e-6)
    np.testing.assert_array_equal(differing, (labels[0] != labels[1]).sum(dim=1).numpy())


def test_draws_have_the_cosines_that_were_asked_for() -> None:
    vectors = vectors_of(OVERLAPPING, 4000)
    for each, cosine in ((vectors.student, 0.7), (vectors.chosen, 0.6), (vectors.rejected, 0.3)):
        np.testing.assert_allclose(np.linalg.norm(each, axis=1), 1.0)
        np.testing.assert_allclose(each[:, 0], cosine)
    errors = [each[:, 1:] / np.linalg.norm(each[:, 1:], axis=1, keepdims=True) for each in (
        vectors.student, vectors.chosen, vectors.rejected)]  # fmt: skip
    for left, right, expected in ((0, 1, 0.3), (0, 2, 0.5), (1, 2, 0.2)):
        found = np.sum(errors[left] * errors[right], axis=1)
        bias = (1 - expected**2) * expected / 2 / 11  # of a sample cosine in 11 dimensions, to first order
        assert abs(found.mean() + bias - expected) < 4 * found.std() / math.sqrt(4000) + 1e-3


def test_equal_teachers_change_nothing() -> None:
    setting = Setting(1000, 0.8, 0.5, 0.5, teacher_overlap=1.0, batch=64)
    cosines = simulate(setting, vectors_of(setting, 5), 0.5, 10, np.random.default_rng(0))
    np.testing.assert_array_equal(cosines, cosines[:, :1] * np.ones(11))
    course = course_of(setting, None, 0.5)
    assert float(course.at(np.asarray(3.0))) == pytest.approx(0.8) and float(course.limit) == pytest.approx(0.8)


def test_swapped_teachers_mirror_the_update() -> None:
    vectors = vectors_of(OVERLAPPING, 7)
    swapped = Vectors(vectors.student, vectors.rejected, vectors.chosen)
    there, differing = batch_gradient(vectors, 100, np.random.default_rng(0))
    back, as_many = batch_gradient(swapped, 100, np.random.default_rng(0))
    np.testing.assert_array_equal(there, -back)
    np.testing.assert_array_equal(differing, as_many)
    forward, reverse = course_of(OVERLAPPING, vectors), course_of(OVERLAPPING, swapped)
    np.testing.assert_allclose(forward.at(np.asarray(-0.3)), reverse.at(np.asarray(0.3)))


@pytest.mark.parametrize("setting", [Setting(2000, 0.8, 0.6, 0.2, batch=1024), OVERLAPPING], ids=["far", "near"])
def test_the_closed_form_is_the_simulation_s_mean(setting: Setting) -> None:
    """Many dimensions, and few, where many small steps make the cosine concentrate instead."""
    draws, step_size, steps = (60, 0.02, 60) if setting.dimension > 100 else (4000, 0.02, 60)
    vectors = vectors_of(setting, draws)
    simulated = simulate(setting, vectors, step_size, steps, np.random.default_rng(4))
    mass: Floats = np.arange(steps + 1) * step_size / ROOT
    left = simulated - courses(course_of(setting, vectors, step_size), mass)
    error = left[:, 1:].std(axis=0, ddof=1) / math.sqrt(draws)
    assert np.all(np.abs(left[:, 1:].mean(axis=0)) < 4 * error)
    without = simulated - courses(course_of(setting, vectors), mass)
    assert abs(without[:, -1].mean()) > 4 * error[-1], "the noise of the batches is seen"


def test_the_cosine_rises_and_then_falls() -> None:
    found = compare(Asked(Setting(2000, 0.8, 0.6, 0.2), draws=20, steps=80).settled())
    curve, best = found["curve"], found["best"]
    assert 10 <= best["step"] <= 30 and best["share_improved"] == 1.0
    assert curve["simulated"][0] + 5 * best["stderr"] < best["cosine"]
    assert curve["simulated"][-1] < curve["simulated"][0] - 5 * curve["stderr"][-1]


@pytest.mark.parametrize("step_size", [0.0, 0.01])
@pytest.mark.parametrize("overlap", [0.0, 0.4])
def test_the_best_mass_is_where_an_optimizer_finds_it(overlap: float, step_size: float) -> None:
    course = course_of(Setting(500, 0.75, 0.55, 0.25, chosen_overlap=overlap / 2), None, step_size)
    found = optimize.minimize_scalar(lambda mass: -course.at(mass), bounds=(0, 5), method="bounded")
    assert float(course.best_mass) == pytest.approx(found.x, abs=1e-4) and float(course.rises)
    assert float(course.at(np.asarray(1e9))) == pytest.approx(float(course.limit), abs=1e-6)


def test_a_reversed_pair_never_gains_and_a_free_one_never_loses() -> None:
    assert float(course_of(Setting(500, 0.8, 0.3, 0.6)).best_mass) == 0
    aligned = Setting(500, 0.5, 0.9, -0.9, chosen_overlap=0, rejected_overlap=0, teacher_overlap=1.0)
    assert math.isinf(float(course_of(aligned).best_mass)) and float(course_of(aligned).limit) == pytest.approx(1.0)


def test_above_the_largest_step_size_nothing_is_gained() -> None:
    setting = Setting(5000, 0.8, 0.6, 0.2, batch=256)
    largest = largest_step_size(setting)
    below, above = (course_of(setting, None, factor * largest) for factor in (0.999, 1.001))
    assert bool(below.rises) and not bool(above.rises)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(20, 0.8, 0.6, 0.4),
        Setting(200, 0.8, 0.6, 0.55),
        Setting(300, 0.6, 0.5, 0.45, chosen_overlap=0.1, rejected_overlap=0.05, teacher_overlap=0.6),
    ],
    ids=["few", "independent", "overlapping"],
)
def test_the_chance_of_rising_is_the_share_of_draws(setting: Setting) -> None:
    draws = 20_000
    share = float(course_of(setting, vectors_of(setting, draws)).rises.mean())
    # asymptotic: its own error is of the order of one over the dimension
    assert abs(share - chance_of_rising(setting)) < 4 * math.sqrt(0.25 / draws) + 0.2 / setting.dimension


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chosen", "1.2"], "--chosen 1.2: a teacher's cosine"),
        (["--rejected", "nan"], "--rejected nan"),
        (["--student", "0"], "--student 0: a cosine to the truth that can rise lies between 0 and 1"),
        (["--dimension", "3"], "--dimension 3: must be at least 6"),
        (["--draws", "1"], "write at least 2 draws"),
        (["--step-size", "-1"], "--step-size -1: must be a positive number"),
        (
            ["--chosen-overlap", "0.9", "--rejected-overlap", "-0.9", "--teacher-overlap", "0.5"],
            "--teacher-overlap 0.5: no such vectors exist; errors with the cosines 0.9 and -0.9 to the student's have "
            "one between -1.000 and -0.620 to each other",
        ),
        (["--batch", "many"], "--batch"),
    ],
)
def test_impossible_settings_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["theory", *arguments, "--out", str(tmp_path / "out")])
    shown = capfd.readouterr()
    assert stop.value.code == 2 and message in shown.err and "Traceback" not in shown.err
    assert not shown.out and not (tmp_path / "out").exists()


def test_a_setting_made_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match="cosine"):
        Setting(100, 0.5, 1.0, 0.5)


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "theory"
    arguments = ["theory", "--dimension", "500", "--draws", "8", "--batch", "64", "--steps", "20", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--json"])
    shown = json.loads(capfd.readouterr().out)
    assert not stop.value.code and shown == json.loads((out / "theory.json").read_text())
    assert [row["batch"] for row in shown["by_batch"]] == [4, 16, 64, 256]
    assert [row["dimension"] for row in shown["by_dimension"]] == [6, 50, 500]
    page = (out / "theory.html").read_text()
    assert page.count('class="chart-card"') == 3 and "Plotly" in page
    with pytest.raises(SystemExit):
        cli.main(arguments)
    again = capfd.readouterr().out
    assert "largest difference of the two curves" in again and json.loads((out / "theory.json").read_text()) == shown


def test_the_commands_of_the_readme_are_understood(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    commands = [shlex.split(line.partition("#")[0]) for line in lines if line.startswith("deltaray theory")]
    small = ["--dimension", "100", "--draws", "2", "--batch", "8", "--steps", "3", "--out", str(tmp_path)]
    assert len(commands) == 2
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main([*command[1:], *small])
        assert not stop.value.code, capfd.readouterr().err
