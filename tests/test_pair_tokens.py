"""From stored responses to a student's pairs: one odd row costs its pair and is counted with its reason."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_model import TEMPLATE, make_tokenizer, save_tiny

from deltaray.data.contracts import PAIRS, PROMPTS, RESPONSES
from deltaray.data.store import Store
from deltaray.pair.shard import pair_shard
from deltaray.pair.stage import _Notes
from deltaray.pair.token_ids import files_by_shard, missing_tokens, tokenize_file
from deltaray.recipe.models import Student, Teacher

FUSSY = "{% if 'bad' in messages[0]['content'] %}{{ messages[0]['content'] + 1 }}{% endif %}" + TEMPLATE
SHARD = f"{Store.prompts}/00000.parquet"
SIDES = ("one", "two")


def row(prompt: str, teacher: str, text: str, **changes: Any) -> dict[str, Any]:
    blank = {"prompt_id": prompt, "sample": 0, "teacher": teacher, "text": text, "reasoning": None, "error": None}
    return blank | {"prompt_token_ids": [], "token_ids": [], "tokens": 1, "finish_reason": "stop"} | changes


@pytest.fixture
def pair_up(tmp_path: Path) -> Any:
    """Pairs two texts (or rows) per prompt; (the pairs, the result of the shard)."""

    def run(sides: dict[str, tuple[Any, Any]], template: str = FUSSY, max_length: int = 64, **spec: Any) -> Any:
        model = save_tiny(tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        store = Store(str(tmp_path / "out"))
        empty = dict.fromkeys(("answer", "source", "error", "conversation"))
        asked = [empty | {"prompt_id": it, "messages": [{"role": "user", "content": it}]} for it in sides]
        store.write_table(SHARD, pa.Table.from_pylist(asked, schema=PROMPTS), PROMPTS)
        for place, teacher in enumerate(SIDES):
            rows = [
                row(it, teacher, **(texts[place] if isinstance(texts[place], dict) else {"text": texts[place]}))
                for it, texts in sides.items()
            ]
            path = f"{Store.responses(teacher)}/00000-x.parquet"
            store.write_table(path, pa.Table.from_pylist(rows, schema=RESPONSES), RESPONSES)
        teachers = {name: Teacher(model=model) for name in SIDES}
        study: Any = type("Study", (), {"students": {"s": Student(model=model)}, "teachers": teachers})
        for unit in missing_tokens(study, store, [("s", name) for name in SIDES]):
            tokenize_file(store, unit)
        tokens = files_by_shard(store, "s", list(SIDES))
        unit = {
            "pairing": "p", "prompts": SHARD, "spec": {"chosen": "one", "rejected": "two", **spec},
            "samples": dict.fromkeys(SIDES, 1), "max_length": max_length, "dropped": {}, "chosen": {}, "write": True,
            "tokens": {name: tokens[name]["00000"] for name in SIDES},
        }  # fmt: skip
        result = pair_shard(store, unit)
        removed = {it["stage"]: it["removed"] for it in result["funnel"] if it["removed"]}
        return store.read_tables(Store.pairs("p"), PAIRS).to_pylist(), removed, result

    return run


def test_a_row_that_breaks_the_template_costs_its_pair_alone(pair_up: Any) -> None:
    pairs, removed, result = pair_up({"a": ("x", "y"), "bad": ("x", "y"), "c": ("x", "y")})
    assert [pair["prompt_id"] for pair in pairs] == ["a", "c"]
    assert removed == {"refused by the student's template": 1}
    notes = _Notes()
    notes.add(result)
    [line] = notes.lines("p", Student(model="-"))
    assert line.startswith("p: 1 candidates refused: the chat template refuses it: TypeError: can only concatenate str")


def test_sides_that_become_the_same_ids_are_identical(pair_up: Any) -> None:
    """By the cut to what fits, or because the ids that were stored are the same."""
    long = "abcdefgh"
    sides = {"a": (long + "x", long + "y"), "b": ("xy", "yx"), "c": (long + "xx", long)}
    pairs, removed, _ = pair_up(sides, max_length=11)  # 3 tokens of prompt, 7 of text and the end
    assert [pair["prompt_id"] for pair in pairs] == ["b"] and removed == {"identical in the student's tokens": 2}
    assert len(pair_up(sides, max_length=64)[0]) == 3
    kept, _, _ = pair_up(sides, max_length=11, drop_identical=False)
    assert len(kept) == 3


def test_thoughts_that_are_kept_apart_tell_sides_apart_and_reach_the_pairs(pair_up: Any) -> None:
    thinking = TEMPLATE.replace(
        "m['content'] }}",
        "('t' + m['reasoning'] + 't ' if m['reasoning'] else '') + m['content'] }}",
    )
    one, two = ({"text": "x", "reasoning": thought} for thought in ("why", "how"))
    pairs, removed, result = pair_up({"a": (one, two)}, template=thinking)
    assert not removed and result["thoughts"] == 1
    assert (pairs[0]["chosen_reasoning"], pairs[0]["rejected_reasoning"]) == ("why", "how")
    tokenizer = make_tokenizer()
    assert tokenizer.decode(pairs[0]["chosen_token_ids"]) == "twhyt x<eos>"


def test_ids_of_the_teacher_are_kept_where_they_spell_the_text(pair_up: Any) -> None:
    own = make_tokenizer().convert_tokens_to_ids(list("xy"))
    wrote = {"text": "xy", "token_ids": [*own, 1], "prompt_token_ids": [2, 3]}
    other = {"text": "xyz", "token_ids": own, "prompt_token_ids": [2, 3]}  # not what its ids say
    [pair], _, _ = pair_up({"a": (wrote, other)}, template=TEMPLATE)
    assert pair["chosen_token_ids"] == [*own, 1] and len(pair["rejected_token_ids"]) == 4


def test_any_failed_response_is_removed_whatever_its_error_says(pair_up: Any) -> None:
    failed = {"text": "", "error": "something new", "finish_reason": "error"}
    pairs, removed, _ = pair_up({"a": (failed, "y"), "b": ("x", "y")}, template=TEMPLATE)
    assert len(pairs) == 1 and removed == {"another failure": 1}
