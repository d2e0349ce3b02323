"""The exploration on the driver: Ray Tune over what is left of the trials, then what they have shown together."""

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.search_space import explored, holds, known_trials, trial_of
from deltaray.recipe.study import Study
from deltaray.runtime.session import TRIAL_CPUS, Capacity, beside_driver
from deltaray.runtime.threads import side_by_side
from deltaray.tune.records import Record, is_over, read_records
from deltaray.tune.shared import at_once, count_of, trial_demand

LOGS = "tuning/ray"
"""Ray Tune's own files, TensorBoard's among them: a folder for each command."""


@dataclass(frozen=True)
class Explorer:
    """One exploration in one command."""

    study: Study
    store: Store
    retry_failed: bool = False

    def over(self, retry_failed: bool) -> dict[str, Record]:
        """The records of this exploration's trials that are done with; earlier spaces may have left others."""
        found, seeds = self._records(), list(self.study.recipe.seeds)
        return {name: it for name, it in found.items() if is_over(it, seeds, retry_failed)}

    def _records(self) -> dict[str, Record]:
        recipe, found = self.study.recipe, read_records(self.store)
        known = known_trials(recipe)
        if known is None:
            return {name: it for name, it in found.items() if holds(recipe, it["choice"])}
        names = {trial.name for trial in known}
        return {name: it for name, it in found.items() if name in names}

    def left(self) -> int:
        """How many trials are still to be made."""
        return max(0, count_of(self.study) - len(self.over(self.retry_failed)))

    def room(self, capacity: Capacity) -> str:
        """How many trials run side by side, and what each takes; of a cluster not asked yet nothing is known."""
        needs, asked = trial_demand(self.study, capacity), explored(self.study.recipe).trials_at_once
        if not capacity.cpus:
            return f"{asked} at once as far as the cluster has room, each takes at most {_shown(needs)}"
        side = at_once(self.study, capacity)
        takes = f"each takes at most {_shown(needs)}"
        limit = "" if side == asked else f" ({asked} are asked for, the cluster has {_shown(capacity)})"
        return f"{side} at once{limit}, {takes}"

    def run(
        self,
        capacity: Capacity,
        progress: Any,
        say: Callable[[str], None],
        count: Callable[[Mapping[str, int]], None],
    ) -> None:
        """Makes the trials that are left. A trial that dies in every attempt does not stop the others.

        `say` gets a line for each that ends, `count` the number of trials by state.
        """
        from deltaray.tune.follow import Follower

        say(f"{self.left()} trials, {self.room(capacity)}")
        # in a thread: on the main one Ray Tune would take Ctrl-C for itself
        follower = partial(Follower, self.study.recipe, self.store, progress, say, count)
        side_by_side([lambda: self._fit(capacity, follower)])

    def refuse_if_all_failed(self) -> None:
        """StageError if not one trial has come to anything."""
        found = self.over(retry_failed=False)
        if found and all(record["state"] == "failed" for record in found.values()):
            raise StageError(
                f"all {len(found)} trials failed; the first: {next(iter(found.values()))['reason']}\n"
                f"each has its reason in {self.store.address(Store.trials)}; fix the cause and run the same command "
                "with --retry-failed"
            )

    def _fit(self, capacity: Capacity, follower: Callable[[int], Any]) -> None:
        import ray
        from ray import tune

        from deltaray.tune.trial import PairMaker, Sweep, run_trial

        # most reports say where a trial is, and measure nothing
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        recipe, over = self.study.recipe, self.over(self.retry_failed)
        known = known_trials(recipe)
        choices = [trial.choice for trial in known or () if trial.name not in over]
        pairs = ray.remote(**beside_driver())(PairMaker).remote()
        sweep = Sweep(self.study, self.store, trial_demand(self.study, capacity), pairs)
        folder, filesystem = self.store.place(LOGS)
        # the trial itself reserves nothing; its small tasks, such as publishing, have the second bundle
        room = tune.PlacementGroupFactory([{}, {"CPU": TRIAL_CPUS}])
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), room),
            param_space={"choice": tune.grid_search(choices)} if known is not None else None,
            tune_config=self._config(capacity),
            run_config=tune.RunConfig(
                name=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}",
                storage_path=folder,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=explored(recipe).max_failures),
                callbacks=[follower(self.left()), *_loggers(recipe)],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        finally:
            ray.kill(pairs)

    def _config(self, capacity: Capacity) -> Any:
        from ray import tune

        recipe = self.study.recipe
        search: Any = None
        if known_trials(recipe) is None:
            from deltaray.tune.search import TpeSearch

            kept = self.over(self.retry_failed)
            begun = {name: it for name, it in self._records().items() if it["state"] == "running"}
            search = TpeSearch(recipe, kept | begun)

        def name(trial: Any) -> str:
            found = trial_of(recipe, trial.config["choice"])
            return found.name if found else str(trial.trial_id)

        return tune.TuneConfig(
            search_alg=search,
            scheduler=_scheduler(recipe),
            num_samples=self.left() if search else 1,
            max_concurrent_trials=at_once(self.study, capacity),
            trial_name_creator=name,
            trial_dirname_creator=name,
        )


def _shown(capacity: Capacity) -> str:
    return f"{capacity.cpus:g} CPUs" + (f" and {capacity.gpus:g} GPUs" if capacity.gpus else "")


def _scheduler(recipe: Recipe) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    asha, training = explored(recipe).asha, recipe.training
    if asha is None or training is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="evaluations",
        metric=asha.metric,
        mode="max",
        grace_period=asha.grace,
        reduction_factor=asha.reduction,
        max_t=training.heldout_evaluations,
        stop_last_trials=False,  # the last evaluation is not the end: the student is evaluated then
    )


def _loggers(recipe: Recipe) -> list[Any]:
    """TensorBoard and JSON come with Ray Tune, CSV too but for our own cells."""
    from deltaray.tune.progress import HarmlessCsv

    found: list[Any] = [HarmlessCsv()]
    for name in explored(recipe).loggers:
        if name == "mlflow":
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            found.append(MLflowLoggerCallback(experiment_name=recipe.name))
        else:
            from ray.air.integrations.wandb import WandbLoggerCallback

            found.append(WandbLoggerCallback(project=recipe.name))
    return found
