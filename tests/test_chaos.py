"""Each response exactly once, whatever dies: processes killed at random, a crash before and after every single write,
a full disk; and rows that fail, which are recorded, tried again when asked, and stop a run that is plainly broken.

The seed of the random kills is printed; `DELTARAY_CHAOS_SEED` repeats it.
"""

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_engine
import pyarrow.parquet as pq
import pytest
import ray
from chaos import Command, chaos
from crashing import CrashError, Crashing, crashes
from fake_engine import Behaviour, FakeEngine, FakeSpec, answer_text, failure
from lab import Lab, Reader, check_complete, generated_again, leftovers, prompt_id, published, rows_of
from tiny_model import save_tiny

import deltaray.generate.engine_sharing
import deltaray.study.pipeline
from deltaray.data.contracts import REFERENCES, RESPONSES
from deltaray.data.prompts.source import store_source
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.generate.archive import supersede
from deltaray.generate.pools import commit_unit
from deltaray.generate.stage import responses_table, teacher_work
from deltaray.generate.staging import publish
from deltaray.generate.units import load_unit
from deltaray.recipe import Study, expand, load_recipe
from deltaray.study.checks import prompt_source
from deltaray.study.definitions import definitions
from deltaray.study.pipeline import Pipeline

ray.cloudpickle.register_pickle_by_value(fake_engine)
KILLS = 4
SMALL = {"cluster": {"cpus": 4}}


# --- processes killed at random -----------------------------------------------------------------------------------
def test_chaos(tmp_path: Path) -> None:
    seed = int(os.environ.get("DELTARAY_CHAOS_SEED", 1))
    print(f"DELTARAY_CHAOS_SEED={seed}")
    marks = tmp_path / "marks"
    marks.mkdir()
    lab = Lab(tmp_path / "study", behaviour=Behaviour(delay=0.1, marks=str(marks)), settings=SMALL)
    reader = Reader(lab.out)
    reader.start()
    outcome = chaos(lab, random.Random(seed), KILLS)
    reader.stop()
    for last, code, stderr in outcome.exits:
        if last == "raylet":  # it says how to resume, unless Ray ends the process even before that
            assert code in (0, 1), stderr
    generated, again = generated_again(marks)
    print(f"{dict(outcome.kills)}: {outcome.rows} rows, {again} of {generated} generated again")
    assert outcome.kills.total() >= KILLS
    assert again <= lab.in_flight() * outcome.kills.total()


