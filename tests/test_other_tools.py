"""Every folder of Parquet files under `out` opens in pandas, pyarrow, `datasets` and Ray, and from one level above."""

from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from deltaray.data.contracts import PAIRS, PROMPTS, REFERENCES, RESPONSES, SAMPLES, SCORES
from deltaray.data.store import Store, number_of, numbers_of
from deltaray.errors import UserError
from deltaray.evaluate.samples import store_samples
from deltaray.pair.describe import delta_path
from deltaray.score.compare import AGREEMENT
from deltaray.study.upgrade import move_records

TEACHERS = ("7", "8")  # names that look like numbers in a folder's name
FOLDERS: dict[str, tuple[int, list[str]]] = {
    "prompts": (2, []),
    "responses": (4, ["teacher"]),
    "responses/teacher=7": (2, []),
    "scores": (4, ["scorer", "teacher"]),
    "scores/scorer=judge": (4, ["teacher"]),
    "scores/scorer=judge/teacher=7": (2, []),
    "references": (4, ["student", "teacher"]),
    "references/student=s/teacher=8": (2, []),
    "pairs": (4, ["pairing"]),
    "pairs/pairing=one": (2, []),
    "evaluation/prompts": (2, ["task"]),
    "evaluation/responses": (2, ["model", "task"]),
    "evaluation/scores/model=s/task=t": (2, []),
    "evaluation/samples/s": (2, []),
}
"""Rows, and the columns that the names of the folders below become."""
TURN = [{"role": "user", "content": "Hi"}]


def rows(schema: pa.Schema, number: int, full: bool) -> pa.Table:
    """One row; what may be null is, or is not."""
    values: dict[pa.DataType, Any] = {
        pa.string(): f"t{number}", pa.int32(): number, pa.int64(): number, pa.float64(): 0.5,
        pa.list_(pa.int32()): [1], pa.list_(pa.string()): ["x"], pa.list_(pa.float64()): [0.5],
        SCORES.field("parts").type: [("part", 1.0)], PROMPTS.field("messages").type: TURN,
    }  # fmt: skip
    row = {field.name: values[field.type] if full or not field.nullable else None for field in schema}
    return pa.Table.from_pylist([row], schema=schema)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study's folders, each with a file without and one with all that may be null."""
    folder = tmp_path_factory.mktemp("study")
    store = Store(str(folder))
    tables = {Store.prompts: PROMPTS, Store.evaluation_prompts("t"): PROMPTS}
    for teacher in TEACHERS:
        tables |= {Store.responses(teacher): RESPONSES, Store.scores("judge", teacher): SCORES}
        tables |= {Store.references("s", teacher): REFERENCES}
    tables |= {Store.evaluation_responses("s", "t"): RESPONSES, Store.evaluation_scores("s", "t"): SCORES}
    for place, schema in tables.items():
        for number in range(2):
            store.write_table(f"{place}/part-{number:05d}.parquet", rows(schema, number, bool(number)), schema)
    for pairing in ("one", "dev"):
        for number in range(2):
            shard = Store.pair_shard(pairing, f"part-{number:05d}")
            store.write_table(shard, rows(PAIRS, number, bool(number)), PAIRS)
        store.write_json(Store.funnel(pairing), [{"stage": "x", "in": 2, "out": 2, "removed": 0}])
        store.write_json(delta_path(pairing), {"pairs": 2})
    for number in range(2):
        store_samples(store, "s", f"task{number}", rows(SAMPLES, number, True).to_pylist(), {"identity": "x"})
    store.write_json(AGREEMENT, {})
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_pandas_and_pyarrow_read_it(out: Path, name: str) -> None:
    count, partitions = FOLDERS[name]
    frame = pandas.read_parquet(out / name)
    assert len(frame) == count and set(partitions) <= set(frame.columns)
    hive = pyarrow.dataset.dataset(out / name, partitioning="hive").to_table()
    assert len(hive) == count and hive.column_names[len(hive.column_names) - len(partitions) :] == partitions
    assert len(pq.read_table(out / name)) == count


@pytest.mark.parametrize("name", FOLDERS)
def test_datasets_reads_it(out: Path, name: str, tmp_path: Path) -> None:
    import datasets

    for arguments in ({"path": str(out / name)}, {"path": "parquet", "data_dir": str(out / name)}):
        found = datasets.load_dataset(**arguments, cache_dir=str(tmp_path))
        assert list(found) == ["train"] and len(found["train"]) == FOLDERS[name][0]


def test_ray_data_reads_them(ray_session: Any, out: Path) -> None:
    import ray

    for name, (count, partitions) in FOLDERS.items():
        found = ray.data.read_parquet(str(out / name)).to_pandas()
        assert len(found) == count and set(partitions) <= set(found.columns), name


# --- numbers by name, and what an earlier version wrote -------------------------------------------------------------
def test_numbers_are_found_by_name() -> None:
    kind = SCORES.field("parts").type
    column = pa.chunked_array([pa.array([[("a", 1.0), ("b", None)], None, [], [("b", 2.0)]], kind)])
    assert number_of(column, "a").to_pylist() == [1.0, None, None, None]
    assert number_of(column, "b").to_pylist() == [None, None, None, 2.0]
    assert number_of(column.slice(1), "b").to_pylist() == [None, None, 2.0]
    assert number_of(pa.chunked_array([], kind), "a").to_pylist() == []
    assert numbers_of(column[0].as_py()) == {"a": 1.0, "b": None} and numbers_of(None) == {}


def test_scores_and_responses_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    store, path = Store(str(tmp_path)), f"{Store.scores('judge', 'a')}/part-00000.parquet"
    earlier = [*(field for field in SCORES if field.name != "parts"), ("parts", pa.map_(pa.string(), pa.float64()))]
    (tmp_path / path).parent.mkdir(parents=True)
    row = {"prompt_id": "p", "sample": 0, "score": 1.0, "note": None, "parts": [("a", 2.0)]}
    pq.write_table(pa.Table.from_pylist([row], schema=pa.schema(earlier)), tmp_path / path)
    assert store.read_table(path, schema=SCORES).to_pylist() == [row | {"parts": [{"key": "a", "value": 2.0}]}]
    with pytest.raises(UserError, match="column score"):
        store.read_table(path, schema=pa.schema([("score", pa.string())]))


def test_records_of_an_earlier_version_leave_the_folders(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for path in ("scores/agreement.json", "evaluation/samples/m/t.json", "pairs/pairing=a/funnel.json"):
        store.write_json(path, {"identity": "x"})
    store.write_json(Store.funnel("a"), [])
    for _ in range(2):
        move_records(store)
    assert store.exists(AGREEMENT) and store.read_json(Store.sample_results("m", "t")) == {"identity": "x"}
    assert [*store.listing("scores", ".json"), *store.listing("evaluation/samples", ".json")] == []
    assert list(store.listing("pairs", ".json")) == [Store.funnel("a")]
