"""Planted keys: a study whose servers say them in every dress leaves them nowhere, Ray's own logs included."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from completions_server import Reply, completion, ok, prompt_of, refusal, serving
from conftest import deltaray
from ruamel.yaml import YAML

from deltaray.text import Cleaner

KEYS = {"teacher": "Tq7/plantedOak+41xZ", "judge": "jd-planted-elm-9c-2b7f", "passed": "planted-in-the-house-31"}
ANSWERS = 12


def dressed(key: str, number: int) -> str:
    raw = key.encode()
    forms = [key, base64.b64encode(b"Bearer " + raw).decode(), quote(key, safe=""), raw.hex(), json.dumps({"k": key})]
    return [*forms, "".join(f"%{byte:02x}" for byte in raw)][number % 6]


def script(request: dict[str, Any], attempt: int) -> Reply:
    """Answers, and refuses some for good or once, always with the key that it was asked with."""
    judges = "judge" in request["model"]
    key, number = KEYS["judge" if judges else "teacher"], sum(map(ord, prompt_of(request))) % ANSWERS
    said = dressed(key, number)
    if judges:
        return completion(f"I was asked with {said}.\nRating: {number % 5 + 1}", reasoning_content=said)
    if number == 0:
        return refusal(400, f"\x1b[2Jno {said}")
    if number == 1 and attempt == 0:
        return ok({"error": {"message": f"slow down, {said}"}}, 429, **{"Retry-After": "0.01"})
    if number == 2:
        return completion("four", f"ended by {said}")
    return completion(f"four, by {said}", reasoning_content=f"it says {said}")


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a name so short that Ray can have its sockets in it."""
    with TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def words_in(file: Path) -> str:
    """All texts of a file; those of Parquet files unpacked."""
    if file.suffix == ".parquet":
        return json.dumps(pq.read_table(file).to_pylist(), ensure_ascii=False, default=str)
    return file.read_bytes().decode(errors="replace")


def test_planted_keys_are_in_nothing_that_a_study_leaves_behind(
    tmp_path: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"teacher": "OAK", "judge": "ELM", "passed": "PASSED_API_KEY"}
    for name, variable in variables.items():
        monkeypatch.setenv(variable, KEYS[name])
    monkeypatch.setenv("RAY_TMPDIR", str(room))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [{"prompt": f"{number}?", "id": f"=p{number}"} for number in range(2 * ANSWERS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(script) as (server, url):
        asked = {"url": url, "key_variable": "OAK", "retries": 2}
        by = {"model": "the-judge", "endpoint": {**asked, "key_variable": "ELM"}}
        recipe = {
            "name": "planted", "out": str(tmp_path / "out"), "prompts": {"path": str(tmp_path / "prompts.jsonl")},
            "teachers": {"weak": {"model": "the-model", "endpoint": asked, "reasoning": "qwen3"}},
            "scorers": {"judge": {"kind": "judge", "by": by, "aspects": {"truth": "?"}}},
            "failures": {"max_share": 0.9},
        }  # fmt: skip
        YAML(typ="safe").dump(recipe, tmp_path / "recipe.yaml")
        path = str(tmp_path / "recipe.yaml")
        runs = [deltaray("generate", path), deltaray("score", path), deltaray("report", str(tmp_path / "out"))]
        runs.append(deltaray("generate", path, "--set", f"teachers.weak.revision={KEYS['teacher']}"))
    assert [run.code for run in runs] == [0, 0, 0, 2], "\n".join(run.stderr for run in runs)
    assert server.keys == {f"Bearer {KEYS['teacher']}", f"Bearer {KEYS['judge']}"}
    left = {str(file): words_in(file) for file in tmp_path.rglob("*") if file.is_file()}
    left |= {str(file): words_in(file) for file in room.rglob("*") if file.is_file()}
    left |= {f"{kind} {number}": getattr(run, kind) for number, run in enumerate(runs) for kind in ("stdout", "stderr")}
    assert any("[key]" in text for name, text in left.items() if "responses" in name)  # it was said, and taken out
    assert any(name.startswith(str(room)) and name.endswith((".out", ".err", ".log")) for name in left)
    cleaner = Cleaner(KEYS.values())
    assert [name for name, text in left.items() if cleaner.holds(text)] == []
    assert "\x1b" not in "".join(run.stderr for run in runs)
