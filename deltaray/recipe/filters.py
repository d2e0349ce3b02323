"""The filters of a pairing, told apart by `kind`: applied in the order of the recipe, each counted in the funnel."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from deltaray.recipe.models import Place, Section

Side = Literal["chosen", "rejected", "both"]


class _Filter(Section):
    sources: list[str] | None = None
    """Filter the pairs of these sources only; all others pass."""


class _SidedFilter(_Filter):
    side: Side = "both"
    """Whose fault removes the pair. A fault of the rejected response alone often adds to the delta: keep those with
    `side: chosen`."""


class Length(_SidedFilter):
    """Responses of so many of the student's tokens, end token included."""

    kind: Literal["length"]
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=1)


class LengthGap(_Filter):
    kind: Literal["length_gap"]
    max_tokens: int = Field(100, ge=0)
    """Largest difference of the two lengths, in the student's tokens."""


class Correctness(_Filter):
    """What a verifier (1 right, 0 wrong) must say of each side."""

    kind: Literal["correctness"]
    scorer: str
    chosen: Literal["right", "wrong", "any"] = "right"
    rejected: Literal["right", "wrong", "wrong_or_truncated", "any"] = "wrong_or_truncated"
    min_gap: float = Field(0.0, ge=0)
    """Least difference of the two scores."""


class Repetition(_SidedFilter):
    """No sentence or paragraph, and no phrase of eight words, occurs so often (code blocks aside)."""

    kind: Literal["repetition"]
    sentences: int = Field(10, ge=2)
    phrases: int = Field(50, ge=2)


class Cjk(_SidedFilter):
    """Less than this share of Chinese characters (U+4E00 to U+9FFF)."""

    kind: Literal["cjk"]
    share: float = Field(0.05, gt=0, le=1)


class Language(_SidedFilter):
    """Responses in these languages, by ISO 639-1 code. Needs the extra `deltaray[filters]`."""

    kind: Literal["language"]
    languages: list[str] = Field(["en"], min_length=1)


class Identity(_SidedFilter):
    """No response in which an assistant names another maker's model as itself or its maker."""

    kind: Literal["identity"]


class Keywords(_SidedFilter):
    """No response in which one of these regular expressions is found, upper or lower case."""

    kind: Literal["keywords"]
    patterns: list[str] = Field(min_length=1)

    @field_validator("patterns")
    @classmethod
    def _compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"a regular expression: {pattern!r}: {error}") from None
        return value


class Refusal(_SidedFilter):
    """No response that begins by refusing."""

    kind: Literal["refusal"]


class DuplicatePrompt(_Filter):
    """Of prompts that say the same, upper and lower case and white space aside, the first alone. `near` takes the
    extra `deltaray[filters]`."""

    kind: Literal["duplicate_prompt"]
    near: float | None = Field(None, gt=0, lt=1)
    """Also of prompts whose words' 5-grams overlap this much (Jaccard, by MinHash)."""


class Contaminated(_Filter):
    """No prompt that gives a benchmark away: that holds this share of the n-grams of one of its questions."""

    kind: Literal["contaminated"]
    paths: list[Place] = Field(min_length=1)
    """Benchmark files, in any form that `prompts.path` may have."""
    ngram: int = Field(8, ge=1)
    """Words."""
    share: float = Field(0.5, gt=0, le=1)


Filter = Annotated[
    Length
    | LengthGap
    | Correctness
    | Repetition
    | Cjk
    | Language
    | Identity
    | Keywords
    | Refusal
    | DuplicatePrompt
    | Contaminated,
    Field(discriminator="kind"),
]
