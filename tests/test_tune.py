"""The exploration without a cluster: the space and its trials, refusals, room, the search's memory, results."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.recipe import Recipe, expand, load_recipe, recipe_folder
from deltaray.recipe.check import check_recipe
from deltaray.recipe.search_space import drawn, grid, holds, known_trials, trial_of
from deltaray.runtime.session import Capacity
from deltaray.train.reference.stage import references_needed
from deltaray.tune.conclude import conclude, front, points_of
from deltaray.tune.follow import Follower
from deltaray.tune.records import is_over, read_records, write_record
from deltaray.tune.results import change_of, over_seeds
from deltaray.tune.search import TpeSearch
from deltaray.tune.shared import at_once, count_of, sharing_trials, study_of, trial_demand
from deltaray.tune.stage import Explorer

CLUSTER = Capacity(8, 0)


def recipe_of(exploration=None, **more):
    given = {
        "name": "explore",
        "out": "unused",
        "prompts": {"path": "unused.jsonl"},
        "teachers": {name: {"model": f"models/{name}"} for name in ("a", "b", "c")},
        "scorers": {"exact": {"kind": "exact_match"}, "size": {"kind": "size", "sizes": {"a": 3, "b": 2, "c": 1}}},
        "pairings": {"named": {"chosen": "a", "rejected": "c", "scorer": "exact"}},
        "student": {"model": "models/student"},
        "training": {"heldout": 0.1, "workers": 2},
        "evaluation": {"tasks": {"sums": {"path": "unused.jsonl"}}},
        "exploration": {"pairing": {"scorer": "exact"}, **(exploration or {})},
    }
    return Recipe.model_validate(given | more)


def problems(exploration, **more):
    return [f"{'.'.join(map(str, at))}: {text}" for at, text in check_recipe(recipe_of(exploration, **more))]


def test_the_section_of_the_readme_is_an_exploration(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(exploration:.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names, file = ("larger", "smaller", "sft", "base"), "{path: p}"
    assert block is not None
    head = f"name: x\nout: {tmp_path}/out\nprompts: {file}\nstudent: {{model: m}}\ntraining: {{heldout: 0.1}}\n"
    head += f"teachers: {{{', '.join(f'{name}: {{model: m}}' for name in names)}}}\n"
    head += "scorers: {judge: {kind: judge, by: {model: m}}}\n"
    head += f"evaluation: {{tasks: {{jailbreaks: {file}}}, selection: {{held: {file}}}}}\n"
    (tmp_path / "recipe.yaml").write_text(head + block[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert known_trials(recipe) is None and count_of(expand(recipe)) == 40


# --- the space --------------------------------------------------------------------------------------------------
def test_every_ordered_pair_once_with_negative_deltas() -> None:
    trials = grid(recipe_of())
    assert {trial.label for trial in trials} == {f"{x} > {y}" for x in "abc" for y in "abc" if x != y}
    assert len({trial.name for trial in trials}) == len(trials) == 6
    assert all(trial.pairing.scorer == "exact" for trial in trials)


def test_a_grid_is_every_possible_combination() -> None:
    space = {"pairings": ["named"], "min_delta": [None, 0.5], "max_delta": [0.2, 1.0], "learning_rate": [1e-5, 1e-4]}
    trials = grid(recipe_of({"space": space, "pairing": {}}))
    windows = {(trial.pairing.min_delta, trial.pairing.max_delta) for trial in trials}
    assert windows == {(None, 0.2), (None, 1.0), (0.5, 1.0)} and len(trials) == 6  # 0.5 to 0.2 holds nothing
    assert len({trial.pairing_name for trial in trials}) == 3  # learning rates share their pairs


def test_what_a_loss_does_not_read_makes_no_second_trial() -> None:
    space = {"pairings": ["named"], "loss": ["dpo_norm", "dpo", "sft"], "beta": [None, 2.0]}
    runs = {(t.run.loss, t.run.beta) for t in grid(recipe_of({"space": space, "pairing": {}}))}
    assert runs == {("dpo_norm", 5.0), ("dpo_norm", 2.0), ("dpo", 0.1), ("dpo", 2.0), ("sft", None)}


def test_names_hold_what_decides_and_nothing_else() -> None:
    names = {trial.name for trial in grid(recipe_of())}
    assert names == {trial.name for trial in grid(recipe_of({"trials_at_once": 3, "max_failures": 0}))}
    assert names.isdisjoint(trial.name for trial in grid(recipe_of({"run": {"learning_rate": 1e-6}})))
    changed = recipe_of(training={"heldout": 0.2, "workers": 2})
    assert names.isdisjoint(trial.name for trial in grid(changed))
    [trial] = grid(recipe_of({"space": {"pairings": ["named"]}, "pairing": {}}))
    assert trial.pairing_name == "named"  # the recipe's own pairs are not written twice


def test_draws_are_different_and_more_of_them_only_add() -> None:
    search = {"search": "random", "space": {"learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}}}
    few, many = (drawn(recipe_of({**search, "samples": count}), count) for count in (5, 12))
    assert [t.name for t in few] == [t.name for t in many[:5]] and len({t.name for t in many}) == 12
    assert all(1e-6 <= t.run.learning_rate <= 1e-3 for t in many)
    small = recipe_of({"search": "random", "samples": 50})
    assert len(known_trials(small)) == 6


def test_a_space_holds_its_own_choices_and_no_others() -> None:
    space = {"learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}, "lora": [None, {"rank": 8}]}
    recipe = recipe_of({"search": "random", "samples": 5, "space": space})
    choice = drawn(recipe, 1)[0].choice
    assert holds(recipe, choice) and not holds(recipe, choice | {"learning_rate": 1.0})
    assert not holds(recipe, choice | {"pairing": "a > z"}) and not holds(recipe, choice | {"beta": 5.0})


@pytest.mark.parametrize(
    ("exploration", "message"),
    [
        ({"space": {"teachers": ["a"]}}, "space.pairings: an ordered pair needs two teachers, here are 1"),
        ({"space": {"teachers": ["a", "bb"]}}, "space.teachers.1: there is no teacher 'bb'; did you mean 'b'?"),
        ({"space": {"pairings": ["namd"]}, "pairing": {}}, "space.pairings.0: there is no pairing 'namd'; did you"),
        ({"space": {"pairings": []}, "pairing": {}}, "space.pairings: is empty"),
        ({"space": {"min_delta": [0.5], "max_delta": [0.1]}}, "space: is empty: every min_delta is above every"),
        ({"space": {"learning_rate": {"low": 1e-6, "high": 1e-5}}}, "learning_rate: a grid needs a list of choices"),
        ({"space": {"learning_rate": [-1.0]}}, "space.learning_rate: -1.0: value error, one positive number"),
        ({"space": {"pairs": [0]}}, "space.pairs: 0: input should be greater than or equal to 1"),
        ({"search": "random"}, "samples: is missing"),
        ({"samples": 5}, "samples: a grid tries every combination"),
        ({"space": {"min_delta": [0.5]}, "pairing": {}}, "keep, min_delta, max_delta and quantiles need scores"),
        ({"run": {"beta": 3, "loss": "dpo", "simpo_gamma": 1}}, "simpo_gamma: the loss 'dpo' does not read it"),
        ({"run": {"learning_rate": [1e-5, 1e-4]}}, "run.learning_rate: write the list as exploration.space"),
        ({"objectives": ["means"]}, "objectives.0: there is no objective 'means'; did you mean 'mean'?"),
        ({"asha": {"grace": 10}}, "asha.grace: no rung is left: training.heldout_evaluations is 10"),
        ({"asha": {"metric": "generated_score"}}, "asha.metric: needs answers that are scored"),
        ({"asha": {}, "space": {"loss": ["dpo", "sft"]}}, "asha.metric: the loss 'sft' has no accuracy"),
        ({"pairing": {"chosen": "a", "rejected": "b"}}, "pairing: `ordered` pairs two teachers sample by sample"),
    ],
)
def test_impossible_spaces_are_refused(exploration, message) -> None:
    [found] = problems(exploration)
    assert message in found


def test_an_exploration_needs_something_to_train_and_to_compare_on() -> None:
    assert "exploration: trains students: add a `training:` section" in problems({}, training=None)
    found = problems({}, training={"workers": 1}, evaluation=None)
    assert found == ["exploration.objectives: nothing tells which student is the best: add `evaluation:` or "
                     "`training.heldout: 0.05`"]  # fmt: skip


# --- shared work ------------------------------------------------------------------------------------------------
def test_21_pairings_share_seven_generations_and_seven_reference_passes() -> None:
    """The ladder's 21 pairings as a space: what is shared is asked for once per teacher, whatever the trials."""
    ladder = load_recipe(recipe_folder() / "qwen2.5-ladder.yaml")
    space = {"pairings": list(ladder.pairings), "learning_rate": [5e-8, 1e-7], "beta": [5.0, 10.0]}
    training = ladder.training.model_copy(update={"runs": {}})
    given = ladder.model_dump() | {"exploration": {"space": space}, "training": training.model_dump()}
    base = expand(Recipe.model_validate(given))
    trials = known_trials(base.recipe)
    study = study_of(base, sharing_trials(base))
    assert len(trials) == len(study.runs) == 84 and len(study.pairings) == 21
    assert base.paired_teachers() == list(base.teachers) and len(base.teachers) == 7
    needed = references_needed(study, study.runs.values())
    assert {student: sorted(teachers) for student, teachers in needed.items()} == {"student": sorted(base.teachers)}


