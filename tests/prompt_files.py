"""Prompt files that several tests write and read."""

import json
from pathlib import Path
from typing import Any

from deltaray.data.prompts import PromptRow, read_prompts

ROWS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "source": "sums"} for n in range(10)]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "1+1?"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path | str, **options: Any) -> list[PromptRow]:
    return list(read_prompts(str(path), "prompts.path", **options))


def text_of(row: PromptRow) -> str:
    return row["messages"][-1]["content"]
