"""Responses that end the process that scores them, and scores outside their scale."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_sandbox import SECRET

from deltaray.data.contracts import PROMPTS, RESPONSES
from deltaray.data.store import Store
from deltaray.score import registry, stage
from deltaray.score.response import Response, Score


def make_unit(store: Store, texts: list[str], kind: str = "python_tests", **spec: Any) -> dict[str, Any]:
    fixed = {"teacher": "t", "prompt_token_ids": [], "token_ids": [], "tokens": 1, "finish_reason": "stop"}
    rows = [{"prompt_id": f"p{n}", "sample": 0, "text": text, "error": None, **fixed} for n, text in enumerate(texts)]
    store.write_table("responses/part-00000-0abc.parquet", pa.Table.from_pylist(rows, schema=RESPONSES), RESPONSES)
    asked = [{"prompt_id": f"p{n}", "messages": [], "answer": '["assert True"]'} for n in range(len(texts))]
    table = pa.Table.from_pylist(asked, schema=PROMPTS)
    store.write_table("prompts/part-00000.parquet", table, PROMPTS)
    section = registry.section_of({"kind": kind, **spec}).model_dump(mode="json")
    return {
        "scorer": "s", "spec": section, "teacher": "t", "prompts": "prompts", "failed": False, "made_from": "x",
        "responses": "responses/part-00000-0abc.parquet", "destination": "scores/part-00000.parquet",
    }  # fmt: skip


def scores_in(store: Store) -> list[tuple[float | None, str | None]]:
    rows = store.read_table("scores/part-00000.parquet", ["score", "note"]).to_pylist()
    return [(row["score"], row["note"]) for row in rows]


def test_secrets_are_in_nothing_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    (tmp_path / "key").write_text(SECRET)
    sources = [str(tmp_path / "key"), "/proc/self/environ", f"/proc/{os.getpid()}/environ"]
    texts = [
        *(f"raise type(open({path!r}, errors='replace').read(), (Exception,), {{}})" for path in sources),
        "import os\nraise type(str(dict(os.environ)), (Exception,), {})",
        "import os, sys\nsys.stderr.write(str(os.environ))\nos.write(3, str(os.environ).encode())",
    ]
    store = Store(str(tmp_path / "out"))
    told = stage.score_file(store, make_unit(store, texts, memory_mib=256))
    assert told["rows"] == told["scored"] == 5 and {score for score, _ in scores_in(store)} == {0.0}
    assert all(len(str(note)) < 60 for _, note in scores_in(store))
    left = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    said = "".join(capfd.readouterr())
    assert len(left) >= 3 and not any(SECRET.encode() in content for content in left) and SECRET not in said


def ending(response: Response) -> Score:
    if response.text == "die":
        os._exit(9)
    return Score(1.0)


def test_a_row_that_ends_its_process_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SCORERS, "exact_match", lambda _: ending)
    store = Store(str(tmp_path))
    unit = make_unit(store, ["fine", "die", "fine", "die"], kind="exact_match")
    tries = 0
    while not store.exists(unit["destination"]):
        tries += 1
        assert tries < 10
        if (child := os.fork()) == 0:  # a worker that Ray starts again
            try:
                stage.score_file(store, unit)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    given_up = (None, "scorer failed: its process died 2 times over this response")
    assert scores_in(store) == [(1.0, None), given_up, (1.0, None), given_up] and tries == 7
    assert not [path for path in (tmp_path / ".deltaray").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (1000.0, "1000.0 is outside its scale, 0 to 1"),
        (-0.1, "-0.1 is outside its scale, 0 to 1"),
        (float("nan"), "nan is not a finite number"),
        (float("inf"), "inf is not a finite number"),
        ("high", "TypeError"),
        (None, None),
    ],
)
def test_a_score_outside_its_scale_is_its_row_s_failure(
    value: Any, note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.SCORERS, "exact_match", lambda _: lambda response: Score(value, "told\n\ud800"))
    store = Store(str(tmp_path))
    stage.score_file(store, make_unit(store, ["x"], kind="exact_match"))
    ((score, said),) = scores_in(store)
    assert score is None and (said == "told ?" if note is None else str(said).startswith(f"scorer failed: {note}"))
