"""Some inputs of the fuzzer for every door: the long run is `python -m tests.fuzz` (see `tests/fuzz`)."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.fuzz import outs
from tests.fuzz.run import one

INPUTS = {"recipes": 120, "prompts": 250, "models": 12, "outs": 6}
SEED = 20_26


@pytest.mark.parametrize("door", INPUTS)
def test_no_input_ends_in_a_traceback(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        check = import_module(f"tests.fuzz.{door}").prepare(tmp_path)
        ended = [one(check, door, SEED, number) for number in range(INPUTS[door])]
    finally:
        outs.leave()
    failed = [found for found in ended if found["ended"] == "traceback"]
    assert not failed, f"input {failed[0]['number']}: {failed[0]['why']}"
    assert len({found["ended"] for found in ended}) == 2  # some are refused, some are not
