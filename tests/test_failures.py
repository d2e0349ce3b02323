"""What fails while running: exit code 1, one message with the cause, the log and how to go on; no traceback."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from completions_server import completion, serving
from conftest import deltaray
from ruamel.yaml import YAML
from tiny_model import save_tiny


def test_an_engine_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    engine = {"dtype": "float32", "arguments": {"nonsense": 1}}
    recipe = {
        "name": "failing",
        "out": str(tmp_path / "out"),
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "teachers": {"weak": {"model": save_tiny(tmp_path / "weak"), "engine": engine}},
    }
    YAML(typ="safe").dump(recipe, tmp_path / "recipe.yaml")
    run = deltaray("generate", str(tmp_path / "recipe.yaml"))
    assert run.code == 1 and not run.stdout
    assert "error: generate failed: " in run.stderr and "unexpected keyword argument 'nonsense'" in run.stderr
    assert "run the same command again to resume" in run.stderr and "Traceback" not in run.stderr
    log = re.search(r"the log is (\S+)", run.stderr)
    assert log and "nonsense" in Path(log[1]).read_text()


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a name so short that Ray can have its sockets in it."""
    with TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_rows_that_all_fail_end_the_command_until_they_are_tried_again(
    tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a Ray that has died left its address behind."""
    (room / "ray").mkdir()
    (room / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(room))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(4)))
    words = ["zapped"]

    def script(request: dict[str, Any], attempt: int) -> Any:
        return completion("four", words[0])

    with serving(script) as (server, url):
        teacher = {"model": "m", "endpoint": {"url": url, "retries": 0}}
        recipe = {"name": "r", "out": str(tmp_path / "out"), "prompts": {"path": str(tmp_path / "prompts.jsonl")}}
        YAML(typ="safe").dump(recipe | {"teachers": {"a": teacher}}, tmp_path / "recipe.yaml")
        first = deltaray("generate", str(tmp_path / "recipe.yaml"))
        assert "uses its own Ray on this machine" in first.stderr and "127.0.0.1:1, which" in first.stderr
        assert "0 answered, 4 failed (first reason: " in first.stderr
        again = deltaray("generate", str(tmp_path / "recipe.yaml"))
        assert len(server.requests) == 4  # nobody asked to try again
        for run in (first, again):
            assert run.code == 1, run.stderr
            assert "error: a: 4 of 4 responses failed" in run.stderr and "'zapped'" in run.stderr
        words[0] = "eos"
        retried = deltaray("generate", str(tmp_path / "recipe.yaml"), "--retry-failed")
    assert retried.code == 0 and "failed" not in retried.stderr, retried.stderr
