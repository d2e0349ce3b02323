"""Failure signatures on made histories: each threshold from both sides, when they show, and that they show once."""

import math
import time

import pytest

from deltaray.recipe.training import Training
from deltaray.recipe.watch import Watch
from deltaray.train.health_checks import DETECTORS, Watcher

STEPS = 200
WATCH = Watch(window=10)


def healthy(step, steps=STEPS):
    """A run that goes well: its loss falls, its accuracy rises with its margin."""
    done = step / steps
    return {
        "step": step, "loss": 0.69 - 0.2 * done, "grad_norm": 1.0, "logps_chosen": -1.0 + 0.05 * done,
        "logps_rejected": -1.0 - 0.3 * done, "rewards_margin": done, "rewards_accuracy": 0.5 + 0.3 * done,
    }  # fmt: skip


def history(steps=STEPS, **courses):
    """A healthy run with other courses: functions of the share that is done."""
    return [
        healthy(step, steps) | {key: course(step / steps) for key, course in courses.items()}
        for step in range(1, steps + 1)
    ]


def signatures(lines, watch, total=None):
    """All that a watcher sees in the lines; `total`: steps of the run, if it is not over."""
    steps = sum(line.get("loss") is not None for line in lines)
    watcher = Watcher(watch, steps if total is None else total)
    return [signature for line in lines for signature in watcher.see(line)]


def names(lines, watch=WATCH, total=None):
    return [signature.name for signature in signatures(lines, watch, total)]


def evaluated(losses, accuracies=None, key="heldout_loss"):
    """A healthy run with an evaluation every ten steps."""
    lines = history()
    for number, loss in enumerate(losses):
        lines[10 * number] |= {key: loss}
        if accuracies is not None:
            lines[10 * number] |= {"heldout_accuracy": accuracies[number], "heldout_margin": 0.1}
    return lines


def test_a_healthy_run_shows_nothing():
    assert signatures(history(), WATCH) == []
    assert signatures(history(), Watch()) == []
    assert signatures([], WATCH) == []


# --- not finite -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["loss", "grad_norm", "heldout_loss"])
def test_not_finite_shows_at_the_step_where_it_happens(key, value):
    lines = history()
    lines[6] |= {key: value}
    (found,) = signatures(lines, WATCH)
    assert (found.name, found.step) == ("not_finite", 7)
    assert key in found.message and "learning_rate" in found.message


def test_a_run_that_stays_at_nan_is_told_once():
    assert names(history(loss=lambda done: math.nan, rewards_margin=lambda done: math.nan)) == ["not_finite"]


# --- collapse -------------------------------------------------------------------------------------------------
def falling(nats):
    """Means of the first and last of 20 windows then differ by `nats`."""
    return lambda done: -1.0 - nats * done * 20 / 19


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [(0.21, 0.21, ["collapse"]), (0.19, 0.5, []), (0.5, 0.19, []), (0.19, 0.19, []), (-0.5, 0.5, [])],
)
def test_collapse_is_both_falling(chosen, rejected, expected):
    lines = history(logps_chosen=falling(chosen), logps_rejected=falling(rejected))
    assert names(lines) == expected


def test_collapse_shows_before_the_end():
    lines = history(logps_chosen=falling(1.0), logps_rejected=falling(1.0))
    (found,) = signatures(lines, WATCH)
    assert 40 < found.step < 60
    assert "0.20 (chosen)" in found.message or "0.21 (chosen)" in found.message


# --- stagnant loss --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "expected"), [(0.011, []), (0.009, ["stagnant_loss"]), (-0.3, ["stagnant_loss"])])
def test_stagnant_is_a_loss_that_falls_by_less_than_a_share(share, expected):
    """Judged at the end alone: `stagnant_from` 1."""
    lines = history(loss=lambda done: 0.7 * (1 - share * (done > 0.5)))
    assert names(lines, WATCH.model_copy(update={"stagnant_from": 1.0})) == expected


def test_stagnant_waits_for_its_share_of_the_run():
    lines = history(loss=lambda done: 0.7)
    assert [found.step for found in signatures(lines, WATCH)] == [100]
    assert names(lines[:99], total=STEPS) == [] and names(lines[:100], total=STEPS) == ["stagnant_loss"]
    assert names(lines, total=2 * STEPS + 1) == []


def noisy(size):
    return lambda done: 0.7 + size * (-1) ** round(STEPS * done)


@pytest.mark.parametrize(("errors", "expected"), [(2, []), (0, ["stagnant_loss"])])
def test_stagnant_is_not_said_of_a_loss_whose_noise_may_hide_a_fall(errors, expected):
    assert names(history(loss=noisy(0.05)), WATCH.model_copy(update={"stagnant_errors": errors})) == expected


def test_stagnant_is_said_of_pairs_without_a_delta():
    """Every pair starts at ln 2; then the student moves, and the loss scatters about where it was."""
    lines = history(loss=lambda done: 0.7 if done < 0.1 else noisy(0.02)(done))
    assert names(lines) == ["stagnant_loss"]


def test_stagnant_knows_negative_losses():
    assert names(history(loss=lambda done: -1.0 - done)) == []
    assert names(history(loss=lambda done: -1.0 + done)) == ["stagnant_loss"]


