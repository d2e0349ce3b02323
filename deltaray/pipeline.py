"""The stages in order: each finds what is done already, does only the rest, and says what it did.

This is the Python API behind the command line: `Pipeline(load_recipe(path)).run(["generate", "pair"])`.
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.generate.answer import Work
from deltaray.generate.supersede import changed_teachers, supersede
from deltaray.generate.units import responses_in
from deltaray.plan import Item, make_plan
from deltaray.prompts import store_source
from deltaray.prompts.preferences import store_preferences
from deltaray.recipe import Recipe, Study, dump_recipe, expand
from deltaray.recipe.study import TrainingRun
from deltaray.runtime.demands import refuse_impossible
from deltaray.runtime.preflight import check_inputs, check_local_inputs, definitions, prompt_folder, prompt_source
from deltaray.runtime.runner import Runner
from deltaray.runtime.session import Capacity, declared_capacity, joins_cluster, stop_ray
from deltaray.runtime.terminal import StageProgress, Terminal
from deltaray.store import Store

STAGES = ("generate", "score", "pair", "train", "merge", "evaluate", "tune", "report")
SECTIONS = {
    "score": "scorers", "pair": "pairings", "train": "training", "merge": "merging", "evaluate": "evaluation",
    "tune": "exploration",
}  # fmt: skip
"""Stages that need a section of the recipe."""


class Pipeline:
    """One study on one cluster. Ray is started when the first stage has something to do."""

    def __init__(self, recipe: Recipe, terminal: Terminal | None = None, retry_failed: bool = False) -> None:
        """`retry_failed`: generation and judges try the rows again that failed."""
        self.retry_failed = retry_failed
        self.recipe, self.terminal = recipe, terminal or Terminal()
        self.study: Study = expand(recipe)
        self.store = Store(recipe.out)
        self.runner = Runner(self.study, self.store, self.terminal)

    # --- before anything runs ---------------------------------------------------------------------------------
    def plan(self, capacity: Capacity | None = None) -> tuple[list[Item], Capacity]:
        """What would run. Checks everything that can be checked; starts and writes nothing.

        Args:
            capacity: of the cluster that it would run on; None: what the recipe declares, or this machine.
        """
        capacity = capacity or self._declared()
        prompts = None
        if not self._family_missing():
            with self.terminal.chatter_to(Path(os.devnull)):
                prompts = check_local_inputs(self.study, self.store)
            self._claim()
        return make_plan(self.study, self.store, prompts, capacity), capacity

    def _declared(self) -> Capacity:
        capacity = declared_capacity(self.recipe.cluster)
        if not joins_cluster(self.recipe.cluster):
            refuse_impossible(self.study, capacity)
        return capacity

    def _check(self) -> None:
        with self.terminal.chatter_to(Path(os.devnull)):
            check_inputs(self.study, self.store)
        self._claim()

    def _claim(self) -> None:
        """Refuses an `out` whose artifacts come from other definitions, but for responses that may step aside."""
        self.store.check_access()
        aside = {Store.responses(name) for name in changed_teachers(self.study, self.store)}
        kept = {name: value for name, value in definitions(self.study).items() if name not in aside}
        self.store.claim(kept, write=False)

    def _family_missing(self) -> bool:
        if self.recipe.miniature is None:
            return False
        from deltaray.miniature.make import family_is_made

        made = self.recipe.miniature
        return not all(family_is_made(Path(made.directory), seed, made.family) for seed in self.recipe.seeds)

    # --- running ----------------------------------------------------------------------------------------------
    def run(self, stages: list[str] | None = None) -> None:
        """Runs the given stages (default: all that the recipe has sections for), in order, and stops Ray.

        A failure leaves Ray to the process: threads of the failed stage may still speak to it.

        Raises:
            UserError: the recipe or its inputs cannot work; nothing was written.
            StageError: a stage failed while running.
        """
        self._declared()
        wanted = stages or self._named_stages()
        for stage in set(wanted) - set(self._named_stages()):
            raise UserError(
                f"{self.recipe.name}: the recipe has no `{SECTIONS[stage]}:` section, so nothing to {stage}"
            )
        with ExitStack() as alone:
            self._prepare(alone)
            self._run_stages(wanted, self.runner.log_file())
        with self.terminal.chatter_to(Path(os.devnull)):  # processes complain while they are ended
            stop_ray()

    def _prepare(self, alone: ExitStack) -> None:
        """The family of a miniature; then all checks; then, and not before, the first file of the study.

        `alone` holds the lock on `out` from then on.
        """
        if self.recipe.miniature and self._family_missing():
            self._run_stages(["miniature"], Path(self.recipe.miniature.directory) / "make.log")
        self._check()
        if joins_cluster(self.recipe.cluster):
            self.runner.ray()
        alone.enter_context(self.store.lock())
        self.store.sweep()
        self._write_recipe()

    def _run_stages(self, stages: list[str], log: Path) -> None:
        with self.terminal.chatter_to(log):
            for stage in stages:
                self.runner.guarded(stage, getattr(self, f"_{stage}"), log)

    def _named_stages(self) -> list[str]:
        return [stage for stage in STAGES if stage not in SECTIONS or getattr(self.recipe, SECTIONS[stage])]

    def _write_recipe(self) -> None:
        try:
            supersede(self.study, self.store)
            self.store.claim(definitions(self.study))
            self.store.write_bytes("recipe.yaml", dump_recipe(self.recipe).encode())
            self._store_prompts()
        except OSError as error:
            raise UserError(f"out: {self.store.out} cannot be written: {error.strerror or error}") from None
        self.runner.bound = True
        self.runner.keep_records()

    def _store_prompts(self) -> None:
        sizes = self.recipe.shard_size, self.recipe.unit_size
        if self.recipe.preferences:
            return store_preferences(self.store, self.recipe.preferences, *sizes)
        store_source(self.store, prompt_source(self.study), *sizes, prompt_folder(self.study))

    # --- the stages -------------------------------------------------------------------------------------------
    def _miniature(self) -> None:
        from deltaray.miniature.family import FAMILIES
        from deltaray.miniature.make import make_family

        made, several = self.recipe.miniature, len(self.recipe.seeds) > 1
        assert made is not None
        models = len(FAMILIES[made.family]) * len(self.recipe.seeds)
        with self.runner.stage("miniature", "models", models, shown="steps") as progress:
            for seed in self.recipe.seeds:
                suffix = f"-seed{seed}" if several else ""

                def show(name: str, step: int, steps: int, end: str = suffix) -> None:
                    progress.update(name + end, step, steps)

                make_family(Path(made.directory), seed, show, made.family)

    def _generate(self) -> None:
        from deltaray.generate.stage import generate, teacher_work

        self._extend()
        works = teacher_work(self.study, self.store, self.retry_failed)
        if all(work.finished for work in works):
            rows = sum(self.store.count_rows(work.assignment.destination) for work in works)
            return self.runner.nothing("generate", f"{rows:,} responses are stored")
        left = sum(responses_in(work.units) for work in works)
        with self.runner.stage("generate", "responses", left) as progress:
            generate(
                self.study, self.store, works, self.runner.ray(), progress.update, partial(self.runner.say, "generate")
            )

    def _extend(self) -> None:
        """The conversations that some prompts become, which is what the teachers then answer."""
        from deltaray.extend.stage import (
            conclusion,
            draw_origins,
            extend,
            extension_work,
            is_extended,
            store_extended,
        )

        if self.study.extensions is None or (is_extended(self.study, self.store) and not self.retry_failed):
            return
        draw_origins(self.study, self.store)
        for retry in (False, True)[: 1 + self.retry_failed]:
            works = extension_work(self.study, self.store, retry)
            if not all(work.finished for work in works):
                left = sum(responses_in(work.units) for work in works)
                with self.runner.stage("extend", "conversations", left) as progress:
                    say = partial(self.runner.say, "extend")
                    extend(self.study, self.store, works, self.runner.ray(), progress.update, say)
        self.runner.say("extend", conclusion(store_extended(self.study, self.store)))

    def _score(self) -> None:
        from deltaray.score.compare import compare_scores, is_compared
        from deltaray.score.stage import all_scores

        self._demand_responses()
        sides = all_scores(self.study)
        if not self._complete_scores(sides) and is_compared(self.study, self.store):
            return self.runner.nothing(
                "score", f"{len(self.study.response_scorers())} scorers have scored all responses"
            )
        self.runner.worked = True
        self.runner.ray()
        compare_scores(self.study, self.store)

    def _complete_scores(self, sides: list[tuple[str, str]]) -> bool:
        """Scores what is missing of (scorer, teacher); whether anything was."""
        from deltaray.score.judging import forget_failed
        from deltaray.score.stage import missing_scores, score

        if self.retry_failed:
            forget_failed(self.store, sides)
        units = missing_scores(self.study, self.store, sides)
        if units:
            left = sum(self.store.count(unit["responses"]) for unit in units)
            with self.runner.stage("score", "scores", left) as progress:
                say = partial(self.runner.say, "score")
                score(self.study, self.store, sides, self.runner.ray(), progress.update, say, self.retry_failed)
        return bool(units)

    def _pair(self) -> None:
        from deltaray.pair.stage import is_done, pair
        from deltaray.score.stage import needed_scores

        self._demand_responses()
        scored = self._complete_scores(needed_scores(self.study))
        todo = [name for name in self.study.pairings if not is_done(self.study, self.store, name)]
        if not todo:
            if not scored:
                self.runner.nothing("pair", f"{len(self.study.pairings)} pairings are up to date")
            return
        with self.runner.stage("pair", "pairings", len(todo)) as progress:
            pair(self.study, self.store, partial(self._show_pairs, progress))

    def _show_pairs(self, progress: StageProgress, name: str, pairs: int) -> None:
        progress.update(name, 1, 1, note=f"{pairs:,} pairs")
        self.runner.metrics.funnel(name, self.store.read_json(f"{Store.pairs(name)}/funnel.json"))

    def _demand_responses(self) -> None:
        for name in self.study.answering():
            if not self.store.committed(Store.responses(name)):
                raise UserError(f"{self.store.out}: teacher {name} has no responses yet; run `deltaray generate` first")

    def _train(self) -> None:
        from deltaray.train.outdated import outdated
        from deltaray.train.stage import train

        for run in self.study.runs.values():
            if note := outdated(self.store, run):
                self.runner.say("train", note)
        runs = [run for run in self.study.runs.values() if not self.store.trained(run.name)]
        if not runs:
            return self.runner.nothing("train", f"{len(self.study.runs)} students are trained")
        for run in runs:
            for pairing in run.pairings:
                if not self.store.committed(Store.pairs(pairing)):
                    raise UserError(f"{self.store.out}: pairing {pairing} has no pairs yet; run `deltaray pair` first")
        self._reference(runs)
        with self.runner.stage("train", "students", len(runs), shown="steps") as progress:
            train(
                self.study, self.store, runs, partial(self._show_training, progress), partial(self.runner.say, "train")
            )

    def _show_training(self, progress: StageProgress, run: str, step: int, total: int, metrics: dict[str, Any]) -> None:
        note = ""
        if metrics:
            accuracy = metrics["rewards_accuracy"]
            right = "" if accuracy is None else f", accuracy {accuracy:.2f}"
            note = f"loss {metrics['loss']:.4f}{right}, {metrics['tokens_per_second']:,.0f} tokens/s"
        progress.update(run, step, total, note=note)
        self.runner.metrics.training(run, step, metrics)

    def _reference(self, runs: list[TrainingRun]) -> None:
        """Reference log-probs, once per response, for the runs whose loss compares with a reference."""
        from deltaray.reference.blocks import missing_blocks
        from deltaray.reference.stage import reference, references_needed

        needed = references_needed(self.study, runs)
        missing = [
            block for student, of in needed.items() for it in of for block in missing_blocks(self.store, student, it)
        ]
        if not missing:
            return
        left = sum(block.rows for block in missing)
        with self.runner.stage("reference", "responses", left) as progress:
            for student, teachers in needed.items():
                reference(self.study, self.store, student, teachers, progress.update)

    def _merge(self) -> None:
        from deltaray.aggregate.ranking import validation_scores
        from deltaray.aggregate.stage import demand_adapters, make_merge, missing_merges, selection_work
        from deltaray.evaluate.stage import store_task_prompts

        demand_adapters(self.study, self.store)
        store_task_prompts(self.study, self.store)
        self._answer_tasks("select", selection_work(self.study, self.store))
        scores = validation_scores(self.study, self.store)
        missing = missing_merges(self.study, self.store, scores)
        if not missing:
            return self.runner.nothing("merge", f"{len(self.study.merges)} merges are up to date")
        with self.runner.stage("merge", "adapters", len(missing), shown="matrices") as progress:
            for merge in missing:
                report = make_merge(self.store, merge, scores, partial(progress.update, merge.name))
                for warning in report.warnings:
                    self.runner.say("merge", f"{merge.name}: {warning}")

    def _evaluate(self) -> None:
        from deltaray.evaluate.stage import conclude, evaluation_work, is_concluded, store_task_prompts

        store_task_prompts(self.study, self.store)
        answered = self._answer_tasks("evaluate", evaluation_work(self.study, self.store))
        benchmarked = self._run_benchmarks()
        if answered or benchmarked:
            conclude(self.study, self.store)
        elif is_concluded(self.study, self.store):
            self.runner.nothing("evaluate", f"{len(self.study.evaluated)} models are evaluated")
        else:
            self.runner.worked = True
            conclude(self.study, self.store)
            self.terminal.say("evaluate: no answers to make; the summary is written anew")

    def _tune(self) -> None:
        """What all trials share, once; then the trials."""
        from deltaray.tune.conclude import conclude
        from deltaray.tune.records import read_records
        from deltaray.tune.stage import Explorer

        explorer = Explorer(self.study, self.store, self.retry_failed)
        left = explorer.left()
        if left:
            self._share()
            with self.runner.stage("tune", "trials", left) as progress:
                explorer.run(self.runner.ray(), progress, partial(self.runner.say, "tune"))
        else:
            self.runner.nothing("tune", "every trial is over")
        conclude(self.study, self.store, read_records(self.store))
        explorer.refuse_if_all_failed()

    def _share(self) -> None:
        """Scores, pairs and references of all trials, as far as they are known beforehand."""
        from deltaray.score.stage import needed_scores
        from deltaray.tune.shared import sharing_trials, study_of
        from deltaray.tune.space import known_trials

        shared = Pipeline(self.recipe, self.terminal, self.retry_failed)
        shared.study, shared.runner = study_of(self.study, sharing_trials(self.study)), self.runner
        shared._demand_responses()
        shared._complete_scores(needed_scores(shared.study))
        if known_trials(self.recipe) is not None:
            try:
                shared._pair()
            except UserError as error:  # of some trials: they fail with it, the others need not
                self.runner.say("pair", str(error))
        shared._reference(list(shared.study.runs.values()))

    def _answer_tasks(self, stage: str, works: list[Work]) -> bool:
        """Has tasks answered and scored; whether anything was missing."""
        from deltaray.evaluate.stage import answer_tasks, unscored

        if all(work.finished for work in works) and not unscored(self.study, self.store, works):
            return False
        say = partial(self.runner.say, stage)
        with self.runner.stage(stage, "answers", sum(responses_in(work.units) for work in works)) as progress:
            answer_tasks(self.study, self.store, works, self.runner.ray(), progress.update, say)
        return True

    def _run_benchmarks(self) -> bool:
        """The harness's tasks, for the best of every grid and all other models; whether any was missing."""
        from deltaray.evaluate.harness import missing_benchmarks, run_benchmarks
        from deltaray.evaluate.select import choose_candidates
        from deltaray.evaluate.stage import models_for_harness

        evaluation = self.study.recipe.evaluation
        if evaluation is None or not evaluation.harness_tasks:
            return False
        choose_candidates(self.study, self.store)
        units = missing_benchmarks(self.study, self.store, models_for_harness(self.study, self.store))
        if units:
            with self.runner.stage("evaluate", "benchmarks", len(units), shown="requests") as progress:
                say = partial(self.runner.say, "evaluate")
                run_benchmarks(self.store, units, self.runner.ray(), progress.update, say)
        return bool(units)

    def _report(self) -> None:
        from deltaray.report import write_report

        if not self.runner.worked and self.store.exists("report.html"):
            return self.runner.nothing("report", self.store.address("report.html"))
        self.terminal.say(f"report: {write_report(self.store)}")
