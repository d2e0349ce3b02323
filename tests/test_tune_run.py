"""`deltaray tune` for real on a preference data set: killed in the middle, resumed, with trials that cannot work."""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, Finished, deltaray
from fake_engine import Behaviour
from tiny_model import save_tiny

from deltaray.data.store import Store
from deltaray.recipe import expand, load_recipe
from deltaray.tune.records import read_records
from deltaray.tune.shared import count_of, sharing_trials, study_of

RECIPE = """\
name: explored
out: {out}
preferences: {{path: {out}-pairs.jsonl}}
scorers: {{length: {{kind: surface, statistic: characters}}}}
student: {{model: {model}, max_length: 64}}
training:
  {{dtype: float32, zero_stage: 1, cpus_per_worker: 3, heldout: 0.25, heldout_evaluations: 2, checkpoint_steps: 2}}
exploration:
  space: {{min_delta: [null, 1000]}} # in both orders; no answer is so much longer than the other
  pairing: {{scorer: length}}
  run: {{loss: simpo, batch_size: 4, learning_rate: 1e-3, epochs: 2}} # no references to make
  trials_at_once: 4
cluster: {{address: "{address}"}}
"""


@pytest.fixture(scope="module")
def explored(ray_session, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict, dict, Finished]:
    """(store, records at the kill, when each student was committed by then, the resumed command)."""
    folder = tmp_path_factory.mktemp("tune")
    out, model = folder / "out", save_tiny(folder / "model")
    write_pairs(out)
    address = ray_session.get_runtime_context().gcs_address
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=out, model=model, address=address))

    def one_is_trained() -> bool:
        return any('"finished"' in path.read_text() for path in out.glob("tuning/trials/*.json"))

    killed = deltaray("tune", str(recipe), until=one_is_trained)
    store = Store(str(out))
    records, students = read_records(store), committed(out)
    assert killed.code == -9, killed.stderr[-3000:]
    return store, records, students, deltaray("tune", str(recipe))