# --- held-out pairs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("losses", "accuracies", "expected"),
    [
        ([0.69, 0.6, 0.6, 0.6, 0.6], [0.5] * 5, []),  # the gain lies among the last four
        ([0.69, 0.6, 0.6, 0.6, 0.6, 0.6], [0.5] * 6, ["no_heldout_gain"]),
        ([0.6, 0.6, 0.6, 0.6, 0.5971], [0.5] * 5, ["no_heldout_gain"]),  # by 0.48 %
        ([0.6, 0.6, 0.6, 0.6, 0.5969], [0.5] * 5, []),  # by 0.52 %
        ([0.6] * 5, [0.5, 0.5, 0.5, 0.5, 0.504], ["no_heldout_gain"]),
        ([0.6, 0.7, 0.8, 0.9, 1.0], [0.5, 0.5, 0.5, 0.5, 0.506], []),  # overconfident, yet better ordered
        ([0.6, 0.7, 0.8, 0.9, 1.0], None, ["no_heldout_gain"]),
        ([0.6, 0.7, 0.8, 0.9], None, []),  # only three since the first
    ],
)
def test_no_heldout_gain_is_some_evaluations_without_a_better_one(losses, accuracies, expected):
    assert names(evaluated(losses, accuracies)) == expected


def test_no_heldout_gain_shows_at_the_evaluation():
    (found,) = signatures(evaluated([0.6] * 8), WATCH)
    assert found.step == 41 and "4 evaluations" in found.message


# --- length ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("last", "expected"), [(149, []), (151, ["length_drift"]), (67, []), (66, ["length_drift"])])
def test_length_drift_is_a_factor_to_either_side(last, expected):
    assert names(evaluated([100, 90, last], key="generated_tokens")) == expected


def test_answers_that_become_empty_have_drifted():
    assert names(evaluated([100, 0], key="generated_tokens")) == ["length_drift"]
    assert names(evaluated([0, 0], key="generated_tokens")) == []


# --- margin ---------------------------------------------------------------------------------------------------
def late(start, end):
    """A course whose window before half is `start`, whose last is `end`, straight between."""
    return lambda done: start + (end - start) * min(1, max(0, (done - 0.5) / 0.45))


@pytest.mark.parametrize(
    ("margin", "accuracy", "expected"),
    [
        ((1.0, 1.51), (0.7, 0.709), ["margin_without_accuracy"]),
        ((1.0, 1.49), (0.7, 0.709), []),
        ((1.0, 1.51), (0.7, 0.711), []),
        ((1.0, 1.51), (0.7, 0.5), ["margin_without_accuracy"]),
        ((1.0, 1.51), (0.951, 0.951), []),
        ((1.0, 1.51), (0.949, 0.949), ["margin_without_accuracy"]),
        ((-1.0, -0.4), (0.4, 0.4), []),
    ],
)
def test_margin_without_accuracy(margin, accuracy, expected):
    lines = history(rewards_margin=late(*margin), rewards_accuracy=late(*accuracy))
    watcher = Watcher(WATCH, STEPS)
    for line in lines[:-1]:
        watcher.history.add(line)  # judged at the end alone
    assert [found.name for found in watcher.see(lines[-1])] == expected


# --- as a whole -----------------------------------------------------------------------------------------------
def test_a_loss_without_rejected_responses_has_no_collapse_and_no_margin():
    empty = dict.fromkeys(("logps_rejected", "rewards_margin", "rewards_accuracy"))
    assert names([line | empty for line in history(logps_chosen=falling(3.0))]) == []


def test_nothing_is_judged_before_two_windows_are_full():
    course = {"logps_chosen": falling(9), "logps_rejected": falling(9), "loss": lambda done: 0.7}
    watch = Watch(window=10, stagnant_from=0)
    assert names(history(**course)[:19], watch) == []
    assert set(names(history(**course)[:20], watch)) == {"collapse", "stagnant_loss"}


def test_line_by_line_and_all_at_once_say_the_same():
    lines = evaluated([0.6] * 8)
    lines = [line | {"logps_chosen": falling(1)(line["step"] / 200), "loss": 0.7} for line in lines]
    watcher = Watcher(WATCH, STEPS)
    one_by_one = [found for line in lines for found in watcher.see(line)]
    assert one_by_one == signatures(lines, WATCH)
    assert {found.name for found in one_by_one} >= {"collapse", "stagnant_loss", "no_heldout_gain"}
    assert all(found.message.isascii() and len(found.message) < 250 for found in one_by_one)


def test_very_large_thresholds_silence():
    lines = history(logps_chosen=falling(1.0), logps_rejected=falling(1.0))
    assert names(lines, Watch(window=10, collapse_nats=1e9)) == []


def test_a_recipe_names_signatures_to_stop_on():
    training = Training(runs={}, watch={"stop_on": list(DETECTORS), "collapse_nats": 0.5})
    assert training.watch.stop_on == list(DETECTORS) and training.watch.collapse_nats == 0.5
    assert Training(runs={}).watch.stop_on == ["not_finite"]
    with pytest.raises(ValueError, match="stop_on"):
        Training(runs={}, watch={"stop_on": ["colapse"]})


def test_watching_costs_no_time():
    """A step takes far longer than this, also after very many."""
    watcher, lines = Watcher(Watch(), 20_000), history(20_000)
    for line in lines[:-100]:
        watcher.history.add(line)
    started = time.process_time()
    for line in lines[-100:]:
        watcher.see(line)
    assert (time.process_time() - started) / 100 < 0.002
