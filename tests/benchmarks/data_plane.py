"""The data plane without models: prompts -> generation -> pairs by `deltaray run`, two teachers, a fake engine.

    python tests/benchmarks/data_plane.py [--rows 10000 100000 1000000] [--resume ROWS]

Of every number of prompts: rows/s of each stage, microseconds per prompt, the driver's peak memory and that of all
processes together. With `--resume` also: a kill -9 of the driver when half of the rows are committed, and the time
from the start of the second command to its first newly committed unit. Writes `results/data-plane.json`.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from miniature_seeds import PACKAGES, hardware, installed
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from fake_engine import Behaviour  # noqa: E402
from tiny_model import save_tiny  # noqa: E402

RESULT = Path(__file__).parent / "results" / "data-plane.json"
TEACHERS = ("strong", "weak")
INTERVAL = 2.0
"""Seconds between two samples of memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="prompts")
    parser.add_argument("--resume", type=int, help="prompts of the run that is killed at half")
    arguments = parser.parse_args()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"scales": {}}
    with tempfile.TemporaryDirectory(prefix="deltaray-data-plane-", ignore_cleanup_errors=True) as folder:
        model = save_tiny(Path(folder) / "model")
        for rows in arguments.rows:
            record["scales"][str(rows)] = full_run(write_study(Path(folder) / str(rows), model, rows), rows)
            record["marginal_microseconds_per_prompt"] = marginal(record["scales"])
            _save(record)
        if arguments.resume:
            rows = arguments.resume
            record["resume"] = resumed_run(write_study(Path(folder) / "resume", model, rows), rows)
            _save(record)


def marginal(scales: dict[str, Any]) -> dict[str, int]:
    """What one prompt more costs from each number of prompts to the next: flat if it grows in proportion."""
    totals = sorted((int(rows), scale["total_seconds"]) for rows, scale in scales.items())
    return {
        f"{few} to {many}": round(1e6 * (longer - shorter) / (many - few))
        for (few, shorter), (many, longer) in itertools.pairwise(totals)
    }


def _save(record: dict[str, Any]) -> None:
    about = {
        "command": "python tests/benchmarks/data_plane.py --resume 1000000",
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(about | record, indent=2) + "\n")
    print(json.dumps(record), flush=True)


def write_study(folder: Path, model: str, rows: int) -> Path:
    """A recipe over a JSONL file of short prompts; returns the recipe's path."""
    folder.mkdir()
    with (folder / "prompts.jsonl").open("w") as sink:
        for number in range(rows):
            sink.write(f'{{"prompt": "what is {number}+{number * 7 % 1000}?", "source": "made"}}\n')
    recipe = {
        "name": "data-plane",
        "out": str(folder / "out"),
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "teachers": {name: {"model": model, "engine": {"replicas": 1}} for name in TEACHERS},
        "pairings": {"delta": {"chosen": TEACHERS[0], "rejected": TEACHERS[1]}},
        "student": {"model": model, "max_length": 256},
    }
    YAML(typ="safe").dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


# --- a command, watched -------------------------------------------------------------------------------------------
class Watched:
    """A running command, the time of every line it says, and the memory of its processes."""

    def __init__(self, recipe: Path) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fake_engine.py"), "run", str(recipe)],
            env=os.environ | Behaviour().variable(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self.driver_gib = self.total_gib = 0.0
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._measure)]
        for thread in self.threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((self.seconds, line.rstrip()))
            print(f"{self.seconds:8.1f} {line.rstrip()}", flush=True)

    def _measure(self) -> None:
        driver = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                processes = driver.children(recursive=True)
                own = driver.memory_full_info()
            except psutil.Error:
                return
            self.driver_gib = max(self.driver_gib, own.rss / 2**30)
            self.total_gib = max(self.total_gib, (own.pss + sum(map(_pss, processes))) / 2**30)
            time.sleep(INTERVAL)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def when(self, start: str) -> float:
        """Seconds until the command said a line that starts so."""
        return next(seconds for seconds, line in self.lines if line.startswith(start))

    def responses(self) -> int:
        """Responses that are done as far as the command has told."""
        done: dict[str, int] = {}
        for _, line in list(self.lines):
            if found := re.match(r"generate (\w+): ([\d,]+)/", line):
                done[found[1]] = int(found[2].replace(",", ""))
        return sum(done.values())

    def end(self) -> None:
        code = self.process.wait()
        for thread in self.threads:
            thread.join()
        if code:
            raise SystemExit(f"exit code {code}")


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


# --- the two measurements -----------------------------------------------------------------------------------------
def full_run(recipe: Path, rows: int) -> dict[str, Any]:
    """Runs everything and checks that every identity is there once."""
    watched = Watched(recipe)
    watched.end()
    out = recipe.parent / "out"
    check(out, rows)
    lines = (out / ".deltaray" / "stages.jsonl").read_text().splitlines()
    stages = {item["stage"]: item["seconds"] for item in map(json.loads, lines)}
    seconds = {"prompts": watched.when("generate: "), **stages}
    result = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "rows_per_second": {
            "prompts": round(rows / seconds["prompts"]),
            "generate": round(2 * rows / seconds["generate"]),
            "pair": round(rows / seconds["pair"]),
        },
        "total_seconds": round(watched.seconds, 1),
        "microseconds_per_prompt": round(1e6 * watched.seconds / rows),
        "peak_driver_gib": round(watched.driver_gib, 2),
        "peak_total_gib": round(watched.total_gib, 2),
        "files": len(list(out.rglob("*.parquet"))),
    }
    shutil.rmtree(recipe.parent)
    return result


def resumed_run(recipe: Path, rows: int) -> dict[str, Any]:
    """Kills the driver when half of the responses are done; times the second command's first unit."""
    first = Watched(recipe)
    while first.process.poll() is None and first.responses() < rows:
        time.sleep(0.2)
    first.process.kill()
    killed_after = first.seconds
    first.process.wait()
    time.sleep(10)  # Ray's processes end with the driver
    out = recipe.parent / "out"
    before = committed(out)
    second = Watched(recipe)
    while not committed(out) - before:
        assert second.process.poll() is None, "it ended without a new unit"
        time.sleep(0.1)
    found = second.seconds
    planned = second.when("generate: ")
    second.process.kill()
    second.process.wait()
    shutil.rmtree(recipe.parent, ignore_errors=True)
    return {
        "prompts": rows,
        "responses_done": first.responses(),
        "killed_after_seconds": round(killed_after, 1),
        "seconds_to_plan": round(planned, 1),
        "seconds_to_first_new_unit": round(found, 1),
    }


def committed(out: Path) -> set[Path]:
    """Committed units and published files."""
    folders = (out / ".deltaray" / "units", out / "responses")
    return {path for folder in folders for path in folder.rglob("*.parquet") if not path.name.startswith(".")}


def check(out: Path, rows: int) -> None:
    """Every teacher answered every prompt once, and every pair is there once."""
    for folder in [*(out / f"responses/teacher={name}" for name in TEACHERS), out / "pairs/pairing=delta"]:
        ids = pa.concat_tables(pq.read_table(path, columns=["prompt_id"]) for path in folder.glob("*.parquet"))
        found, unique = len(ids), pc.count_distinct(ids["prompt_id"]).as_py()
        assert found == unique == rows, f"{folder}: {found} rows, {unique} of them different, instead of {rows}"


if __name__ == "__main__":
    main()
