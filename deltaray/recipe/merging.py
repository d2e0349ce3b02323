"""The recipe's merging section: the adapters of several deltas into one (Preference Delta Aggregation, 2606.00357)."""

from typing import Literal

from pydantic import Field

from deltaray.recipe.models import Section, Seed


class MergeMethod(Section):
    """One way to merge. What `None` and `False` leave open the method decides, as in `deltaray merge`."""

    method: str | None = None
    """`gam`, `mean`, `ties`, … (those of `deltaray merge --method`); default: the name that stands before it."""
    rank: int | None = Field(None, ge=1)
    """Cut the merged adapter to this rank."""
    scale: float | None = Field(None, gt=0)
    """Multiply the merged update."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of numbers that TIES and DARE keep."""
    seed: Seed | None = None
    """Of DARE's masks."""
    inner: Literal["mean", "ties", "dare"] | None = None
    """The rule of KnOTS and Core Space in their space."""
    restore_norm: bool = False
    """GAM: at the norm of the plain mean (not in the paper)."""
    skip_missing: bool = False
    """Averages leave out adapters that do not change a matrix."""


class Merging(Section):
    """Each delta is a run that trains an adapter; `evaluation.selection` ranks them.

    The best one is GAM's reference, and a merge of k is one of the best k.
    """

    deltas: list[str] = Field(min_length=2)
    """Runs of `training.runs` with `lora`, one pairing each, that all start alike (one `seed`)."""
    methods: dict[str, MergeMethod] = {"gam": MergeMethod()}
    """By name; the merge of k deltas is called `<name>-<k>` and goes to `adapters/<name>-<k>/`."""
    counts: list[int] | None = None
    """How many deltas to merge, each number a merge; default: 2, 3, … to all."""

    def sizes(self) -> list[int]:
        """The numbers of deltas to merge."""
        return self.counts if self.counts is not None else list(range(2, len(self.deltas) + 1))

    def names(self) -> dict[str, tuple[str, int]]:
        """Every merge: its name -> (which of `methods`, how many deltas)."""
        return {f"{method}-{count}": (method, count) for method in self.methods for count in self.sizes()}
