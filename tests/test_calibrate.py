"""Calibration: the predictor on runs whose truth is known, the stop-watch on a fake engine, once for real."""

import asyncio
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import deltaray
from tiny_model import save_tiny

from deltaray.data.contracts import RESPONSES
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.recipe import load_recipe
from deltaray.runtime.session import Capacity
from deltaray.study.calibrate.compare import compare
from deltaray.study.calibrate.measure import check_clocks, sample_prompts
from deltaray.study.calibrate.pace import beginnings, per_row, seconds_per_token
from deltaray.study.calibrate.predict import Prediction, predict, schedule
from deltaray.study.calibrate.records import Calibration, Mean, Measure, PoolMeasure
from deltaray.study.calibrate.run import latest_prediction
from deltaray.study.calibrate.timed import PARTS, TIMED, TimedSpec, timed_table
from deltaray.study.pipeline import Pipeline

SLOTS = 32


# --- runs with a known truth ------------------------------------------------------------------------------------
def simulated(generator, lengths, start=0.0, slots=SLOTS):
    """(asked, begun, answered) of rows in an engine with continuous batching: each step gives each running row one
    token and takes longer the more rows run, with noise."""
    waiting, left = list(range(len(lengths)))[::-1], {}
    begun, answered, now = np.zeros(len(lengths)), np.zeros(len(lengths)), start
    while waiting or left:
        while waiting and len(left) < slots:
            row = waiting.pop()
            left[row], begun[row] = int(lengths[row]), now
        now += (0.01 + 0.001 * len(left)) * generator.lognormal(0, 0.2)
        for row in [row for row in left if left[row] == 1]:
            answered[row] = now
            del left[row]
        left = {row: tokens - 1 for row, tokens in left.items()}
    return np.full(len(lengths), start), begun, answered


def lengths_of(generator, rows):
    return np.clip(generator.lognormal(3, 0.6, rows), 1, 150).round()


def test_rows_begin_when_a_place_gets_free():
    generator = np.random.default_rng(1)
    asked, begun, answered = simulated(generator, lengths_of(generator, 300))
    found = beginnings(asked, answered, SLOTS)
    assert np.allclose(np.sort(found), np.sort(begun))
    changes = sorted([(time, 1) for time in found] + [(time, -1) for time in answered])
    assert max(np.cumsum([change for _, change in changes])) == SLOTS


@pytest.mark.parametrize("rows", [2 * SLOTS, 4 * SLOTS, 20 * SLOTS])
def test_the_pace_of_a_short_run_is_that_of_a_long_one(rows):
    generator = np.random.default_rng(2)
    lengths = lengths_of(generator, 100 * SLOTS)
    _, _, answered = simulated(generator, lengths)
    truth = answered.max() / lengths.sum()
    errors, naive = [], []
    for _ in range(30):
        drawn = generator.choice(lengths, rows, replace=False)
        asked, _, answered = simulated(generator, drawn, start=1e9)
        errors.append(seconds_per_token(asked, answered, drawn, SLOTS).mean / truth - 1)
        naive.append((answered.max() - 1e9) / drawn.sum() / truth - 1)
    assert abs(np.mean(errors)) < 0.04
    assert np.mean(naive) > 4 * SLOTS / rows * 0.05  # what the emptying batch does to tokens over time


