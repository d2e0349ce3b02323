"""A study of fakes whose recipe can change, and what must hold of its store, row by row.

`Lab` is the study; `check_complete` compares the store with what the recipe asks for, `Reader` looks at it meanwhile.
"""

import json
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fake_engine import Behaviour, answer_text
from ruamel.yaml import YAML

from deltaray.data.contracts import RESPONSES
from deltaray.data.store import Store
from deltaray.generate.fingerprint import identity_digest

Key = tuple[str, int]
"""(prompt_id, sample)"""


# --- the study ----------------------------------------------------------------------------------------------------
@dataclass
class Lab:
    """A study of two teachers, `strong` with two replicas and `weak` with one, whose recipe can change."""

    folder: Path
    model: str | None = None  # whose template renders the prompts; None: endpoints, which spares workers torch's import
    prompts: int = 256
    shard_size: int = 16
    unit_size: int = 8
    units_in_flight: int = 3
    stall_seconds: float = 600.0
    samples: int = 1
    temperatures: dict[str, float] = field(default_factory=lambda: {"strong": 0.5, "weak": 1.0})
    behaviour: Behaviour = field(default_factory=Behaviour)
    settings: dict[str, Any] = field(default_factory=dict)  # further keys of the recipe

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def replicas(self, teacher: str) -> int:
        return 2 if teacher == "strong" else 1

    def write(self) -> Path:
        """The prompts and the recipe as they are now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"id": prompt_id(n), "prompt": f"{n}+{n}=", "answer": self.answer(n)})
            for n in range(self.prompts)
        ]
        (self.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        path = self.folder / "recipe.yaml"
        YAML(typ="safe").dump(self.recipe(), path)
        return path

    def answer(self, number: int) -> str:
        """What an exact-match scorer calls right: what `strong` says at first. A prompt's answer never changes."""
        return answer_text("strong", prompt_id(number), 0, 0.5)

    def recipe(self) -> dict[str, Any]:
        return {
            "name": "chaos",
            "out": str(self.out),
            "shard_size": self.shard_size,
            "unit_size": self.unit_size,
            "prompts": {"path": str(self.folder / "prompts.jsonl")},
            "teachers": {name: self.teacher(name) for name in self.temperatures},
            **self.settings,
        }

    def teacher(self, name: str) -> dict[str, Any]:
        engine = {"cpus": 0.5, "replicas": self.replicas(name), "units_in_flight": self.units_in_flight}
        engine["stall_seconds"] = self.stall_seconds
        sampling = {"temperature": self.temperatures[name], "samples": self.samples}
        teacher = {"model": self.model or name, "sampling": sampling, "engine": engine}
        return teacher if self.model else teacher | {"endpoint": {"url": "http://localhost"}}

    def wanted(self) -> set[Key]:
        """The keys that every teacher's folder must hold."""
        return {(prompt_id(n), sample) for n in range(self.prompts) for sample in range(self.samples)}

    def check_rows(self, name: str, rows: list[dict[str, Any]]) -> float | None:
        """Every row holds what it must; returns the one temperature at which all were made, None without rows."""
        found = {float(row["text"].rpartition(" ")[2]) for row in rows}
        assert len(found) <= 1, f"{name}: temperatures {found} mixed"
        temperature = found.pop() if found else None
        for row in rows:
            assert row["teacher"] == name and row["error"] is None
            assert row["text"] == answer_text(name, row["prompt_id"], row["sample"], temperature or 0.0)
        return temperature

    def in_flight(self) -> int:
        """Rows that engines hold at once: what one crash may cost."""
        return sum(self.replicas(name) for name in self.temperatures) * self.units_in_flight * self.unit_size

    def change(self, draw: random.Random) -> str:
        """Changes the recipe as users do; says how."""
        kind = draw.choice(["prompts", "prompts", "samples", "sampling"])
        if kind == "prompts":
            self.prompts += draw.randint(1, 8 * self.shard_size)
        elif kind == "samples" and self.samples < 3:
            self.samples += 1
        else:
            name = draw.choice(list(self.temperatures))
            self.temperatures[name] = draw.choice([0.5, 1.0])
        self.write()
        return f"{kind}: {self.prompts} prompts, {self.samples} samples, {self.temperatures}"


