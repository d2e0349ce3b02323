"""A pool's engine that writes conversations: the turns of all prompts of a unit one after another, in one visit.

A unit of conversations is committed like a unit of answers, so that what a crash costs and what a second run does are
generation's. Only finished conversations are ever stored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaray.failures import reason_of
from deltaray.generate.extend.rules import Draft, exchanges
from deltaray.generate.requests import Output, failed
from deltaray.generate.stream import Answering, SpecAround
from deltaray.generate.units import render, with_system
from deltaray.recipe.extensions import Extensions

KIND = "kind="
"""What stands before the kind at the end of a unit's destination."""


@dataclass(frozen=True)
class TalkSpec(SpecAround):
    """Replicas that write conversations."""

    section: Extensions

    def start(self) -> "Talk":
        return Talk(self.spec.start(), self.section)


class Talk:
    """Asks one engine for turn after turn."""

    def __init__(self, engine: Answering, section: Extensions) -> None:
        self.engine, self.section = engine, section

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        """One output per prompt: its `text` is the extended prompt as JSON, `tokens` is all that was written for it.

        A turn that fails, is empty or is cut ends its conversation with that turn's output.
        """
        kind = unit["destination"].rpartition(KIND)[2]
        talks = [
            _Talk(name, Draft(kind, messages, exchanges(self.section, kind, name)))
            for name, messages in zip(unit["prompt_ids"], unit["messages"], strict=True)
        ]
        while going := self._ready([talk for talk in talks if not talk.ended]):
            answers = await self.engine.generate(_asked(unit, going))
            for talk, (answer,) in zip(going, answers, strict=True):
                try:
                    talk.take(answer)
                except BaseException as error:
                    talk.failure = failed(reason_of(error))
        return [[talk.result()] for talk in talks]

    def _ready(self, talks: "list[_Talk]") -> "list[_Talk]":
        """Those with a question for the engine; what the chat template refuses ends its conversation."""
        if not talks:
            return []
        by = self.section.by
        for talk in talks:
            system = by.system if talk.draft.speaker == "assistant" else None
            try:
                talk.question = with_system(talk.draft.question(), system)
            except BaseException as error:
                talk.failure = failed(reason_of(error))
        talks = [talk for talk in talks if not talk.failure]
        ids, refused = render(by, [talk.question for talk in talks])
        for talk, own, reason in zip(talks, ids, refused, strict=True):
            talk.token_ids = own
            talk.failure = None if reason is None else failed(f"prompt refused: {reason}")
        return [talk for talk in talks if not talk.failure]

    def close(self) -> None:
        self.engine.close()


class _Talk:
    """One conversation, what is asked for its next turn, and how it failed if it did."""

    def __init__(self, prompt_id: str, draft: Draft) -> None:
        self.prompt_id, self.draft = prompt_id, draft
        self.question: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.tokens = 0
        self.failure: Output | None = None

    @property
    def ended(self) -> bool:
        return self.failure is not None or self.draft.finished

    def take(self, answer: Output) -> None:
        self.tokens += answer["tokens"]
        if answer["error"] is not None or answer["finish_reason"] != "stop" or not answer["text"].strip():
            self.failure = answer
        else:
            self.draft.add(answer["text"])

    def result(self) -> Output:
        if self.failure is not None:
            return self.failure | {"token_ids": [], "tokens": self.tokens}
        fields = {"reasoning": None, "finish_reason": "stop", "error": None}
        return {"token_ids": [], "tokens": self.tokens, "text": json.dumps(self.draft.messages())} | fields


def _asked(unit: Mapping[str, Any], talks: list[_Talk]) -> dict[str, Any]:
    """The unit of one more turn of these conversations; each turn draws with a seed of its own."""
    return {
        **unit,
        "samples": [0],
        "prompt_ids": [f"{talk.prompt_id}#{len(talk.draft.written)}" for talk in talks],
        "messages": [talk.question for talk in talks],
        "tools": [None for _ in talks],
        "token_ids": [talk.token_ids for talk in talks],
    }
