"""Preference Delta Aggregation: what is planned, which adapters a merge takes, when it is made again, and the table."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from adapters import make_adapter
from adapters import merge as merge_folders
from conftest import deltaray
from safetensors.torch import load_file
from test_recipe import load, refusal
from tiny_model import save_tiny

from deltaray.data.contracts import RESPONSES
from deltaray.data.contracts import SCORES as SCORES_SCHEMA
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.results import evaluation_of, summarise
from deltaray.merge.aggregate.ranking import merged_deltas, ranked, validation_scores
from deltaray.merge.aggregate.results import aggregation
from deltaray.merge.aggregate.stage import demand_adapters, make_merge, missing_merges
from deltaray.merge.aggregate.table import aggregation_table, order_lines
from deltaray.recipe import Study, dump_recipe, expand
from deltaray.report import write_report
from deltaray.runtime.session import Capacity
from deltaray.study.plan import make_plan

RECIPE = """\
name: study
out: runs/study
prompts: {path: prompts.jsonl}
teachers:
  one: {model: models/one}
  two: {model: models/two}
  three: {model: models/three}
  weak: {model: models/weak}
pairings:
  one: {chosen: one, rejected: weak}
  two: {chosen: two, rejected: weak}
  three: {chosen: three, rejected: weak}
student: {model: models/student}
training:
  runs:
    late: {pairing: two, lora: {rank: 4}, after: d-one}
    d-one: {pairing: one, lora: {rank: 4}}
    d-two: {pairing: two, lora: {rank: 4}}
    d-three: {pairing: three, lora: {rank: 4}}
    joint: {pairing: [one, two, three], lora: {rank: 4}}
    grid: {pairing: one, learning_rate: [1e-5, 1e-4]}
    whole: {pairing: one}
merging:
  deltas: [d-one, d-two, d-three]
  methods:
    gam: {}
    sparse: {method: ties, density: 0.3}
evaluation:
  tasks:
    held_out: {path: held_out.jsonl}
  selection:
    validation: {path: validation.jsonl}
  claims: ["gam-3 > d-one"]
