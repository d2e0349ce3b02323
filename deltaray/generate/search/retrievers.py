"""Who finds passages for the replicas: one actor with a BM25 index, or somebody's server over any other index."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltaray.errors import StageError
from deltaray.generate.requests import readable
from deltaray.generate.search.corpus import corpus_digest, passages_of
from deltaray.generate.search.engine import AnswerError, Retriever, SearchSpec
from deltaray.generate.stream import Spec
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.search import Corpus, Search
from deltaray.runtime import server as client
from deltaray.runtime.session import beside_driver

RETRIES = 5
"""Of a request to a server, with pauses that double from one second on."""
SECONDS = 120.0
"""That one request may take."""
OF_QUERIES = (400, 413, 414, 422)
"""What a server says of queries that it does not like; other refusals are everybody's."""


@dataclass(frozen=True)
class Index:
    """Asks the one actor that has the corpus."""

    actor: Any

    async def find(self, queries: list[str], count: int) -> list[list[str]]:
        return list(await self.actor.find.remote(queries, count))


@dataclass(frozen=True)
class Server:
    """Asks as the clients of Search-R1's retrieval server do."""

    url: str
    pause: float = 1.0  # seconds before the first repetition

    async def find(self, queries: list[str], count: int) -> list[list[str]]:
        """Raises StageError for a server that stays away or refuses all, AnswerError for one that says nonsense."""
        server, reason, nonsense = client.Server(self.url, SECONDS), "", False
        try:
            for attempt in range(RETRIES + 1):
                try:
                    reply = await server.ask({"queries": queries, "topk": count, "return_scores": True}, any_type=True)
                    if reply.status < 300:
                        return [found[:count] for found in passages_in(reply.body, len(queries))]
                    nonsense = reply.status in OF_QUERIES
                    reason = f"HTTP {reply.status}: {json.dumps(reply.body) if reply.body else reply.text}"
                except (client.NoReplyError, ValueError) as error:
                    nonsense, reason = isinstance(error, ValueError) or error.unusable, str(error)
                if attempt < RETRIES:
                    await asyncio.sleep(self.pause * 2**attempt)
        finally:
            await server.close()
        reason = f"{self.url} found nothing in {RETRIES + 1} attempts: {server.shown(reason)}"
        raise AnswerError(reason) if nonsense else StageError(f"evaluation.search.url: {reason}")


def passages_in(answer: Any, queries: int) -> list[list[str]]:
    """The passages of every query in a server's answer, with scores or without; ValueError for any other answer."""
    found = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != queries or not all(isinstance(item, list) for item in found):
        raise ValueError("no `result` with a list for every query")
    return [[_contents(item) for item in of_query] for of_query in found]


def _contents(item: Any) -> str:
    document = item.get("document", item) if isinstance(item, dict) else None
    if not isinstance(document, dict) or not isinstance(document.get("contents"), str):
        raise ValueError("a passage without `contents`")
    return readable(document["contents"].strip())


def searching(rules: Search) -> Callable[[Spec], Spec]:
    """What puts searches around the replicas of a pool; the index is loaded, or made, before they ask.

    Raises:
        UserError: the corpus cannot be read.
    """
    return partial(_around, rules=rules, retriever=_retriever(rules))


def _around(spec: Spec, rules: Search, retriever: Retriever) -> Spec:
    return SearchSpec(spec, rules, retriever)


def _retriever(rules: Search) -> Retriever:
    if rules.corpus is None:
        assert rules.url is not None
        return Server(rules.url)
    import ray

    passages_of(rules.corpus)  # in this process, where a mistake in the corpus ends in one plain message
    return Index(ray.remote(**beside_driver())(_Index).remote(rules.corpus))


class _Index:
    """The actor."""

    def __init__(self, corpus: Corpus) -> None:
        self.passages = passages_of(corpus)

    def find(self, queries: list[str], count: int) -> list[list[str]]:
        return self.passages.find(queries, count)


def search_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides what answers that search read and when they have to stop; a corpus by its content, which is read."""
    if recipe.evaluation is None or recipe.evaluation.search is None:
        return {}
    rules = recipe.evaluation.search
    plain = rules.model_dump(mode="json", exclude={"corpus"})
    return {"search": plain | ({} if rules.corpus is None else {"corpus": corpus_digest(rules.corpus)})}
