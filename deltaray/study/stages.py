"""What every stage of a study does: finds what is done already, does the rest, says what it did.

Thin: the work is in the packages named after the verbs, imported once their stage runs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from deltaray.data.shapes import FUNNEL
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.generate.answer import Work, refuse_failed
from deltaray.generate.units import responses_in
from deltaray.recipe import Study
from deltaray.recipe.study import TrainingRun
from deltaray.runtime.runner import Runner
from deltaray.runtime.terminal import StageProgress


class Stages:
    """The stages of one study as methods, by their names."""

    def __init__(self, study: Study, store: Store, runner: Runner, retry_failed: bool) -> None:
        """`retry_failed`: generation and judges try the rows again that failed."""
        self.study, self.store, self.runner, self.retry_failed = study, store, runner, retry_failed

    # --- responses, scores, pairs -------------------------------------------------------------------------------
    def miniature(self) -> None:
        from deltaray.labs.miniature.family import FAMILIES
        from deltaray.labs.miniature.make import make_family

        made, several = self.study.recipe.miniature, len(self.study.recipe.seeds) > 1
        assert made is not None
        if made.family == "smollm2":
            return self._real_models(Path(made.directory))
        models = len(FAMILIES[made.family]) * len(self.study.recipe.seeds)
        with self.runner.stage("miniature", "models", models, shown="steps") as progress:
            for seed in self.study.recipe.seeds:
                suffix = f"-seed{seed}" if several else ""

                def show(name: str, step: int, steps: int, end: str = suffix) -> None:
                    progress.update(name + end, step, steps)

                make_family(Path(made.directory), seed, show, made.family)

    def _real_models(self, directory: Path) -> None:
        from deltaray.labs.smollm import LADDER, make_ladder

        with self.runner.stage("miniature", "models", len(LADDER)) as progress:
            make_ladder(directory, progress.update)

    def generate(self) -> None:
        from deltaray.generate.stage import generate, teacher_work

        self._extend()
        say = partial(self.runner.say, "generate")
        worked = False
        for retry in (False, True)[: 1 + self.retry_failed]:
            works = teacher_work(self.study, self.store, retry)
            if not all(work.finished for work in works):
                worked, left = True, sum(responses_in(work.units) for work in works)
                with self.runner.stage("generate", "responses", left) as progress:
                    generate(self.study, self.store, works, self.runner.ray(), progress.update, say)
        if not worked:
            rows = sum(self.store.count_rows(work.assignment.destination) for work in works)
            self.runner.nothing("generate", f"{rows:,} responses are stored")
        refuse_failed(self.store, works, self.study.recipe.failures, say)

    def _extend(self) -> None:
        """The conversations that some prompts become, which is what the teachers then answer."""
        from deltaray.generate.extend.stage import (
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
        refuse_failed(self.store, works, self.study.recipe.failures, partial(self.runner.say, "extend"))
        self.runner.say("extend", conclusion(store_extended(self.study, self.store)))

    def score(self) -> None:
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
        from deltaray.score.stage import missing_scores, refuse_unscored, score

        if self.retry_failed:
            forget_failed(self.store, sides)
        units = missing_scores(self.study, self.store, sides)
        if units:
            left = sum(self.store.count(unit["responses"]) for unit in units)
            with self.runner.stage("score", "scores", left) as progress:
                say = partial(self.runner.say, "score")
                score(self.study, self.store, sides, self.runner.ray(), progress.update, say, self.retry_failed)
        folders = {f"{scorer} {teacher}": Store.scores(scorer, teacher) for scorer, teacher in sides}
        refuse_unscored(self.store, folders, self.study.recipe.failures, partial(self.runner.say, "score"))
        return bool(units)

    def pair(self) -> None:
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
            say = partial(self.runner.say, "pair")
            pair(self.study, self.store, partial(self._show_pairs, progress), say)

    def _show_pairs(self, progress: StageProgress, name: str, pairs: int) -> None:
        progress.update(name, 1, 1, note=f"{pairs:,} pairs")
        self.runner.metrics.funnel(name, self.store.read_json(Store.funnel(name), FUNNEL))

    def _demand_responses(self) -> None:
        for name in self.study.answering():
            if not self.store.committed(Store.responses(name)):
                raise UserError(f"{self.store.out}: teacher {name} has no responses yet; run `deltaray generate` first")

    # --- students -------------------------------------------------------------------------------------------------
    def train(self) -> None:
        from deltaray.pair.stage import is_paired
        from deltaray.train.stage import train
        from deltaray.train.staleness import outdated_in

        for note in outdated_in(self.study, self.store):
            self.runner.say("train", note)
        runs = [run for run in self.study.runs.values() if not self.store.trained(run.name)]
        if not runs:
            return self.runner.nothing("train", f"{len(self.study.runs)} students are trained")
        for pairing in dict.fromkeys(pairing for run in runs for pairing in run.pairings):
            if not self.store.committed(Store.pairs(pairing)):
                raise UserError(f"{self.store.out}: pairing {pairing} has no pairs yet; run `deltaray pair` first")
            if not is_paired(self.study, self.store, pairing):
                raise UserError(
                    f"{self.store.out}: pairing {pairing}: its responses or scores are others than those that its "
                    "pairs were made from; run `deltaray pair` first"
                )
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
        from deltaray.train.reference.blocks import missing_blocks
        from deltaray.train.reference.stage import reference, references_needed

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

    def merge(self) -> None:
        from deltaray.evaluate.stage import store_task_prompts
        from deltaray.merge.aggregate.ranking import validation_scores
        from deltaray.merge.aggregate.stage import demand_adapters, make_merge, missing_merges, selection_work

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

    # --- what they can do -----------------------------------------------------------------------------------------
    def evaluate(self) -> None:
        from deltaray.evaluate.stage import conclude, evaluation_work, is_concluded, store_task_prompts
        from deltaray.merge.aggregate.results import aggregation

        store_task_prompts(self.study, self.store)
        answered = self._answer_tasks("evaluate", evaluation_work(self.study, self.store))
        benchmarked = self._run_benchmarks()
        if answered or benchmarked:
            conclude(self.study, self.store, aggregation)
        elif is_concluded(self.study, self.store):
            self.runner.nothing("evaluate", f"{len(self.study.evaluated)} models are evaluated")
        else:
            self.runner.worked = True
            conclude(self.study, self.store, aggregation)
            self.runner.terminal.say("evaluate: no answers to make; the summary is written again")

    def tune(self) -> None:
        """What all trials share, once; then the trials."""
        from deltaray.train.staleness import outdated_in
        from deltaray.tune.conclude import conclude
        from deltaray.tune.records import read_records
        from deltaray.tune.shared import sharing_trials, study_of
        from deltaray.tune.stage import Explorer

        for note in outdated_in(study_of(self.study, sharing_trials(self.study)), self.store):
            self.runner.say("tune", note)
        explorer = Explorer(self.study, self.store, self.retry_failed)
        left = explorer.left()
        if left:
            self._share()
            with self.runner.stage("tune", "trials", left) as progress:
                explorer.run(self.runner.ray(), progress, partial(self.runner.say, "tune"), self.runner.metrics.trials)
        else:
            self.runner.nothing("tune", "every trial is over")
        conclude(self.study, self.store, read_records(self.store))
        explorer.refuse_if_all_failed()

    def _share(self) -> None:
        """Scores, pairs and references of all trials, as far as they are known beforehand."""
        from deltaray.recipe.search_space import known_trials
        from deltaray.score.stage import needed_scores
        from deltaray.tune.shared import sharing_trials, study_of

        shared = Stages(study_of(self.study, sharing_trials(self.study)), self.store, self.runner, self.retry_failed)
        shared._demand_responses()
        shared._complete_scores(needed_scores(shared.study))
        if known_trials(self.study.recipe) is not None:
            try:
                shared.pair()
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

    def report(self) -> None:
        from deltaray.report import is_reported, write_report

        if not self.runner.worked and is_reported(self.store):
            return self.runner.nothing("report", self.store.address("report.html"))
        self.runner.terminal.say(f"report: {write_report(self.store)}")
