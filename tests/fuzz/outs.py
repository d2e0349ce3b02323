"""Tampered `out` folders: a file of a small study is changed, cut or exchanged, and it is looked at and gone on with.

The study is made of a preference data set, so that its pairs need neither engine nor cluster: what Ray would spread is
done in this process. Where bytes of a Parquet file changed and the pairs are made again, they must be the same as
before, or the command must say which file is wrong: another result without a word is a failure.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deltaray.cli.stages import _conclude
from deltaray.data.contracts import PAIRS
from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.recipe import load_recipe
from deltaray.report import write_report
from deltaray.runtime.runner import Runner
from deltaray.runtime.session import Capacity
from deltaray.runtime.terminal import Terminal
from deltaray.study.pipeline import Pipeline
from deltaray.study.status import open_study, study_status
from tests.fuzz.mutate import change, spoil
from tests.fuzz.recipes import Check, _silent
from tests.tiny_model import save_tiny

SPREADING = (
    "pair.token_ids",
    "pair.prompts",
    "pair.describe",
    "pair.stage",
    "score.compare",
    "score.judging",
    "score.stage",
)
"""Modules that spread work over the cluster."""


def prepare(folder: Path) -> Check:
    """A study with pairs, a trained run and an evaluation."""
    terminal = _silent()
    _stay_here()
    recipe, out = _recipe(folder), folder / "out"
    _pipeline(recipe, terminal).run(["score", "pair"])
    _trained(out)
    _pipeline(recipe, terminal).run(["report"])
    whole, truth = folder / "whole", _pairs(out)
    shutil.copytree(out, whole)

    def check(chance: random.Random) -> str:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        path = chance.choice(sorted(path for path in out.rglob("*") if path.is_file() and path.name != "lock"))
        exact = _tamper(chance, path)
        if again := chance.random() < 0.5 and not path.is_relative_to(out / "pairs"):
            shutil.rmtree(out / "pairs")
            shutil.rmtree(out / ".deltaray" / "pairs", ignore_errors=True)
            if chance.random() < 0.5:
                shutil.rmtree(out / ".deltaray" / "tokens", ignore_errors=True)
        said = [_done(act, terminal) for act in _commands(chance, recipe, out, terminal)]
        if again and exact and "refused" not in said and _pairs(out) != truth:
            raise AssertionError(f"{path.relative_to(out)}: other pairs, and not a word")
        return "refused" if "refused" in said else "went on"

    return check


def _commands(chance: random.Random, recipe: Path, out: Path, terminal: Terminal) -> Iterator[Callable[[], object]]:
    def go_on() -> None:
        pipeline = _pipeline(recipe, terminal)
        pipeline.run(["score", "pair"])
        _conclude(terminal, pipeline)

    yield lambda: study_status(str(out), terminal, False)
    yield lambda: study_status(str(out), terminal, True)
    yield lambda: _pipeline(recipe, terminal).plan()
    yield go_on
    if chance.random() < 0.15:  # a page takes longer than all the rest
        yield lambda: write_report(open_study(str(out)))


def _done(act: Callable[[], object], terminal: Terminal) -> str:
    try:
        act()
    except (UserError, StageError) as error:
        terminal.say(f"error: {error}")
        if "nforeseen" in str(error):
            raise AssertionError(str(error)) from error
        if isinstance(error, StageError) and not isinstance(error.__cause__, UserError | StageError | None):
            raise AssertionError(f"a stage met {error.__cause__!r}") from error
        return "refused"
    return "done"


# --- the study ----------------------------------------------------------------------------------------------------
def _recipe(folder: Path) -> Path:
    save_tiny(folder / "student")
    rows = [
        {"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": "no", "chosen_score": 1, "rejected_score": 0}
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks.jsonl").write_text('{"prompt": "3+3=", "answer": "6"}\n')
    recipe = {
        "name": "fuzzed",
        "out": str(folder / "out"),
        "shard_size": 8,
        "preferences": {"path": str(folder / "rows.jsonl")},
        "scorers": {"given": {"kind": "given"}, "surface": {"kind": "surface"}},
        "pairings": {
            "all": {"chosen": "chosen", "rejected": "rejected", "scorer": "given"},
            "some": {
                "chosen": "chosen", "rejected": "rejected", "scorer": "surface", "limit": 9,
                "filters": [{"kind": "duplicate_prompt"}],
            },
        },
        "student": {"model": str(folder / "student"), "max_length": 64},
        "training": {"runs": {"all": {"pairing": "all"}}},
        "evaluation": {"tasks": {"sums": {"path": str(folder / "tasks.jsonl")}}, "claims": ["all > student"]},
        "cluster": {"cpus": 8, "gpus": 0},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def _trained(out: Path) -> None:
    """What training and evaluation leave behind, invented."""
    store = Store(str(out))
    lines = [{"step": n, "epoch": 0.1 * n, "loss": 1 / n, "rewards_margin": 0.1, "tokens": 9} for n in range(1, 6)]
    store.write_bytes("training/all/metrics.jsonl", "\n".join(map(json.dumps, lines)).encode())
    store.write_json("training/all/data.json", {"trained": 24})
    store.write_bytes("students/all/config.json", b"{}")
    store.write_bytes("students/all/.complete", b"")
    answers = {"total": 4, "failed": 0, "cut": 0, "unscored": 0, "notes": {}}
    result = {"metric": "exact_match", "value": 0.5, "stderr": 0.1, "n": 4, "answers": answers}
    for name in ("all", "student"):
        store.write_json(Store.evaluation(name), {"model": name, "tasks": {"sums": result}, "mean": 0.5})
    mean = {"mean": 0.5, "stderr": 0.1, "values": [0.5]}
    names = {name: {"role": "student", "tasks": {"sums": mean | {"n": 4}}, "mean": mean} for name in ("all", "student")}
    interval = {"difference": 0.0, "low": -0.1, "high": 0.1}
    claim = {"better": "all", "worse": "student", "task": "mean", "holds": False, "method": "bootstrap", **interval}
    row = {"first": "all", "second": "student", "task": "mean", "verdict": "open", **interval}
    summary = {"tasks": ["sums"], "seeds": [0], "names": names, "claims": ["all > student"], "missing": {}}
    store.write_json("evaluation/summary.json", summary | {"comparisons": [claim], "differences": [row]})
    trial = {"name": "t", "label": "a > b", "state": "running", "choice": {}, "pairing": "all", "settings": {}}
    store.write_json("tuning/trials/t.json", trial)
    units = f".deltaray/units/{Store.responses('chosen')}/x/part-00000"
    for path in store.committed(Store.responses("chosen"))[:1]:
        store.write_bytes(f"{units}/unit.parquet", store.read_bytes(path))


def _pipeline(recipe: Path, terminal: Terminal) -> Pipeline:
    return Pipeline(load_recipe(recipe), terminal)


def _pairs(out: Path) -> dict[str, list[Any]]:
    store = Store(str(out))
    return {name: sorted(map(str, store.read_tables(Store.pairs(name), PAIRS).to_pylist())) for name in ("all", "some")}


# --- this process is the cluster ------------------------------------------------------------------------------------
_before: list[tuple[Any, str, Any]] = []


def _stay_here() -> None:
    for name in SPREADING:
        _put(import_module(f"deltaray.{name}"), "map_units", _map_units)
    _put(Runner, "ray", lambda self: Capacity(8, 0))
    _put(Runner, "stage", _stage)
    _put(import_module("deltaray.study.pipeline"), "stop_ray", lambda: None)  # it would stop the one of other tests


def _put(place: Any, name: str, instead: Any) -> None:
    _before.append((place, name, getattr(place, name)))
    setattr(place, name, instead)


def leave() -> None:
    """Makes work spread over a cluster again."""
    while _before:
        setattr(*_before.pop())


def _map_units(units: list[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    for unit in units:
        yield json.loads(json.dumps(work(json.loads(json.dumps(unit)))))


@contextmanager
def _stage(self: Runner, stage: str, unit: str, left: int, shown: str | None = None) -> Iterator[Any]:
    with self.terminal.progress(stage, unit) as progress:
        yield progress
    self.records.append({"stage": stage, "seconds": 1.0, "done": left, "unit": unit, "tokens": 0, "peak_gib": 0.1})
    self.keep_records()


# --- what is changed ------------------------------------------------------------------------------------------------
def _tamper(chance: random.Random, path: Path) -> bool:
    """Changes a file; whether what it holds may not have become something else that is sound."""
    act, content = chance.random(), path.read_bytes()
    if act < 0.06:
        path.unlink()
        chance.choice((lambda: path.symlink_to("/dev/zero"), path.mkdir, lambda: path.symlink_to(path), path.touch))()
        return False
    if path.suffix == ".json" and act < 0.6:
        path.write_text(json.dumps(change(chance, json.loads(content))))
        return False
    if path.suffix == ".jsonl" and act < 0.6:
        lines = content.splitlines()
        place = chance.randrange(len(lines))
        lines[place] = json.dumps(change(chance, json.loads(lines[place]))).encode()
        path.write_bytes(b"\n".join(lines))
        return False
    if path.suffix == ".parquet" and act < 0.2:
        _exchange(chance, path)
        return False
    path.write_bytes(spoil(chance, content))
    return path.suffix == ".parquet"


def _exchange(chance: random.Random, path: Path) -> None:
    """A sound Parquet file that is not what it should be."""
    table = pq.read_table(path)
    act = chance.choice(("rename", "drop", "empty", "double", "other"))
    if act == "rename":
        table = table.rename_columns([f"{name}x" if chance.random() < 0.3 else name for name in table.column_names])
    elif act == "drop":
        table = table.drop_columns([chance.choice(table.column_names)])
    elif act == "empty":
        table = table.slice(0, 0)
    elif act == "other" and table.num_rows:
        table = table.take([0] * table.num_rows)
    pq.write_table(table, path)