def test_a_frozen_replica_is_ended_and_another_repeats_its_units(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    behaviour = Behaviour(marks=str(marks), freezes=True)
    lab = Lab(tmp_path / "study", prompts=64, stall_seconds=10, behaviour=behaviour, settings=SMALL)
    code, stderr = Command(lab, "generate", str(lab.write())).result()
    assert code == 0, stderr
    check_complete(lab)
    assert 0 < generated_again(marks)[1] <= lab.units_in_flight * lab.unit_size


def test_a_command_outlives_its_listeners_and_ends_with_its_terminal(tmp_path: Path) -> None:
    """The pipe that it writes into is closed, as by `head`; SIGHUP is what a terminal sends when it is closed."""
    lab = Lab(tmp_path / "study", prompts=2000, behaviour=Behaviour(delay=0.2), settings=SMALL)
    of_the_suite = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    command = Command(lab, "generate", str(lab.write()), heard=False)
    signal.signal(signal.SIGHUP, of_the_suite)
    while len(list((lab.out / "responses").rglob("*.parquet"))) < 10:  # more than one line of progress later
        assert command.runs
        time.sleep(0.1)
    command.process.send_signal(signal.SIGHUP)
    code, _ = command.result()
    assert code == 130
    [log] = (lab.out / ".deltaray" / "logs").iterdir()
    assert "Traceback" not in log.read_text()


# --- a crash at every write ---------------------------------------------------------------------------------------
def complete(study: Study, store: Store, behaviour: Behaviour, retry: bool = False) -> None:
    """What `deltaray generate` does to the store, in one process."""
    supersede(study, store)
    store.claim(definitions(study))
    store_source(store, prompt_source(study), study.recipe.shard_size, study.recipe.unit_size)
    engine = FakeEngine(behaviour)
    works = teacher_work(study, store, retry)
    for unit in (unit for work in works for unit in work.units):
        loaded = load_unit(store, unit)
        outputs = asyncio.run(engine.generate(loaded))
        commit_unit(store, responses_table, loaded | {"outputs": outputs})
    for work in teacher_work(study, store, retry):
        for folder, again in work.waiting:
            publish(store, work.assignment.destination, folder, again, RESPONSES)


def study_of(lab: Lab) -> Study:
    return expand(load_recipe(lab.write()))


def test_a_crash_at_any_write_of_a_changed_study_costs_nothing(tmp_path: Path) -> None:
    lab = Lab(tmp_path, prompts=3, shard_size=2, unit_size=2)
    complete(study_of(lab), Store(str(lab.out)), lab.behaviour)
    check_complete(lab)
    lab.prompts, lab.samples, lab.temperatures["weak"] = 4, 2, 0.5
    before = lab.out.rename(tmp_path / "before")
    study = study_of(lab)
    for store in crashes(before, lab.out, lambda store: complete(study, store, lab.behaviour)):
        for name in lab.temperatures:
            published(lab, name)
        store.sweep()
        complete(study, store, lab.behaviour)
        check_complete(lab)
        assert not leftovers(lab.out)
        lab.temperatures["weak"] = 1.0  # what was said before comes back, though not asked again
        complete(study_of(lab), store, Behaviour(failing=1.0))
        back = {(row["prompt_id"], row["sample"]) for row in rows_of(lab.out / "responses/teacher=weak") if row["text"]}
        assert back >= {(prompt_id(n), 0) for n in range(3)}
        lab.temperatures["weak"] = 0.5


def test_a_crash_at_any_write_of_a_second_attempt_costs_nothing(tmp_path: Path) -> None:
    lab = Lab(tmp_path, prompts=6, shard_size=2, unit_size=2)
    study, failing = study_of(lab), Behaviour(failing=0.6)
    complete(study, Store(str(lab.out)), failing)
    assert failed_keys(lab)
    before = lab.out.rename(tmp_path / "before")
    for store in crashes(before, lab.out, lambda store: complete(study, store, lab.behaviour, retry=True)):
        complete(study, store, Behaviour(failing=1.0))  # a run without --retry-failed tries nothing again
        for name in lab.temperatures:
            keys = [(row["prompt_id"], row["sample"]) for row in rows_of(lab.out / "responses" / f"teacher={name}")]
            assert sorted(keys) == sorted(lab.wanted())
        complete(study, store, lab.behaviour, retry=True)
        check_complete(lab)
        assert not leftovers(lab.out)


def test_units_of_a_sampling_that_was_left_wait_until_it_is_asked_for_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    lab = Lab(tmp_path, prompts=6, shard_size=6, unit_size=2, behaviour=Behaviour(marks=str(marks)))
    Crashing.left, Crashing.after = 9, False  # in the middle of the first teacher's units
    with pytest.raises(CrashError):
        complete(study_of(lab), Crashing(str(lab.out)), lab.behaviour)
    units = lab.out / ".deltaray" / "units"
    waiting = set(units.rglob("*.parquet"))
    assert waiting
    lab.temperatures["strong"] = 1.0
    complete(study_of(lab), Store(str(lab.out)), lab.behaviour)
    check_complete(lab)
    assert set(units.rglob("*.parquet")) == waiting and not leftovers(lab.out)
    lab.temperatures["strong"] = 0.5
    complete(study_of(lab), Store(str(lab.out)), lab.behaviour)
    check_complete(lab)
    assert not set(units.rglob("*.parquet"))
    assert generated_again(marks)[1] <= lab.unit_size  # the unit that the crash cost


# --- rows that fail -----------------------------------------------------------------------------------------------
@pytest.fixture
def fakes(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Behaviour], None]:
    """Sets how the engines behave in this process's Ray, which outlives the pipelines."""
    monkeypatch.setattr(deltaray.study.pipeline, "stop_ray", lambda: None)

    def behave(behaviour: Behaviour) -> None:
        monkeypatch.setattr(
            deltaray.generate.engine_sharing, "pool_spec", lambda teachers, capacity: FakeSpec(behaviour)
        )

    return behave


def pairs_lab(folder: Path) -> Lab:
    """A study whose pairs are scored: `strong` is right wherever it does not fail."""
    lab = Lab(folder, prompts=48, shard_size=16, unit_size=8)
    lab.settings = {
        "pairings": {"delta": {"chosen": "strong", "rejected": "weak", "scorer": "exact"}},
        "scorers": {"exact": {"kind": "exact_match"}},
        "student": {"model": save_tiny(folder / "model")},
        "failures": {"max_share": 0.6},
    }
    return lab


def failed_keys(lab: Lab) -> set[tuple[str, str, int]]:
    rows = [row for name in lab.temperatures for row in rows_of(lab.out / "responses" / f"teacher={name}")]
    return {(row["teacher"], row["prompt_id"], row["sample"]) for row in rows if row["error"]}


