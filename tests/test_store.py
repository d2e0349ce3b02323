"""The store: only complete files are visible, a retried write replaces itself, definitions do not mix."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaray.data.contracts import PROMPTS, SCORES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.failures import told_in

ROW = {"prompt_id": "a", "sample": 0, "score": 1.0, "note": None, "parts": None}


def table(*ids: str, samples: int = 1) -> pa.Table:
    rows = [{**ROW, "prompt_id": item, "sample": n} for item in ids for n in range(samples)]
    return pa.Table.from_pylist(rows, schema=SCORES)


def parquet(columns: dict[str, object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(params=["folder", "uri", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same promises on a local folder and where there is no rename (pyarrow's in-memory file system)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    outs = {"folder": str(tmp_path / "out"), "uri": f"file://{tmp_path}/out", "object store": "mock:///out"}
    return pickle.loads(pickle.dumps(Store(outs[request.param])))


# --- promises of every store (tests/test_s3.py holds a real object store to them, too) ---------------------------
def test_tables_come_back_with_the_contract_schema(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a", "b"), SCORES)
    assert store.read_tables("scores", SCORES).schema.equals(SCORES)
    assert store.read_tables("scores", SCORES, ["sample", "prompt_id"]).column_names == ["sample", "prompt_id"]
    assert store.count_rows("scores") == 2 and store.read_tables("nothing", SCORES).num_rows == 0


def test_row_groups_have_the_size_asked_for(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a", "b", "c", "d", "e"), SCORES, row_group_size=2)
    footer = store.footer("scores/part-00000.parquet")
    assert [footer.row_group(n).num_rows for n in range(footer.num_row_groups)] == [2, 2, 1]


def test_unfinished_files_are_invisible(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    for hidden in ("scores/.part-00001.parquet.123", "scores/.part-00002.parquet", "scores/.model.0/x.parquet"):
        store.write_bytes(hidden, b"torn")
    assert store.committed("scores") == list(store.listing("scores")) == ["scores/part-00000.parquet"]


def test_a_failed_write_leaves_what_was_there(store: Store) -> None:
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    with pytest.raises(Exception, match="Failed to parse"):
        wrong = table("a").set_column(1, "sample", pa.array(["x"]))
        store.write_table("scores/part-00000.parquet", wrong, SCORES)
    assert store.read_tables("scores", SCORES).to_pylist() == [ROW]


def test_a_log_grows_by_whole_lines(store: Store) -> None:
    store.append_line(".deltaray/stages.jsonl", {"stage": "é"})
    store.append_line(".deltaray/stages.jsonl", {"stage": "b"})
    assert store.read_bytes(".deltaray/stages.jsonl").decode() == '{"stage": "é"}\n{"stage": "b"}\n'


def test_definitions_do_not_mix_and_nothing_is_written_when_refused(store: Store) -> None:
    store.claim({"responses/teacher=a": {"temperature": 0.0}})
    store.claim({"responses/teacher=a": {"temperature": 0.0}, "responses/teacher=b": {"temperature": 1.0}})
    with pytest.raises(UserError, match=r"responses/teacher=a: temperature was 0.0 and is now 0.5"):
        store.claim({"responses/teacher=c": {}, "responses/teacher=a": {"temperature": 0.5}})
    assert not store.exists(".deltaray/definitions/responses.teacher=c.json")


def test_a_folder_appears_complete_and_replaces_the_one_before(store: Store, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "config.json").write_text("{}")
    (model / "old").write_text("")
    assert not store.trained("delta")
    store.put_folder(model, "students/delta")
    assert store.trained("delta") == "students/delta"
    assert (Path(store.local_folder("students/delta")) / "sub" / "config.json").read_text() == "{}"
    assert store.committed("students", "") == [] and not store.trained("delt")
    (model / "old").rename(model / "new")
    store.put_folder(model, "students/delta")
    found = {path.name for path in Path(store.local_folder("students/delta")).iterdir()}
    assert found - {".complete"} == {"sub", "new"}


def test_a_folder_is_deleted_with_its_hidden_files(store: Store) -> None:
    for path in ("state/run/.mark", "state/run/deep/file", "state/other"):
        store.write_bytes(path, b"x")
    store.delete_folder("state/run")
    store.delete_folder("state/run")
    assert not store.exists("state/run/.mark") and not store.exists("state/run/deep/file")
    assert store.exists("state/other")


def test_deleting_and_moving(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.write_bytes(f"units/x={name}/1.parquet", name.encode())
    store.delete(["units/x=a/1.parquet", "units/x=a/1.parquet", "units/never/there.parquet"])
    assert list(store.listing("units")) == ["units/x=b/1.parquet", "units/x=c/1.parquet"]
    store.move("units/x=b/1.parquet", ".deltaray/aside/x=b/1.parquet")
    store.move("units/x=c/1.parquet", ".deltaray/aside/x=b/1.parquet")
    assert not store.listing("units") and store.read_bytes(".deltaray/aside/x=b/1.parquet") == b"c"
    assert list(store.listing(".deltaray/aside")) == [".deltaray/aside/x=b/1.parquet"]
    with pytest.raises(OSError):
        store.move("units/x=b/1.parquet", "units/x=b/2.parquet")


def test_listings_know_sizes_and_times(store: Store) -> None:
    store.write_bytes("pairs/pairing=a=b/1.parquet", b"four")
    store.write_bytes("pairs/pairing=a=b/2.parquet", b"")
    store.write_json("pairs/pairing=a=b/_funnel.json", [])
    found = store.listing("pairs")
    assert {path: info.size for path, info in found.items()} == {
        "pairs/pairing=a=b/1.parquet": 4,
        "pairs/pairing=a=b/2.parquet": 0,
    }
    assert all(info.mtime_ns for info in found.values()) or store.out.startswith("mock:")
    assert list(store.listing("pairs", "/_funnel.json")) == ["pairs/pairing=a=b/_funnel.json"]
    assert store.listing("nothing") == {} and store.folders("pairs") == ["pairing=a=b"]


FOREIGN = {
    "other columns": (parquet({"x": [1]}), r"column prompt_id \(string\) is missing"),
    "other types": (parquet({name: ["0"] for name in ROW}), "column sample is string instead of int32"),
    "no keys": (
        parquet({name: pa.nulls(1, pa.string()) if name == "prompt_id" else table("a")[name] for name in SCORES.names}),
        "damaged or no Parquet file of ours: .*null values",
    ),
    "no Parquet": (b"a,b\n1,2\n", "damaged or no Parquet file"),
    "empty": (b"", "damaged or no Parquet file"),
    "cut": (b"", "damaged or no Parquet file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_reading_names_a_foreign_or_damaged_file(store: Store, kind: str) -> None:
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    content, wrong = FOREIGN[kind]
    if kind == "cut":
        content = store.read_bytes("scores/part-00000.parquet")[:-20]
    store.write_bytes("scores/part-00001.parquet", content)
    with pytest.raises(UserError, match=wrong) as told:
        store.read_tables("scores", SCORES)
    assert store.address("scores/part-00001.parquet") in str(told.value) and "remove it" in str(told.value)


def test_damaged_pages_are_told_too(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_table("scores/part-00000.parquet", table(*(uuid.uuid4().hex for _ in range(99))), SCORES)
    content = bytearray(store.read_bytes("scores/part-00000.parquet"))
    content[4:400] = bytes(396)
    store.write_bytes("scores/part-00000.parquet", bytes(content))
    with pytest.raises(UserError, match=r"part-00000.parquet: is damaged"):
        store.read_tables("scores", SCORES)


def test_prompts_schema_survives(store: Store) -> None:
    messages = [{"role": "user", "content": "é\u0000"}]
    rows = [
        {"prompt_id": "a", "messages": messages, "answer": None, "source": "s", "error": None, "conversation": None}
    ]
    store_prompts(store, rows, 4)  # type: ignore[arg-type]
    assert store.read_tables(Store.prompts, PROMPTS).to_pylist() == rows


# --- local folders ----------------------------------------------------------------------------------------------
HOLDER = """
import sys
from deltaray.data.store import Store
with Store(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_process_at_a_time_and_a_killed_one_frees_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {holder.pid} on "), store.lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with store.lock(), pytest.raises(UserError, match=f"process {os.getpid()} on "), store.lock():
        pass
    with store.lock():
        pass


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    left = [f"scores/.part-00001.parquet.{uuid.uuid4().hex}", f"students/.delta.{uuid.uuid4().hex}/model.safetensors"]
    for path in left:
        store.write_bytes(path, b"torn")
    store.write_bytes("scores/.kept", b"")
    assert store.sweep() == 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".kept", "part-00000.parquet"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_costs_nothing_that_was_committed(small_disk: Path, tmp_path: Path) -> None:
    store = Store(str(small_disk))
    store.write_table("scores/part-00000.parquet", table("a"), SCORES)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(os.urandom(2 << 20))
    big = table(*(uuid.uuid4().hex for _ in range(80_000)))
    attempts = {
        "scores/part-00000.parquet": lambda path: store.write_table(path, big, SCORES),
        "report.html": lambda path: store.write_bytes(path, bytes(2 << 20)),
        ".deltaray/stages.jsonl": lambda path: store.append_line(path, "x" * (2 << 20)),
        "students/delta": lambda path: store.put_folder(tmp_path / "model", path),
    }
    for path, attempt in attempts.items():
        with pytest.raises(StageError, match=os.strerror(errno.ENOSPC)) as told:
            attempt(path)
        assert str(small_disk / Path(path).parent) in str(told.value) and "same command again" in str(told.value)
    assert store.read_tables("scores", SCORES).to_pylist() == [ROW]
    assert not [path for path in small_disk.rglob("*") if re.search("[0-9a-f]{32}", path.name)]
    store.write_bytes("later", bytes(1 << 19))  # there is room again for what is small enough


def test_a_full_disk_is_still_told_when_a_task_of_ray_met_it(ray_session: Any, small_disk: Path) -> None:
    store, wide = Store(str(small_disk)), bytes(2 << 20)

    def write(row: dict[str, Any]) -> dict[str, Any]:
        store.write_bytes("scores/part-00000.parquet", wide)
        return row

    class Writer:
        async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return write(row)

    pool = ray_session.data.ActorPoolStrategy(size=1)
    attempts = (
        lambda: ray_session.get(ray_session.remote(write).remote({})),
        lambda: ray_session.data.range(1).map(write).take_all(),
        lambda: ray_session.data.range(1).map(Writer, compute=pool).take_all(),
    )
    for attempt in attempts:
        with pytest.raises(Exception, match=os.strerror(errno.ENOSPC)) as met:
            attempt()
        told = told_in(met.value)
        assert type(told) is StageError
        first, second = str(told).splitlines()
        assert first == f"{small_disk}/scores/part-00000.parquet cannot be written: {os.strerror(errno.ENOSPC)}"
        assert second.startswith("what is committed is safe") and second.endswith("to resume")
    assert told_in(RuntimeError("something else")) is None
