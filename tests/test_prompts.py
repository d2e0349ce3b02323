"""Prompts: every accepted form gives the same rows; mistakes name file, row and fix; bad text is kept and marked."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_files import ROWS, TURNS, read, text_of, write

from deltaray.data.contracts import PROMPTS
from deltaray.data.prompts import PromptSource, store_prompts, store_source
from deltaray.data.prompts.rows import prompt_row
from deltaray.data.prompts.view import View
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe.source import Source


# --- forms ------------------------------------------------------------------------------------------------------
def test_all_forms_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "p.jsonl", ROWS)
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist([{**row, "extra": 1.5} for row in ROWS]), tmp_path / "p.parquet")
    lines = ["prompt,answer,source", *(f"{row['prompt']},{row['answer']},sums" for row in ROWS)]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    expected = read(jsonl)
    assert len(expected) == 10 and expected[0]["messages"] == [{"role": "user", "content": "What is 0 + 1?"}]
    for name in ("p.json", "p.parquet", "p.csv"):
        assert read(tmp_path / name) == expected


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set that lies in the local cache, under its name on the hub."""
    import datasets

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub.parquet")
    cached = datasets.Dataset.from_parquet(str(tmp_path / "hub.parquet"), cache_dir=str(tmp_path / "cache"))
    name = f"somebody/{tmp_path.name}"
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: {(name, "train"): cached}[path, split])
    return name


def test_hub_data_sets_give_the_same_rows_and_are_read_once(tmp_path: Path, hub: str) -> None:
    assert read(hub) == read(write(tmp_path / "p.jsonl", ROWS))
    with pytest.raises(UserError, match="neither a file here nor a dataset that can be loaded"):
        read("somebody/else")
    store = Store(str(tmp_path / "out"))
    store_source(store, PromptSource(hub, "prompts.path"), 4, 2)
    assert store.read_json(".deltaray/prompts/prompts.json")["rows"] == 10


def test_other_peoples_columns_splits_and_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "id": n, "other": 0.5} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub.parquet")
    data = datasets.Dataset.from_parquet(str(tmp_path / "hub.parquet"), cache_dir=str(tmp_path / "cache"))
    known = {("somebody/sums", "main", "test[:3]"): data}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: known[path, config, split])
    source = Source(
        path="somebody/sums", config="main", split="test[:3]", columns={"prompt": "question"}, template="Q: {prompt} A:"
    )
    store = Store(str(tmp_path / "out"))
    store_source(store, PromptSource(source.path, "prompts.path", view=View.of(source)), 4, 2)
    found = store.read_tables(Store.prompts, PROMPTS)
    assert found["prompt_id"].to_pylist() == ["0", "1", "2"]
    assert found["answer"].to_pylist() == ["1", "2", "3"]
    assert [turns[0]["content"] for turns in found["messages"].to_pylist()] == [f"Q: {n} + 1? A:" for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "p.jsonl", view=View.of(source)) == list(
        PromptSource(source.path, "prompts.path", view=View.of(source)).rows()
    )


def test_a_column_that_is_not_there_and_a_template_without_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"messages": TURNS}])
    with pytest.raises(UserError, match=r"p.jsonl:1: no column 'question' \(columns.prompt\); the row has messages"):
        read(path, view=View(columns={"prompt": "question"}))
    with pytest.raises(UserError, match="`template` goes around a text in `prompt`"):
        read(path, view=View(template="{prompt}"))
    with pytest.raises(ValueError, match=r"a text with \{prompt\} in it, once"):
        Source(path="p", template="no place")


def test_messages_and_ids_are_kept(tmp_path: Path) -> None:
    [row] = read(write(tmp_path / "p.jsonl", [{"messages": TURNS, "id": 7}]))
    assert row["messages"] == TURNS and row["prompt_id"] == "7"


def test_the_id_is_a_stable_hash_of_the_messages(tmp_path: Path) -> None:
    [row] = read(write(tmp_path / "p.jsonl", [{"prompt": "1+1?"}]))
    assert row["prompt_id"] == "d08a0ea40e586d06e99c0c7a69b0f21c"  # SHA-256 of [["user", "1+1?"]], first 128 bits
    [same] = read(write(tmp_path / "q.jsonl", [{"messages": [{"role": "user", "content": "1+1?"}]}]))
    assert same["prompt_id"] == row["prompt_id"]


