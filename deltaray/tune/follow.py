"""Follows the trials on the driver: a line for each that ends, and the records of those that could not write theirs."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback

from deltaray.data.store import Store
from deltaray.failures import cause_of
from deltaray.recipe.check_exploration import objectives_of
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.search_space import Trial, trial_of
from deltaray.tune.records import write_record

ENDED = ("finished", "failed")
"""Phases in which a trial has written its record itself."""
STATES = ("finished", "stopped", "failed")


class Follower(Callback):  # type: ignore[misc]
    """Ray Tune's callback. Only the driver's copy speaks: the one in Ray Tune's saved state has nobody to speak to."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        progress: Any,
        say: Callable[[str], None],
        count: Callable[[Mapping[str, int]], None],
        total: int,
    ) -> None:
        """`progress`: of the stage; it counts trials out of `total`. `count` gets the number of trials by state."""
        self.recipe, self.store, self.progress, self.say, self.total = recipe, store, progress, say, total
        self.count = count
        self.states: Counter[str] = Counter()
        self.running: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "store": self.store}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trial, "start")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("note"):
            self.say(str(result["note"]))
        steps = f" {result['step']}/{result['steps']}" if result.get("steps") else ""
        self._show(trial, f"{result.get('phase', '')}{steps if result.get('phase') == 'train' else ''}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        phase = last.get("phase")
        if phase in ENDED:
            return self._end(trial, phase, self._ending(last))
        reason = f"stopped after evaluation {last.get('evaluations', 0)}: others were better"
        self._record(trial, "stopped", reason, last)
        self._clear(trial)
        self._end(trial, "stopped", reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        cause = cause_of(trial.get_error() or "its process died").splitlines()[0]  # a cell of the table of trials
        reason = f"died in every attempt: {cause}"
        self._record(trial, "failed", reason, {})
        self._end(trial, "failed", reason)

    # --- what is shown ------------------------------------------------------------------------------------------
    def _ending(self, last: dict[str, Any]) -> str:
        if last.get("reason"):
            return str(last["reason"])
        values = {name: last.get(name) for name in objectives_of(self.recipe)}
        return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)

    def _show(self, trial: Any, phase: str) -> None:
        self.running[str(trial)] = phase
        note = "; ".join(f"{name}: {now}" for name, now in self.running.items())
        self.progress.update("trials", sum(self.states.values()), self.total, note=note)
        self._count()

    def _end(self, trial: Any, state: str, text: str) -> None:
        self.running.pop(str(trial), None)
        self.states[state] += 1
        done = sum(self.states.values())
        seconds = (trial.last_result or {}).get("time_total_s")
        took = f", {seconds:.0f} s" if seconds else ""
        self.say(f"[{done}/{self.total}] {trial} {state}{took}: {text}")
        counts = ", ".join(f"{number} {name}" for name, number in self.states.items())
        self.progress.update("trials", done, self.total, note=counts)
        self._count()

    def _count(self) -> None:
        ended, running = {state: self.states[state] for state in STATES}, len(self.running)
        self.count({"waiting": self.total - sum(ended.values()) - running, "running": running, **ended})

    # --- what is kept -------------------------------------------------------------------------------------------
    def _record(self, trial: Any, state: str, reason: str, last: dict[str, Any]) -> None:
        found, seeds = self._found(trial), list(self.recipe.seeds)
        accuracy = {"mean": last.get("heldout_accuracy"), "stderr": None}
        write_record(self.store, found, state, reason=reason, seeds=seeds, heldout_accuracy=accuracy)

    def _clear(self, trial: Any) -> None:
        """A stopped trial never goes on: its checkpoints only take room. Removed in a task, which may import torch."""
        import ray

        suffixes = [f"-seed{seed}" for seed in self.recipe.seeds] if len(self.recipe.seeds) > 1 else [""]
        names = [f"{self._found(trial).name}{suffix}" for suffix in suffixes]
        ray.remote(num_cpus=0)(clear_checkpoints).remote(self.store, names)

    def _found(self, trial: Any) -> Trial:
        found = trial_of(self.recipe, trial.config["choice"])
        assert found is not None
        return found


def clear_checkpoints(store: Store, runs: list[str]) -> None:
    """Removes the checkpoints of runs that nobody resumes."""
    from deltaray.train.checkpoint import Checkpoints

    for run in runs:
        Checkpoints(store, run).clear()
