"""Prompts on their way into the store: shards only grow, a file is read once, memory stays bounded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_files import ROWS, TURNS, read, write

from deltaray.data.contracts import MESSAGES, PROMPTS
from deltaray.data.prompts import (
    PromptSource,
    check_source,
    read_prompts,
    read_rows,
    refuse_changed_prompts,
    shards,
    source,
    store_prompts,
    store_source,
)
from deltaray.data.prompts.rows import prompt_row
from deltaray.data.store import Store
from deltaray.errors import UserError


# --- shards -----------------------------------------------------------------------------------------------------
def test_shards_only_grow(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = read(write(tmp_path / "p.jsonl", ROWS))
    assert store_prompts(store, iter(rows[:6]), 4) == 6
    before = {path: store.read_table(path) for path in store.committed(Store.prompts)}
    assert store_prompts(store, rows, 4) == 4 and store_prompts(store, rows, 4) == 0
    assert all(store.read_table(path).equals(table) for path, table in before.items())
    stored = store.read_tables(Store.prompts, PROMPTS)["prompt_id"].to_pylist()
    assert stored == [row["prompt_id"] for row in rows]
    assert [store.count(path) for path in store.committed(Store.prompts)] == [4, 2, 4]


def test_the_table_is_the_one_that_arrow_makes(tmp_path: Path) -> None:
    rows = [prompt_row({"messages": TURNS[start:], "id": start, "answer": "é"}) for start in (0, 1, 3)]
    table = shards.prompt_table(rows)
    assert table.equals(pa.Table.from_pylist(rows, schema=PROMPTS)) and table["messages"].type == MESSAGES


def test_a_shard_is_no_larger_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 1000)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 300)
    rows = [prompt_row({"prompt": "x" * 250, "id": n}) for n in range(10)]
    store = Store(str(tmp_path / "out"))
    assert store_prompts(store, rows, 100) == 10
    assert [store.count(path) for path in store.committed(Store.prompts)] == [4, 4, 2]
    assert store.read_tables(Store.prompts, PROMPTS).to_pylist() == rows


@pytest.mark.parametrize("changed", [{"answer": "77"}, {"messages": [*TURNS[:3], {"role": "user", "content": "2"}]}])
def test_changed_prompts_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    store = Store(str(tmp_path / "out"))
    rows = [prompt_row({"messages": TURNS, "id": "turns"}), *read(write(tmp_path / "p.jsonl", ROWS))]
    store_prompts(store, rows, 4)
    more = prompt_row({"prompt": "new"})
    assert refuse_changed_prompts(store, [more, *rows]) == 12
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    with pytest.raises(UserError, match=r"prompt turns is no longer in the prompts"):
        refuse_changed_prompts(store, [more, *rows[1:]])
    with pytest.raises(UserError, match="prompt turns has another text or answer"):
        refuse_changed_prompts(store, [more, {**rows[0], **changed}, *rows[1:]])  # type: ignore[typeddict-item]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before


def test_rows_are_read_by_their_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = [prompt_row({"prompt": f"{n} {'x' * 200}", "id": n}) for n in range(50)]
    store_prompts(store, rows, 100, unit_size=8)
    [path] = store.committed(Store.prompts)
    for wanted in ([0], [49], [7, 8, 9], [30, 3, 49, 3], list(range(50)), []):
        assert read_rows(store, path, wanted, PROMPTS.names).to_pylist() == [rows[n] for n in wanted]
    assert read_rows(store, path, [12, 11], ["prompt_id"]).to_pydict() == {"prompt_id": ["12", "11"]}
    for wrong in ([50], [-1, 2]):
        with pytest.raises(IndexError):
            read_rows(store, path, wrong, ["prompt_id"])


def test_only_the_row_groups_that_are_needed_are_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    rows = [prompt_row({"prompt": f"{n} {'x' * 200}", "id": n}) for n in range(50)]
    store_prompts(store, rows, 100, unit_size=8)
    [path] = store.committed(Store.prompts)
    file = tmp_path / "out" / path
    group = pq.ParquetFile(file).metadata.row_group(3)
    columns = [group.column(number) for number in range(group.num_columns)]
    start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
    size = sum(column.total_compressed_size for column in columns)
    content = file.read_bytes()
    file.write_bytes(content[:start] + b"\xff" * size + content[start + size :])  # rows 24 … 31 are lost
    assert read_rows(store, path, [23, 32], PROMPTS.names).to_pylist() == [rows[23], rows[32]]
    with pytest.raises(OSError):
        read_rows(store, path, [24], PROMPTS.names)


# --- from the file to the store, once -----------------------------------------------------------------------------
def bring(store: Store, prompts: PromptSource) -> int:
    count = check_source(store, prompts)
    store_source(store, prompts, shard_size=3, unit_size=2)
    return count


def test_what_is_stored_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "out"))
    prompts = PromptSource(write(tmp_path / "p.jsonl", ROWS), "prompts.path")
    readings: list[str] = []
    monkeypatch.setattr(source, "read_prompts", lambda *args: readings.append(args[0]) or read_prompts(*args))

    def is_read(prompts: PromptSource, count: int) -> bool:
        readings.clear()
        assert bring(store, prompts) == count == store.count_rows(Store.prompts)
        return bool(readings)

    assert is_read(prompts, 10) and not is_read(prompts, 10)
    moved = PromptSource(str((tmp_path / "p.jsonl").rename(tmp_path / "q.jsonl")), "prompts.path")
    assert not is_read(moved, 10)
    assert is_read(PromptSource(moved.path, "prompts.path", limit=10), 10)
    write(tmp_path / "q.jsonl", [*ROWS, {"prompt": "one more"}])
    assert is_read(moved, 11) and not is_read(moved, 11)
    (tmp_path / "out" / store.committed(Store.prompts)[1]).unlink()
    assert is_read(moved, 11)
    write(tmp_path / "q.jsonl", ROWS)
    with pytest.raises(UserError, match="no longer in the prompts"):
        check_source(store, moved)


class DyingStore(Store):
    """Dies when it is about to write its n-th file."""

    def __init__(self, out: str, writes: int) -> None:
        super().__init__(out)
        self.writes = writes

    def write_bytes(self, path: str, content: Any) -> None:
        if not self.writes:
            raise KeyboardInterrupt
        self.writes -= 1
        super().write_bytes(path, content)


@pytest.mark.parametrize("writes", range(5))
def test_a_kill_between_any_two_writes_is_harmless(tmp_path: Path, writes: int) -> None:
    out = str(tmp_path / "out")
    prompts = PromptSource(write(tmp_path / "p.jsonl", ROWS), "prompts.path")
    with pytest.raises(KeyboardInterrupt):
        bring(DyingStore(out, writes), prompts)
    assert bring(Store(out), prompts) == 10
    stored = Store(out).read_tables(Store.prompts, PROMPTS).to_pylist()
    assert sorted(row["prompt_id"] for row in stored) == sorted(row["prompt_id"] for row in prompts.rows())
    assert Store(out).exists(".deltaray/prompts/prompts.json")


def test_a_file_that_changes_while_it_is_read_gets_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "out"))
    prompts = PromptSource(write(tmp_path / "p.jsonl", ROWS), "prompts.path")

    def reading_while_it_grows(*arguments: Any) -> int:
        count = store_prompts(*arguments)
        write(tmp_path / "p.jsonl", [*ROWS, {"prompt": "one more"}])
        return count

    monkeypatch.setattr(source, "store_prompts", reading_while_it_grows)
    store_source(store, prompts, 4, 2)
    assert not store.exists(".deltaray/prompts/prompts.json")


# --- memory -----------------------------------------------------------------------------------------------------
PEAK = """
import sys
from deltaray.data.prompts import PromptSource, check_source, store_source
from deltaray.data.store import Store

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

prompts, store, before = PromptSource(sys.argv[1], "prompts.path"), Store(sys.argv[2]), kib("VmRSS")
if sys.argv[3] == "stream":
    check_source(store, prompts)
    store_source(store, prompts, 4096, 256)
else:
    held = list(prompts.rows())
print(kib("VmHWM") - before)
"""


def peak(how: str, path: Path, out: Path) -> int:
    """Growth of a process's largest resident set over what its imports take, in KiB."""
    command = [sys.executable, "-c", PEAK, str(path), str(out), how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_two_hundred_thousand_prompts_stream(tmp_path: Path) -> None:
    with (tmp_path / "p.jsonl").open("w") as file:
        for number in range(200_000):
            file.write(f'{{"prompt": "{number} {"and so on " * 80}"}}\n')
    streamed, held = (peak(how, tmp_path / "p.jsonl", tmp_path / "out") for how in ("stream", "hold"))
    assert streamed < held / 2
    store = Store(str(tmp_path / "out"))
    assert store.count_rows(Store.prompts) == 200_000 and len(store.committed(Store.prompts)) == 49
