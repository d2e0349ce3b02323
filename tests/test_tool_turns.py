"""Turns that call tools and report back reach teachers, students and pairs as they are, or are refused aloud."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from paired import pair_all
from prompt_files import read, write
from tiny_model import make_tokenizer, save_tiny
from transformers import AutoTokenizer

from deltaray.data.contracts import PROMPTS
from deltaray.data.prompts import store_prompts
from deltaray.data.prompts.preferences import preference_row
from deltaray.data.store import Store
from deltaray.data.tokens.chat import NotShownError, render_prompt, render_prompts
from deltaray.data.tokens.response_tokens import Written, response_ids
from deltaray.errors import UserError
from deltaray.generate.completions import request_body
from deltaray.generate.units import Assignment, load_unit, missing_units
from deltaray.labs.miniature.tokenizer import build_tokenizer
from deltaray.recipe.models import Teacher
from deltaray.score.judge import questions_of
from deltaray.score.registry import section_of

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "são paulo"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "how is the weather"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": "21 <b>c</b>"}', "tool_call_id": "c1", "name": "get_weather"},
]
ORDINARY = [{"role": "user", "content": "1+1="}]
JSON_ARGUMENTS = '{"city": "são paulo"}'


def with_template(name: str) -> Any:
    tokenizer = build_tokenizer()  # every character a token
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def row_of(turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {"messages": turns} | ({"tools": tools} if tools else {})


# --- from the file ----------------------------------------------------------------------------------------------
def test_every_field_is_kept_beside_plain_turns(tmp_path: Path) -> None:
    odd = [{**turn, "weight": 0} for turn in TURNS]
    row, plain = read(write(tmp_path / "p.jsonl", [row_of(odd, [WEATHER]), {"messages": ORDINARY}]))
    assert json.loads(row["conversation"] or "") == {"messages": odd, "tools": [WEATHER]}
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant", "tool"]
    assert row["messages"][2]["content"] == "" and row["messages"][3]["content"] == TURNS[3]["content"]
    assert plain["conversation"] is None and plain["messages"] == ORDINARY


@pytest.mark.parametrize("change", [{"tool_calls": [CALL | {"id": "c2"}]}, {"tool_calls": [{"name": "other"}]}])
def test_what_is_called_tells_prompts_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    other = [*TURNS[:2], TURNS[2] | change, TURNS[3]]
    rows = read(write(tmp_path / "p.jsonl", [row_of(TURNS, None), row_of(other, None), row_of(TURNS, [WEATHER])]))
    assert len({row["prompt_id"] for row in rows}) == 3


def test_an_ordinary_prompt_keeps_its_id_and_other_fields_do_not_count(tmp_path: Path) -> None:
    marked = [{**ORDINARY[0], "timestamp": 7}]
    plain, same = (
        read(write(tmp_path / f"{n}.jsonl", [{"messages": it}]))[0] for n, it in enumerate([ORDINARY, marked])
    )
    assert plain == same and plain["prompt_id"] == hashlib.sha256(b'[["user", "1+1="]]').hexdigest()[:32]


def test_tables_fill_missing_fields_with_nulls_and_write_schemas_as_text(tmp_path: Path) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "rome"}'}
    turns = [TURNS[1], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "21", "name": "w"}]
    table = pa.table({"messages": [turns, ORDINARY], "tools": [json.dumps([WEATHER]), None]})
    pq.write_table(table, tmp_path / "p.parquet")
    row, plain = read(tmp_path / "p.parquet")
    whole = json.loads(row["conversation"] or "")
    assert whole["tools"] == [WEATHER] and whole["messages"][1]["tool_calls"] == [call]
    assert whole["messages"][0] == TURNS[1] and whole["messages"][2] == turns[2]
    assert plain["conversation"] is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (row_of([*ORDINARY, {"role": "assistant", "content": None}], None), "a turn needs a role"),
        (row_of(TURNS[:3], None), "the last turn must be the user's, or a tool's"),
        ({"messages": ORDINARY, "tools": "[{"}, "`tools` is text, but no JSON"),
        ({"messages": ORDINARY, "tools": ["get_weather"]}, "`tools` must be a list of function schemas"),
    ],
)
def test_mistakes_name_the_row_and_the_mend(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"p.jsonl:1: {words}"):
        read(write(tmp_path / "p.jsonl", [row]))


def test_preferences_bring_their_tools() -> None:
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    found = preference_row({"prompt": TURNS, "tools": [WEATHER], **sides})
    assert json.loads(found.prompt["conversation"] or "") == {"messages": TURNS, "tools": [WEATHER]}
    assert found.texts == ("chosen", "rejected")


# --- through the template ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, {"city": "são paulo"}) for name in ("qwen2_5", "qwen3", "llama3_1", "qwen3_6")),
        *((name, JSON_ARGUMENTS) for name in ("qwen2_5", "qwen3")),
    ],
)
def test_ids_are_the_templates_own(name: str, arguments: Any) -> None:
    tokenizer = with_template(name)
    call = CALL | {"function": {"name": "get_weather", "arguments": arguments}}
    turns = [*TURNS[:2], {"role": "assistant", "content": "", "tool_calls": [call]}, TURNS[3]]
    expected = tokenizer.apply_chat_template(
        turns, tools=[WEATHER], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert render_prompt(tokenizer, turns, [WEATHER]) == expected
    assert render_prompts(tokenizer, [ORDINARY, turns], [None, [WEATHER]])[0][1] == expected
    prompt = render_prompt(tokenizer, turns, [WEATHER])
    answer = response_ids(tokenizer, prompt, Written("warm"))
    answered = [*turns, {"role": "assistant", "content": "warm"}]
    whole = tokenizer.apply_chat_template(answered, tools=[WEATHER], tokenize=True, return_dict=False)
    assert whole[: len(prompt) + len(answer) - 1] == [*prompt, *answer[:-1]] and prompt == expected


@pytest.mark.parametrize(
    ("name", "turns", "tools", "words"),
    [
        ("llama3", TURNS[1:2], [WEATHER], "leaves out what tools ask or say: 'get_weather'"),
        ("phi3", [TURNS[1], TURNS[3]], None, "leaves out what tools ask or say"),
        ("gemma", TURNS[1:], None, "the chat template refuses it"),
    ],
)
def test_a_template_that_cannot_show_tools_refuses_the_prompt_alone(
    name: str, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, words: str
) -> None:
    tokenizer = with_template(name)
    ids, refused = render_prompts(tokenizer, [ORDINARY, turns], [None, tools])
    assert refused[0] is None and ids[0] == render_prompt(tokenizer, ORDINARY)
    assert ids[1] == [] and words in (refused[1] or "")


def test_a_schema_without_a_name_is_given_all_the_same() -> None:
    tokenizer, tools = with_template("qwen2_5"), [{"type": "web_search"}]
    expected = tokenizer.apply_chat_template(
        ORDINARY, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert render_prompts(tokenizer, [ORDINARY, ORDINARY], [tools, None]) == (
        [expected, render_prompt(tokenizer, ORDINARY)],
        [None, None],
    )


def test_a_lost_call_and_a_lost_answer_are_both_seen() -> None:
    tokenizer = make_tokenizer()  # writes role and content of every turn, and nothing else
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    render_prompt(tokenizer, [TURNS[1], TURNS[3]])
    with pytest.raises(NotShownError, match="get_weather"):
        render_prompt(tokenizer, [TURNS[1], *called, TURNS[3]])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<' + m['role']", "'' if m['role'] == 'tool' else '<' + m['role']"
    )
    with pytest.raises(NotShownError, match="21 <b>"):
        render_prompt(tokenizer, [TURNS[1], TURNS[3]])


# --- through the stages -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(one whose template knows tools, one whose template ignores them)."""
    folders = []
    for name in ("qwen2_5", "llama3"):
        folder = tmp_path_factory.mktemp(name)
        save_tiny(folder)
        with_template(name).save_pretrained(folder)
        folders.append(str(folder))
    return folders[0], folders[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "out"))
    rows = [row_of(TURNS, [WEATHER]) | {"id": "tools"}, {"messages": ORDINARY, "id": "plain"}]
    store_prompts(store, read(write(tmp_path / "p.jsonl", rows)), 8)
    return store


