"""A pool's engine that lets its model search: the answers of a unit, turn after turn, in one visit.

The prompt of a turn is the ids of all before it, so no text is tokenized twice and nothing a model wrote is altered.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deltaray.failures import reason_of
from deltaray.generate.completions import LONGEST_TOKEN
from deltaray.generate.requests import Output, failed
from deltaray.generate.search.react_trace import Trail, stops
from deltaray.generate.stream import Answering, SpecAround
from deltaray.generate.units import tokenizer_of
from deltaray.recipe.models import Teacher
from deltaray.recipe.search import Search


class AnswerError(Exception):
    """What came back for some queries is nothing that can be read."""


class Retriever(Protocol):
    """What finds passages; pickled into the replicas."""

    async def find(self, queries: list[str], count: int) -> list[list[str]]:
        """The best `count` passages of each query or fewer, best first; AnswerError: there is no reading them."""


@dataclass(frozen=True)
class SearchSpec(SpecAround):
    """Replicas whose models may search."""

    rules: Search
    retriever: Retriever

    def start(self) -> "Searching":
        return Searching(self.spec.start(), self.rules, self.retriever)


class Searching:
    """Asks one engine turn after turn; units that must not search go through as they are."""

    def __init__(self, engine: Answering, rules: Search, retriever: Retriever) -> None:
        self.engine, self.rules, self.retriever = engine, rules, retriever

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        """One output per prompt and sample; see `Trail.result`."""
        if not unit["search"]:
            return await self.engine.generate(unit)
        trails = [[Trail(self.rules) for _ in unit["samples"]] for _ in unit["prompt_ids"]]
        going = [(place, sample, trail) for place, of in enumerate(trails) for sample, trail in enumerate(of)]
        while going:
            answers = await self.engine.generate(_turn(unit, going, self.rules))
            for (_, _, trail), (output,) in zip(going, answers, strict=True):
                self._going_on(trail, partial(trail.take, output))
            going = [it for it in going if it[2].query is not None]
            await self._search(unit, [trail for _, _, trail in going])
            going = [it for it in going if it[2].query is not None]
        return [[trail.result() for trail in of] for of in trails]

    async def _search(self, unit: Mapping[str, Any], trails: list[Trail]) -> None:
        """One request for all that ask."""
        if not trails:
            return
        tokenizer = tokenizer_of(Teacher.model_validate_json(unit["teacher"]))

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def cut(passage: str) -> str:
            most = self.rules.passage_tokens
            ids = encode(passage := passage[: most * LONGEST_TOKEN])
            return passage if len(ids) <= most else str(tokenizer.decode(ids[:most]))

        for trail, passages in zip(trails, await self._found([str(it.query) for it in trails]), strict=True):
            if isinstance(passages, AnswerError):
                trail.fail(failed(f"the search failed: {passages}"))
            else:
                self._going_on(trail, partial(self._read, trail, passages, cut, encode))

    async def _found(self, queries: list[str]) -> list[list[str] | AnswerError]:
        """The passages of every query; where all together are answered with nonsense, each is asked alone."""
        try:
            return [*await self.retriever.find(queries, self.rules.passages)]
        except AnswerError as error:
            if len(queries) == 1:
                return [error]
        return [found for [found] in await asyncio.gather(*(self._found([query]) for query in queries))]

    @staticmethod
    def _read(trail: Trail, passages: list[str], cut: Callable[[str], str], encode: Callable[[str], list[int]]) -> None:
        trail.read([cut(passage) for passage in passages], encode)

    def _going_on(self, trail: Trail, step: Callable[[], None]) -> None:
        """Takes a step of one answer; what it raises ends that answer alone."""
        try:
            step()
        except BaseException as error:
            trail.fail(failed(reason_of(error)))

    def close(self) -> None:
        self.engine.close()


def _turn(unit: Mapping[str, Any], going: list[tuple[int, int, Trail]], rules: Search) -> dict[str, Any]:
    """The unit of one more turn of these answers; each turn draws with a seed of its own.

    vLLM's reasoning parsers know whole answers only, so the reasoning stays where it is in the trail.
    """
    settings = json.loads(unit["sampling"])
    settings |= {"stop": [*settings.get("stop", []), *stops(rules)], "include_stop_str_in_output": True}
    return {
        **unit,
        "reasoning": None,
        "sampling": json.dumps(settings),
        "samples": [0],
        "prompt_ids": [f"{unit['prompt_ids'][p]}#{unit['samples'][s]}#{trail.searches}" for p, s, trail in going],
        "messages": [unit["messages"][p] for p, _, _ in going],
        "tools": [unit["tools"][p] for p, _, _ in going],
        "token_ids": [[*unit["token_ids"][p], *trail.token_ids] for p, _, trail in going],
    }