def test_the_hash_is_that_of_plain_json() -> None:
    import hashlib

    for text in ('"quoted" \\ back', "line\nend\ttab\x00\x1f\x7f", "é 日本 \u2028 🙂"):
        plain = json.dumps([["user", text]], ensure_ascii=False).encode()
        assert prompt_row({"prompt": text})["prompt_id"] == hashlib.sha256(plain).hexdigest()[:32]


def test_limit_and_dropped_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[1], ROWS[3]])
    assert [row["answer"] for row in read(path, drop_duplicates=True)] == ["1", "2", "3", "4"]
    assert [row["answer"] for row in read(path, drop_duplicates=True, limit=3)] == ["1", "2", "3"]
    assert len(read(path, limit=2)) == 2  # what comes after is not looked at


# --- mistakes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf\n \r\n", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: broken JSON"),
        (b'{"prompt": "a"}\n\x00\x00\x00\n', "p.jsonl:2: broken JSON"),
        (b'{"prompt": "a"}\n\n' + b"[" * 200_000, "p.jsonl:3: broken JSON: nested too deeply"),
        (b'{"prompt": "a", "id": ' + b"9" * 5_000 + b"}\n", "p.jsonl:1: broken JSON"),
        (b'{"prompt": "' + b"a" * 50_000_000 + b"\n", "p.jsonl:1: broken JSON"),
        (b'{"prompt": "a"}\n[1]\n', "p.jsonl:2: not an object"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "p.jsonl:1: not UTF-8 text but UTF-16"),
        (b'{"question": "a"}\n', "p.jsonl:1: neither `prompt` nor `messages`; the row has question"),
        (b'{"prompt": "  "}\n', "p.jsonl:1: `prompt` is empty"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "p.jsonl:2: the same id as"),
        (b'{"prompt": "a"}\r\n\r\n{"prompt": "a"}\r\n', "p.jsonl:3: the same prompt as"),
        (b'{"prompt": "\xff"}\n{"prompt": "\xff"}\n', "p.jsonl:2: the same prompt as"),
        (b'{"messages": []}\n', "p.jsonl:1: `messages` must be a list"),
        (b'{"messages": [{"role": "robot", "content": "' + b"x" * 9999 + b'"}]}\n', "p.jsonl:1: a turn needs a role"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "p.jsonl:1: the last turn must be the user's"),
    ],
    ids=range(17),
)
def test_mistakes_name_file_row_and_mend(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.jsonl")
    assert message in str(error.value) and len(str(error.value)) < 600


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.path: there is no file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="unknown kind"):
        (tmp_path / "p.xlsx").touch()
        read(tmp_path / "p.xlsx")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"prompt": [1, 2]}), "row 1: `prompt` is empty or not text"),
        (pa.table({"prompt": ["a", None]}), "row 2: neither `prompt` nor `messages`"),
        (pa.table({"messages": ["hello"]}), "row 1: `messages` must be a list"),
        (pa.table({"messages": [[{"role": "user", "content": 1}]]}), "row 1: a turn needs a role"),
        (pa.table({"question": ["a"]}), "neither `prompt` nor `messages`; the columns are question"),
        (pa.table({"prompt": pa.array([], pa.string())}), "holds no prompts"),
    ],
    ids=range(6),
)
def test_parquet_files_of_the_wrong_shape(tmp_path: Path, table: pa.Table, message: str) -> None:
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet") as error:
        read(tmp_path / "p.parquet")
    assert message in str(error.value)


