"""What answers the searches of tasks that may search: a corpus of one's own, or a server."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from deltaray.recipe.models import Place, Section


class Corpus(Section):
    path: Place
    """JSONL, JSON, Parquet, CSV or a hub dataset id, a passage per row; BM25 looks through it."""
    config: str | None = None
    """Which configuration of a hub data set that has several."""
    split: str = "train"
    """Which split of a hub data set."""
    text: str = "text"
    """The column with the passage."""
    title: str | None = "title"
    """The column with its title, which is searched and shown with it; a row may lack it."""


class Search(Section):
    """Turns of ReAct (arXiv 2210.03629): the model writes, asks in <search>, reads <result>, ends with <answer>."""

    corpus: Corpus | None = None
    """Needs `deltaray[search]`."""
    url: str | None = None
    """In its place a server that takes `{"queries": […], "topk": n}` as that of Search-R1 does, over any index."""
    passages: int = Field(5, ge=1)
    """Shown for each search."""
    passage_tokens: int = Field(500, ge=1)
    """Of the model's; what is longer is cut."""
    turns: int = Field(8, ge=1)
    """Searches in one answer; one that wants more has none. A task's `max_tokens` is of what is written between two."""
    query: str = "search"
    """The tag around a query: <search>…</search>."""
    result: str = "result"
    """The tag around what was found; Search-R1's models know it as `information`."""
    answer: str = "answer"
    """The tag around the final answer, which alone is scored."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.corpus is None) == (self.url is None):
            raise ValueError("write `corpus` (a file that BM25 looks through) or `url` (a server), one of the two")
        return self

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("an address such as http://host:8000/retrieve")
        return value

    @field_validator("query", "result", "answer")
    @classmethod
    def _is_tag(cls, value: str) -> str:
        if not value.isidentifier():
            raise ValueError("the name of a tag, without <>")
        return value
