"""What the tests of extended prompts share."""

from typing import Any

from deltaray.data.prompts import PromptRow
from deltaray.data.prompts.rows import prompt_row
from deltaray.recipe.extensions import Extensions

KINDS = ("self_talk", "related_query", "paraphrase", "repeat")
SHARES: dict[str, Any] = {
    "self_talk": {"share": 0.3}, "related_query": {"share": 0.2}, "paraphrase": {"share": 0.15, "sources": ["sums"]},
    "repeat": {"share": 0.1},
}  # fmt: skip


def section(**kinds: Any) -> Extensions:
    return Extensions.model_validate({"by": {"model": "m"}, **(kinds or SHARES)})


def row(text: str = "1+1=", source: str | None = "sums", system: str | None = None) -> PromptRow:
    before = [{"role": "system", "content": system}] if system else []
    return prompt_row({"messages": [*before, {"role": "user", "content": text}], "answer": "2", "source": source})


def is_asked_as_user(question: list[dict[str, Any]]) -> bool:
    return "Write" in question[-1]["content"]
