"""What is missing, what becomes visible and what steps aside: the bookkeeping of generation, without any engine."""

import itertools
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answered import respond

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store
from deltaray.generate.answer import work_of
from deltaray.generate.archive import supersede
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import commit_unit, error_of
from deltaray.generate.stage import responses_table, seeded
from deltaray.generate.staging import failures, publish, rows_done, waiting_folders
from deltaray.generate.units import Assignment, missing_units, responses_in, unit_blocks, with_system
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.models import Sampling, Teacher
from deltaray.runtime.session import Capacity
from deltaray.runtime.threads import as_room_allows, startable
from deltaray.study.status import _rate

HERE = "responses/teacher=t"
Key = tuple[str, int]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"p{n}", "messages": [{"role": "user", "content": str(n)}],
            "answer": None, "source": None, "error": None,
        }
        for n in range(first, last)
    ]  # fmt: skip


def teacher(samples: int = 1, **sampling: Any) -> Teacher:
    return Teacher(model="m", sampling=Sampling(samples=samples, **sampling))


def answered(store: Store, unit: dict[str, Any], broken: set[Key] = frozenset(), say: str = "") -> dict[str, Any]:  # type: ignore[assignment]
    """The unit as an engine would hand it on: each answer says which it is."""
    ids = store.read_table(unit["prompts"], ["prompt_id"])["prompt_id"].take(unit["rows"]).to_pylist()
    outputs = [[output(f"{say}{item}#{n}", (item, n) in broken) for n in unit["samples"]] for item in ids]
    return unit | {"prompt_ids": ids, "token_ids": [[1]] * len(ids), "outputs": outputs}


def output(text: str, broken: bool) -> dict[str, Any]:
    good = {"token_ids": [2, 3], "tokens": 2, "text": text, "reasoning": None, "finish_reason": "stop", "error": None}
    return good | ({"text": "", "finish_reason": "error", "error": "out of luck"} if broken else {})


def commit(store: Store, units: list[dict[str, Any]], **how: Any) -> None:
    for unit in units:
        commit_unit(store, responses_table, answered(store, unit, **how))


def publish_waiting(store: Store, who: Teacher, destination: str = HERE) -> None:
    identity = identity_digest(generation_identity(who))
    for folder, retry in list(waiting_folders(store, destination, identity)):
        publish(store, destination, folder, retry, RESPONSES)


def visible(store: Store, destination: str = HERE) -> dict[Key, str]:
    found = store.read_tables(destination, RESPONSES).to_pylist()
    keys = [(row["prompt_id"], row["sample"]) for row in found]
    assert len(set(keys)) == len(keys)
    return {key: row["text"] for key, row in zip(keys, found, strict=True)}


def owed(store: Store, who: Teacher, retry: bool = False, unit_size: int = 4) -> list[dict[str, Any]]:
    identity = identity_digest(generation_identity(who))
    return missing_units(store, Assignment("t", who, Store.prompts, HERE, identity, unit_size, retry))


# --- blocks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_blocks_cover_every_missing_cell_once_and_stay_small(seed: int) -> None:
    draw = np.random.default_rng(seed)
    missing = draw.random((draw.integers(1, 60), draw.integers(1, 5))) < draw.random()
    unit_size = int(draw.integers(1, 20))
    blocks = list(unit_blocks(missing, unit_size))
    cells = Counter(cell for block, samples in blocks for cell in itertools.product(block, samples))
    assert cells == Counter(zip(*(place.tolist() for place in np.nonzero(missing)), strict=True))
    assert all(len(block) * len(samples) <= max(unit_size, len(samples)) for block, samples in blocks)


def test_blocks_of_an_interrupted_shard_are_those_of_the_first_run() -> None:
    everything = np.ones((50, 1), dtype=bool)
    first = [tuple(block) for block, _ in unit_blocks(everything, 8)]
    left = everything.copy()
    left[[*first[1], *first[4]]] = False
    again = [tuple(block) for block, _ in unit_blocks(left, 8)]
    assert set(again) == set(first) - {first[1], first[4]}


