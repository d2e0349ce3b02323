"""The recipe's exploration: which pairings, deltas and training settings `deltaray tune` tries, and how it searches."""

from itertools import permutations
from typing import Literal

from pydantic import Field, field_validator, model_validator

from deltaray.recipe.losses import LossName
from deltaray.recipe.models import Section, Seed
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.training import Lora, Run

ABOVE = " > "
"""Between the two teachers of an ordered pair."""


class Range(Section):
    """Any number from `low` to `high`; for `random` and `optuna`."""

    low: float
    high: float
    log: bool = False
    """Drawn evenly on the scale of logarithms."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with `log: true`")
        return self


class Space(Section):
    """What varies from trial to trial. A list names the choices; an empty one leaves the setting as it is in
    `exploration.pairing` and `exploration.run` (in named pairings: as it is there)."""

    pairings: Literal["ordered"] | list[str] = "ordered"
    """`ordered`: any two teachers in either order, so half of the deltas are negative where teachers form a ladder; or
    names of the recipe's `pairings`."""
    teachers: list[str] = []
    """Those of `ordered`; default: all of the recipe."""
    scorer: list[str] = []
    min_delta: list[float | None] | Range = []
    max_delta: list[float | None] | Range = []
    """The window of deltas, on the scorer's scale."""
    pairs: list[int | None] = []
    """How many pairs are trained on; null: all."""
    loss: list[LossName] = []
    learning_rate: list[float] | Range = []
    beta: list[float | None] | Range = []
    """Losses that read no beta take none; null: the loss's default."""
    lora: list[Lora | None] = []
    """null: all weights."""

    @field_validator("*")
    @classmethod
    def _every_choice_once(cls, value: object) -> object:
        if isinstance(value, list) and any(item in value[:place] for place, item in enumerate(value)):
            raise ValueError("every choice once")
        return value


class TrialRun(Run):
    """What all trials' runs have in common: the keys of a run."""

    pairing: str | list[str] = ""
    """Stays empty: the space says which."""


class Asha(Section):
    """Asynchronous successive halving (arXiv 1810.05934): of the trials that reach a rung the worse ones are stopped.

    With several seeds the first decides, and the others follow in the trials that survive."""

    metric: Literal["heldout_accuracy", "generated_score"] = "heldout_accuracy"
    """Accuracy on held-out pairs (`training.heldout`), or the score of answers to held-out prompts
    (`training.generation`)."""
    grace: int = Field(1, ge=1)
    """Held-out evaluations before the first rung; each further rung is `reduction` times as far."""
    reduction: int = Field(3, ge=2)
    """The best 1 / reduction of a rung go on."""


class Exploration(Section):
    space: Space = Space()
    pairing: Pairing = Pairing()
    """Rules that all `ordered` pairings have in common, and the scorer that measures their deltas."""
    run: TrialRun = TrialRun()
    search: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination; `random`: drawn evenly; `optuna`: tree-structured Parzen estimator, for one objective
    or several."""
    samples: int | None = Field(None, ge=1)
    """How many trials `random` and `optuna` make."""
    seed: Seed = 0
    """Of the search itself; every trial is trained once for each of the study's `seeds`."""
    objectives: list[str] = []
    """What is to be large: `selection` and `mean` (means of `evaluation.selection` and `evaluation.tasks`), the name of
    a task, or `heldout_accuracy`. The first decides which student is the best. Default: the first of these three that
    there is."""
    asha: Asha | None = None
    trials_at_once: int = Field(1, ge=1)
    """Fewer where the cluster has no room for them."""
    max_failures: int = Field(2, ge=0)
    """How often a trial is tried again whose process has died."""
    loggers: list[Literal["mlflow", "wandb"]] = []
    """Also log there, as their own environment variables say where; TensorBoard is always written."""

    def pairs_of(self, teachers: list[str]) -> list[str]:
        """The choices of pairings: names, or `chosen > rejected`.

        Args:
            teachers: of the recipe, in its order.
        """
        if self.space.pairings != "ordered":
            return self.space.pairings
        return [ABOVE.join(pair) for pair in permutations(self.space.teachers or teachers, 2)]

    @property
    def scorers(self) -> list[str]:
        """All scores that trials look at, as `NAME` or `NAME/PART`."""
        return list(dict.fromkeys([*self.pairing.scorers, *self.space.scorer]))
