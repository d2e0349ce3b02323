"""Streams of units: each result once, also of a unit that stands still."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fake_engine
import pytest
import ray
from fake_engine import FakeSpec

from deltaray.generate.stream import stream_units
from deltaray.runtime import stream
from deltaray.runtime.stream import map_units

for module in (sys.modules[__name__], fake_engine):
    ray.cloudpickle.register_pickle_by_value(module)


def double(folder: Path, stuck: set[int], unit: dict[str, Any]) -> dict[str, Any]:
    """Stands still in a unit the first time, as if Ray had forgotten it."""
    number = unit["number"]
    with (folder / f"{number}.begun").open("a") as begun:
        begun.write(".")
    if number in stuck and (folder / f"{number}.begun").read_text() == ".":
        while not (folder / "over").exists():
            time.sleep(0.1)
    return {"number": number, "double": 2 * number, "nothing": None}


def test_a_unit_that_stands_still_is_done_again_and_each_result_is_given_once(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 5.0)
    monkeypatch.setattr(stream, "cpus_of_a_core", lambda: 0.5)  # what stands still leaves room for others
    done = list(map_units([{"number": number} for number in range(6)], partial(double, tmp_path, {4})))
    assert sorted(row["number"] for row in done) == list(range(6))
    assert all(row == {"number": row["number"], "double": 2 * row["number"], "nothing": None} for row in done)
    (tmp_path / "over").touch()
    assert len((tmp_path / "4.begun").read_text()) > 1
    assert caplog.text.count("asked for again: none has ended for 5 s") == 1


def load(folder: Path, unit: dict[str, Any]) -> dict[str, Any]:
    double(folder, {2}, unit)
    prompts = {"messages": [[]], "tools": [None], "token_ids": [[1]], "refused": [None]}
    return unit | prompts | {"prompt_ids": [f"p{unit['number']}"]}


def write(unit: dict[str, Any]) -> dict[str, Any]:
    return {"number": unit["number"], "text": unit["outputs"][0][0]["text"]}


def test_a_pool_is_started_anew_where_a_task_beside_it_stands_still(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 10.0)
    unit = {"name": "strong", "model": "m", "sampling": '{"temperature": 0.5}', "rows": [0], "samples": [0]}
    units = [unit | {"number": number} for number in range(4)]
    done = list(stream_units(units, FakeSpec(), partial(load, tmp_path), write))
    told = sorted((row["number"], row["text"]) for row in done)
    assert told == [(number, f"strong says p{number}#0 at 0.5") for number in range(4)]
    (tmp_path / "over").touch()
    assert len((tmp_path / "2.begun").read_text()) > 1