def test_a_search_that_learns_shares_every_pairing_scorer_and_loss() -> None:
    exploration = {"search": "optuna", "samples": 9, "space": {"scorer": ["exact", "size"], "loss": ["dpo", "simpo"]}}
    base = expand(recipe_of(exploration))
    study = study_of(base, sharing_trials(base))
    assert len(study.runs) == 24 and {it.scorer for it in study.pairings.values()} == {"exact", "size"}
    assert set(references_needed(study, study.runs.values())["student"]) == {"a", "b", "c"}


def test_trials_exist_once_per_seed() -> None:
    teachers = {name: {"model": f"models/seed{{seed}}/{name}"} for name in ("a", "b")}
    recipe = recipe_of({"space": {"pairings": "ordered"}}, seeds=[0, 3], teachers=teachers, pairings={},
                       scorers={"exact": {"kind": "exact_match"}})  # fmt: skip
    base = expand(recipe)
    trial = grid(recipe)[0]
    study = study_of(base, [trial])
    assert list(study.runs) == [f"{trial.name}-seed0", f"{trial.name}-seed3"]
    assert [run.settings.seed for run in study.runs.values()] == [0, 3]
    assert study.pairings[f"{trial.pairing_name}-seed3"].chosen == "a-seed3"
    assert base.paired_teachers() == ["a-seed0", "b-seed0", "a-seed3", "b-seed3"]