def test_broken_parquet_and_csv_files(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"{n}" * 50 for n in range(5000)]}), tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    for content in (b"not parquet at all", whole[:-40], whole[:100] + b"\xff" * 5000 + whole[5100:]):
        (tmp_path / "p.parquet").write_bytes(content)
        with pytest.raises(UserError, match="not a readable Parquet file"):
            read(tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text('prompt\n"a quote that stays open\nb\nc\n')
    with pytest.raises(UserError, match="broken CSV"):
        read(tmp_path / "p.csv")


# --- text that is odd, and text that is not Unicode ----------------------------------------------------------------
def test_odd_text_is_kept_as_it_is(tmp_path: Path) -> None:
    lines = [b'{"prompt": "nul \\u0000 bell \x07 raw\ttab"}', '{"prompt": "é\u2028\u0085\u007f 🙂"}'.encode()]
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")
    rows = read(tmp_path / "p.jsonl")
    assert [text_of(row) for row in rows] == ["nul \x00 bell \x07 raw\ttab", "é\u2028\u0085\x7f 🙂"]
    assert all(row["error"] is None for row in rows)
    (tmp_path / "p.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"two\r\nlines, \x00 and \x07",\r\n')
    [row] = read(tmp_path / "p.csv")
    assert text_of(row) == "two\r\nlines, \x00 and \x07" and row["answer"] is None and row["error"] is None
    (tmp_path / "long.jsonl").write_bytes(b'{"prompt": "' + b"a" * 50_000_000 + b'"}\n{"prompt": "b"}\n')
    assert [len(text_of(row)) for row in read(tmp_path / "long.jsonl")] == [50_000_000, 1]


BAD = [b"caf\xe9 one", b"caf\xe8 one", b"\xed\xa0\x80 is half a pair", b"cut off \xf0\x9f\x99"]


def bad_jsonl(path: Path) -> Path:
    lines = [b'{"prompt": "good"}', *(b'{"prompt": "' + text + b'"}' for text in BAD), b'{"prompt": "fine"}']
    (path / "p.jsonl").write_bytes(b"\n".join(lines))
    return path / "p.jsonl"


def bad_csv(path: Path) -> Path:
    (path / "p.csv").write_bytes(b"\n".join([b"prompt", b"good", *BAD, b"fine"]))
    return path / "p.csv"


def bad_json(path: Path) -> Path:
    texts = ['{"prompt": "good"}', *(f'{{"prompt": "half \\ud83d {n}"}}' for n in range(4)), '{"prompt": "fine"}']
    (path / "p.json").write_text(f"[{', '.join(texts)}]")
    return path / "p.json"


def bad_parquet(path: Path) -> Path:
    """Text that is declared as UTF-8 and is not."""
    raw = pa.array([b"good", *BAD, b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"prompt": text}), path / "p.parquet")
    return path / "p.parquet"


def bad_bytes(path: Path) -> Path:
    """Text that is declared as bytes."""
    pq.write_table(pa.table({"prompt": pa.array([b"good", *BAD, b"fine"], pa.binary())}), path / "p.parquet")
    return path / "p.parquet"


def bad_messages(path: Path) -> Path:
    raw = pa.array([b"good", *BAD, b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    turns = pa.StructArray.from_arrays([pa.array(["user"] * len(raw)), text], ["role", "content"])
    messages = pa.ListArray.from_arrays(list(range(len(raw) + 1)), turns)
    pq.write_table(pa.table({"messages": messages}), path / "p.parquet")
    return path / "p.parquet"


@pytest.mark.parametrize("make", [bad_jsonl, bad_csv, bad_json, bad_parquet, bad_bytes, bad_messages])
def test_text_that_is_no_unicode_is_stored_with_its_reason(make: Callable[[Path], Path], tmp_path: Path) -> None:
    rows = read(make(tmp_path))
    assert [row["error"] is None for row in rows] == [True, False, False, False, False, True]
    assert [text_of(row) for row in (rows[0], rows[-1])] == ["good", "fine"]
    for row in rows[1:-1]:
        assert "\ufffd" in text_of(row) and row["error"].partition(":")[0] in ("invalid UTF-8", "lone surrogate")
    assert len({row["prompt_id"] for row in rows}) == len(rows)  # also where the mended texts are equal
    store = Store(str(tmp_path / "out"))
    assert store_prompts(store, rows, 4) == len(rows)
    assert store.read_tables(Store.prompts, PROMPTS).to_pylist() == rows
    assert store_prompts(store, read(make(tmp_path)), 4) == 0  # read again they are the same prompts


def test_every_field_may_hold_bad_text(tmp_path: Path) -> None:
    bad = "\\udc80x"
    lines = [
        f'{{"prompt": "a", "answer": "{bad}"}}',
        f'{{"prompt": "b", "source": "{bad}"}}',
        f'{{"prompt": "c", "id": "{bad}"}}',
        '{"prompt": "d", "id": "\\udc81x"}',
        f'{{"messages": [{{"role": "system", "content": "{bad}"}}, {{"role": "user", "content": "e"}}]}}',
        f'{{"prompt": "f", "note": "{bad}"}}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "p.jsonl")
    assert [row["error"] is None for row in rows] == [False] * 5 + [True]
    assert rows[0]["answer"] == rows[1]["source"] == rows[4]["messages"][0]["content"] == "\ufffdx"
    assert rows[2]["prompt_id"] != rows[3]["prompt_id"]
    assert pa.Table.from_pylist(rows, schema=PROMPTS).num_rows == 6