def marks_of(folder: Path) -> int:
    return generated_again(folder)[0]


def test_failed_rows_are_recorded_and_tried_again_only_when_asked(
    tmp_path: Path, fakes: Callable[[Behaviour], None]
) -> None:
    lab, marks = pairs_lab(tmp_path), tmp_path / "marks"
    marks.mkdir()
    recipe, share = load_recipe(lab.write()), 0.25
    wanted = {
        (name, *key): how for name in lab.temperatures for key in lab.wanted() if (how := failure(name, *key, share))
    }
    fakes(Behaviour(failing=share))
    Pipeline(recipe).run(["generate", "pair"])
    assert failed_keys(lab) == set(wanted) and len(set(wanted.values())) == 2
    for row in (row for name in lab.temperatures for row in rows_of(lab.out / "responses" / f"teacher={name}")):
        how = wanted.get((row["teacher"], row["prompt_id"], row["sample"]))
        assert {"error": "engine error", "empty": "empty answer", None: ""}[how] == (row["error"] or "").partition(":")[
            0
        ]
    broken = {key[1] for key in wanted}
    assert len(pairs(lab)) == lab.prompts - len(broken)
    derived = plant_references(lab)

    fakes(Behaviour(marks=str(marks)))
    Pipeline(recipe).run(["generate"])
    assert marks_of(marks) == 0 and failed_keys(lab) == set(wanted)  # not retried for ever

    Pipeline(recipe, retry_failed=True).run(["generate"])
    assert marks_of(marks) == len(wanted)  # those and no others
    assert check_complete(lab) == 2 * lab.prompts and not failed_keys(lab)
    assert not any(path.exists() for path in derived)  # made from rows that are no longer there
    Pipeline(recipe).run(["pair"])
    assert {row["prompt_id"]: row["chosen_score"] for row in pairs(lab)} == {key: 1.0 for key, _ in lab.wanted()}


def pairs(lab: Lab) -> list[dict[str, Any]]:
    rows = [
        row for path in (lab.out / "pairs/pairing=delta").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    for row in rows:
        assert row["chosen"][0]["content"] == answer_text("strong", row["prompt_id"], 0, lab.temperatures["strong"])
        assert row["rejected"][0]["content"] == answer_text("weak", row["prompt_id"], 0, lab.temperatures["weak"])
    return rows


def plant_references(lab: Lab) -> list[Path]:
    """Reference files as the reference pass would have left them; those beside files in which rows failed."""
    failed = {(name, prompt) for name, prompt, _ in failed_keys(lab)}
    beside = []
    for name in lab.temperatures:
        for path in (lab.out / "responses" / f"teacher={name}").glob("*.parquet"):
            target = f"{Store.references('student', name)}/{path.name}"
            Store(str(lab.out)).write_table(target, REFERENCES.empty_table(), REFERENCES)
            if any((name, prompt) in failed for prompt in pq.read_table(path)["prompt_id"].to_pylist()):
                beside.append(lab.out / target)
    assert beside
    return beside


def test_a_plainly_broken_run_stops_early(tmp_path: Path, fakes: Callable[[Behaviour], None]) -> None:
    lab = Lab(tmp_path, prompts=2000, shard_size=500, unit_size=4)
    lab.settings = {"failures": {"max_share": 0.3, "after": 20}}
    marks = tmp_path / "marks"
    marks.mkdir()
    fakes(Behaviour(failing=0.9, marks=str(marks), delay=0.02))
    with pytest.raises(StageError, match=r"failures\.max_share 0\.3") as caught:
        Pipeline(load_recipe(lab.write())).run(["generate"])
    assert caught.value.exit_code == 1
    assert "this row always fails" in str(caught.value) and "--retry-failed" in str(caught.value)
    assert marks_of(marks) < lab.prompts / 2


# --- a full disk --------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_the_command_and_room_lets_it_finish(tmp_path: Path, small_disk: Path) -> None:
    lab = Lab(tmp_path / "study", settings=SMALL | {"out": str(small_disk / "out")})
    recipe, ballast = str(lab.write()), small_disk / "ballast"
    lab.folder.joinpath("out").symlink_to(small_disk / "out")
    ballast.write_bytes(bytes(4 * 2**20 - 200 * 2**10))
    code, stderr = Command(lab, "generate", recipe).result()
    assert code == 1 and "No space left on device" in stderr and "run the same command again to resume" in stderr
    assert "Traceback" not in stderr
    for name in lab.temperatures:
        published(lab, name)
    ballast.unlink()
    code, stderr = Command(lab, "generate", recipe).result()
    assert code == 0, stderr
    check_complete(lab)
    assert not leftovers(small_disk / "out")
