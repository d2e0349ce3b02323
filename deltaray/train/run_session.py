"""One training run on a worker: from its newest checkpoint to the committed student."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deltaray.data.store import Store
from deltaray.data.tokens import turn_end
from deltaray.errors import StageError
from deltaray.model_files.folder import fetch
from deltaray.recipe.models import Student
from deltaray.recipe.study import TrainingRun
from deltaray.recipe.training import Training
from deltaray.score.registry import SCORERS
from deltaray.train.checkpoint import Checkpoints
from deltaray.train.engine import save_trained, stop_engine
from deltaray.train.examples import Data, check_vocabulary
from deltaray.train.generation import Answering, heldout_questions
from deltaray.train.health_checks import Signature, Watcher
from deltaray.train.reporter import Reporter
from deltaray.train.schedule import total_steps
from deltaray.train.staleness import note_pairs
from deltaray.train.trainer import Metrics, Trainer

BEHIND = 2
"""Steps that are made while a checkpoint is being written; then it is waited for."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    store: Store
    training: Training
    students: dict[str, Student]
    runs: list[TrainingRun]
    progress: Any  # handle of the `Progress` actor
    scorer: Any = None  # the recipe's section of the scorer of generated answers


@dataclass
class RunSession:
    """One run from its newest checkpoint to the committed student."""

    job: Job
    run: TrainingRun
    tokenizer: Any
    data: Data
    saved: float = field(default_factory=time.monotonic)
    best: tuple[float, str] | None = None  # (held-out accuracy, name of its checkpoint)
    finished_at: int | None = None  # the step before which the checkpoint that is being written is committed

    def run_to_the_end(self) -> None:
        job, run = self.job, self.run
        student = job.students[run.student]
        self.source = self._source(student)
        self.trainer = Trainer(job.training, student, run, self.data, self._pad_id(), self._start())
        check_vocabulary(self.data, self._vocabulary(), job.students[run.student].model)
        self.total = total_steps(len(self.data.train), run.settings)
        if late := [step for step in run.intermediate_checkpoints if step > self.total]:
            raise StageError(f"{run.name}: intermediate_checkpoints: {late[0]}: the run has only {self.total} steps")
        self.reporter = Reporter(job.store, job.progress, run.name, self.total, self.data.counts)
        self.checkpoints = Checkpoints(job.store, run.name)
        self.watcher = Watcher(job.training.watch, self.total)
        self.answering = self._answering()
        self._steps(self._resume())
        self._finish()
        self._keep(run.name)
        stop_engine(self.trainer.engine)
        if dist.get_rank() == 0:
            self.checkpoints.clear()

    def _source(self, student: Student) -> Path | None:
        """The untouched student's folder on rank 0, with all that will lie beside the trained weights."""
        refusal: list[str | None] = [None]
        folder = None
        if dist.get_rank() == 0 and self.run.settings.lora is None:
            try:
                folder = fetch(student.model, student.revision, weights=False)
            except Exception as error:  # the hub's own errors and those of the network below it
                refusal = [f"{self.run.name}: the files of {student.model} cannot be fetched: {error}"]
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise StageError(refusal[0])
        return folder

    def _answering(self) -> Answering | None:
        asked, store = self.job.training.generation, self.job.store
        if asked is None or not len(self.data.heldout):
            return None
        questions = heldout_questions(store, self.run.pairings, self.data.heldout, asked.prompts)
        score = SCORERS[self.job.scorer.kind](self.job.scorer) if self.job.scorer else None
        return Answering(asked, questions, self.tokenizer, self.job.training.micro_batch_tokens, score)

    def _keep(self, name: str) -> None:
        """Commits the student as it is now under a name, if it is not there already."""
        there = [self.job.store.trained(name)]
        dist.broadcast_object_list(there, src=0)
        if there[0] is None:
            adapter = self.run.settings.lora is not None
            path = Store.adapter(name) if adapter else Store.student(name)
            if dist.get_rank() == 0:
                note_pairs(self.job.store, name, self.run.pairings)
            student = self.job.students[self.run.student]
            save_trained(self.trainer.engine, self.tokenizer, self.job.store, path, student, self.source, adapter)

    def _start(self) -> str | None:
        """The folder of what the run goes on from; runs stand behind the one that they name."""
        path = self.job.store.trained(self.run.after) if self.run.after else None
        return self.job.store.local_folder(path) if path else None

    def _pad_id(self) -> int:
        """Padding is masked everywhere, so any id will do; some tokenizers' own has no row in the embedding."""
        return turn_end(self.tokenizer)

    def _vocabulary(self) -> int:
        return int(self.trainer.engine.module.model.config.get_text_config().vocab_size)

    def _resume(self) -> int:
        """The step to go on with."""
        state, damaged = self.checkpoints.load(self.trainer.engine, self.data.fingerprint)
        for name in damaged:
            self.reporter.say(f"checkpoint {name} is damaged or of other pairs, and is left out")
        if state is None:
            self.reporter.begin([])
            return 0
        self.best = tuple(state["best"]) if state["best"] else None
        for line in state["lines"]:
            self.watcher.see(line)
        self.reporter.begin(state["lines"])
        self.reporter.say(f"resumed after step {state['step']}")
        return int(state["step"])

    def _steps(self, first: int) -> None:
        for step in range(first, self.total):
            if step == self.finished_at:
                self._finish()
            metrics = self.trainer.step(step, self.total)
            evaluated = self._is_evaluated(step)
            if evaluated:
                metrics |= self.trainer.evaluate()
            elif step + 1 == self.total:
                metrics |= self.trainer.routing_drift()
            if self.answering and (evaluated or step == 0):
                metrics |= self.answering(self.trainer.engine)
            found = self.watcher.see(metrics)
            self.reporter(metrics, found)
            if stop := [item for item in found if item.name in self.job.training.watch.stop_on]:
                return self._stop(stop[0])
            if name := self.run.intermediate_checkpoints.get(step + 1):
                self._keep(name)
            best = evaluated and self._is_best(metrics)
            if best or self._is_due(step):
                self._save(step + 1, metrics["heldout_accuracy"] if best else None)

    def _is_evaluated(self, step: int) -> bool:
        every = max(1, self.total // self.job.training.heldout_evaluations)
        return len(self.data.heldout) > 0 and ((step + 1) % every == 0 or step + 1 == self.total)

    def _is_best(self, metrics: Metrics) -> bool:
        """Only a run that may be stopped goes back to its best checkpoint."""
        watched = set(self.job.training.watch.stop_on) - {"not_finite"} and metrics["heldout_accuracy"] is not None
        return bool(watched) and (self.best is None or metrics["heldout_accuracy"] > self.best[0])

    def _is_due(self, step: int) -> bool:
        """As rank 0 sees it: clocks differ."""
        every = self.job.training.checkpoint_steps
        late = time.monotonic() - self.saved > 60 * self.job.training.checkpoint_minutes
        due = [step + 1 < self.total and (late or bool(every and (step + 1) % every == 0))]
        dist.broadcast_object_list(due, src=0)
        return due[0]

    def _save(self, step: int, best: float | None) -> None:
        """After `step` steps; `best`: the held-out accuracy, if no step before had so high a one."""
        name = self.checkpoints.new_name(step)
        if best is not None:
            self.best = (best, name)
        lines, data = self.reporter.lines, self.data.fingerprint
        state = {"step": step, "data": data, "lines": list(lines), "best": self.best}
        self._finish()
        self.checkpoints.begin(self.trainer.engine, name, state, keep=self.best[1] if self.best else None)
        self.saved, self.finished_at = time.monotonic(), step + BEHIND

    def _finish(self) -> None:
        """Commits the checkpoint that is being written, with the lines of metrics up to now."""
        self.checkpoints.finish()
        self.reporter.commit()
        self.finished_at = None

    def _stop(self, signature: Signature) -> None:
        """Goes back to the best checkpoint (without held-out pairs: the newest)."""
        self._finish()
        names = [self.best[1]] if self.best else self.checkpoints.complete()[:1]
        if signature.name == "not_finite" and not names:
            raise StageError(f"{self.run.name}: step {signature.step}: {signature.message}")
        for name in names:
            self.checkpoints.load_one(self.trainer.engine, name, self.data.fingerprint)
        where = names[0] if names else "this step"
        self.reporter.say(f"stopped at step {signature.step} by {signature.name}; the student is that of {where}")
