"""The search space: from one choice per axis to a trial with a name of its own; grids and draws of trials. Pure."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from deltaray.recipe.exploration import ABOVE, Exploration, Range
from deltaray.recipe.losses import LOSS_FACTS, SETTINGS
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.training import Run

Choice = dict[str, Any]
"""Axis -> value, as JSON; axes on which nothing is chosen are left out."""
WINDOW = ("min_delta", "max_delta")
ON_PAIRING = ("scorer", *WINDOW)
ON_RUN = ("loss", "learning_rate", "beta", "lora", "pairs")
ATTEMPTS = 20
"""Draws for each trial that is wanted: windows of deltas may be impossible."""


@dataclass(frozen=True)
class Trial:
    """One training configuration on one pairing; it is trained once for each of the study's seeds."""

    name: str
    label: str  # the pairing as the user names it
    choice: Choice
    pairing_name: str
    pairing: Pairing
    run: Run


def explored(recipe: Recipe) -> Exploration:
    """The recipe's exploration, which must be there."""
    assert recipe.exploration is not None
    return recipe.exploration


def axes(recipe: Recipe) -> dict[str, list[Any] | Range]:
    """What varies, axis by axis, the pairings first; values as JSON."""
    exploration = explored(recipe)
    found: dict[str, list[Any] | Range] = {"pairing": list(exploration.pairs_of(recipe.answering))}
    for name in (*ON_PAIRING, *ON_RUN):
        values = getattr(exploration.space, name)
        if isinstance(values, Range):
            found[name] = values
        elif values:
            found[name] = [item.model_dump(mode="json") if hasattr(item, "model_dump") else item for item in values]
    return found


# --- trials -----------------------------------------------------------------------------------------------------
def grid(recipe: Recipe) -> list[Trial]:
    """Every combination of the choices that is possible, once. A `Range` has no grid (the recipe is refused)."""
    lists = {name: values for name, values in axes(recipe).items() if isinstance(values, list)}
    return _different(recipe, (dict(zip(lists, values, strict=True)) for values in product(*lists.values())))


def drawn(recipe: Recipe, count: int) -> list[Trial]:
    """So many different trials by the exploration's seed; fewer if the space has no more. A larger count only adds."""
    chance, space = np.random.default_rng(explored(recipe).seed), axes(recipe)
    if not any(isinstance(values, Range) for values in space.values()):
        every = grid(recipe)
        return [every[int(place)] for place in chance.permutation(len(every))[:count]]
    choices = ({name: _draw(values, chance) for name, values in space.items()} for _ in range(ATTEMPTS * count))
    return _different(recipe, choices, count)


def known_trials(recipe: Recipe) -> list[Trial] | None:
    """All trials of a search that does not depend on results; None for one that does."""
    exploration = explored(recipe)
    if exploration.search == "optuna":
        return None
    return grid(recipe) if exploration.search == "grid" else drawn(recipe, exploration.samples or 1)


def holds(recipe: Recipe, choice: Choice) -> bool:
    """Whether a choice, of an earlier command perhaps, is one of the space as it is now."""
    space = axes(recipe)
    return space.keys() == choice.keys() and all(
        values.low <= choice[name] <= values.high if isinstance(values, Range) else choice[name] in values
        for name, values in space.items()
    )


def _different(recipe: Recipe, choices: Iterable[Choice], most: int | None = None) -> list[Trial]:
    found: dict[str, Trial] = {}
    for choice in choices:
        trial = trial_of(recipe, choice)
        if trial is not None:
            found.setdefault(trial.name, trial)
        if len(found) == most:
            break
    return list(found.values())


def _draw(values: list[Any] | Range, chance: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(chance.integers(len(values)))]
    if values.log:
        return float(np.exp(chance.uniform(np.log(values.low), np.log(values.high))))
    return float(chance.uniform(values.low, values.high))


def trial_of(recipe: Recipe, choice: Choice) -> Trial | None:
    """The trial of one choice; None if its window of deltas is empty.

    Two choices that come to the same (a beta for a loss that reads none) are one trial. Its name holds a digest of
    all that decides what is trained, so that it means the same in every run of the command.
    """
    label, pairing = _pairing(recipe, choice)
    low, high = pairing.min_delta, pairing.max_delta
    if low is not None and high is not None and low > high:
        return None
    same = recipe.pairings.get(label) == pairing
    pairing_name = label if same else f"{_plain(label)}-{_digest(pairing.model_dump(mode='json'))}"
    run = _run(recipe, choice, pairing_name)
    training = recipe.training
    assert training is not None
    decides = [pairing.model_dump(mode="json"), run.model_dump(mode="json"), training.dtype, training.heldout]
    return Trial(f"{_plain(label)}-{_digest(decides)}", label, choice, pairing_name, pairing, run)


def _plain(label: str) -> str:
    """A label as a part of file names."""
    return label.replace(ABOVE, "-over-")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _pairing(recipe: Recipe, choice: Choice) -> tuple[str, Pairing]:
    label = str(choice["pairing"])
    if explored(recipe).space.pairings == "ordered":
        chosen, rejected = label.split(ABOVE)
        base = explored(recipe).pairing.model_copy(update={"chosen": chosen, "rejected": rejected})
    else:
        base = recipe.pairings[label]
    return label, base.model_copy(update={name: choice[name] for name in ON_PAIRING if name in choice})


def _run(recipe: Recipe, choice: Choice, pairing: str) -> Run:
    """The run of a choice: settings that the base has by its loss's defaults give way to those of the trial's loss."""
    base = explored(recipe).run
    loss, defaults = choice.get("loss", base.loss), LOSS_FACTS[base.loss].defaults
    values = base.model_dump() | {"pairing": pairing}
    if loss != base.loss:
        values = {name: it for name, it in values.items() if name not in SETTINGS or it != defaults.get(name)}
    values |= {name: choice[name] for name in ON_RUN if name in choice}
    if "beta" in choice and "beta" not in LOSS_FACTS[loss].defaults:
        del values["beta"]
    return Run.model_validate(values)
