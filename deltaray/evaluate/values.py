"""What every prompt is worth to every model: the per-sample values that intervals are made from."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from deltaray.data.store import Store
from deltaray.evaluate.local import values_by_prompt
from deltaray.evaluate.samples import values_by_document
from deltaray.recipe.study import Study


class TaskValues:
    """Values by prompt of every (model, task), each read once.

    `results` is what `evaluation_of` tells of each model by name; `value(model, task)` is its value there.
    """

    def __init__(self, study: Study, store: Store, results: Mapping[str, Any]) -> None:
        evaluation = study.recipe.evaluation
        assert evaluation is not None
        self.store, self.results, self.local = store, results, evaluation.tasks
        self.tasks = evaluation.names
        self.by_prompt = cache(self._by_prompt)

    def value(self, model: str, task: str) -> float:
        """The value of one task, or of `mean`, as it stands in `evaluation/<model>.json`."""
        result = self.results[model]
        return float(result["mean"] if task == "mean" else result["tasks"][task]["value"])

    def _by_prompt(self, model: str, task: str) -> dict[str, float]:
        if task in self.local:
            answered_as = self.results[model].get("selected", model)
            return values_by_prompt(self.store, answered_as, task, self.local[task])
        return values_by_document(self.store, model, task)
