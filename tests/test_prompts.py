"""Prompts: every accepted form gives the same rows; every mistake names file, row and mend; shards only grow."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaray.contracts import PROMPTS
from deltaray.errors import UserError
from deltaray.prompts import read_prompts, store_prompts
from deltaray.store import Store

ROWS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "source": "sums"} for n in range(10)]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_forms_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "p.jsonl", ROWS)
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    lines = ["prompt,answer,source", *(f"{row['prompt']},{row['answer']},sums" for row in ROWS)]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    expected = read_prompts(jsonl, "prompts.path")
    assert len(expected) == 10 and expected[0]["messages"] == [{"role": "user", "content": "What is 0 + 1?"}]
    for name in ("p.json", "p.parquet", "p.csv"):
        assert read_prompts(str(tmp_path / name), "prompts.path") == expected


def test_messages_and_ids_are_kept(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1+1?"},
    ]
    [row] = read_prompts(write(tmp_path / "p.jsonl", [{"messages": turns, "id": 7}]), "prompts.path")
    assert row["messages"] == turns and row["prompt_id"] == "7"


def test_the_id_is_a_stable_hash_of_the_messages(tmp_path: Path) -> None:
    [row] = read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "1+1?"}]), "prompts.path")
    assert row["prompt_id"] == "d08a0ea40e586d06e99c0c7a69b0f21c"  # SHA-256 of [["user", "1+1?"]], first 128 bits
    [same] = read_prompts(write(tmp_path / "q.jsonl", [{"messages": [{"role": "user", "content": "1+1?"}]}]), "x")
    assert same["prompt_id"] == row["prompt_id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: broken JSON"),
        ('{"prompt": "a"}\n[1]\n', "p.jsonl:2: not an object"),
        ('{"question": "a"}\n', "p.jsonl:1: neither `prompt` nor `messages`; the row has question"),
        ('{"prompt": "  "}\n', "p.jsonl:1: `prompt` is empty"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "p.jsonl:2: the same id as"),
        ('{"prompt": "a"}\n{"prompt": "a"}\n', "p.jsonl:2: the same prompt as"),
        ('{"messages": []}\n', "p.jsonl:1: `messages` must be a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}\n', "p.jsonl:1: a turn needs a role"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "p.jsonl:1: the last turn must be the user's"),
    ],
)
def test_mistakes_name_file_row_and_mend(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(tmp_path / "p.jsonl"), "prompts.path")
    assert message in str(error.value)


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.path: there is no file"):
        read_prompts(str(tmp_path / "none.jsonl"), "prompts.path")
    with pytest.raises(UserError, match="unknown kind"):
        (tmp_path / "p.xlsx").touch()
        read_prompts(str(tmp_path / "p.xlsx"), "prompts.path")


def test_shards_only_grow(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = read_prompts(write(tmp_path / "p.jsonl", ROWS), "prompts.path")
    assert store_prompts(store, rows[:6], 4) == 6
    before = {path: store.read_table(path) for path in store.committed(Store.prompts)}
    assert store_prompts(store, rows, 4) == 4 and store_prompts(store, rows, 4) == 0
    assert all(store.read_table(path).equals(table) for path, table in before.items())
    stored = store.read_tables(Store.prompts, PROMPTS)["prompt_id"].to_pylist()
    assert stored == [row["prompt_id"] for row in rows]


def test_changed_prompts_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = read_prompts(write(tmp_path / "p.jsonl", ROWS), "prompts.path")
    store_prompts(store, rows, 4)
    with pytest.raises(UserError, match="no longer in the prompts"):
        store_prompts(store, rows[1:], 4)
    with pytest.raises(UserError, match="another text or answer"):
        store_prompts(store, [{**rows[0], "answer": "77"}, *rows[1:]], 4)
