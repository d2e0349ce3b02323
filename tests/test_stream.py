"""Small units of CPU work: each result once, also of a unit that stands still."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from deltaray.runtime import stream
from deltaray.runtime.stream import map_units

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def double(folder: Path, stuck: set[int], unit: dict[str, Any]) -> dict[str, Any]:
    """Stands still in a unit the first time, as if Ray had forgotten it."""
    number = unit["number"]
    with (folder / f"{number}.begun").open("a") as begun:
        begun.write(".")
    if number in stuck and (folder / f"{number}.begun").read_text() == ".":
        time.sleep(3600)
    return {"number": number, "double": 2 * number, "nothing": None}


def test_a_unit_that_stands_still_is_done_again_and_each_result_is_given_once(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "PATIENCE", 5.0)
    done = list(map_units([{"number": number} for number in range(6)], partial(double, tmp_path, {4})))
    assert sorted(row["number"] for row in done) == list(range(6))
    assert all(row == {"number": row["number"], "double": 2 * row["number"], "nothing": None} for row in done)
    assert (tmp_path / "4.begun").read_text() == ".."
    assert caplog.text.count("asked for anew: none has ended for 5 s") == 1