# --- missing, staged, published -----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_interrupted_every_response_is_published_once(store: Store, seed: int) -> None:
    """Units are committed in any order, some twice, prompts and samples are added, publishing is cut off anywhere."""
    draw = random.Random(seed)
    count, samples = 0, 1
    for _ in range(12):
        if draw.random() < 0.3:
            count += draw.randint(1, 9)
            store_prompts(store, rows(0, count), 8)
        samples += draw.random() < 0.2
        who = teacher(samples)
        units = owed(store, who, unit_size=draw.choice([2, 3, 7]))
        chosen = draw.sample(units, draw.randint(0, len(units)))
        commit(store, [*chosen, *chosen[:1]])
        before = visible(store)
        if len(chosen) == len(units) and draw.random() < 0.8:
            publish_waiting(store, who)
        after = visible(store)
        assert before.items() <= after.items()
        assert rows_done(store, HERE) >= len(after)
    commit(store, owed(store, teacher(samples)))
    publish_waiting(store, teacher(samples))
    assert visible(store) == {(f"p{n}", s): f"p{n}#{s}" for n in range(count) for s in range(samples)}
    assert owed(store, teacher(samples)) == [] and rows_done(store, HERE) == count * samples


def test_publishing_cut_off_before_units_are_deleted_can_be_repeated(store: Store) -> None:
    store_prompts(store, rows(0, 8), 8)
    commit(store, owed(store, teacher()))
    [(folder, _)] = waiting_folders(store, HERE, identity_digest(generation_identity(teacher())))
    staged = {path: store.read_table(path) for path in store.committed(folder)}
    publish_waiting(store, teacher())
    for path, table in staged.items():  # as if the process had died between the two
        store.write_table(path, table, RESPONSES)
    assert owed(store, teacher()) == []
    publish_waiting(store, teacher())
    assert len(visible(store)) == 8 and not store.committed(folder)


def test_more_samples_ask_only_for_the_new_ones(store: Store) -> None:
    store_prompts(store, rows(0, 10), 4)
    commit(store, owed(store, teacher(1)))
    publish_waiting(store, teacher(1))
    units = owed(store, teacher(3))
    assert {tuple(unit["samples"]) for unit in units} == {(1, 2)} and responses_in(units) == 20


def test_a_unit_is_named_after_what_it_holds(store: Store) -> None:
    store_prompts(store, rows(0, 8), 8)
    names = {unit["staged"] for unit in owed(store, teacher(1))}
    assert len(names) == 2 and names == {unit["staged"] for unit in owed(store, teacher(1))}
    assert not names & {unit["staged"] for unit in owed(store, teacher(2), unit_size=8)}
    assert not names & {unit["staged"] for unit in owed(store, teacher(1, temperature=0.5))}


# --- failures -----------------------------------------------------------------------------------------------------
def test_failed_rows_are_kept_not_retried_and_replaced_on_demand(store: Store) -> None:
    store_prompts(store, rows(0, 8), 4)
    commit(store, owed(store, teacher()), broken={("p1", 0), ("p6", 0)})
    publish_waiting(store, teacher())
    assert owed(store, teacher()) == [] and len(visible(store)) == 8
    assert failures(store, store.committed(HERE)) == {"engine error": 2}
    for kind in ("scores/scorer=exact", "references/student=s"):
        for path in store.committed(HERE):
            store.write_bytes(path.replace("responses", kind, 1), b"worked out from it")

    commit(store, owed(store, teacher(), retry=True)[:1], say="again ")
    publish_waiting(store, teacher())
    now = visible(store)
    assert len(now) == 8 and [text for text in now.values() if text.startswith("again")] == ["again p1#0"]
    assert responses_in(owed(store, teacher(), retry=True)) == 1
    for kind in ("scores/scorer=exact", "references/student=s"):  # only what came from the changed file is gone
        assert len(store.committed(f"{kind}/teacher=t")) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"text": " \n"}, "empty answer"),
        (
            {"text": "", "reasoning": "hm", "finish_reason": "length"},
            "empty answer: the reasoning was cut at max_tokens",
        ),
        ({"error": "no room"}, "engine error: no room"),
        ({"error": "prompt refused: invalid UTF-8"}, "prompt refused: invalid UTF-8"),
    ],
)  # fmt: skip
def test_why_a_response_counts_as_failed(changes: dict[str, Any], reason: str | None) -> None:
    assert error_of(output("fine", False) | changes) == reason