def prompt_id(number: int) -> str:
    return f"p{number:06d}"


# --- what must hold -----------------------------------------------------------------------------------------------
def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of the visible files of a folder; every one of them must be a complete table of responses."""
    rows: list[dict[str, Any]] = []
    for path in visible(folder):
        table = pq.read_table(path)
        assert table.schema.equals(RESPONSES), path
        rows += [row | {"teacher": folder.name.removeprefix("teacher=")} for row in table.to_pylist()]
    return rows


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def keys_of(rows: list[dict[str, Any]]) -> list[Key]:
    return [(row["prompt_id"], row["sample"]) for row in rows]


@dataclass(frozen=True)
class Published:
    """What is visible of a teacher: rows of one temperature, whatever the recipe asks for meanwhile."""

    asked: float  # the recipe's temperature
    temperature: float | None
    keys: frozenset[Key]

    def kept_in(self, later: "Published") -> bool:
        """Nothing that was published is gone, unless a change of the sampling let it step aside."""
        settled = self.asked == self.temperature == later.asked == later.temperature
        return not settled or self.keys <= later.keys


def published(lab: Lab, name: str) -> Published:
    """Complete files, unique keys, one temperature, and in every row exactly what it must hold."""
    rows = rows_of(lab.out / "responses" / f"teacher={name}")
    keys = keys_of(rows)
    assert len(set(keys)) == len(keys), f"{name}: doubled rows"
    return Published(lab.temperatures[name], lab.check_rows(name, rows), frozenset(keys))


def check_complete(lab: Lab) -> int:
    """After a finished command: exactly what the recipe asks for. Returns the number of rows."""
    rows = 0
    for name in lab.temperatures:
        there, wanted = published(lab, name), lab.wanted()
        assert there.asked == there.temperature, f"{name}: answers of temperature {there.temperature}"
        lost, surplus = len(wanted - there.keys), len(there.keys - wanted)
        assert not lost and not surplus, f"{name}: {lost} rows lost, {surplus} too many"
        rows += len(there.keys)
    return rows


def leftovers(out: Path) -> list[str]:
    """Hidden files of the visible folders and units of the present settings that wait: none after a finished command.

    Units of settings that the recipe no longer asks for wait until it does.
    """
    store = Store(str(out))
    hidden = [path for path in out.rglob(".*") if path != out / ".deltaray" and path.name != ".complete"]
    for teacher in store.folders("responses"):
        definition = store.definition(f"responses/{teacher}")
        assert definition is not None, teacher
        for folder in (out / ".deltaray/units/responses" / teacher).glob(f"{identity_digest(definition)}*"):
            hidden += folder.rglob("*.parquet")
    return sorted(str(path.relative_to(out)) for path in hidden if path.is_file())


def generated_again(marks: Path) -> tuple[int, int]:
    """(rows generated in all, those among them that had been generated before), from the engines' marks."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for file in marks.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            mark = json.loads(line)
            counts.update(
                (mark["name"], mark["temperature"], prompt, sample)
                for prompt in mark["prompt_ids"]
                for sample in mark["samples"]
            )
    return counts.total(), counts.total() - len(counts)


class Reader(threading.Thread):
    """Reads the visible files all the time, as anybody might; remembers the first thing that is not as it must be."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.over = out, threading.Event()
        self.snapshots, self.trouble = 0, ""

    def run(self) -> None:
        while not self.over.wait(0.05) and not self.trouble:
            for folder in (self.out / "responses").glob("teacher=*"):
                self.trouble = self.trouble or self._look(folder)
                self.snapshots += 1

    def _look(self, folder: Path) -> str:
        try:
            tables = [pq.read_table(path, columns=["prompt_id", "sample"]) for path in visible(folder)]
        except FileNotFoundError:
            return ""  # a changed teacher's files step aside
        except Exception as error:
            return f"{folder}: {error!r}"
        keys = Counter(keys_of(pa.concat_tables(tables).to_pylist())) if tables else Counter()
        doubled = [key for key, count in keys.items() if count > 1]
        return f"{folder}: {len(doubled)} doubled keys, such as {doubled[0]}" if doubled else ""

    def stop(self) -> None:
        self.over.set()
        self.join()
        assert not self.trouble, self.trouble
        assert self.snapshots
