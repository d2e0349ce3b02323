"""The study: a recipe with its seeds and grids written out, so that every stage sees plain named things."""

import re
from dataclasses import dataclass

from deltaray.recipe.extensions import Extensions
from deltaray.recipe.merging import MergeMethod
from deltaray.recipe.models import Student, Teacher
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.scorers import Judge, Scorer, scorer_name
from deltaray.recipe.training import Run


@dataclass(frozen=True)
class TrainingRun:
    """One student to train: a recipe's run at one seed and one learning rate."""

    name: str
    student: str
    pairings: tuple[str, ...]
    settings: Run  # learning_rate is one number here, seed includes the study's
    candidate_of: str | None  # the name that the best of a grid will take
    after: str | None = None  # the run whose result it starts from

    @property
    def intermediate_checkpoints(self) -> dict[int, str]:
        """The names of the students that are kept on the way, by the step after which."""
        base = base_name(self.name)
        return {step: f"{base}-step{step}{self.name[len(base) :]}" for step in self.settings.intermediate_checkpoints}


@dataclass(frozen=True)
class AdapterMerge:
    """One merge of the best `count` of some runs' adapters, at one seed."""

    name: str
    student: str
    deltas: tuple[str, ...]
    count: int
    method: str
    settings: MergeMethod


@dataclass(frozen=True)
class EvaluatedModel:
    """A model whose evaluation is asked for."""

    name: str
    base: str  # the name without its seed suffix
    seed: int
    role: str  # untouched | student | teacher


@dataclass(frozen=True)
class Study:
    recipe: Recipe
    teachers: dict[str, Teacher]
    students: dict[str, Student]
    pairings: dict[str, Pairing]
    runs: dict[str, TrainingRun]
    evaluated: dict[str, EvaluatedModel]
    scorers: dict[str, Scorer]
    merges: dict[str, AdapterMerge]
    extensions: Extensions | None = None

    def student_of(self, pairing: str) -> str:
        """The student that a pairing trains and in whose tokens its lengths are counted."""
        runs = [run.student for run in self.runs.values() if pairing in run.pairings]
        suffix = pairing.rpartition("-seed")[2]
        guess = f"{self.recipe.student.name}-seed{suffix}" if self.recipe.student else ""
        return runs[0] if runs else guess if guess in self.students else next(iter(self.students))

    def grid(self, name: str) -> list[str]:
        """The candidates among which `name` is chosen; empty if it is not a grid."""
        return [run.name for run in self.runs.values() if run.candidate_of == name]

    def deltas(self) -> list[str]:
        """The runs whose adapters are merged."""
        return list(dict.fromkeys(delta for merge in self.merges.values() for delta in merge.deltas))

    def selected_on(self, model: str) -> list[str]:
        """The tasks on which a model competes with others: candidates of a grid, deltas for GAM's reference."""
        evaluation, run = self.recipe.evaluation, self.runs.get(model)
        competes = run is not None and (run.candidate_of is not None or model in self.deltas())
        return list(evaluation.selection) if evaluation and competes else []

    def explored_teachers(self) -> set[str]:
        """Teachers that some trial of the exploration uses, at any seed."""
        wanted = explored_names(self.recipe)
        return {name for name in self.teachers if name in wanted or base_name(name) in wanted}

    def response_scorers(self) -> list[str]:
        """The scorers of responses: all but those that evaluation tasks name and no pairing does."""
        evaluation = self.recipe.evaluation
        tasks = [*evaluation.tasks.values(), *evaluation.selection.values()] if evaluation else []
        asked = {scorer_name(task.scorer) for task in tasks if task.scorer}
        paired = {scorer_name(it) for pairing in self.pairings.values() for it in pairing.scorers}
        return [name for name in self.scorers if name in paired or name not in asked]

    def paired_teachers(self) -> list[str]:
        """Teachers that some pairing or trial uses, in the order of the recipe."""
        used = {name for pairing in self.pairings.values() for name in pairing.names}
        used |= self.explored_teachers()
        used |= {it.against for it in self.scorers.values() if isinstance(it, Judge) and it.against}
        return [name for name in self.teachers if name in used or not (self.pairings or self.recipe.exploration)]

    def answering(self) -> list[str]:
        """Everybody whose responses are scored and paired: those teachers, and the sides of a preference data set."""
        given = self.recipe.preferences
        return [*self.paired_teachers(), *([given.chosen, given.rejected] if given else [])]


def explored_names(recipe: Recipe) -> set[str]:
    """The teachers of the exploration's pairings, by their names in the recipe."""
    exploration = recipe.exploration
    if exploration is None:
        return set()
    if exploration.space.pairings == "ordered":
        return set(exploration.space.teachers or recipe.answering)
    return {name for pairing in exploration.space.pairings for name in recipe.pairings[pairing].names}


def base_name(name: str) -> str:
    """The recipe's name of something that exists once per seed."""
    return re.sub(r"-seed\d+$", "", name)
