"""Files of prompts and of preferences in all formats: changed rows, changed bytes, files that never end."""

import csv
import gzip
import io
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deltaray.data.prompts import read_prompts
from deltaray.data.prompts.preferences import read_preferences
from deltaray.data.prompts.shards import prompt_table
from deltaray.errors import UserError
from deltaray.recipe.recipe import Preferences
from tests.fuzz.mutate import change, json_bytes, spoil, value
from tests.fuzz.recipes import Check, _silent

TURNS = [{"role": "user", "content": "Name a colour."}]
RED: dict[str, Any] = {"role": "assistant", "content": "Red."}
PART = {"type": "text", "text": "Red."}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "1+1=", "answer": "2", "source": "sums"},
    {"id": "b", "messages": [{"role": "system", "content": "Be brief."}, *TURNS], "answer": ["x"]},
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"prompt": "chosen?", "chosen": "yes", "rejected": "no", "chosen_score": 5, "rejected_score": 1.5},
    {"chosen": [*TURNS, RED], "rejected": [*TURNS, RED | {"content": "7"}]},
    {"prompt": TURNS, "chosen": [RED | {"content": [PART], "reasoning": "hm"}], "rejected": "Blue."},
]  # fmt: skip


def prepare(folder: Path) -> Check:
    """One file after the other under the same folder."""
    terminal = _silent()
    ends = _endless(folder)

    def check(chance: random.Random) -> str:
        kind = chance.choice(("jsonl", "jsonl", "json", "csv", "parquet", "parquet", "jsonl.gz", "endless"))
        if kind == "endless":
            path = chance.choice(ends)
        else:
            path = folder / f"rows.{kind}"
            path.write_bytes(_file(chance, kind))
        return "read" if "read" in (_read(path, terminal), _read_preferences(path, terminal)) else "refused"

    return check


def _endless(folder: Path) -> list[Path]:
    """A pipe that nobody writes to, a device, a folder, a file of holes, and a small file of large zeros."""
    os.mkfifo(folder / "pipe.jsonl")
    for name in ("zero.jsonl", "zero.parquet", "zero.csv", "zero.json"):
        (folder / name).symlink_to("/dev/zero")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "folder.jsonl").mkdir()
    with (folder / "holes.jsonl").open("wb") as file:
        file.truncate(1 << 36)
    (folder / "zeros.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 27), 1))
    return sorted(folder.glob("*"))


def _read(path: Path, terminal: Any) -> str:
    try:
        rows = list(read_prompts(str(path), "prompts.path"))
        prompt_table(rows)
    except UserError as error:
        terminal.say(f"error: {error}")
        return "refused"
    return "read"


def _read_preferences(path: Path, terminal: Any) -> str:
    try:
        rows = list(read_preferences(Preferences(path=str(path))))
        prompt_table([row.prompt for row in rows])
        pa.array([row.answers[0].text for row in rows], pa.string())
    except UserError as error:
        terminal.say(f"error: {error}")
        return "refused"
    return "read"


def _file(chance: random.Random, kind: str) -> bytes:
    rows = chance.sample(ROWS[:3] if chance.random() < 0.5 else ROWS[3:], chance.choice((1, 2, 3)))
    if chance.random() < 0.7:
        for _ in range(chance.choice((1, 1, 2, 4))):
            place = chance.randrange(len(rows))
            changed = change(chance, rows[place])
            rows[place] = changed
    content = _written(chance, kind, rows)
    if chance.random() < 0.4:
        content = spoil(chance, content)
    return content


def _written(chance: random.Random, kind: str, rows: list[Any]) -> bytes:
    if kind == "json":
        return json_bytes(rows)
    if kind == "csv":
        return _csv(rows)
    if kind == "parquet":
        return _parquet(chance, rows)
    lines = b"\n".join(map(json_bytes, rows))
    return gzip.compress(lines) if kind.endswith("gz") else lines


def _csv(rows: list[Any]) -> bytes:
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(str(key) for row in rows for key in row)))
    writer.writeheader()
    writer.writerows({str(key): item for key, item in row.items()} for row in rows)
    return text.getvalue().encode(errors="surrogatepass")


def _parquet(chance: random.Random, rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    try:
        if chance.random() < 0.3:
            table = pa.table(
                {"prompt": _odd_column(chance), "chosen": _odd_column(chance), "rejected": _odd_column(chance)}
            )
        else:
            table = pa.Table.from_pylist([row if isinstance(row, dict) else {"prompt": row} for row in rows])
        pq.write_table(table, sink, compression=chance.choice(("none", "snappy", "zstd")))
    except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError, AttributeError):
        pq.write_table(pa.table({"prompt": [str(value(chance)).encode(errors="replace") for _ in range(3)]}), sink)
    return sink.getvalue()


def _odd_column(chance: random.Random) -> pa.Array:
    """Two values of some type that a user's table may have."""
    return chance.choice(COLUMNS)()


COLUMNS = (
    lambda: pa.array([1, 2]),
    lambda: pa.array(["a", None]),
    lambda: pa.array([b"\xff", b"b"]),
    lambda: pa.array([-(2**62), 2**62], pa.timestamp("s")),
    lambda: pa.array([1, 2], pa.timestamp("ns", "Nowhere/City")),
    lambda: pa.array([1, 2], pa.duration("ns")),
    lambda: pa.array([2**31 - 1, -(2**31)], pa.date32()),
    lambda: pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    lambda: pa.array([1, 2], pa.decimal256(70)),
    lambda: pa.array(["a", "b"]).dictionary_encode(),
    lambda: pa.array([None, None]),
    lambda: pa.array([[[[[["x"]]]]], []]),
    lambda: pa.array([{"role": "user", "content": None}, {"role": 7, "content": "x"}]),
    lambda: pa.array([[{"role": "user", "content": "x"}], None]),
    lambda: pa.array([float("nan"), float("inf")]),
    lambda: pa.array(["x", "y"], pa.large_string()),
    lambda: pa.array([True, False]),
)