# --- other settings -----------------------------------------------------------------------------------------------
def study_with(store: Store, **sampling: Any) -> Study:
    who = {"model": "m", "sampling": sampling}
    recipe = {"name": "s", "out": store.out, "prompts": {"path": "p.jsonl"}, "teachers": {"t": who}}
    return expand(Recipe.model_validate(recipe))


def generate_all(store: Store, study: Study, say: str) -> dict[Key, str]:
    supersede(study, store)
    who = study.teachers["t"]
    identity = identity_digest(generation_identity(who))
    assignment = Assignment("t", seeded("t", who), Store.prompts, HERE, identity, 4)
    commit(store, work_of(store, assignment).units, say=say)
    publish_waiting(store, who)
    return visible(store)


def test_other_settings_never_mix_and_come_back(store: Store) -> None:
    store_prompts(store, rows(0, 8), 4)
    store.define(HERE, generation_identity(study_with(store).teachers["t"]))
    cold = generate_all(store, study_with(store), "cold ")
    hot = generate_all(store, study_with(store, temperature=1.0), "hot ")
    assert all(text.startswith("hot") for text in hot.values()) and len(hot) == 8
    assert generate_all(store, study_with(store), "a second time ") == cold
    assert generate_all(store, study_with(store, temperature=1.0), "a second time ") == hot


def test_a_system_prompt_does_not_replace_the_conversations_own() -> None:
    asked, own = {"role": "user", "content": "?"}, {"role": "system", "content": "own"}
    assert with_system([asked], "be brief") == [{"role": "system", "content": "be brief"}, asked]
    assert with_system([own, asked], "be brief") == [own, asked]


# --- room on the cluster ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(10))
def test_jobs_never_need_more_than_there_is_and_all_run(seed: int) -> None:
    draw = random.Random(seed)
    capacity = Capacity(8, 4)
    needs = [Capacity(draw.choice([1, 2, 4, 9]), draw.choice([0, 1, 2, 4])) for _ in range(12)]
    waiting, running, finished = list(range(12)), [], []
    while waiting or running:
        for job in startable(waiting, [needs[job] for job in running], needs, capacity):
            waiting.remove(job)
            running.append(job)
        together = [needs[job] for job in running]
        assert running and (len(running) == 1 or sum(need.cpus for need in together) <= 8)
        assert len(running) == 1 or sum(need.gpus for need in together) <= 4
        finished.append(running.pop(draw.randrange(len(running))))
    assert sorted(finished) == list(range(12))


def test_a_failing_job_ends_the_wait() -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        as_room_allows([fail, fail], [Capacity(1, 0)] * 2, Capacity(1, 0))


# --- a task of a killed command that lives on for a moment ----------------------------------------------------------
@pytest.mark.parametrize("publishing", [False, True])
def test_units_that_somebody_else_publishes_meanwhile_are_found_where_they_went(
    store: Store, monkeypatch: pytest.MonkeyPatch, publishing: bool
) -> None:
    store_prompts(store, rows(0, 8), 8)
    commit(store, owed(store, teacher()))
    [(folder, _)] = waiting_folders(store, HERE, identity_digest(generation_identity(teacher())))
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    read, seen = Store.read_table, list[str]()

    def read_late(self: Store, path: str, *arguments: Any, **named: Any) -> Any:
        """The other one publishes just when the first unit is about to be read."""
        if path.startswith(folder) and not seen:
            seen.append(path)
            publish_waiting(store, teacher())
        return read(self, path, *arguments, **named)

    monkeypatch.setattr(Store, "read_table", read_late)
    assert (publish(store, HERE, folder, False, RESPONSES) if publishing else owed(store, teacher())) in (0, [])
    assert seen and len(visible(store)) == 8


@pytest.mark.parametrize("ahead", [0.0, 3600.0], ids=["one clock", "the storage's clock is ahead"])
def test_the_rate_is_that_of_the_commits(ahead: float, store: Store) -> None:
    respond(store, "t", prompts=30, shard_size=10, say=lambda n, k: "yes")
    now = time.time() + ahead
    for path, age in zip(sorted(Path(store.out, HERE).glob("*.parquet")), (20.0, 15.0, 10.0), strict=True):
        os.utime(path, (now - age, now - age))
    rate = _rate(store, HERE)
    assert rate == pytest.approx(20 / (20 if not ahead else 10), rel=0.05)
