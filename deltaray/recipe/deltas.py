"""The recipe's scorers and pairings: which two responses become a pair, and which pairs are kept."""

from typing import Literal

from pydantic import Field

from deltaray.recipe.models import Section


class Scorer(Section):
    kind: Literal["exact_match"]
    """`exact_match`: 1.0 where the response equals the prompt's `answer` (white space stripped), else 0.0."""


class Pairing(Section):
    chosen: str
    rejected: str
    """Teachers by name. Both give one response per prompt and sample; the pairing joins them."""
    scorer: str | None = None
    """Whose scores fill the score and delta columns."""
    keep: Literal["all", "chosen_wrong", "chosen_right"] = "all"
    """Keep only pairs whose chosen response the scorer calls wrong (score 0) or right (score 1)."""
    min_delta: float | None = None
    max_delta: float | None = None
    drop_identical: bool = True
    drop_truncated: bool = True
    """Drop pairs in which a response was cut at max_tokens."""
    max_length_gap: int | None = Field(None, ge=0)
    """Largest allowed difference of the two lengths, in the student's tokens."""
    limit: int | None = Field(None, ge=1)
    """Keep a seeded draw of so many pairs."""
