"""What is made again, and what is not: files are told apart by their content, not by their names or their number."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from answered import ask, respond

from deltaray.data.contracts import PAIRS, REFERENCES, RESPONSES, SCORES
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.stage import _inputs, is_concluded
from deltaray.pair.prompts import filter_digest
from deltaray.pair.stage import inputs_of, is_paired
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.filters import DuplicatePrompt
from deltaray.report import is_reported, write_report
from deltaray.score.compare import AGREEMENT, is_compared
from deltaray.score.compare import _inputs as compared
from deltaray.score.stage import missing_scores, score_file
from deltaray.study.stages import Stages
from deltaray.train.reference.blocks import blocks_of, missing_blocks
from deltaray.train.staleness import note_pairs, outdated_in

LISTS = ("tasks", "seeds", "claims", "comparisons", "differences")
SUMMARY: dict[str, Any] = {key: [] for key in LISTS} | {"names": {}, "missing": {}}
SCORE = {"prompt_id": "p000", "sample": 0, "score": 1.0, "note": None, "parts": None}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    pairing = {"chosen": "weak", "rejected": "weaker", "scorer": "exact"}
    return expand(
        Recipe.model_validate(
            {
                "name": "current", "out": str(tmp_path / "out"), "prompts": {"path": "unused.jsonl"},
                "teachers": {"weak": {"model": "unused"}, "weaker": {"model": "unused"}},
                "scorers": {"exact": {"kind": "exact_match"}}, "pairings": {"all": pairing},
                "student": {"model": "unused", "max_length": 64},
                "training": {"runs": {"delta": {"pairing": "all", "learning_rate": 1e-4}}},
            }
        )
    )  # fmt: skip


@pytest.fixture
def store(study: Study) -> Store:
    """Responses and scores of two teachers, and pairs that are said to be made from them."""
    store = Store(study.recipe.out)
    ask(store, 4, 2)
    for teacher in ("weak", "weaker"):
        respond(store, teacher, 4, 2, lambda n, _: str(n))
    for unit in missing_scores(study, store):
        score_file(store, unit)
    store.write_table(Store.pair_shard("all", "part-00000"), PAIRS.empty_table(), PAIRS)
    store.write_json(".deltaray/pairs/all.json", {"inputs": inputs_of(study, store, "all")})
    return store


def rewrite(store: Store, path: str, schema: pa.Schema, **changes: Any) -> None:
    """The file again under its name with another first row, if any; of the same size and time as far as possible."""
    before = store.filesystem.get_file_info(path)
    first, *others = store.read_table(path, schema=schema).to_pylist()
    made_from = store.source(path)
    store.write_table(
        path, pa.Table.from_pylist([first | changes, *others], schema=schema), schema, made_from=made_from
    )
    os.utime(f"{store.out}/{path}", ns=(before.mtime_ns, before.mtime_ns))


def first_file(store: Store, folder: str) -> str:
    return store.committed(folder)[0]


def test_a_files_content_tells_it_from_any_other(tmp_path: Path) -> None:
    store, values = Store(str(tmp_path)), {}
    for name, last in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        rows = [SCORE, SCORE | {"prompt_id": "p001", "score": last}]
        path = f"scores/part-{name}.parquet"
        store.write_table(path, pa.Table.from_pylist(rows, schema=SCORES), SCORES, made_from=f"of {name}")
        values[name] = store.content(path)
        assert store.source(path) == f"of {name}"
        assert store.read_table(path).schema.metadata is None  # nothing that would keep files apart from each other
    assert values["a"] == values["b"] != values["c"]
    assert store.digest(["scores"]) == Store(str(tmp_path)).digest(["scores"]) != store.digest(["scores"], 1)


def test_scores_that_changed_under_their_names_make_pairs_again(study: Study, store: Store) -> None:
    assert is_paired(study, store, "all")
    path = first_file(store, Store.scores("exact", "weaker"))
    rewrite(store, path, SCORES)
    assert is_paired(study, store, "all")  # the same scores
    rewrite(store, path, SCORES, score=0.5)
    assert not is_paired(study, store, "all")


@pytest.mark.parametrize("teacher", ["weak", "weaker"])
def test_responses_that_changed_are_scored_and_paired_again(study: Study, store: Store, teacher: str) -> None:
    assert not missing_scores(study, store)
    path = first_file(store, Store.responses(teacher))
    rewrite(store, path, RESPONSES, text="9")
    assert [unit["responses"] for unit in missing_scores(study, store)] == [path]
    assert not is_paired(study, store, "all")


def test_scores_that_do_not_say_what_they_are_made_from_stay(study: Study, store: Store) -> None:
    """An earlier version wrote them, and a judge's cost money."""
    path = first_file(store, Store.scores("exact", "weak"))
    store.write_table(path, store.read_table(path, schema=SCORES), SCORES)
    assert store.source(path) is None and not missing_scores(study, store)


