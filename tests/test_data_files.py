"""Files of prompts and preferences as people have them: compressed, with columns twice, with fields too many."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_files import read, text_of

from deltaray.data.prompts import PromptSource
from deltaray.data.prompts.preferences import KEY, Preference, read_preferences
from deltaray.data.prompts.view import View
from deltaray.errors import UserError
from deltaray.recipe.recipe import Preferences

ROW = {"prompt": "Name a fish.", "chosen": "A trout.", "rejected": "A whale."}
CSV = b"prompt,chosen,rejected\n"


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def preferences(path: Path, content: bytes | None = None, **section: Any) -> tuple[list[Preference], list[str]]:
    """(the rows, what the user is told)."""
    told: list[str] = []
    if content is not None:
        path.write_bytes(content)
    return list(read_preferences(Preferences(path=str(path), **section), told.append)), told


# --- text -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("p.jsonl.gz", gzip.compress),
        ("p.jsonl.zst", lambda raw: pa.compress(raw, codec="zstd", asbytes=True)),
        ("p.jsonl.bz2", bz2.compress),
        ("P.JSONL", bytes),
    ],
)
def test_compressed_text_is_read_and_its_mistakes_have_lines(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    rows, _ = preferences(tmp_path / name, pack(jsonl(ROW)) + pack(jsonl(ROW | {"prompt": "A bird?"})))
    assert [row.texts for row in rows] == [("A trout.", "A whale.")] * 2
    with pytest.raises(UserError, match=rf"{name}:2: broken JSON"):
        preferences(tmp_path / name, pack(jsonl(ROW) + b"{\n"))
    for packed, kind in (
        (gzip.compress(CSV + b"q,a,b\n"), "p.csv.gz"),
        (gzip.compress(b"[" + jsonl(ROW) + b"]"), "p.json.gz"),
    ):
        assert len(preferences(tmp_path / kind, packed)[0]) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl.gz", gzip.compress(jsonl(ROW) * 99)[:-9], "cannot be read: not a whole gzip file: Truncated"),
        ("p.jsonl.zst", jsonl(ROW), "cannot be read: not a whole zstd file"),
        ("p.parquet.gz", b"", "unknown kind '.parquet.gz'; use .jsonl, .json, .csv, .parquet, or"),
        ("p.jsonl", jsonl(ROW)[:-1] + b",\n", "p.jsonl:1: broken JSON: a comma follows the object"),
        ("p.jsonl", jsonl(ROW)[:-1] + jsonl(ROW), "p.jsonl:1: broken JSON: a second object follows"),
        ("p.jsonl", b'{"prompt": "a", "chosen": "b", "chosen": "c"}', "p.jsonl:1: broken JSON: the key 'chosen'"),
        ("p.json", b'[\n{"prompt": "a",\n"prompt": "b"}]', "p.json:2: broken JSON: the key 'prompt' is there twice"),
        ("p.json", b"[\n" + jsonl(ROW) + b",\n" + b'{"prompt": "a"}]', "p.json:4: no `chosen`"),
        ("p.json", b"[\n" + jsonl(ROW), "p.json:3: broken JSON: the list does not end"),
        ("p.json", b"[" + jsonl(ROW) + b",]", "p.json:2: broken JSON"),
        ("p.csv", CSV + b"Hi, you,a,b\n", "p.csv:2: 4 fields where the header has 3"),
        ("p.csv", CSV + b'"two\nlines",a,b\n\nshort,a\n', "p.csv:5: 2 fields where the header has 3"),
        ("p.csv", CSV + b'"two\nlines",,b\n', "p.csv:2: no `chosen`"),
        ("p.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", "p.csv:1: the column 'chosen' is there twice"),
        ("p.csv", '\ufeffprompt,a\nx,y\n'.encode("utf-16-le"), "p.csv:1: not UTF-8 text but UTF-16"),
        ("p.csv", "prompt\nx\n".encode("utf-16-be"), "p.csv:1: not UTF-8 text but UTF-16"),
    ],
    ids=range(16),
)  # fmt: skip
def test_files_that_cannot_be_meant_so_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        preferences(tmp_path / name, content)
    assert message in str(error.value)


def test_quotes_marks_and_an_index_column_do_no_harm(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf"",prompt,chosen,rejected\r\n0,"a, ""b""\r\nc",x,y\r\n'
    [row], _ = preferences(tmp_path / "p.csv", content)
    assert row.prompt["messages"][0]["content"] == 'a, "b"\r\nc' and row.texts == ("x", "y")


# --- columns ----------------------------------------------------------------------------------------------------
def test_a_column_twice_and_one_that_is_not_there_are_refused_in_tables(tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in ROW.values()]
    pq.write_table(pa.Table.from_arrays([*columns, columns[0]], [*ROW, "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="the column 'prompt' is there twice"):
        preferences(tmp_path / "p.parquet")
    pq.write_table(pa.table(columns, names=list(ROW)), tmp_path / "p.parquet")
    with pytest.raises(
        UserError, match=r"no column 'winner' \(columns.chosen\); the columns are prompt, chosen, rejected"
    ):
        preferences(tmp_path / "p.parquet", columns={"chosen": "winner"})


def test_what_the_recipe_names_wins_over_what_is_there(tmp_path: Path) -> None:
    foreign = {"question": "Q", "good": "A", "bad": "B", "mark": 2, "other": 1, "prompt": "?", "chosen_score": 0}
    columns = {
        "prompt": "question",
        "chosen": "good",
        "rejected": "bad",
        "chosen_score": "mark",
        "rejected_score": "other",
    }
    [row], _ = preferences(tmp_path / "p.jsonl", jsonl(foreign | {"rating_rejected": 9}), columns=columns)
    assert (row.prompt["messages"][0]["content"], row.texts, row.scores) == ("Q", ("A", "B"), (2.0, 1.0))
    (tmp_path / "q.jsonl").write_bytes(jsonl({"ask": "Q", "messages": [{"role": "user", "content": "M"}]}))
    assert text_of(read(tmp_path / "q.jsonl", view=View(columns={"prompt": "ask"}))[0]) == "Q"
    with pytest.raises(ValueError, match="keys among id, prompt, system"):
        Preferences(path="p", columns={"messages": "m"})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_nan_and_columns_of_nulls_are_none(tmp_path: Path, suffix: str) -> None:
    nan, path = float("nan"), tmp_path / f"p{suffix}"
    row = ROW | {
        "id": nan,
        "source": nan,
        "system": None,
        "chosen_score": nan,
        "score_chosen": 3,
        "rejected_score": -1e999,
    }
    if suffix == ".jsonl":
        path.write_bytes(jsonl(row))
    else:
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), path)
    [found], told = preferences(path)
    assert found.scores == (3.0, None) and not told
    assert (
        len(found.prompt["prompt_id"]) == 32 and found.prompt["source"] is None and len(found.prompt["messages"]) == 1
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_that_are_not_read_are_told_of_once(tmp_path: Path, suffix: str) -> None:
    rows = [ROW | {"images": ["a.png"], "note": "x"}, ROW | {"prompt": "A bird?", "images": ["b.png"], "note": "y"}]
    path = tmp_path / f"p{suffix}"
    pq.write_table(pa.Table.from_pylist(rows), path) if suffix == ".parquet" else path.write_bytes(jsonl(*rows))
    expected = f"{KEY}: column 'images' is ignored: what it says reaches neither prompts nor answers"
    assert preferences(path)[1] == [expected]
    told: list[str] = []
    assert len(list(PromptSource(str(path), KEY).rows(told.append))) == 2 and told == [expected]


def test_a_column_system_is_the_first_turn(tmp_path: Path) -> None:
    rows, told = preferences(
        tmp_path / "p.jsonl", jsonl(ROW | {"system": "Be brief."}, ROW | {"system": "", "prompt": "?"})
    )
    assert [len(row.prompt["messages"]) for row in rows] == [2, 1] and not told
    assert rows[0].prompt["messages"][0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(
        UserError, match=r"p.jsonl:1: `system` and the conversation's own system turn say different things"
    ):
        preferences(tmp_path / "p.jsonl", jsonl(ROW | {"system": "Be brief.", "prompt": own}))
    (tmp_path / "q.jsonl").write_bytes(jsonl({"prompt": "Hi", "system": "Be brief."}))
    assert [turn["role"] for turn in read(tmp_path / "q.jsonl")[0]["messages"]] == ["system", "user"]


# --- ids --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("one", "other"), [(7, 7), (1, "1"), (True, "True")])
def test_one_id_with_two_prompts_is_refused_with_both_lines(tmp_path: Path, one: object, other: object) -> None:
    content = jsonl(ROW | {"id": one}, ROW | {"id": one}, ROW | {"id": other, "prompt": "A bird?"})
    with pytest.raises(UserError, match=r"p.jsonl:3: the same id as .*p.jsonl:1 with another prompt"):
        preferences(tmp_path / "p.jsonl", content)
    with pytest.raises(UserError, match=r"p.jsonl:3: the same id as .*p.jsonl:1 with another prompt"):
        read(tmp_path / "p.jsonl", drop_duplicates=True)
    rows, _ = preferences(tmp_path / "p.jsonl", jsonl(ROW | {"id": one}, ROW | {"id": one}))
    assert len(rows) == 2  # another sample


def test_a_prompt_and_messages_that_differ_are_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    (tmp_path / "p.jsonl").write_bytes(jsonl({"prompt": "Hi", "messages": turns}, {"prompt": "Ho", "messages": turns}))
    with pytest.raises(UserError, match=r"p.jsonl:2: `prompt` and `messages` say different things"):
        read(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_bytes(jsonl({"messages": [{"role": "user", "content": " "}]}))
    with pytest.raises(UserError, match=r"p.jsonl:1: the user's last turn is empty"):
        read(tmp_path / "p.jsonl")


# --- the hub ----------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of preferences whose splits and configurations have names of their own."""
    import datasets

    pq.write_table(pa.Table.from_pylist([ROW | {"question": "Name a fish."}]), tmp_path / "hub.parquet")
    cached = datasets.Dataset.from_parquet(str(tmp_path / "hub.parquet"), cache_dir=str(tmp_path / "cache"))
    name = f"somebody/{tmp_path.name}"

    def load_dataset(path: str, config: str | None = None, split: str | None = None) -> Any:
        assert path == name
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['plain', 'hard']")
        if split not in ("train_prefs", "test_prefs"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train_prefs', 'test_prefs'].")
        return cached

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return name


def test_preferences_name_split_config_and_columns_on_the_hub(hub: str) -> None:
    section = {"path": hub, "config": "plain", "split": "test_prefs", "columns": {"prompt": "question"}}
    [row] = read_preferences(Preferences(**section))  # type: ignore[arg-type]
    assert row.texts == ("A trout.", "A whale.")
    for change, message in (
        ({"split": None}, r"preferences.split: .* has no split 'train', which .* \['train_prefs', 'test_prefs'\]"),
        ({"split": "validation"}, r"has no split 'validation': .*'train_prefs'"),
        ({"config": None}, r"preferences.config: .*available configs: \['plain', 'hard'\]"),
        ({"columns": {"chosen": "best"}}, r"no column 'best' \(columns.chosen\); the columns are prompt, chosen"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_preferences(Preferences(**section | change)))  # type: ignore[arg-type]
