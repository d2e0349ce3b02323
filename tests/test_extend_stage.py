"""Extended prompts in the store: what is kept of them, each exactly once, and through the command."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from completions_server import completion, serving
from crashing import crashes
from extensions import KINDS, SHARES, is_asked_as_user, row, section
from paired import pair_all
from prompt_files import write
from tiny_model import make_tokenizer, save_tiny

import deltaray.study.pipeline
from deltaray.data.contracts import EXTENSIONS, PROMPTS, RESPONSES
from deltaray.data.prompts.source import check_source, store_source
from deltaray.data.store import Store
from deltaray.data.tokens.chat import render_prompt
from deltaray.errors import UserError
from deltaray.generate.extend.multi_turn import Talk
from deltaray.generate.extend.rules import drawn_kind
from deltaray.generate.extend.stage import (
    COUNTS,
    draw_origins,
    extension_work,
    extensions_table,
    is_extended,
    store_extended,
)
from deltaray.generate.pools import commit_unit
from deltaray.generate.requests import failed
from deltaray.generate.staging import publish
from deltaray.generate.units import load_unit
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.check import check_recipe
from deltaray.runtime.session import Capacity
from deltaray.study.checks import prompt_source
from deltaray.study.definitions import definitions
from deltaray.study.pipeline import Pipeline
from deltaray.study.plan import make_plan


# --- what is kept -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_what_is_too_long_cut_or_nothing_new_is_dropped_with_its_reason(model: str) -> None:
    origin, between = row("1+1=")["messages"], {"role": "assistant", "content": "2"}
    said = [[{"role": "user", "content": "x" * n}, between, *origin] for n in (20, 21)]
    limit = len(render_prompt(make_tokenizer(), said[0]))
    whole = {"token_ids": [], "tokens": 3, "reasoning": None, "finish_reason": "stop", "error": None}
    outputs = [whole | {"text": json.dumps(messages)} for messages in [*said, [*origin, between, *origin]]]
    outputs += [whole | {"text": "half a", "finish_reason": "length"}, whole | {"text": " "}, failed("out of luck")]
    unit = {
        "prompt_ids": list("abcdef"),
        "destination": Store.extended("related_query"),
        "outputs": [[it] for it in outputs],
    }
    student = expand(recipe_at("o", "p", model)).students["student"].model_dump_json()
    kept, long, same, cut, empty, broken = extensions_table(student, limit, unit).to_pylist()
    assert kept["messages"] == said[0] and kept["tokens"] == limit and kept["dropped"] is kept["error"] is None
    assert long["dropped"] == f"too long: {limit + 1} tokens, more than {limit}" and long["messages"] == said[1]
    assert same["dropped"].startswith("echo: ") and cut["dropped"].startswith("cut: ") and cut["messages"] == []
    assert cut["error"] is None and empty["error"] == "empty answer" and broken["error"] == "engine error: out of luck"
    repeated = extensions_table(student, limit, {**unit, "destination": Store.extended("repeat")}).to_pylist()
    assert repeated[2]["dropped"] is None


# --- exactly once -----------------------------------------------------------------------------------------------
PROMPTS_THERE = 24


def recipe_at(out: str | Path, prompts: str | Path, model: str, **extensions: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "turns", "out": str(out), "prompts": {"path": str(prompts)}, "shard_size": 10, "unit_size": 4,
            "teachers": {"a": {"model": model}, "b": {"model": model}}, "student": {"model": model},
            "extensions": {"by": {"model": model, "system": "be kind"}, "max_tokens": 500, **SHARES, **extensions},
        }
    )  # fmt: skip


class Scribe:
    """An engine that writes something of its own for every question, and fails where `fails` says so."""

    def __init__(self, fails: str | None = None) -> None:
        self.asked: list[str] = []
        self.fails = fails

    async def generate(self, unit: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        for name, messages, ids in zip(unit["prompt_ids"], unit["messages"], unit["token_ids"], strict=True):
            assert ids == render_prompt(make_tokenizer(), messages)
            assert (messages[0]["content"] == "be kind") is not is_asked_as_user(messages)
            self.asked.append(name)
        return [[self.answer(name)] for name in unit["prompt_ids"]]

    def answer(self, name: str) -> dict[str, Any]:
        if self.fails and name.startswith(self.fails):
            return failed("out of luck")
        fields = {"token_ids": [1], "tokens": 1, "reasoning": None, "finish_reason": "stop", "error": None}
        return {"text": f"turn {name.replace('#', ' ')}"} | fields

    def close(self) -> None:
        pass


def complete(study: Study, store: Store, engine: Scribe, retry: bool = False) -> None:
    """What `deltaray generate` does before teachers answer, in one process."""
    assert study.extensions is not None
    store.claim(definitions(study))
    store_source(store, prompt_source(study), study.recipe.shard_size, study.recipe.unit_size, Store.origins)
    draw_origins(study, store)
    student = study.students["student"].model_dump_json()
    for unit in (unit for work in extension_work(study, store, retry) for unit in work.units):
        loaded = load_unit(store, unit)
        outputs = asyncio.run(Talk(engine, study.extensions).generate(loaded))
        commit_unit(store, lambda unit: extensions_table(student, 500, unit), loaded | {"outputs": outputs})
    for work in extension_work(study, store, retry):
        for folder, again in work.waiting:
            publish(store, work.assignment.destination, folder, again, EXTENSIONS)
    store_extended(study, store)


@pytest.fixture
def study(tmp_path: Path, model: str) -> Study:
    rows = [{"prompt": f"what is {n}+{n}?", "answer": str(2 * n), "source": "sums"} for n in range(PROMPTS_THERE)]
    return expand(recipe_at(tmp_path / "out", write(tmp_path / "p.jsonl", rows), model))


def stored(store: Store) -> dict[str, dict[str, Any]]:
    rows = store.read_tables(Store.prompts, PROMPTS).to_pylist()
    assert len({item["prompt_id"] for item in rows}) == len(rows)
    return {item["prompt_id"]: item for item in rows}


def test_a_crash_at_any_write_loses_and_repeats_nothing(model: str, tmp_path: Path) -> None:
    """Three prompts; their reading, which is as without extensions, is done before."""
    few = dict.fromkeys(KINDS) | {"self_talk": {"share": 0.5, "turns": 4}, "repeat": {"share": 0.3}}
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"what is {n}+{n}?"} for n in range(3)])
    small = expand(recipe_at("unused", prompts, model, **few).model_copy(update={"shard_size": 4, "unit_size": 2}))
    base = Store(str(tmp_path / "base"))
    base.claim(definitions(small))
    store_source(base, prompt_source(small), 4, 2, Store.origins)
    whole = Store(str(shutil.copytree(tmp_path / "base", tmp_path / "whole")))
    complete(small, whole, Scribe())
    wanted = stored(whole)
    assert {item["source"] for item in wanted.values()} == {None, "self_talk", "repeat"}
    for store in crashes(tmp_path / "base", tmp_path / "crashed", lambda store: complete(small, store, Scribe())):
        staged = (path for kind in KINDS for path in store.listing(f".deltaray/units/{Store.extended(kind)}"))
        done = {name for path in staged for name in store.read_table(path, ["prompt_id"])["prompt_id"].to_pylist()}
        engine = Scribe()
        complete(small, store, engine)
        assert stored(store) == wanted and is_extended(small, store)
        assert not done & {name.partition("#")[0] for name in engine.asked}


def test_what_is_not_drawn_stays_and_what_is_drawn_appears_once_as_a_conversation(study: Study, model: str) -> None:
    store, engine = Store(study.recipe.out), Scribe()
    assert study.extensions is not None
    items = {item.name: item for item in make_plan(study, store, PROMPTS_THERE, Capacity(8, 0))}
    assert items["repeat"].total is None and items["a"].total is None and items["a"].stage == "generate"
    complete(study, store, engine)
    origins = list(prompt_source(study).rows())
    kinds = {item["prompt_id"]: drawn_kind(study.extensions, item) for item in origins}
    found = stored(store)
    assert set(Counter(kinds.values())) == {None, *KINDS}
    assert all(found[item["prompt_id"]] == item for item in origins if kinds[item["prompt_id"]] is None)
    by_source = Counter(item["source"] for item in found.values())
    for kind in KINDS:
        assert by_source[f"sums/{kind}"] == sum(it == kind for it in kinds.values())
    counts = store.read_json(COUNTS)
    assert {kind: count["extended"] for kind, count in counts.items()} == {
        kind: by_source[f"sums/{kind}"] for kind in KINDS
    }
    pairs, _ = pair_all(store, model)
    assert {pair["prompt_id"] for pair in pairs} == set(found)
    for pair in pairs:
        assert pair["prompt"] == found[pair["prompt_id"]]["messages"] and pair["conversation"] is None
        assert [len(pair[side]) for side in ("chosen", "rejected")] == [1, 1] and pair["chosen"] != pair["rejected"]
        assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
    items = {item.name: item for item in make_plan(study, store, PROMPTS_THERE, Capacity(8, 0))}
    assert items["repeat"].finished and items["a"].total == len(found)


def test_prompts_can_be_added_and_failures_tried_again(study: Study, tmp_path: Path) -> None:
    store = Store(study.recipe.out)
    assert study.extensions is not None
    drawn = [item["prompt_id"] for item in prompt_source(study).rows() if drawn_kind(study.extensions, item)]
    complete(study, store, Scribe(fails=drawn[0]))
    before = stored(store)
    lost = {kind: count["failed"] for kind, count in store.read_json(COUNTS).items() if count["failed"]}
    assert list(lost.values()) == [{"engine error": 1}] and len(before) == PROMPTS_THERE - 1
    complete(study, store, engine := Scribe())
    assert engine.asked == [] and stored(store) == before  # nobody asked to try again
    complete(study, store, engine := Scribe(), retry=True)
    assert {name.partition("#")[0] for name in engine.asked} == {drawn[0]}
    again = stored(store)
    assert len(again) == PROMPTS_THERE and again.items() >= before.items()
    more = [json.loads(line) for line in Path(study.recipe.prompts.path).read_text().splitlines()]  # type: ignore[union-attr]
    write(tmp_path / "p.jsonl", [*more, *({"prompt": f"and {n}?", "source": "sums"} for n in range(20))])
    complete(study, store, engine := Scribe())
    assert len(stored(store)) == PROMPTS_THERE + 20 and stored(store).items() >= again.items()
    assert not {name.partition("#")[0] for name in engine.asked} & set(drawn) and engine.asked


def test_equal_conversations_count_once(study: Study, tmp_path: Path) -> None:
    rows = [{"prompt": "what?", "id": str(n), "source": "sums"} for n in range(30)]
    recipe = study.recipe.model_dump() | {"prompts": {"path": write(tmp_path / "same.jsonl", rows)}}
    recipe["extensions"] |= dict.fromkeys(KINDS[:3]) | {"repeat": {"share": 1}}
    same, store = expand(Recipe.model_validate(recipe)), Store(study.recipe.out)
    engine = Scribe()
    engine.answer = lambda name: Scribe.answer(engine, "always the same")  # type: ignore[method-assign]
    complete(same, store, engine)
    assert len(stored(store)) == 1
    assert store.read_json(COUNTS)["repeat"]["dropped"] == {"same conversation": 29}


# --- mistakes ---------------------------------------------------------------------------------------------------
def test_other_extensions_need_another_out(study: Study, tmp_path: Path) -> None:
    store = Store(study.recipe.out)
    complete(study, store, Scribe())
    for change in ({"seed": 1}, {"repeat": {"share": 0.2}}):
        other = study.recipe.model_dump()
        other["extensions"] |= change
        with pytest.raises(UserError, match="prompts: extensions was"):
            store.claim(definitions(expand(Recipe.model_validate(other))))
    plain = expand(Recipe.model_validate(study.recipe.model_dump() | {"extensions": None}))
    with pytest.raises(UserError, match="prompts: extensions was"):
        store.claim(definitions(plain))
    with pytest.raises(UserError, match="no longer in the prompts"):
        check_source(store, prompt_source(expand(shorter(study, tmp_path))), Store.origins)


def shorter(study: Study, folder: Path) -> Recipe:
    path = write(folder / "short.jsonl", [{"prompt": "what is 0+0?", "answer": "0", "source": "sums"}])
    return Recipe.model_validate(study.recipe.model_dump() | {"prompts": {"path": path}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extensions": {"by": {"model": "m"}}}, "no kind is asked for"),
        ({"student": None}, "`max_tokens` counts the student's tokens"),
        (
            {"extensions": {"by": {"model": "m"}, "repeat": {"share": 0.6}, "self_talk": {"share": 0.5}}},
            "add up to 1.1",
        ),
        (
            {"extensions": {"by": {"model": "m", "sampling": {"samples": 2}}, "repeat": {"share": 0.6}}},
            "one conversation is written per prompt",
        ),
        (
            {
                "extensions": {
                    "by": {"model": "m"},
                    "repeat": {"share": 0.6, "sources": ["a"]},
                    "self_talk": {"share": 0.5, "sources": ["a", "b"]},
                }
            },
            "the shares of source 'a' add up to 1.1",
        ),
    ],
)
def test_contradictions_are_told(change: dict[str, Any], words: str) -> None:
    recipe = Recipe.model_validate(recipe_at("o", "p.jsonl", "m").model_dump() | change)
    assert any(words in text for _, text in check_recipe(recipe))


@pytest.mark.parametrize("kind", [{"self_talk": {"share": 1, "turns": 10}}, {"repeat": {"share": 1, "turns": 7}}])
def test_more_turns_than_the_limit_are_refused(kind: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="less than or equal"):
        section(**kind)


# --- on Ray -----------------------------------------------------------------------------------------------------
def says(request: dict[str, Any], attempt: int) -> Any:
    """As a user something new for every question, as an assistant the number of turns it was shown."""
    messages = request["messages"]
    asked = is_asked_as_user(messages)
    return completion(f"and {request['seed']}?" if asked else f"after {len(messages)} turns")


def test_generate_extends_first_and_asks_nobody_twice(
    ray_session: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltaray.study.pipeline, "stop_ray", lambda: None)  # this process's Ray outlives the pipeline
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows: list[dict[str, Any]] = [{"prompt": f"what is {n}+{n}?", "source": "sums"} for n in range(PROMPTS_THERE)]
    path = write(tmp_path / "p.jsonl", [*rows, {"prompt": "use a tool", "tools": tools}])
    with serving(says) as (server, url):
        served = {"model": "served", "endpoint": {"url": url}, "sampling": {"temperature": 0.5}}
        recipe = recipe_at(tmp_path / "out", path, model).model_dump() | {"teachers": {"a": served}, "name": "served"}
        recipe["extensions"] |= {"by": served | {"system": "be kind"}}
        pipeline = Pipeline(Recipe.model_validate(recipe))
        pipeline.run(["generate"])
        asked = list(server.requests)
        Pipeline(pipeline.recipe).run(["generate"])
        assert len(server.requests) == len(asked)
    found = stored(pipeline.store)
    assert len(found) == PROMPTS_THERE + 1 and {f"sums/{kind}" for kind in KINDS} < {
        it["source"] for it in found.values()
    }
    answers = {row["prompt_id"]: row for row in pipeline.store.read_tables(Store.responses("a"), RESPONSES).to_pylist()}
    assert answers.keys() == found.keys()
    for prompt_id, item in found.items():
        said = [turn["content"] for turn in item["messages"] if turn["role"] == "assistant"]
        kind = str(item["source"]).rpartition("/")[2]
        shown = [2 * n + 2 for n in range(len(said))]  # a system turn, and all turns up to the question
        assert said == [f"after {turns} turns" for turns in shown], kind
        assert answers[prompt_id]["text"] == f"after {len(item['messages'])} turns"
    assert [request["tools"] for request in asked if "tools" in request] == [tools]
    written = sum(len(item["messages"]) - 1 for item in found.values())
    given = sum(len(item["messages"]) // 2 for item in found.values() if item["source"] == "sums/repeat")
    assert len(asked) == len(found) + written - given  # one request per response and per written turn
