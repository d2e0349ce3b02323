"""Stores with made-up responses, for the tests of scores and pairs."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store

Say = Callable[[int, int], str]
"""(number of the prompt, sample) -> text."""


def ask(store: Store, prompts: int, shard_size: int, **columns: Callable[[int], Any]) -> None:
    """Prompts `p000`, `p001`, … asking `n+n=`; `answer`, `source` and `content` may say otherwise."""
    content = columns.get("content", lambda n: f"{n}+{n}=")
    rows: list[Any] = [
        {
            "prompt_id": f"p{n:03d}",
            "messages": [{"role": "user", "content": content(n)}],
            "answer": columns.get("answer", lambda n: str(2 * n))(n),
            "source": columns.get("source", lambda n: None)(n),
            "error": None,
        }
        for n in range(prompts)
    ]
    store_prompts(store, rows, shard_size)


def respond(store: Store, teacher: str, prompts: int, shard_size: int, say: Say, samples: int = 1) -> None:
    """All responses of a teacher; one that says nothing has failed, one that ends in … was cut."""
    for number, start in enumerate(range(0, prompts, shard_size)):
        keys = [(n, k) for n in range(start, min(start + shard_size, prompts)) for k in range(samples)]
        table = pa.Table.from_pylist([_row(teacher, n, k, say(n, k)) for n, k in keys], schema=RESPONSES)
        store.write_table(f"{Store.responses(teacher)}/part-{number:05d}-abc.parquet", table, RESPONSES)


def _row(teacher: str, number: int, sample: int, text: str) -> dict[str, Any]:
    return {
        "prompt_id": f"p{number:03d}", "sample": sample, "teacher": teacher, "text": text, "prompt_token_ids": [1],
        "token_ids": [1], "tokens": len(text.split()), "finish_reason": "length" if text.endswith("…") else "stop",
        "error": None if text else "empty answer", "reasoning": None,
    }  # fmt: skip