def write_pairs(out: Path) -> None:
    pairs = [
        {"prompt": f"{n}+{7 * n}=", "chosen": str(8 * n), "rejected": f"i guess {n}" * (1 + n % 3)} for n in range(24)
    ]
    Path(f"{out}-pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def committed(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("students/*/config.json")}


def test_a_kill_loses_and_repeats_no_finished_trial(explored) -> None:
    store, before, students, resumed = explored
    assert resumed.code == 0, resumed.stderr[-3000:]
    after, now = read_records(store), committed(Path(store.out))
    over = {name: record for name, record in before.items() if record["state"] in ("finished", "failed")}
    assert over and {name: after[name] for name in over} == over
    assert {name: now[name] for name in students} == students
    assert f"tune: {4 - len(over)} trials to do" in resumed.stderr


def test_trials_that_cannot_work_tell_why_and_stop_nobody(explored) -> None:
    store, *_, resumed = explored
    records = read_records(store)
    assert sorted(record["state"] for record in records.values()) == ["failed", "failed", "finished", "finished"]
    failed = [record for record in records.values() if record["state"] == "failed"]
    assert all("no pairs left" in it["reason"] and it["settings"]["min_delta"] == 1000 for it in failed)
    table = store.read_table("tuning/trials.parquet").to_pylist()
    assert len(table) == 4 and [row["best"] for row in table].count(True) >= 1
    assert "no pairs left" in resumed.stdout


def test_trials_have_room_and_the_best_is_one_path_away(explored) -> None:
    store, *_, resumed = explored
    assert "2 at once (4 are asked for, the cluster has 8 CPUs), each takes at most 3.25 CPUs" in resumed.stderr
    best = store.read_json("tuning/best.json")
    assert (Path(best["path"]) / "model.safetensors").is_file() and best["path"] in resumed.stdout
    kept = [record for record in read_records(store).values() if record["state"] == "finished"]
    assert all(record["heldout_accuracy"]["mean"] is not None and record["delta"]["mean"] for record in kept)
    assert {record["delta"]["mean"] > 0 for record in kept} == {True, False}  # one order and the other
    assert list(Path(store.out).glob("tuning/ray/*/*/events.out.tfevents.*"))  # TensorBoard


HALVED = """\
name: halved
out: {out}
seeds: [0, 1]
preferences: {{path: {out}-pairs.jsonl}}
scorers: {{length: {{kind: surface, statistic: characters}}}}
student: {{model: {model}, max_length: 64}}
training: {{dtype: float32, zero_stage: 1, heldout: 0.25, heldout_evaluations: 2}}
pairings: {{up: {{chosen: chosen, rejected: rejected, scorer: length}}}}
exploration:
  space: {{pairings: [up], learning_rate: [1e-2, 1e-9]}} # the first learns, the second cannot
  run: {{loss: simpo, batch_size: 4}}
  asha: {{reduction: 2}}
cluster: {{address: "{address}"}}
"""


def test_successive_halving_stops_the_worse_trial_after_its_first_seed(ray_session, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    write_pairs(out)
    address = ray_session.get_runtime_context().gcs_address
    recipe.write_text(HALVED.format(out=out, model=save_tiny(tmp_path / "model"), address=address))
    done = deltaray("tune", str(recipe))
    assert done.code == 0, done.stderr[-3000:]
    records = {record["settings"]["learning_rate"]: record for record in read_records(Store(str(out))).values()}
    assert {rate: record["state"] for rate, record in records.items()} == {1e-2: "finished", 1e-9: "stopped"}
    assert records[1e-2]["heldout_accuracy"]["mean"] == 1
    kept = records[1e-2]["runs"]
    assert len(kept) == 2 and kept.keys() <= committed(out).keys()
    begun = {path.name for path in out.glob("training/*")} - kept.keys()
    assert all(name.endswith("-seed0") for name in begun)  # it may be stopped before it has written anything


SWEEP = """\
name: sweep
out: {out}
unit_size: 8
prompts: {{path: {out}-prompts.jsonl}}
teachers: {{{teachers}}}
scorers: {{length: {{kind: surface, statistic: characters}}}}
student: {{model: {model}}}
training: {{heldout: 0.25}}
pairings: {{{pairings}}}
exploration:
  space: {{pairings: [{names}], learning_rate: [1e-4, 1e-3]}}
cluster: {{address: "{address}"}}
"""


def test_a_sweep_over_21_pairings_starts_each_teacher_once(ray_session, tmp_path: Path) -> None:
    """By what the engines wrote down, in place of vLLM: every prompt reached every teacher once, in one engine."""
    out, model, names = tmp_path / "out", save_tiny(tmp_path / "model"), [f"t{number}" for number in range(7)]
    pairs = {f"{a}-{b}": f"{{chosen: {a}, rejected: {b}, scorer: length}}" for a, b in combinations(names, 2)}
    Path(f"{out}-prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1="}) + "\n" for n in range(16)))
    recipe, marks = tmp_path / "recipe.yaml", tmp_path / "marks"
    marks.mkdir()
    recipe.write_text(
        SWEEP.format(
            out=out,
            model=model,
            teachers=", ".join(f"{name}: {{model: {model}}}" for name in names),
            pairings=", ".join(f"{name}: {pair}" for name, pair in pairs.items()),
            names=", ".join(pairs),
            address=ray_session.get_runtime_context().gcs_address,
        )
    )
    command = [sys.executable, str(ROOT / "tests" / "fake_engine.py"), "generate", str(recipe)]
    environment = os.environ | Behaviour(marks=str(marks)).variable()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    base = expand(load_recipe(recipe))
    assert count_of(base) == 42 and len(study_of(base, sharing_trials(base)).pairings) == 21
    units = [(path.stem, *it) for path in marks.glob("*.jsonl") for it in map(_unit, path.read_text().splitlines())]
    asked = sorted((name, prompt) for _, name, prompts in units for prompt in prompts)
    assert len(asked) == len(set(asked)) == 7 * 16
    engines = {(process, name) for process, name, _ in units}
    assert sorted(name for _, name in engines) == names


def _unit(line: str) -> tuple[str, list[str]]:
    found = json.loads(line)
    return found["name"], found["prompt_ids"]
