"""The delta landscape: a known knee is found, none is seen where there is none, and the words follow the numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from scipy.optimize import curve_fit

from deltaray.report import build_report
from deltaray.report.landscape import landscape_chart
from deltaray.tune.landscape import Point, bent, kinked, landscape, p_of, straight

DELTAS = np.linspace(-0.4, 1.0, 21)


def points(gains, deltas=DELTAS, half=0.02, **more):
    return [
        Point(f"p{n}", f"t{n}", float(d), float(d) - 0.01, float(d) + 0.01, float(g), float(g) - half, float(g) + half,
              quality=0.5, chosen_change=0.1, rejected_change=-0.2, **more)
        for n, (d, g) in enumerate(zip(deltas, gains, strict=True))
    ]  # fmt: skip


def saturating(knee, noise, seed=0):
    drawn = np.random.default_rng(seed).normal(0, noise, len(DELTAS))
    return 0.3 * np.minimum(DELTAS, knee) + 0.02 + drawn


def test_fits_agree_with_scipy():
    gains = saturating(0.4, 0.02)
    line, level = straight(DELTAS, gains), np.polyfit(DELTAS, gains, 1)
    assert (line.slope, line.level) == pytest.approx(tuple(level), rel=1e-9)
    found = kinked(DELTAS, gains)

    def model(x, level, slope, knee):
        return level + slope * np.minimum(x, knee)

    starts = [(0, 0.3, knee) for knee in (0.1, 0.25, 0.35, 0.45, 0.55)]  # each ends in the minimum next to it
    fits = [curve_fit(model, DELTAS, gains, p0=start)[0] for start in starts]
    left = {float(((gains - model(DELTAS, *fit)) ** 2).sum()): fit for fit in fits}
    assert found.residual == pytest.approx(min(left), rel=1e-3)
    assert found.knee == pytest.approx(left[min(left)][2], abs=0.01)


def test_a_line_that_goes_on_above_its_knee_agrees_with_scipy():
    chance = np.random.default_rng(5)
    gains = 0.3 * np.minimum(DELTAS, 0.4) + 0.12 * np.maximum(DELTAS - 0.4, 0) + chance.normal(0, 0.01, len(DELTAS))
    found = bent(DELTAS, gains)

    def model(x, level, slope, after):
        return level + slope * np.minimum(x, found.knee) + after * np.maximum(x - found.knee, 0)

    fit = curve_fit(model, DELTAS, gains)[0]
    assert (found.level, found.slope, found.after) == pytest.approx(tuple(fit), rel=1e-6)
    assert found.residual == pytest.approx(float(((gains - found.at(DELTAS)) ** 2).sum()), rel=1e-9)
    assert found.residual < kinked(DELTAS, gains).residual and found.knee == pytest.approx(0.4, abs=0.15)


def test_growth_that_slows_down_is_no_saturation():
    chance = np.random.default_rng(6)
    gains = 0.5 * np.minimum(DELTAS, 0.3) + 0.15 * np.maximum(DELTAS - 0.3, 0) + chance.normal(0, 0.005, len(DELTAS))
    found = landscape(points(gains))
    assert found["bend"]["bends"] and found["bend"]["p"] < 0.05 and not found["knee"]["saturates"]
    assert "more slowly from a delta of" in found["summary"] and "show no saturation" in found["summary"]
    assert found["curve"]["after"] == found["bend"]["after"] > 0
    figure = landscape_chart(json.loads(json.dumps(found)))
    heights = dict(zip(figure.data[0]["x"], figure.data[0]["y"], strict=True))
    assert heights[1.0] - heights[found["bend"]["knee"]] == pytest.approx(
        found["bend"]["after"] * (1.0 - found["bend"]["knee"])
    )


def test_a_known_knee_is_found_with_its_interval():
    found = landscape(points(saturating(0.4, 0.01, seed=1)))  # seed 0 is one of the 5 % that seem to grow on
    assert found["knee"]["saturates"] and found["knee"]["p"] < 0.01
    low, high = found["knee"]["interval"]
    assert low < 0.4 < high < low + 0.3
    assert found["curve"]["knee"] == found["knee"]["knee"] and "saturates at a delta of 0." in found["summary"]


def test_a_straight_line_bends_and_a_flat_end_grows_no_more_often_than_they_may():
    chance = np.random.default_rng(1)
    lines = [0.3 * DELTAS + chance.normal(0, 0.03, len(DELTAS)) for _ in range(20)]
    assert sum(p_of(straight, kinked, 2, DELTAS, gains, seed) < 0.05 for seed, gains in enumerate(lines)) <= 4
    knees = [saturating(0.4, 0.01, seed) for seed in range(20)]
    # of 20 at 5 %: five or more have a probability of 0.3 %
    assert sum(p_of(kinked, bent, 3, DELTAS, gains, seed) < 0.05 for seed, gains in enumerate(knees)) <= 4


def test_no_saturation_and_no_relation_are_said():
    straight_line = landscape(points(saturating(5, 0.01)))
    assert not straight_line["knee"]["saturates"] and "the data show no saturation" in straight_line["summary"]
    noise = landscape(points(np.random.default_rng(3).normal(0, 0.05, len(DELTAS))))
    assert "is not shown to grow with the delta" in noise["summary"]
    falling = landscape(points(-saturating(0.4, 0.01)))
    assert not falling["knee"]["saturates"] and "falls with the delta" in falling["summary"]
    few = landscape(points([0.0, 0.1, 0.2], DELTAS[:3]))
    assert few["curve"] is None and "Too few" in few["summary"]
    assert "0 pairings" in landscape([])["summary"]


def test_pairs_that_hurt_in_spite_of_a_positive_delta_are_named():
    made = points(saturating(0.4, 0.01))
    made[-1] = replace(made[-1], gain=-0.2, gain_low=-0.22, gain_high=-0.18, chosen_change=-0.3, rejected_change=-0.4)
    made[0] = replace(made[0], gain=0.2, gain_low=0.18, gain_high=0.22)
    made[-2] = replace(made[-2], gain=-0.01, gain_low=-0.05, gain_high=0.03)  # holds no difference
    found = landscape(made)
    assert found["outliers"] == ["p0", "p20"]
    assert "Harmful in spite of a positive delta: p20 (both likelihoods fell)." in found["summary"]
    assert "Helpful in spite of a negative delta: p0." in found["summary"]


def test_quality_beside_the_delta():
    gains = saturating(5, 0.01)
    made = [replace(it, quality=float(n % 7), gain=it.gain + 0.02 * (n % 7)) for n, it in enumerate(points(gains))]
    found = landscape(made)
    assert found["quality"]["correlation"] > 0.7 and "shows relation to the quality" in found["summary"]


def test_the_report_draws_it_and_lists_all_trials(tmp_path: Path):
    """An exploration of three trials, one of which failed; nothing else is in the folder."""
    folder = tmp_path / "tuning" / "trials"
    folder.mkdir(parents=True)
    settings = dict.fromkeys(("scorer", "min_delta", "max_delta", "pairs", "beta", "lora"))
    settings |= {"chosen": "a", "rejected": "b", "loss": "dpo", "learning_rate": 1e-4}
    gain = {"difference": 0.1234, "low": 0.1, "high": 0.15}
    done = {"state": "finished", "label": "a > b", "settings": settings, "gain": gain, "seconds": {"train": 7.0}}
    died = {"state": "failed", "label": "b > a", "settings": settings, "reason": "<b>no pair</b> is left"}
    for name, record in {"one": done, "two": done, "three": died}.items():
        (folder / f"{name}.json").write_text(json.dumps({"name": name, **record}))
    found = json.loads(json.dumps(landscape(points(saturating(0.4, 0.01)))))
    (tmp_path / "tuning" / "landscape.json").write_text(json.dumps(found))
    html = build_report(tmp_path).read_text(encoding="utf-8")
    assert found["summary"].replace("'", "&#39;") in html and "2 finished, 1 failed" in html
    assert "&lt;b&gt;no pair&lt;/b&gt; is left" in html and "<b>no pair" not in html
    assert html.index('data-sort="0.1234"') and html.count('<tr><th scope="row" data-sort') == 3

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return "#123456" if isinstance(value, str) and value.startswith("@") else value

    chart = landscape_chart(found)
    figure = go.Figure(plain(chart.data), plain(chart.layout))
    assert len(figure.data[1].x) == len(DELTAS) and len(figure.layout.shapes) == 2
