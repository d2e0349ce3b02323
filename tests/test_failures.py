"""What fails while running: exit code 1, one message with the cause, the log and how to go on; no traceback."""

import re
from pathlib import Path

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
