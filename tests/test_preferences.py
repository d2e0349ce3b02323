"""An existing preference data set becomes prompts, responses and pairs that train without a teacher."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny

from deltaray.data.contracts import PAIRS, RESPONSES
from deltaray.data.prompts.preferences import check_preferences, preference_row, read_preferences, store_preferences
from deltaray.data.prompts.rows import RowError
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.pair.stage import pair
from deltaray.recipe import Recipe, expand, load_recipe
from deltaray.recipe.recipe import Preferences
from deltaray.score.stage import missing_scores, score

USER = {"role": "user", "content": "2+2="}
BETTER, WORSE = ({"role": "assistant", "content": text} for text in "45")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": "2+2=", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"prompt": "2+2=", "chosen": [BETTER], "rejected": "5", "source": None},
    ],
)
def test_the_forms_of_trl_and_open_instruct_say_the_same(row: dict[str, Any]) -> None:
    found = preference_row(row)
    assert found.prompt["messages"] == [USER] and found.texts == ("4", "5") and found.scores == (None, None)


def test_several_turns_are_the_prompt_but_for_the_last() -> None:
    turns = [USER, WORSE, {"role": "user", "content": "Sure?"}]
    found = preference_row(
        {"prompt": [USER], "chosen": [*turns, BETTER], "rejected": [*turns, WORSE], "chosen_score": 4}
    )
    assert found.prompt["messages"] == turns and found.scores == (4.0, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2+2=", "chosen": "4"}, "no `rejected`"),
        ({"chosen": "4", "rejected": "5"}, "needs a `prompt`"),
        ({"chosen": [USER], "rejected": [USER]}, "the last is the assistant's"),
        ({"chosen": [USER, BETTER], "rejected": [{"role": "user", "content": "?"}, WORSE]}, "different conversations"),
        ({"prompt": "2+2=", "chosen": 4, "rejected": 5}, "must be text, or turns"),
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5", "score_chosen": "high"}, "a score must be a number"),
    ],
)
def test_rows_that_are_no_preferences_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        preference_row(row)


def write(path: Path, rows: list[dict[str, Any]]) -> Preferences:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Preferences(path=str(path))


def test_mistakes_name_the_row_and_exchanged_columns_are_noticed(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"bad.jsonl:2: no `rejected`; the row has prompt, chosen"):
        list(read_preferences(write(tmp_path / "bad.jsonl", [good, {"prompt": "q", "chosen": "a"}])))
    swapped = [{**good, "prompt": f"q{n}", "chosen_score": 1 + n % 2, "rejected_score": 3} for n in range(5)]
    with pytest.raises(UserError, match=r"lower than rejected in 5 of 5 rows .* exchanged"):
        list(read_preferences(write(tmp_path / "swapped.jsonl", swapped)))
    with pytest.raises(UserError, match="holds no rows"):
        list(read_preferences(write(tmp_path / "empty.jsonl", [])))


def test_a_parquet_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["q"], "winner": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="no `chosen` and `rejected`; the columns are prompt, winner"):
        list(read_preferences(Preferences(path=str(tmp_path / "foreign.parquet"))))


def test_a_repeated_prompt_has_several_samples_in_its_own_shard(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 5}", "chosen": f"c{n}", "rejected": "" if n == 3 else f"r{n}"} for n in range(12)]
    section, store = write(tmp_path / "data.jsonl", rows), Store(str(tmp_path / "out"))
    assert check_preferences(store, section) == 5
    for _ in range(2):  # the second time there is nothing to do
        store_preferences(store, section, shard_size=4, unit_size=2)
    found = store.read_tables(Store.responses("chosen"), RESPONSES).to_pylist()
    assert sorted(row["text"] for row in found) == sorted(row["chosen"] for row in rows)
    assert len({(row["prompt_id"], row["sample"]) for row in found}) == 12
    for path in store.committed(Store.prompts):
        shard = path.rpartition("/")[2].removesuffix(".parquet")
        ids = set(store.read_table(path, ["prompt_id"])["prompt_id"].to_pylist())
        there = store.read_tables(Store.responses("chosen"), RESPONSES, ["prompt_id"], prefix=f"{shard}-")
        assert ids == set(there["prompt_id"].to_pylist())
    failed = [row["error"] for row in store.read_tables(Store.responses("rejected"), RESPONSES).to_pylist()]
    assert failed.count("empty answer") == 1
    write(tmp_path / "data.jsonl", rows[:-1])
    with pytest.raises(UserError, match="has changed"):
        check_preferences(store, section)


def test_preferences_are_scored_paired_and_ready_to_train(ray_session: Any, tmp_path: Path) -> None:
    answers = [(n % 20, n) for n in range(24)]
    rows = [
        {"prompt": f"{q}+{q}=", "chosen": str(2 * q), "rejected": f"{n} no", "chosen_score": 4, "rejected_score": n % 4}
        for q, n in answers
    ]
    section = write(tmp_path / "data.jsonl", rows)
    recipe = Recipe.model_validate(
        {
            "name": "given",
            "out": str(tmp_path / "out"),
            "preferences": section.model_dump(),
            "scorers": {"given": {"kind": "given"}},
            "pairings": {
                "all": {"chosen": "chosen", "rejected": "rejected", "scorer": "given"},
                "clear": {"chosen": "chosen", "rejected": "rejected", "scorer": "given", "min_delta": 3},
            },
            "student": {"model": save_tiny(tmp_path / "student"), "max_length": 64},
            "training": {"runs": {"delta": {"pairing": "all", "learning_rate": 1e-4}}},
        }
    )
    study, store = expand(recipe), Store(recipe.out)
    store_preferences(store, section, shard_size=8, unit_size=4)
    assert score(study, store) == 48 and not missing_scores(study, store)
    assert pair(study, store) == {"all": 24, "clear": 12}
    funnel = store.read_json(f"{Store.pairs('all')}/_funnel.json")
    assert funnel[0]["in"] == 20 and funnel[-1]["out"] == 24
    assert all(one["out"] == other["in"] for one, other in pairwise(funnel))
    assert {row["delta"] for row in store.read_tables(Store.pairs("clear"), PAIRS).to_pylist()} == {3.0, 4.0}
    _check_training(store, study)


def _check_training(store: Store, study: Any) -> None:
    """References of both sides, and the examples of a run that needs them."""
    from dataclasses import asdict

    from deltaray.data.tokens import load_tokenizer
    from deltaray.train.examples import read_data
    from deltaray.train.reference.blocks import missing_blocks
    from deltaray.train.reference.stage import references_needed
    from deltaray.train.reference.worker import ReferenceWorker

    student, run = study.students["student"], study.runs["delta"]
    worker = ReferenceWorker(store, "student", student, study.recipe.training)
    [(name, teachers)] = references_needed(study, [run]).items()
    assert teachers == ["chosen", "rejected"]
    for teacher in teachers:
        for block in missing_blocks(store, name, teacher):
            worker(asdict(block))
    data = read_data(store, run, student, load_tokenizer(student, "student").eos_token_id, 0)
    assert data.counts["pairs"] == data.counts["trained"] == len(data.train) == 24
    assert (data.train.references < 0).all()


def test_a_recipe_has_prompts_or_preferences(tmp_path: Path) -> None:
    def refusal(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(f"name: x\nout: {tmp_path}/out\n{text}")
        with pytest.raises(UserError) as error:
            load_recipe(tmp_path / "recipe.yaml")
        return str(error.value).replace(f"{tmp_path}/", "")

    assert "recipe.yaml:1: prompts: is missing" in refusal("teachers: {a: {model: m}}\n")
    both = "prompts: {path: p}\npreferences: {path: q}\nteachers: {a: {model: m}}\n"
    assert "recipe.yaml:4: preferences: brings its own prompts" in refusal(both)
    assert "teachers: is missing" in refusal("prompts: {path: p}\n")
    given = "prompts: {path: p}\nteachers: {a: {model: m}}\nscorers:\n  s: {kind: given}\n"
    assert "recipe.yaml:6: scorers.s.kind: only `preferences:` bring scores along" in refusal(given)
    unknown = given.replace("kind: given", "kind: gives")
    assert "recipe.yaml:6: scorers.s: kind 'gives' is not allowed; write one of: 'size'" in refusal(unknown)
    assert "scorers.s.tolerence: unknown key; did you mean 'tolerance'?" in refusal(
        given.replace("kind: given", "kind: numeric, tolerence: 1")
    )
    assert "scorers.s: `kind` is missing" in refusal(given.replace("kind: given", "tolerance: 1"))


# --- what a turn may hold -----------------------------------------------------------------------------------------
CALL = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]


def side(content: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content, **fields}]


@pytest.mark.parametrize(
    ("chosen", "text", "reasoning", "kind"),
    [
        (side("4", reasoning_content="two and two"), "4", "two and two", None),
        (side("4", thinking="hm", reasoning=None, tool_calls=None), "4", "hm", None),
        (side([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}]), "4", "hm", None),
        ("<think>hm</think>4", "<think>hm</think>4", None, None),
        (side("Let me see.", tool_calls=CALL), "Let me see.", None, "answer calls tools"),
        (side(None, tool_calls=CALL, reasoning="hm"), "", "hm", "answer calls tools"),
        (side(None), "", None, "empty answer"),
        (side("", reasoning="hm"), "", "hm", "empty answer"),
        ("caf\udce9", "caf\ufffd", None, "answer not Unicode"),
        ({"role": "assistant", "content": "4"}, "4", None, None),
    ],
)
def test_thoughts_and_calls_of_an_answer_are_kept_or_counted(
    chosen: Any, text: str, reasoning: str | None, kind: str | None
) -> None:
    found = preference_row({"prompt": [USER], "chosen": chosen, "rejected": "5"}).answers[0]
    assert (found.text, found.reasoning) == (text, reasoning)
    assert (found.error or "").partition(":")[0] == (kind or "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": side([{"type": "image_url", "image_url": {"url": "x"}}])}, "a part of type 'image_url'; only text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'; only text"),
        ({"chosen": side("4", reasoning="one", thinking="other")}, "two different thoughts"),
        ({"chosen": [USER, *side("so"), *side("4")]}, "`chosen` ends in two turns of the assistant"),
        ({"chosen": [USER, *side("4"), USER]}, "the last is the assistant's, not the user's"),
        ({"prompt": [USER], "chosen": [{"role": "user", "content": "?"}, *side("4")]}, "say different things"),
        ({"prompt": "?", "chosen": [USER, *side("4")]}, "`prompt` and the turns of `chosen` say different things"),
        ({"prompt": " "}, "`prompt` is empty"),
        ({"chosen": json.dumps(side("4"))}, "`chosen` is text that holds turns; write turns as a list"),
        ({"prompt": str([USER])}, "`prompt` is text that holds turns; write turns as a list"),
        ({"prompt": {"text": "?"}}, "`prompt` must be text, or turns"),
        ({"chosen": {"from": "gpt", "value": "4"}}, "must be text, or turns {role, content}"),
    ],
)
def test_conversations_that_cannot_be_meant_so_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        preference_row({"prompt": "2+2=", "chosen": "4", "rejected": "5"} | row)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "turns", "expected"),
    [
        ("2+2=", [{"role": "system", "content": "s"}], ["system", "user"]),
        ([{"role": "system", "content": "s"}, USER], [USER], ["system", "user"]),
        ([USER], [{"role": "system", "content": "s"}, USER], ["system", "user"]),
        ([{"role": "system", "content": "s"}], [USER], ["system", "user"]),
        ("2+2=", [{"role": "assistant", "content": "Welcome"}, USER], ["assistant", "user"]),
    ],
)
def test_a_prompt_and_turns_that_begin_elsewhere_are_joined(prompt: Any, turns: Any, expected: list[str]) -> None:
    found = preference_row({"prompt": prompt, "chosen": [*turns, BETTER], "rejected": [*turns, WORSE]})
    assert [turn["role"] for turn in found.prompt["messages"]] == expected


def test_calls_before_the_answer_must_be_the_same() -> None:
    before = [USER, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "1"}]
    other = [USER, before[1] | {"tool_calls": [{"function": {"name": "guess"}}]}, before[2]]
    assert preference_row({"chosen": [*before, BETTER], "rejected": [*before, WORSE]}).prompt["conversation"]
    with pytest.raises(RowError, match="different conversations"):
        preference_row({"chosen": [*before, BETTER], "rejected": [*other, WORSE]})


def test_answers_that_cannot_be_trained_are_stored_as_failed_and_told_of(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": side("x", tool_calls=CALL), "rejected": "y"},
        {"prompt": "b", "chosen": side("x", reasoning="hm"), "rejected": "y"},
    ]
    section, store, told = write(tmp_path / "data.jsonl", rows), Store(str(tmp_path / "out")), []
    assert check_preferences(store, section, told.append) == 2
    assert told == [
        "preferences.path: 1 of 4 answers call tools, which is not trained: the funnel counts their pairs "
        "('answer calls tools')"
    ]
    store_preferences(store, section, shard_size=4, unit_size=2)
    found = store.read_tables(Store.responses("chosen"), RESPONSES).to_pylist()
    assert [(row["error"] or "").partition(":")[0] for row in found] == ["answer calls tools", ""]
    assert [row["reasoning"] for row in found] == [None, "hm"]
    record = json.loads((tmp_path / "out" / ".deltaray" / "preferences.json").read_text())
    del record["reading"]["reader"]  # as an earlier version wrote it
    store.write_json(".deltaray/preferences.json", record)
    with pytest.raises(UserError, match=r"made by an earlier version .* use another `out`"):
        check_preferences(store, section)
