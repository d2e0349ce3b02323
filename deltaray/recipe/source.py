"""Where prompts come from, in whatever columns they lie there: what `prompts` and every evaluation task can say."""

from typing import ClassVar

from pydantic import Field, field_validator

from deltaray.recipe.models import Place, Section

COLUMNS = ("id", "prompt", "messages", "system", "answer", "source", "tools")
PLACE = "{prompt}"


class Source(Section):
    names: ClassVar[tuple[str, ...]] = COLUMNS
    """What `columns` may say where to find."""

    path: Place
    """JSONL, JSON, Parquet, CSV (text also as .gz, .zst, .bz2) or a hub dataset id, with `prompt` (text) or `messages`,
    optionally `system` (text that becomes the first turn), `id`, `answer`, `source`, `tools`."""
    config: str | None = None
    """Which configuration of a hub data set that has several."""
    split: str | None = None
    """Which split of a hub data set; none: `train`."""
    columns: dict[str, str] = {}
    """Where other names are used: ours -> theirs, such as `{prompt: question}`."""
    template: str | None = None
    """A text around every prompt, which takes the place of `{prompt}` in it."""
    answer: str | None = None
    """The answer of every prompt, where the data has none, such as `refuse`."""
    answers: dict[str, str] = {}
    """What the data's answers become: theirs -> ours, such as `{unsafe: refuse, safe: comply}`."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many rows only."""

    @field_validator("columns")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        if not set(value) <= set(cls.names):
            raise ValueError(f"keys among {', '.join(cls.names)}, each with the name it has in the data")
        return value

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and value.count(PLACE) != 1:
            raise ValueError(f"a text with {PLACE} in it, once")
        return value
