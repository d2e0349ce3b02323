"""One trial, in a process of its own that Ray Tune leads: its pairs, its students at every seed, their evaluation.

Whatever it makes is committed to the store as any run's is, so a trial that starts again goes on where it was.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune

from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.failures import told_in
from deltaray.pair.definition import pairing_definitions
from deltaray.recipe.search_space import Choice, Trial, trial_of
from deltaray.recipe.study import Study
from deltaray.runtime.session import Capacity
from deltaray.train.definition import run_definitions
from deltaray.tune.records import write_record
from deltaray.tune.results import facts_of, objective_values
from deltaray.tune.shared import study_of

REPORT_INTERVAL = 2.0
"""Seconds between two reports of where a trial is; held-out measurements are always reported."""


@dataclass(frozen=True)
class Sweep:
    """What every trial is told."""

    base: Study
    store: Store
    share: Capacity  # of the cluster, for one trial
    pairs: Any  # handle of the `PairMaker`


class PairMaker:
    """An actor: trials that want the same pairs must not write them at the same time."""

    def make(self, base: Study, store: Store, trial: Trial) -> None:
        """Makes the pairs of a trial, and describes them, if nobody has yet.

        Raises:
            UserError: rules left none.
        """
        from deltaray.pair.stage import is_done, pair

        study = study_of(base, [trial])
        store.claim(pairing_definitions(study) | run_definitions(study))
        if not all(is_done(study, store, name) for name in study.pairings):
            pair(study, store)


def run_trial(config: Choice, sweep: Sweep) -> None:
    """Ray Tune's trainable. What trying again would not fix becomes the trial's record instead of an exception."""
    base, store = sweep.base, sweep.store
    choice = config["choice"]
    trial = trial_of(base.recipe, choice)
    assert trial is not None
    clock, seeds = Clock(), list(base.recipe.seeds)
    write_record(store, trial, "running")
    try:
        facts = _work(sweep, trial, clock)
    except (UserError, StageError) as error:
        reason = str(told_in(error) or error)  # an actor's comes with a traceback around it
        record = write_record(store, trial, "failed", reason=reason, seconds=clock.seconds, seeds=seeds)
    else:
        record = write_record(store, trial, "finished", seconds=clock.seconds, seeds=seeds, **facts)
    final = {name: value for name, value in record.get("objectives", {}).items() if value is not None}
    tune.report({"phase": record["state"], "reason": record.get("reason", ""), **final})


def _work(sweep: Sweep, trial: Trial, clock: "Clock") -> dict[str, Any]:
    from deltaray.train.stage import train

    study, store = study_of(sweep.base, [trial]), sweep.store
    assert study.recipe.training is not None
    tell = Teller(next(iter(study.runs)), study.recipe.training.heldout_evaluations)
    with clock.phase("pair"):
        tell.phase("pair")
        ray.get(sweep.pairs.make.remote(sweep.base, store, trial))
    with clock.phase("train"):
        tell.phase("train")
        train(study, store, list(study.runs.values()), tell.progress, tell.note)
    if study.recipe.evaluation is not None:
        with clock.phase("evaluate"):
            tell.phase("evaluate")
            _evaluate(study, store, sweep.share)
    facts = facts_of(study, store, trial)
    return facts | {"objectives": objective_values(sweep.base.recipe, facts)}


def _evaluate(study: Study, store: Store, share: Capacity) -> None:
    from deltaray.evaluate.harness import missing_benchmarks, run_benchmarks
    from deltaray.evaluate.results import evaluation_of
    from deltaray.evaluate.stage import answer_tasks, evaluation_work, models_for_harness, unscored

    evaluation, works = study.recipe.evaluation, evaluation_work(study, store)
    assert evaluation is not None
    if not all(work.finished for work in works) or unscored(study, store, works):
        answer_tasks(study, store, works, share, lambda *_: None, lambda _: None)
    models = {name: model for name, model in models_for_harness(study, store).items() if name in study.runs}
    units = missing_benchmarks(study, store, models) if evaluation.harness_tasks else []
    if units:
        run_benchmarks(store, units, share, lambda *_: None, lambda _: None)
    for name in study.runs:
        result = evaluation_of(store, name, name, evaluation.tasks, evaluation.harness_tasks)
        store.write_json(Store.evaluation(name), result)


# --- telling ----------------------------------------------------------------------------------------------------
@dataclass
class Clock:
    """Seconds of each phase, kept also of one that failed."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - began, 1)


@dataclass
class Teller:
    """Reports to Ray Tune: the phase, the step, and the first seed's held-out measurements, by which ASHA decides."""

    first: str  # the run of the first seed
    evaluations: int  # of a whole run
    told: float = 0.0

    def phase(self, name: str) -> None:
        tune.report({"phase": name, "pid": os.getpid()})

    def note(self, text: str) -> None:
        """What the training has to say: a resumption, a sign of failure."""
        tune.report({"phase": "train", "note": text})

    def progress(self, run: str, step: int, total: int, metrics: dict[str, Any]) -> None:
        measured = {
            key: metrics[key] for key in ("heldout_accuracy", "generated_score") if metrics.get(key) is not None
        }
        first = run == self.first and "heldout_loss" in metrics
        if not first and time.monotonic() - self.told < REPORT_INTERVAL:
            return
        self.told = time.monotonic()
        every = max(1, total // self.evaluations)
        rung = {"evaluations": -(-step // every), **measured} if first else {}
        tune.report({"phase": "train", "run": run, "step": step, "steps": total, **rung})
