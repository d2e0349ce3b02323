"""The store: only complete files are visible, a retried write replaces itself, definitions do not mix."""

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from deltaray.contracts import PROMPTS, SCORES
from deltaray.errors import UserError
from deltaray.generate.units import missing_units
from deltaray.prompts import store_prompts
from deltaray.recipe.models import Model, Sampling
from deltaray.store import Store

ROW = {"prompt_id": "a", "sample": 0, "score": 1.0}


def table(*ids: str, samples: int = 1) -> pa.Table:
    rows = [{**ROW, "prompt_id": item, "sample": n} for item in ids for n in range(samples)]
    return pa.Table.from_pylist(rows, schema=SCORES)


@pytest.fixture(params=["folder", "uri", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same promises on a local folder and where there is no rename (pyarrow's in-memory file system)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    outs = {"folder": str(tmp_path / "out"), "uri": f"file://{tmp_path}/out", "object store": "mock:///out"}
    return pickle.loads(pickle.dumps(Store(outs[request.param])))


def test_tables_come_back_with_the_contract_schema(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a", "b"), SCORES)
    assert store.read_tables("scores", SCORES).schema.equals(SCORES)
    assert store.count_rows("scores") == 2 and store.read_tables("nothing", SCORES).num_rows == 0


def test_unfinished_files_are_invisible(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    store.write_bytes("scores/.part-00001.parquet.123", b"torn")
    store.write_bytes("scores/.part-00002.parquet", b"torn")
    assert store.committed("scores") == ["scores/part-00000.parquet"]


def test_a_failed_write_leaves_what_was_there(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    with pytest.raises(Exception, match="Failed to parse"):
        store.write_table(
            "scores/part-00000.parquet", pa.table({"prompt_id": ["a"], "sample": ["x"], "score": [1.0]}), SCORES
        )
    assert store.read_tables("scores", SCORES).to_pylist() == [ROW]


def test_definitions_do_not_mix_and_nothing_is_written_when_refused(store: Store) -> None:
    store.claim({"responses/teacher=a": {"temperature": 0.0}})
    store.claim({"responses/teacher=a": {"temperature": 0.0}, "responses/teacher=b": {"temperature": 1.0}})
    with pytest.raises(UserError, match=r"responses/teacher=a: temperature was 0.0 and is now 0.5"):
        store.claim({"responses/teacher=c": {}, "responses/teacher=a": {"temperature": 0.5}})
    assert not store.exists(".deltaray/definitions/responses.teacher=c.json")


def test_a_folder_appears_complete(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "config.json").write_text("{}")
    assert not store.has_student("delta")
    store.put_folder(tmp_path / "model", "students/delta")
    assert store.has_student("delta")
    assert (Path(store.local_folder("students/delta")) / "sub" / "config.json").read_text() == "{}"
    assert store.committed("students", "") == [] and not store.has_student("delt")


def test_missing_units_are_exactly_what_is_not_committed(store: Store) -> None:
    rows = [
        {"prompt_id": str(n), "messages": [{"role": "user", "content": str(n)}], "answer": None, "source": None}
        for n in range(10)
    ]
    store_prompts(store, rows, 4)  # type: ignore[arg-type]
    sampling = Sampling(samples=2)

    def missing() -> dict[str, list[str]]:
        units = missing_units(store, Store.prompts, "responses", Model(model="m"), sampling)
        return {unit["destination"]: unit["prompt_ids"] for unit in units}

    assert sorted(item for ids in missing().values() for item in ids) == sorted(str(n) for n in range(10))
    assert missing() == missing()  # deterministic names
    [first, second, third] = missing()
    store.write_table(first, table("0", "1", "2", "3", samples=2), SCORES)
    store.write_table(second, table("4", "6", samples=2), SCORES)
    store.write_table(third, table("8", samples=2), SCORES)
    assert sorted(item for ids in missing().values() for item in ids) == ["5", "7", "9"]
    assert not set(missing()) & {first, second}  # a file is never overwritten by another set of prompts


def test_prompts_schema_survives(store: Store) -> None:
    rows = [{"prompt_id": "a", "messages": [{"role": "user", "content": "é\u0000"}], "answer": None, "source": "s"}]
    store_prompts(store, rows, 4)  # type: ignore[arg-type]
    assert store.read_tables(Store.prompts, PROMPTS).to_pylist() == rows
