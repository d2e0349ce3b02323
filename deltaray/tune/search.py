"""The search that learns from results: Optuna's tree-structured Parzen estimator behind Ray Tune's interface.

Ray's own `OptunaSearch` takes no earlier results where there are several objectives; here the records of earlier
commands are the memory, so that a killed search goes on as if it had not been.
"""

import json
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from deltaray.recipe.check_exploration import objectives_of
from deltaray.recipe.exploration import Range
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.search_space import Choice, axes, explored, trial_of
from deltaray.tune.records import Record

ATTEMPTS = 100
"""Suggestions in a row that give no new trial before the space counts as used up."""


def distributions(recipe: Recipe) -> dict[str, BaseDistribution]:
    """The axes in Optuna's words; a choice is its JSON."""
    return {
        name: FloatDistribution(it.low, it.high, log=it.log)
        if isinstance(it, Range)
        else CategoricalDistribution([json.dumps(value) for value in it])
        for name, it in axes(recipe).items()
    }


class TpeSearch(Searcher):  # type: ignore[misc]
    """Suggests choices; a trial that is known already is told to the estimator and not made again."""

    def __init__(self, recipe: Recipe, records: dict[str, Record]) -> None:
        """`records`: of earlier trials of this very space."""
        self.recipe, self.records, self.objectives = recipe, records, objectives_of(recipe)
        super().__init__(metric=self.objectives[0], mode="max")
        self.space = distributions(recipe)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # a search that goes on draws other numbers than one that starts
        sampler = optuna.samplers.TPESampler(seed=explored(recipe).seed + len(records))
        self.study = optuna.create_study(directions=["maximize"] * len(self.objectives), sampler=sampler)
        for record in records.values():
            parameters, values = self._parameters(record["choice"]), self._values(record.get("objectives"))
            if record["state"] == "running":  # killed with its command: first of all
                self.study.enqueue_trial(parameters)
            elif values is not None:
                self.study.add_trial(create_trial(params=parameters, distributions=self.space, values=values))
        self.asked: dict[str, optuna.trial.Trial] = {}
        self.names = set(records) - {name for name, record in records.items() if record["state"] == "running"}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        for _ in range(ATTEMPTS):
            asked = self.study.ask(self.space)
            choice = self._choice(asked.params)
            trial = trial_of(self.recipe, choice)
            if trial is not None and trial.name not in self.names:
                self.names.add(trial.name)
                self.asked[trial_id] = asked
                return {"choice": choice}
            known = self._values(self.records.get(trial.name, {}).get("objectives")) if trial else None
            if known is None:
                self.study.tell(asked, state=TrialState.FAIL)
            else:
                self.study.tell(asked, known)
        return self.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked, values = self.asked.pop(trial_id, None), self._values(result)
        if asked is None:
            return
        if values is None:
            self.study.tell(asked, state=TrialState.FAIL)
        else:
            self.study.tell(asked, values)

    def _values(self, found: dict[str, Any] | None) -> list[float] | None:
        values = [(found or {}).get(name) for name in self.objectives]
        return None if None in values else [float(value) for value in values if value is not None]

    def _parameters(self, choice: Choice) -> dict[str, Any]:
        return {
            name: choice[name] if isinstance(self.space[name], FloatDistribution) else json.dumps(choice[name])
            for name in self.space
        }

    def _choice(self, parameters: dict[str, Any]) -> Choice:
        return {
            name: value if isinstance(self.space[name], FloatDistribution) else json.loads(value)
            for name, value in parameters.items()
        }

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' records are the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""