def test_a_batch_that_is_never_full_predicts_too_much_rather_than_too_little():
    generator = np.random.default_rng(3)
    lengths = lengths_of(generator, 20 * SLOTS)
    full = simulated(generator, lengths)
    few = simulated(generator, lengths[: SLOTS // 2])
    pace = seconds_per_token(full[0], full[2], lengths, SLOTS).mean
    assert seconds_per_token(few[0], few[2], lengths[: SLOTS // 2], SLOTS).mean > pace


def test_no_pace_without_time_or_tokens():
    for answered, tokens in ((np.zeros(4), np.ones(4)), (np.ones(4), np.zeros(4))):
        with pytest.raises(ValueError, match="no tokens"):
            seconds_per_token(np.zeros(4), answered, tokens, SLOTS)


def test_samples_of_one_prompt_are_not_independent():
    values, prompts = np.repeat([1.0, 2.0, 3.0, 4.0], 5), np.repeat(list("abcd"), 5)
    assert per_row(values, prompts) == per_row(values[::5], prompts[::5])


# --- predictions ------------------------------------------------------------------------------------------------
def measure_of(tokens=(20.0, 0.5), pace=(0.001, 0.00002), prompts=100, samples=1):
    return Measure(
        identity="",
        engine={},
        samples=samples,
        prompts=prompts,
        rows=prompts * samples,
        failed=0,
        prompt_tokens=Mean(mean=10, error=0.1),
        tokens=Mean(mean=tokens[0], error=tokens[1]),
        seconds_per_token=Mean(mean=pace[0], error=pace[1]),
        full_batch=True,
    )


def pool_of(*teachers, start=10.0, seconds=13.0, gpus=1.0, replicas=1):
    fields = {"cpus": 1, "gpus": gpus, "stream_cpus": 1, "start_seconds": start, "seconds": seconds}
    return PoolMeasure(teachers=list(teachers), replicas=replicas, **fields)


def calibration_of(pools, measures, gpus=8.0, unit_size=256):
    fields = {"date": "", "prompts": 10_000, "cpus": 64, "gpus": gpus, "versions": {}, "hardware": {}}
    seconds = {"session_seconds": 2, "publish_seconds": 1}
    return Calibration(pools=pools, teachers=measures, unit_size=unit_size, **fields, **seconds)


def inside(interval, truth):
    return interval.low <= truth <= interval.high


def test_a_whole_run_is_the_sample_and_the_rest_at_the_full_batch_s_pace():
    found = predict(calibration_of([pool_of("a")], {"a": measure_of()}), 10_000, gpu_hour_price=3)
    assert found.tokens.value == pytest.approx(200_000)
    assert found.pools[0].seconds.value == pytest.approx(13 + (200_000 - 2_000) * 0.001)
    assert found.seconds.value == pytest.approx(2 + 13 + 198 + 1)
    assert found.gpu_hours.value == pytest.approx((13 + 198) / 3600)
    assert found.cost.value == pytest.approx(3 * found.gpu_hours.value)
    for value in (found.tokens, found.seconds, found.gpu_hours, found.teachers["a"].seconds):
        assert value.low < value.value < value.high


def test_the_sample_itself_is_known_exactly():
    found = predict(calibration_of([pool_of("a")], {"a": measure_of()}), 100)
    assert found.tokens.low == found.tokens.high == pytest.approx(2_000)
    assert found.seconds.value == pytest.approx(2 + 13 + 1)


def test_a_shared_engine_starts_once_and_pools_without_room_wait():
    measures = {"a": measure_of(), "b": measure_of()}
    together = predict(calibration_of([pool_of("a", "b")], measures), 10_000)
    beside = predict(calibration_of([pool_of("a"), pool_of("b")], measures), 10_000)
    after = predict(calibration_of([pool_of("a"), pool_of("b")], measures, gpus=1), 10_000)
    alone = 13 + 198
    assert together.seconds.value == pytest.approx(3 + 13 + 2 * 198)
    assert beside.seconds.value == pytest.approx(3 + alone)
    assert after.seconds.value == pytest.approx(3 + 2 * alone)
    assert [pool.begins for pool in after.pools] == pytest.approx([0, alone])
    assert [pool.begins for pool in beside.pools] == pytest.approx([0, 0])


def test_replicas_share_the_tokens_and_are_no_more_than_the_units():
    def with_replicas(count: int, unit_size: int) -> Prediction:
        return predict(calibration_of([pool_of("a", replicas=count)], {"a": measure_of()}, unit_size=unit_size), 10_000)

    assert with_replicas(4, 256).pools[0].seconds.value == pytest.approx(13 + (200_000 / 4 - 2_000) * 0.001)
    assert with_replicas(4, 256).gpu_hours.value == pytest.approx(4 * (13 + 48) / 3600)
    assert with_replicas(4, 5_000).pools[0].replicas == 2


@pytest.mark.parametrize(
    ("seconds", "cpus", "ends"),
    [
        ([3, 2, 4], [1, 1, 1], [3, 2, 4]),
        ([3, 2, 4], [4, 4, 4], [3, 5, 9]),
        ([3, 2, 4], [2, 2, 2], [3, 2, 6]),
        ([3, 2, 4], [9, 1, 1], [3, 5, 7]),
    ],
)
def test_pools_are_scheduled_like_jobs(seconds, cpus, ends):
    assert schedule(seconds, [Capacity(need, 0) for need in cpus], Capacity(4, 0)) == ends


def test_intervals_hold_the_truth_nineteen_times_of_twenty():
    """Samples of simulated runs against the runs themselves; a true 95 % gives 52 of 60 or more in 99 of 100 cases."""
    generator = np.random.default_rng(4)
    hits, misses, prompts, rows, runs = Counter(), [], 40 * SLOTS, 4 * SLOTS, 60
    for _ in range(runs):
        lengths = lengths_of(generator, prompts)
        starts = 10 * (1 + 0.1 * generator.standard_normal(2))
        truth = simulated(generator, lengths, starts[0])[2].max()
        drawn = generator.choice(lengths, rows, replace=False)
        asked, _, answered = simulated(generator, drawn, starts[1])
        pace = seconds_per_token(asked, answered, drawn, SLOTS)
        mean, error = drawn.mean(), drawn.std(ddof=1) / np.sqrt(rows)
        measure = measure_of((mean, error), (pace.mean, pace.error), rows)
        pool = pool_of("a", start=starts[1], seconds=answered.max())
        found = predict(calibration_of([pool], {"a": measure}), prompts)
        hits["tokens"] += inside(found.tokens, lengths.sum())
        hits["seconds"] += inside(found.pools[0].seconds, truth)
        misses.append(found.pools[0].seconds.value / truth - 1)
    assert min(hits["tokens"], hits["seconds"]) >= 52, hits
    assert abs(np.mean(misses)) < 0.03  # no bias: a short run is not a long one in small


def test_prompts_are_drawn_evenly_and_repeatably():
    rows = [{"prompt_id": str(number)} for number in range(50)]
    assert sample_prompts(iter(rows), 10) == sample_prompts(iter(rows), 10)
    assert sample_prompts(rows, 80) == (rows, 50)
    drawn = [sample_prompts(rows, 10, seed)[0] for seed in range(400)]
    assert all(len({row["prompt_id"] for row in draw}) == 10 for draw in drawn)
    often = Counter(row["prompt_id"] for draw in drawn for row in draw)
    assert len(often) == 50 and max(often.values()) < 2 * min(often.values())


# --- the stop-watch ---------------------------------------------------------------------------------------------
class FakeSpec:
    """Answers each prompt with its own words, and notes what it was asked."""

    cpus, gpus, min_replicas, max_replicas, requests_in_flight = 1.0, 0.0, 2, 4, 8
    environment, ray_options = {}, {}

    def __init__(self):
        self.asked = []

    def start(self):
        return self

    async def generate(self, unit):
        self.asked.append((unit["model"], len(unit["prompt_ids"]), json.loads(unit["sampling"])["max_tokens"]))
        await asyncio.sleep(0)
        blank = {"token_ids": [1], "tokens": 1, "reasoning": None, "finish_reason": "stop", "error": None}
        return [[blank | {"text": f"{name}#{sample}"} for sample in unit["samples"]] for name in unit["prompt_ids"]]

    def close(self):
        pass


def unit_of(model, prompts):
    names = [f"{model}{number}" for number in range(prompts)]
    turns = [[{"role": "user", "content": name}] for name in names]
    lists = {"prompt_ids": names, "messages": turns, "token_ids": [[1]] * prompts}
    lists |= {"tools": [None] * prompts, "refused": [None] * prompts}
    return {"name": model, "model": model, "adapter": None, "samples": [0, 1], "sampling": '{"max_tokens": 9}', **lists}


def test_a_timed_engine_answers_alike_and_asks_new_weights_for_a_token_first():
    spec, asked = FakeSpec(), [("a", 5), ("a", 3), ("b", 1000)]

    async def answers():
        engine = TimedSpec(spec).start()
        return await asyncio.gather(*(engine.generate(unit_of(*what)) for what in asked))

    for what, outputs in zip(asked, asyncio.run(answers()), strict=True):
        unit = unit_of(*what) | {"outputs": outputs}
        assert [[it["text"] for it in row] for row in unit["outputs"]] == [
            [f"{name}#0", f"{name}#1"] for name in unit["prompt_ids"]
        ]
        table = timed_table(unit)
        assert table.schema == TIMED
        columns = (table[name].to_pylist() for name in ("ready", "asked", "answered"))
        assert all(list(times) == sorted(times) for times in zip(*columns, strict=True))
    warm = [(model, prompts) for model, prompts, tokens in spec.asked if tokens == 1]
    assert sorted(warm) == [("a", 1), ("b", 1)]
    assert all(tokens in (1, 9) for _, _, tokens in spec.asked)
    assert sum(1 for model, _, tokens in spec.asked if model == "b" and tokens == 9) <= PARTS


# --- once for real ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(the recipe's file, its store, what `plan --calibrate` printed, the files and the comparison after it).

    Two samples of 301 prompts, of which one is too long to be asked; then the real run of all of them.
    """
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny(folder / "model", seed=3)
    prompts = [{"prompt": f"what is {number}+{number % 7}?"} for number in range(300)]
    prompts.append({"prompt": "far too long " * 60})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    out, recipe = folder / "out", folder / "recipe.yaml"
    recipe.write_text(f"""
name: calibrated
out: {out}
prompts: {{path: {folder}/prompts.jsonl}}
teachers:
  tiny:
    model: {folder}/model
    sampling: {{temperature: 1.0, max_tokens: 48, samples: 2}}
    engine: {{dtype: float32, max_model_len: 128, arguments: {{max_num_seqs: 16}}}}
""")
    measured = deltaray("plan", str(recipe), "--calibrate", "64", "--json")
    assert measured.code == 0, measured.stderr
    store = Store(str(out))
    files, before = [path.relative_to(out) for path in out.rglob("*") if path.is_file()], compare(store)
    generated = deltaray("generate", str(recipe))
    assert generated.code == 0, generated.stderr
    return recipe, store, json.loads(measured.stdout), files, before


def latest(recipe, *changes):
    """What a later `plan` says."""
    pipeline = Pipeline(load_recipe(recipe, changes))
    return latest_prediction(pipeline.study, pipeline.store, pipeline.plan()[0])


def test_tokens_are_predicted_and_compared(calibrated):
    _, store, measured, _, before = calibrated
    rows = {row["what"]: row for row in compare(store)}
    assert before == [] and rows.keys() == {"tokens of tiny", "tokens", "seconds"}
    stored = store.read_tables(Store.responses("tiny"), RESPONSES, ["tokens"])["tokens"].to_pylist()
    tokens = rows["tokens"]
    assert len(stored) == measured["prediction"]["teachers"]["tiny"]["rows"] == 602
    assert tokens["truth"] == sum(stored)
    assert tokens["low"] <= tokens["truth"] <= tokens["high"] and tokens["low"] < tokens["high"]
    assert abs(tokens["predicted"] / tokens["truth"] - 1) < 0.15
    assert rows["seconds"]["truth"] > 0 and rows["seconds"]["predicted"] > 0


def test_a_calibration_is_kept_and_its_work_is_not(calibrated):
    recipe, _, measured, files, _ = calibrated
    calibration, prediction = latest(recipe)
    assert prediction.model_dump() == measured["prediction"]
    assert calibration.model_dump() == measured["calibration"]
    measure = calibration.teachers["tiny"]
    assert (measure.prompts, measure.rows, measure.full_batch) == (64, 128, True)
    kept = [path for path in files if path.parts[:2] != (".deltaray", "logs") and path.name != "lock"]
    assert kept == [Path(".deltaray/calibration.json")]


@pytest.mark.parametrize(
    "change", ["teachers.tiny.sampling.temperature=0.5", "teachers.tiny.engine.arguments.max_num_seqs=8"]
)
def test_other_teachers_have_no_prediction(calibrated, change):
    assert latest(calibrated[0], change) is None


def test_a_longer_run_takes_longer(calibrated):
    calibration, _ = latest(calibrated[0])
    seconds = [predict(calibration, prompts).seconds.value for prompts in (64, 301, 10_000, 1_000_000)]
    assert all(shorter < longer for shorter, longer in pairwise(seconds))


def test_times_of_a_wrong_clock_are_refused() -> None:
    moments = [np.array([110.0, 150.0]), np.array([120.0, 190.0])]
    check_clocks((100.0, 191.0), moments)
    for ahead in (-3600.0, 3600.0):
        with pytest.raises(StageError, match=r"clocks differ by 3,(590|599) s or more: set them"):
            check_clocks((100.0, 191.0), [it + ahead for it in moments])