"""
SCORES = {"d-one": 0.4, "d-two": 0.6, "d-three": 0.4}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return expand(load(tmp_path, RECIPE, [f"out={tmp_path / 'out'}"]))


# --- planning -----------------------------------------------------------------------------------------------------
def test_merges_are_named_by_method_and_number_at_every_seed(tmp_path: Path) -> None:
    study = expand(load(tmp_path, RECIPE, ["seeds=[0,1]"]))
    names = [f"{name}-{count}-seed{seed}" for seed in (0, 1) for name in ("gam", "sparse") for count in (2, 3)]
    assert list(study.merges) == names
    merge = study.merges["sparse-2-seed1"]
    assert (merge.method, merge.count, merge.deltas) == ("ties", 2, ("d-one-seed1", "d-two-seed1", "d-three-seed1"))
    assert {name: study.evaluated[name].base for name in names[:2]} == {names[0]: "gam-2", names[1]: "gam-3"}
    assert list(expand(load(tmp_path, RECIPE, ["merging.counts=[3]"])).merges) == ["gam-3", "sparse-3"]
    recipe = load(tmp_path, RECIPE)
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_runs_stand_behind_those_they_go_on_from(study: Study) -> None:
    assert list(study.runs)[:2] == ["d-one", "late"] and study.runs["late"].after == "d-one"
    assert study.runs["joint"].pairings == ("one", "two", "three")


def test_only_deltas_and_candidates_answer_the_selection_tasks(study: Study) -> None:
    names = [name for name in [*study.runs, *study.merges, "student"] if study.selected_on(name)]
    assert names == ["d-one", "d-two", "d-three", "grid-lr1e-05", "grid-lr0.0001"]


def test_the_plan_tells_merges_between_training_and_evaluation(study: Study) -> None:
    items = make_plan(study, Store(study.recipe.out), None, Capacity(8, 0))
    stages = list(dict.fromkeys(item.stage for item in items))
    assert stages[-4:] == ["train", "merge", "evaluate", "report"]
    assert [item.name for item in items if item.stage == "merge"] == list(study.merges)
    assert {item.name for item in items if item.stage == "evaluate"} >= {*study.merges, "joint", "late"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[d-one, d-two", "[d-one, d-tow", "merging.deltas.1: there is no run 'd-tow'; did you mean 'd-two'?"),
        ("[d-one, d-two", "[d-one, d-one", "merging.deltas.1: names a run twice"),
        ("[d-one, d-two", "[d-one, whole", "merging.deltas.1: trains all weights; give training.runs.whole a `lora`"),
        ("d-two: {", "d-two: {learning_rate: [1e-5, 1e-4], ", "merging.deltas.1: is a grid; write one learning_rate"),
        ("d-two: {", "d-two: {seed: 3, ", "merging.deltas: adapters that are merged start alike"),
        ("sparse: {method: ties", "sparse: {method: tise", "methods.sparse.method: there is no merge method 'tise'"),
        ("    gam: {}", "    gma: {}", "methods.gma: there is no merge method 'gma'; did you mean 'gam'?"),
        ("sparse: {", "spar/se: {", "merging.methods.spar/se: names become folders"),
        ("gam: {}", "gam: {density: 0.5}", "methods.gam.density: the method 'gam' does not take it"),
        ("density: 0.3", "density: 1.3", "methods.sparse.density: 1.3: write less than or equal to 1"),
        ("    joint:", "    gam-2:", "methods.gam: its merge 'gam-2' has the name of another model; rename"),
        ("gam-3 > d-one", "gam-4 > d-one", "evaluation.claims.0: there is no model 'gam-4'; did you mean 'gam-"),
        ("after: d-one", "after: grid", "runs.late.after: is a grid, whose best is known only after the evaluation"),
        ("after: d-one", "after: whole", "runs.late.after: goes on with what whole trains: write the same `lora`"),
        ("after: d-one", "after: late", "runs.late.after: leads back to itself"),
        ("after: d-one", "after: nobody", "runs.late.after: there is no run 'nobody'"),
        ("{rank: 4}, after", "{rank: 4}, loss: kto, after", "runs.late.after: kto takes the weights it starts from"),
        ("[one, two, three], lora", "[one, tow, three], lora", "runs.joint.pairing.1: there is no pairing 'tow'"),
        ("[one, two, three], lora", "[], lora", "runs.joint.pairing: is empty"),
    ],
)
def test_refusals_name_the_key_and_the_mend(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in RECIPE
    assert message in refusal(tmp_path, RECIPE.replace(before, after, 1))


def test_counts_and_selection_are_checked(tmp_path: Path) -> None:
    assert "merging.counts.0: write numbers from 2 to 3" in refusal(tmp_path, RECIPE, ["merging.counts=[4]"])
    assert "add tasks to find it on as `evaluation.selection`" in refusal(
        tmp_path, RECIPE, ["evaluation.selection={}", "training.runs.grid.learning_rate=1e-5"]
    )


# --- which adapters, and when -------------------------------------------------------------------------------------
def test_the_best_on_the_selection_tasks_come_first_and_lead(study: Study) -> None:
    assert ranked(("d-one", "d-two", "d-three"), SCORES) == ["d-two", "d-one", "d-three"]
    assert merged_deltas(study.merges["gam-2"], SCORES) == ["d-two", "d-one"]


def train_adapters(study: Study, folder: Path, seeds: dict[str, int]) -> Store:
    """Commits an adapter for each delta, as training would."""
    store = Store(study.recipe.out)
    for name, seed in seeds.items():
        store.put_folder(make_adapter(folder / f"{name}-{seed}", seed), Store.adapter(name))
    return store


def merge_missing(study: Study, store: Store, scores: dict[str, float]) -> list[str]:
    missing = missing_merges(study, store, scores)
    for merge in missing:
        make_merge(store, merge, scores, lambda done, total: None)
    return [merge.name for merge in missing]


def test_a_merge_is_made_once_and_again_when_what_it_is_made_of_changes(study: Study, tmp_path: Path) -> None:
    store = train_adapters(study, tmp_path, {"d-one": 1, "d-two": 2, "d-three": 3})
    assert merge_missing(study, store, SCORES) == ["gam-2", "gam-3", "sparse-2", "sparse-3"]
    assert merge_missing(study, store, SCORES) == []
    answers = f"{Store.evaluation_responses('gam-3', 'held_out')}/part-00000.parquet"
    store.write_table(answers, RESPONSES.empty_table(), RESPONSES)
    train_adapters(study, tmp_path, {"d-three": 4})  # only the merges of three hold it
    assert merge_missing(study, store, SCORES) == ["gam-3", "sparse-3"]
    assert not store.exists(answers)  # they were those of another adapter
    assert merge_missing(study, store, SCORES | {"d-one": 0.5}) == []  # the order is the same
    assert merge_missing(study, store, SCORES | {"d-one": 0.3}) == ["gam-2", "gam-3", "sparse-2", "sparse-3"]
    settings = study.merges["gam-2"].settings.model_copy(update={"restore_norm": True})
    changed = replace(study, merges={"gam-2": replace(study.merges["gam-2"], settings=settings)})
    assert merge_missing(changed, store, SCORES | {"d-one": 0.3}) == ["gam-2"]


def test_a_merge_is_that_of_the_command_with_the_best_delta_as_reference(study: Study, tmp_path: Path) -> None:
    store = train_adapters(study, tmp_path, {"d-one": 1, "d-two": 2, "d-three": 3})
    make_merge(store, study.merges["gam-3"], SCORES, lambda done, total: None)  # of two, any reference does
    folders = [tmp_path / name for name in ("d-one-1", "d-two-2", "d-three-3")]
    merge_folders(folders, tmp_path / "wanted", reference=str(folders[1]))
    merge_folders(folders, tmp_path / "astray", reference=str(folders[0]))
    places = (tmp_path / "out/adapters/gam-3", tmp_path / "wanted", tmp_path / "astray")
    found, wanted, astray = (load_file(place / "adapter_model.safetensors") for place in places)
    updates = [{key: _update(tensors, key) for key in found if "lora_B" in key} for tensors in (found, wanted, astray)]
    assert updates[0].keys() and all(np.allclose(updates[0][key], updates[1][key], atol=1e-6) for key in updates[0])
    assert any(not np.allclose(updates[0][key], updates[2][key], atol=1e-3) for key in updates[0])


def _update(tensors, key):
    return (tensors[key].double() @ tensors[key.replace("lora_B", "lora_A")].double()).numpy()


def test_a_merge_that_was_killed_before_its_record_is_made_again(study: Study, tmp_path: Path) -> None:
    store = train_adapters(study, tmp_path, {"d-one": 1, "d-two": 2, "d-three": 3})
    store.put_folder(tmp_path / "d-one-1", Store.adapter("gam-2"))  # as far as it had come
    assert "gam-2" in [merge.name for merge in missing_merges(study, store, SCORES)]


def test_deltas_that_are_not_trained_are_asked_for(study: Study, tmp_path: Path) -> None:
    store = train_adapters(study, tmp_path, {"d-one": 1, "d-two": 2})
    with pytest.raises(UserError, match="run d-three is not trained yet; run `deltaray train` first"):
        demand_adapters(study, store)


def test_the_command_merges_from_a_recipe_whose_deltas_have_answered(tmp_path: Path) -> None:
    """No engine starts: the answers to the selection task are there."""
    model = save_tiny(tmp_path / "model")
    text = re.sub(r"models/\w+", model, RECIPE)
    for name in ("prompts", "held_out", "validation"):
        rows = [{"id": f"{name}{number}", "prompt": f"{name} {number}+1=", "answer": "2"} for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        text = text.replace(f"path: {name}.jsonl", f"path: {tmp_path}/{name}.jsonl")
    study = expand(load(tmp_path, text, overrides := [f"out={tmp_path / 'out'}"]))
    recipe = (str(tmp_path / "recipe.yaml"), "--set", *overrides)
    store = train_adapters(study, tmp_path, {"d-one": 1, "d-two": 2, "d-three": 3})
    for name, right in {"d-one": 1, "d-two": 3, "d-three": 2}.items():
        answer(store, name, "validation", right, of=4, prompt="validation")
    merged, again = deltaray("merge", *recipe), deltaray("merge", *recipe)
    assert (merged.code, again.code) == (0, 0), merged.stderr + again.stderr
    assert "merge: 4 adapters to do" in merged.stderr and "answers to do" not in merged.stderr
    assert "merge: nothing to do (4 merges are up to date)" in again.stderr
    made = store.definition(Store.adapter("gam-2"))
    assert made is not None and [name for name, _ in made["adapters"]] == ["d-two", "d-three"]


# --- the table ----------------------------------------------------------------------------------------------------
def answer(store: Store, model: str, task: str, right: int, of: int = 100, prompt: str = "p") -> None:
    key = [{"prompt_id": f"{prompt}{number}", "sample": 0} for number in range(of)]
    said = {"teacher": model, "text": "", "prompt_token_ids": [], "token_ids": [], "tokens": 0, "finish_reason": "stop"}
    answers = pa.Table.from_pylist([row | said for row in key], schema=RESPONSES)
    scored = [row | {"score": float(number < right)} for number, row in enumerate(key)]
    scores, file = pa.Table.from_pylist(scored, schema=SCORES_SCHEMA), "part-00000-0abc.parquet"
    store.write_table(f"{Store.evaluation_responses(model, task)}/{file}", answers, RESPONSES)
    store.write_table(f"{Store.evaluation_scores(model, task)}/{file}", scores, SCORES_SCHEMA)


def evaluated(study: Study, right: dict[str, list[int]], validation: dict[str, list[int]]) -> tuple[Store, dict]:
    """A store with answers of every model at every seed, and what `evaluation_of` makes of them."""
    store, results = Store(study.recipe.out), {}
    tasks = study.recipe.evaluation.tasks
    for name, model in study.evaluated.items():
        if model.base in right:
            answer(store, name, "held_out", right[model.base][model.seed])
            results[name] = evaluation_of(store, name, name, tasks)
        if model.base in validation:
            answer(store, name, "validation", validation[model.base][model.seed])
    return store, results


RIGHT = {
    "student": [50, 50], "d-one": [60, 62], "d-two": [58, 64], "d-three": [55, 55], "late": [40, 44],
    "joint": [61, 61], "gam-2": [66, 70], "gam-3": [70, 72], "sparse-2": [65, 65], "sparse-3": [64, 66],
}  # fmt: skip
VALIDATION = {"d-one": [60, 60], "d-two": [50, 70], "d-three": [40, 40]}


def test_the_table_compares_every_model_with_the_student_and_the_delta_that_validation_chose(tmp_path: Path) -> None:
    text = RECIPE.replace("models/student", "'models/{seed}'")
    study = expand(load(tmp_path, text, ["seeds=[0,1]", f"out={tmp_path / 'out'}"]))
    store, results = evaluated(study, RIGHT, VALIDATION)
    found = aggregation(study, store, results)
    assert found is not None
    assert found["order"] == {
        "0": ["d-one-seed0", "d-two-seed0", "d-three-seed0"],
        "1": ["d-two-seed1", "d-one-seed1", "d-three-seed1"],
    }
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "student", "d-one", "d-two", "d-three", "best single", "late", "joint",
        "gam-2", "gam-3", "sparse-2", "sparse-3",
    ]  # fmt: skip
    assert rows["best single"]["mean"]["values"] == pytest.approx([0.60, 0.64])  # not the best on what is reported
    gain = np.array([0.70 - 0.60, 0.72 - 0.64])
    assert rows["gam-3"]["over_best"]["difference"] == pytest.approx(gain.mean())
    assert rows["gam-3"]["over_student"]["difference"] == pytest.approx(0.21)
    low, high = rows["gam-3"]["over_best"]["low"], rows["gam-3"]["over_best"]["high"]
    assert low < gain.min() < gain.max() < high and (low + high) / 2 == pytest.approx(gain.mean())
    assert rows["student"]["over_student"] is None and rows["best single"]["over_best"] is None
    table = aggregation_table(found, ["held_out"])
    assert (
        table.row_count == len(rows) and "seed 0: on the selection tasks d-one-seed0 (60.0) >" in order_lines(found)[0]
    )


def test_the_report_shows_the_table(study: Study) -> None:
    store, results = evaluated(study, RIGHT, VALIDATION)
    for name, result in results.items():
        store.write_json(Store.evaluation(name), result)
    store.write_json(
        "evaluation/summary.json", summarise(study, store) | {"aggregation": aggregation(study, store, results)}
    )
    page = Path(write_report(store)).read_text()
    assert "Merged deltas" in page and "could not be read" not in page
    rows = page.partition("Table of merged deltas")[2].partition("</table>")[0].partition("<tbody>")[2].split("</tr>")
    gam = next(row for row in rows if ">gam-3<" in row)
    assert ">merge<" in gam and ">3<" in gam and "70.0" in gam and "+10.0 (" in gam and "+20.0 (" in gam


def test_with_one_seed_intervals_are_over_prompts(study: Study) -> None:
    store, results = evaluated(study, RIGHT, VALIDATION)
    found = aggregation(study, store, results)
    assert found is not None
    gain = next(row for row in found["rows"] if row["name"] == "gam-3")["over_best"]
    assert gain["difference"] == pytest.approx(0.10) and gain["method"] == "paired bootstrap over prompts, 95 %"
    assert 0 < gain["low"] < 0.10 < gain["high"]
    assert validation_scores(study, store) == {"d-one": 0.6, "d-two": 0.5, "d-three": 0.4}


def test_there_is_no_table_before_all_merges_are_evaluated(study: Study) -> None:
    store, results = evaluated(study, {key: value for key, value in RIGHT.items() if key != "gam-3"}, VALIDATION)
    assert aggregation(study, store, results) is None
