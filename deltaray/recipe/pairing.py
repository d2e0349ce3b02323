"""The recipe's pairings: which two responses to a prompt become a pair, and which pairs are kept."""

from typing import Literal

from pydantic import Field

from deltaray.recipe.filters import Correctness, Filter
from deltaray.recipe.models import Section


class Draw(Section):
    """Which responses take part, drawn again for every prompt: a mix of weak and strong makes for large deltas."""

    of: int = Field(4, ge=2)
    """Responses, each of another teacher."""
    weak: int = Field(2, ge=0)
    """Exactly so many of them from `weak_teachers`."""
    weak_teachers: list[str] = Field(min_length=1)


class Pairing(Section):
    policy: Literal["by_sample", "best_over_worst", "best_over_random"] = "by_sample"
    """`by_sample`: sample i of `chosen` over sample i of `rejected`. The others make one pair per prompt out of all
    samples of `teachers`: the best by `scorer` over the worst, or over any other, drawn by lot."""
    chosen: str = ""
    rejected: str = ""
    """Teachers by name (`by_sample`)."""
    teachers: list[str] = []
    """The pool of the other policies; one teacher with several samples will do."""
    sources: list[str] | None = None
    """Pair prompts of these sources only; patterns as for files, such as `chat/*`."""
    draw: Draw | None = None
    """Not all of the pool for every prompt but a draw from it."""
    reverse: bool = False
    """Exchange chosen and rejected of every pair that is kept: the control."""
    scorer: str | None = None
    """Whose scores fill the score and delta columns: `NAME`, or `NAME/PART` for one number that a score is made of."""
    keep: Literal["all", "chosen_wrong", "chosen_right", "tied"] = "all"
    """Keep only pairs whose chosen response the scorer calls wrong (score 0) or right (score 1), or with delta 0."""
    min_delta: float | None = None
    max_delta: float | None = None
    """A window; without one `by_sample` keeps negative deltas, the other policies only positive ones."""
    min_quantile: float | None = Field(None, ge=0, le=1)
    max_quantile: float | None = Field(None, ge=0, le=1)
    """The same in quantiles of the deltas that are left by then."""
    drop_identical: bool = True
    """Drop pairs that say the same, white space aside."""
    drop_truncated: bool = True
    """Drop pairs in which a response was cut at max_tokens."""
    max_length_gap: int | None = Field(None, ge=0)
    """Largest allowed difference of the two lengths, in the student's tokens."""
    filters: list[Filter] = []
    max_per_source: int | None = Field(None, ge=1)
    """Keep a seeded draw of so many pairs of each source."""
    limit: int | None = Field(None, ge=1)
    """Keep a seeded draw of so many pairs."""
    stratify: bool = False
    """Draw `limit` from every source in proportion to its pairs."""

    @property
    def names(self) -> list[str]:
        """The teachers whose responses it pairs."""
        return [self.chosen, self.rejected] if self.policy == "by_sample" else self.teachers

    @property
    def scorers(self) -> list[str]:
        """The scores it looks at, as `NAME` or `NAME/PART`."""
        references = [self.scorer, *(it.scorer for it in self.filters if isinstance(it, Correctness))]
        return list(dict.fromkeys(it for it in references if it is not None))

    @property
    def is_drawn(self) -> bool:
        """Whether all pairs must be known before the first can be kept."""
        asked = (self.limit, self.max_per_source, self.min_quantile, self.max_quantile)
        return any(it is not None for it in asked)