def test_references_of_other_responses_are_missing(study: Study, store: Store) -> None:
    for block in blocks_of(store, "student", "weak"):
        rows = [{"prompt_id": "p000", "sample": 0, "logp": -1.0, "tokens": 1}]
        table = pa.Table.from_pylist(rows, schema=REFERENCES)
        store.write_table(block.path("student"), table, REFERENCES, made_from=block.source)
    assert not missing_blocks(store, "student", "weak")
    rewrite(store, first_file(store, Store.responses("weak")), RESPONSES, text="9")
    assert [block.start for block in missing_blocks(store, "student", "weak")] == [0]


def test_students_are_not_trained_on_pairs_of_other_responses(study: Study, store: Store) -> None:
    stages = Stages(study, store, SimpleNamespace(say=lambda *_: None), False)  # type: ignore[arg-type]
    note_pairs(store, "delta", ["all"])
    store.write_bytes(f"{Store.student('delta')}/.complete", b"")
    assert not list(outdated_in(study, store))
    rewrite(store, first_file(store, Store.responses("weak")), RESPONSES, text="9")
    [note] = outdated_in(study, store)
    assert note.startswith("delta was trained on pairs of all whose responses or scores changed since; run `deltaray")
    store.delete([f"{Store.student('delta')}/.complete"])
    with pytest.raises(
        UserError, match=r"pairing all: its responses or scores are others .* run `deltaray pair` first"
    ):
        stages.train()


def test_agreement_summaries_and_filters_follow_contents(study: Study, store: Store) -> None:
    store.write_json(AGREEMENT, {"inputs": compared(study, store), "scorers": [], "agreement": []})
    assert is_compared(study, store)
    rewrite(store, first_file(store, Store.responses("weak")), RESPONSES, tokens=9)
    assert not is_compared(study, store)
    before = filter_digest(store, DuplicatePrompt(kind="duplicate_prompt"))
    ask(store, 6, 2)
    assert filter_digest(store, DuplicatePrompt(kind="duplicate_prompt")) != before


def test_a_report_of_other_files_is_written_again(store: Store) -> None:
    assert not is_reported(store)
    write_report(store)
    assert is_reported(store)
    store.write_table(Store.pair_shard("all", "part-00001"), PAIRS.empty_table(), PAIRS)
    assert not is_reported(store)


def test_a_run_that_version_0_1_defined_is_still_the_same(store: Store) -> None:
    store.define("training/delta", {"early": [2], "beta": 5.0})
    store.claim({"training/delta": {"intermediate_checkpoints": [2], "beta": 5.0}})
    with pytest.raises(UserError, match=r"training/delta: intermediate_checkpoints was \[2\] and is now \[3\]"):
        store.claim({"training/delta": {"intermediate_checkpoints": [3], "beta": 5.0}})


def test_a_summary_of_other_answers_is_not_the_last_word(study: Study, store: Store) -> None:
    evaluation = SimpleNamespace(claims=[], names=[])
    evaluated: Any = SimpleNamespace(recipe=SimpleNamespace(evaluation=evaluation), evaluated={})
    folder = Store.evaluation_scores("m", "t")
    store.write_table(f"{folder}/part-00000.parquet", pa.Table.from_pylist([SCORE], schema=SCORES), SCORES)
    store.write_json("evaluation/summary.json", SUMMARY)
    assert not is_concluded(evaluated, store)  # as after a kill, or of an earlier version
    store.write_json(Store.evaluated, {"inputs": _inputs(store)})
    assert is_concluded(evaluated, store)
    rewrite(store, f"{folder}/part-00000.parquet", SCORES, score=0.0)
    assert not is_concluded(evaluated, store)