def unit_of(store: Store, model: str) -> dict[str, Any]:
    work = Assignment("t", Teacher(model=model, system="never used"), Store.prompts, Store.responses("t"), "i", 8)
    [unit] = missing_units(store, work)
    return load_unit(store, unit)


def test_the_teacher_is_given_all_of_it(store: Store, models: tuple[str, str]) -> None:
    unit = unit_of(store, models[0])
    expected = AutoTokenizer.from_pretrained(models[0]).apply_chat_template(
        TURNS, tools=[WEATHER], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert unit["token_ids"][0] == expected and unit["refused"] == [None, None]
    body = request_body(unit, 0, 0, {})
    assert body["messages"] == TURNS and body["tools"] == [WEATHER]
    assert "tools" not in request_body(unit, 1, 0, {})


def test_a_teacher_that_cannot_be_shown_it_fails_that_row(store: Store, models: tuple[str, str]) -> None:
    unit = unit_of(store, models[1])
    assert unit["refused"][1] is None and "leaves out" in unit["refused"][0]


@pytest.mark.parametrize("knows", [True, False])
def test_pairs_carry_it_or_say_that_the_student_cannot(store: Store, models: tuple[str, str], knows: bool) -> None:
    pairs, removed = pair_all(store, models[0 if knows else 1])
    assert removed["refused by the student's template"] == (not knows)
    assert [pair["prompt_id"] for pair in pairs] == ["tools", "plain"][not knows :]
    assert pairs[-1]["conversation"] is None
    if knows:
        assert json.loads(pairs[0]["conversation"]) == {"messages": TURNS, "tools": [WEATHER]}
        assert [turn["role"] for turn in pairs[0]["prompt"]] == [turn["role"] for turn in TURNS]
        expected = AutoTokenizer.from_pretrained(models[0]).apply_chat_template(
            TURNS, tools=[WEATHER], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert pairs[0]["prompt_token_ids"] == expected


def test_a_changed_call_under_the_same_id_is_refused(store: Store, tmp_path: Path) -> None:
    other = [*TURNS[:2], TURNS[2] | {"tool_calls": [CALL | {"id": "c2"}]}, TURNS[3]]
    rows = [row_of(other, [WEATHER]) | {"id": "tools"}, {"messages": ORDINARY, "id": "plain"}]
    with pytest.raises(UserError, match="prompt tools has another text"):
        store_prompts(store, read(write(tmp_path / "q.jsonl", rows)), 8)
    assert store.read_tables(Store.prompts, PROMPTS).num_rows == 2


def test_a_judge_reads_what_was_called() -> None:
    judge = section_of({"kind": "judge", "by": {"model": "m"}})
    [(_, [question]), *_] = questions_of(judge, TURNS, "warm")
    assert '"name": "get_weather"' in question["content"] and "21 <b>c</b>" in question["content"]