# --- room -------------------------------------------------------------------------------------------------------
def test_trials_have_room_as_a_whole_or_wait() -> None:
    base = expand(recipe_of({"trials_at_once": 9}))
    assert trial_demand(base, CLUSTER) == Capacity(2.25, 0)  # two workers, or an engine and the tasks around it
    assert at_once(base, CLUSTER) == 3 and at_once(base, Capacity(100, 0)) == 9
    gpus = expand(recipe_of({"trials_at_once": 9}, training={"heldout": 0.1, "workers": 4}))
    assert trial_demand(gpus, Capacity(64, 10)).gpus == 4 and at_once(gpus, Capacity(64, 10)) == 2
    with pytest.raises(UserError, match=r"a trial needs 2.25 CPUs, the cluster has 2;"):
        at_once(base, Capacity(2, 0))
    explorer = Explorer(base, Store("unused"))
    assert "3 at once (9 are asked for, the cluster has 8 CPUs)" in explorer.room(CLUSTER)
    assert explorer.room(Capacity(0, 0)).startswith("9 at once as far as")  # a cluster that is joined later


# --- records and the search's memory ----------------------------------------------------------------------------
def finished(store, trial, value, **facts):
    own = {"objectives": {"mean": value}, "seeds": [0], "delta": {"mean": 0.1, "low": 0.0, "high": 0.2}}
    own |= {"gain": {"difference": value, "low": 0.0, "high": 1.0}, "seconds": {"train": 1.0}}
    run = {"seed": 0, "path": f"students/{trial.name}", "pairs": 10}
    return write_record(store, trial, "finished", **(own | {"runs": {trial.name: run}} | facts))


