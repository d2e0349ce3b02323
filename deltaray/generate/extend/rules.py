"""Which prompts are extended, how far, and what a model is asked for each further turn. Pure.

Kinds and limits follow OLMo 3 (arXiv 2512.13961, the multi-turn part of Dolci Instruct's pairs). Its templates are not
published: the words below are our own.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from deltaray.data.prompts.rows import PromptRow, prompt_hash
from deltaray.recipe.extensions import Extensions

Turn = dict[str, Any]

_GO_ON = """\
This is a conversation between a user and an assistant.

<conversation>
{conversation}
</conversation>

Write what this user says next: a further question, a doubt, or a wish to change or add to the last answer. Keep to \
the user's language and manner. Write the message alone, with nothing around it."""

_RELATED = """\
A user is about to send this message to an assistant:

<message>
{query}
</message>

Write a message that the same user may have sent before: another question on a related matter, which can be answered \
by itself{different}. Keep to the user's language and manner. Write the message alone, with nothing around it."""

_PARAPHRASE = """\
A user sends this message to an assistant:

<message>
{query}
</message>

Write a message that asks for exactly the same in other words{different}. Keep every fact and condition, and the \
language. Write the message alone, with nothing around it."""

_DIFFERENT = " and that differs from these:\n\n<earlier>\n{earlier}\n</earlier>\n\n"
"""What a second message is told about the first."""


# --- which prompts ----------------------------------------------------------------------------------------------
def drawn_kind(section: Extensions, row: PromptRow) -> str | None:
    """The kind that a prompt is drawn for; None if it stays as it is.

    A prompt of several turns, with tools, or that cannot be asked at all stays.
    """
    *before, last = row["messages"]
    single = last["role"] == "user" and all(turn["role"] == "system" for turn in before)
    if not single or row["error"] is not None or row.get("conversation") is not None:
        return None
    place = _number(f"extend#{section.seed}#{row['prompt_id']}") / 2**64
    for name, kind in section.kinds.items():
        if kind.sources is None or row["source"] in kind.sources:
            if place < kind.share:
                return name
            place -= kind.share
    return None


def exchanges(section: Extensions, kind: str, prompt_id: str) -> int:
    """How many turns of user and assistant are added to a prompt, in pairs, such that the limit holds: at least one."""
    most = (section.kinds[kind].turns - 2) // 2  # the prompt and the answer to come are two turns
    return 1 + _number(f"turns#{section.seed}#{prompt_id}") % most


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


# --- turn by turn -----------------------------------------------------------------------------------------------
@dataclass
class Draft:
    """A conversation in the making."""

    kind: str
    origin: list[Turn]  # system turns, and the one of the user
    exchanges: int
    written: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._repeat()

    @property
    def finished(self) -> bool:
        return len(self.written) == 2 * self.exchanges

    @property
    def speaker(self) -> str:
        """Who writes the next turn. A self-talk goes on after the prompt, the other kinds lead up to it."""
        first = "assistant" if self.kind == "self_talk" else "user"
        return first if len(self.written) % 2 == 0 else {"user": "assistant", "assistant": "user"}[first]

    def question(self) -> list[Turn]:
        """What the model is asked, in order to write the next turn."""
        if self.speaker == "assistant":
            return self._so_far()
        if self.kind == "self_talk":
            told = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in self._so_far())
            return _ask(_GO_ON.format(conversation=told))
        earlier = "\n\n".join(turn["content"] for turn in self.written if turn["role"] == "user")
        different = _DIFFERENT.format(earlier=earlier) if earlier else ""
        template = _RELATED if self.kind == "related_query" else _PARAPHRASE
        return _ask(template.format(query=self.origin[-1]["content"], different=different))

    def add(self, text: str) -> None:
        """Adds what the speaker says."""
        self.written.append({"role": self.speaker, "content": text.strip() if self.speaker == "user" else text})
        self._repeat()

    def messages(self) -> list[Turn]:
        """The extended prompt: all turns before the answer that is asked for."""
        return self._so_far() if self.kind == "self_talk" else [*self._so_far(), self.origin[-1]]

    def _so_far(self) -> list[Turn]:
        return [*(self.origin if self.kind == "self_talk" else self.origin[:-1]), *self.written]

    def _repeat(self) -> None:
        """The same question again needs no model."""
        if self.kind == "repeat" and not self.finished and self.speaker == "user":
            self.written.append({"role": "user", "content": self.origin[-1]["content"]})


def _ask(words: str) -> list[Turn]:
    return [{"role": "user", "content": words}]


# --- what becomes of it -----------------------------------------------------------------------------------------
def echoes(messages: list[Turn]) -> bool:
    """Whether the user says the same twice, white space and case aside: then the model has written nothing new."""
    said = [" ".join(turn["content"].casefold().split()) for turn in messages if turn["role"] == "user"]
    return len(set(said)) < len(said)


def extended_row(kind: str, origin: PromptRow, messages: list[Turn]) -> PromptRow:
    """The extended prompt. Its id is that of its messages, its source names the kind.

    What a verifier compares with belongs to the original question; a self-talk ends with another.
    """
    return PromptRow(
        prompt_id=prompt_hash(messages),
        messages=messages,
        answer=None if kind == "self_talk" else origin["answer"],
        source=kind if origin["source"] is None else f"{origin['source']}/{kind}",
        error=None,
    )
