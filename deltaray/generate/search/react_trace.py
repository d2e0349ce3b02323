"""The rules of an answer that searches: what it asks for, what it is shown, when it ends. Pure."""

from collections.abc import Callable, Sequence

from deltaray.generate.requests import Output
from deltaray.recipe.search import Search


class Trail:
    """One answer on its way: the model's words and the results between them, as text and as token ids."""

    def __init__(self, rules: Search) -> None:
        self.rules = rules
        self.text, self.own = "", ""  # with what was read, and without
        self.token_ids: list[int] = []
        self.searches = 0
        self.query: str | None = None
        """What it waits for; None once it has ended."""
        self.last: Output = {}

    def take(self, output: Output) -> None:
        """The model's next words."""
        self.text += output["text"]
        self.own += output["text"]
        self.token_ids += output["token_ids"]
        self.last = output
        asked = None if output["error"] else asked_for(output["text"], self.rules.query)
        self.query = asked if self.searches < self.rules.turns else None

    def fail(self, output: Output) -> None:
        """Ends with a failed output."""
        self.last, self.query = output, None

    def read(self, passages: Sequence[str], encode: Callable[[str], list[int]]) -> None:
        """What the search has found, as the model will read it."""
        result = shown(passages, self.rules.result)
        self.text += result
        self.token_ids += encode(result)
        self.searches += 1

    def result(self) -> Output:
        """The answer alone as the text, the whole trail as the reasoning; no text if it came to no answer."""
        answer = final_answer(self.own, self.rules.answer)
        reason = self.last["finish_reason"] if self.last["error"] or answer is not None else "length"
        return {
            "token_ids": self.token_ids,
            "tokens": len(self.token_ids),
            "text": answer or "",
            "reasoning": self.text or None,
            "finish_reason": reason,
            "error": self.last["error"],
        }


def stops(rules: Search) -> list[str]:
    """Where the model must stop writing: it has asked, or has answered."""
    return [f"</{rules.query}>", f"</{rules.answer}>"]


def asked_for(text: str, tag: str) -> str | None:
    """The query that the words end with; None if they do not end with one."""
    if not text.endswith(f"</{tag}>"):
        return None
    _, opened, query = text.removesuffix(f"</{tag}>").rpartition(f"<{tag}>")
    return query.strip() if opened else None


def shown(passages: Sequence[str], tag: str) -> str:
    """What was found, numbered by rank."""
    lines = [f"({rank}) {passage}" for rank, passage in enumerate(passages, start=1)] or ["nothing was found"]
    return "\n".join(["", f"<{tag}>", *lines, f"</{tag}>", ""])


def final_answer(own: str, tag: str) -> str | None:
    """What stands between the last answer tags of what the model itself wrote; None if there are none."""
    before, closed, _ = own.rpartition(f"</{tag}>")
    _, opened, answer = before.rpartition(f"<{tag}>")
    return answer.strip() if closed and opened else None