def test_trials_are_over_for_the_seeds_that_they_had(tmp_path: Path) -> None:
    store, (first, second, third, *_) = Store(str(tmp_path)), grid(recipe_of())
    finished(store, first, 0.5)
    write_record(store, second, "failed", reason="no pairs left", seeds=[0])
    write_record(store, third, "running")
    records = read_records(store)
    assert [is_over(records[it.name], [0]) for it in (first, second, third)] == [True, True, False]
    assert not is_over(records[first.name], [0, 1]) and not is_over(records[second.name], [0], retry_failed=True)
    base = expand(recipe_of())
    assert Explorer(base, store).left() == 4 and Explorer(base, store, retry_failed=True).left() == 5


DIED = "Traceback (most recent call last):\n  File x, line 1, in y\nMemoryError: no room\nKilled\n"


def test_trials_that_cannot_write_their_own_record_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that the scheduler stops, and one whose process dies: Ray Tune tells the driver of both."""
    monkeypatch.setattr(Follower, "_clear", lambda *_: None)  # it asks Ray to remove checkpoints
    store, recipe, said = Store(str(tmp_path)), recipe_of(), list[str]()
    shown = SimpleNamespace(update=lambda *_, **__: None)
    counts: list[dict[str, int]] = []
    follower = Follower(recipe, store, shown, said.append, counts.append, 3)
    first, second, third = grid(recipe)[:3]
    ends = {
        first.name: SimpleNamespace(config={"choice": first.choice}, last_result={"phase": "train", "evaluations": 2}),
        second.name: SimpleNamespace(config={"choice": second.choice}, last_result={}, get_error=lambda: DIED),
        third.name: SimpleNamespace(config={"choice": third.choice}, last_result={"phase": "finished", "mean": 0.5}),
    }
    follower.on_trial_complete(1, [], ends[first.name])
    follower.on_trial_error(1, [], ends[second.name])
    follower.on_trial_complete(1, [], ends[third.name])
    records = read_records(store)
    assert records[first.name]["state"] == "stopped" and "after evaluation 2" in records[first.name]["reason"]
    assert records[second.name]["reason"] == "died in every attempt: MemoryError: no room"
    assert counts[-1] == {"waiting": 0, "running": 0, "finished": 1, "stopped": 1, "failed": 1}
    assert third.name not in records and said[2].endswith("finished: mean 0.5")  # that one has written its own
    assert all(is_over(records[trial.name], [0]) for trial in (first, second))


def test_all_failed_is_a_failure_of_the_command(tmp_path: Path) -> None:
    store, base = Store(str(tmp_path)), expand(recipe_of())
    for trial in grid(base.recipe):
        write_record(store, trial, "failed", reason="no pairs left", seeds=[0])
    with pytest.raises(StageError, match="all 6 trials failed; the first: no pairs left"):
        Explorer(base, store).refuse_if_all_failed()
    conclude(base, store, read_records(store))  # a table of failures all the same
    assert store.read_table("tuning/trials.parquet")["reason"].to_pylist() == ["no pairs left"] * 6
    finished(store, grid(base.recipe)[0], 0.5)
    Explorer(base, store).refuse_if_all_failed()


def test_the_search_remembers_resumes_and_never_repeats() -> None:
    space = {"teachers": ["a", "b"], "learning_rate": [1e-6, 1e-5, 1e-4]}
    recipe = recipe_of({"search": "optuna", "samples": 6, "space": space})
    choices = [{"pairing": p, "learning_rate": rate} for p in ("a > b", "b > a") for rate in space["learning_rate"]]
    trials = [trial_of(recipe, choice) for choice in choices]
    records = {
        trial.name: {"name": trial.name, "choice": trial.choice, "state": "finished", "objectives": {"mean": 0.1 * n}}
        for n, trial in enumerate(trials[:3])
    }
    killed = {"name": trials[5].name, "choice": trials[5].choice, "state": "running"}
    search = TpeSearch(recipe, records | {trials[5].name: killed})
    assert len(search.study.trials) == 4  # what is known, and what is to be tried first
    asked = [search.suggest(f"t{n}") for n in range(4)]
    assert asked[0] == {"choice": trials[5].choice} and asked[3] == search.FINISHED
    names = {trial_of(recipe, it["choice"]).name for it in asked[:3]}
    assert names == {trial.name for trial in trials[3:]}
    search.on_trial_complete("t0", {"mean": 0.9})
    assert search.study.best_value == 0.9


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    exploration = {"search": "optuna", "samples": 3, "objectives": ["mean", "sums"]}
    recipe = recipe_of(exploration)
    search = TpeSearch(recipe, {})
    for number, values in enumerate(({"mean": 1.0, "sums": 0.2}, {"mean": 0.5, "sums": 0.9})):
        assert "choice" in search.suggest(str(number))
        search.on_trial_complete(str(number), values)
    assert len(search.study.best_trials) == 2
    values = {"x": (0.5, 0.9), "y": (1.0, 0.2), "z": (0.4, 0.8), "w": (1.0, 0.2)}
    records = {
        name: {"state": "finished", "objectives": {"mean": mean, "sums": sums}} for name, (mean, sums) in values.items()
    }
    assert front(records, ["mean", "sums"]) == ["y", "w", "x"] and front(records, ["sums"]) == ["x"]


# --- results ----------------------------------------------------------------------------------------------------
def test_the_table_the_best_and_the_points_come_from_the_records(tmp_path: Path) -> None:
    recipe = recipe_of({"space": {"learning_rate": [1e-5, 1e-4]}})
    store, trials = Store(str(tmp_path)), grid(recipe)
    for number, trial in enumerate(trials[:4]):  # two pairings at two learning rates
        finished(store, trial, [0.1, 0.3, 0.2, 0.15][number], gains=[0.1])
    write_record(store, trials[4], "stopped", reason="others were better", seeds=[0])
    write_record(store, trials[5], "running")
    records = read_records(store)
    conclude(expand(recipe), store, records)
    rows = {row["trial"]: row for row in store.read_table("tuning/trials.parquet").to_pylist()}
    assert rows[trials[1].name]["best"] and sum(row["best"] for row in rows.values()) == 1
    assert rows[trials[0].name]["learning_rate"] == 1e-5 and rows[trials[4].name]["gain"] is None
    lines = store.read_bytes("tuning/trials.csv").decode().splitlines()
    assert len(lines) == 7 and lines[0].startswith('"trial","pairing","state"')
    best = store.read_json("tuning/best.json")
    assert best["trial"] == trials[1].name and best["path"] == f"{tmp_path}/students/{trials[1].name}"
    points = points_of(records, "mean")
    assert sorted(point.gain for point in points) == [0.2, 0.3]  # of each pairing the better learning rate
    assert len(json.loads(store.read_bytes("tuning/landscape.json"))["points"]) == 2


def test_numbers_over_steps_and_seeds() -> None:
    lines = [{"logps_chosen": float(-n)} for n in range(20)]
    assert change_of(lines, "logps_chosen") == -15.0 and change_of(lines, "absent") is None
    assert change_of([{"logps_chosen": -1.0}, {"logps_chosen": -3.0}], "logps_chosen") == -2.0
    assert over_seeds([1.0, None, 3.0]) == {"mean": 2.0, "stderr": pytest.approx(1.0)}
    assert over_seeds([2.0]) == {"mean": 2.0, "stderr": None} and over_seeds([None])["mean"] is None


def test_the_landscape_recipe_has_twenty_pairs_at_three_seeds() -> None:
    recipe = load_recipe(recipe_folder() / "miniature-landscape.yaml")
    trials = grid(recipe)
    assert len(trials) == 20 and len(study_of(expand(recipe), trials).runs) == 60
    assert replace(trials[0], name="") != replace(trials[1], name="")
