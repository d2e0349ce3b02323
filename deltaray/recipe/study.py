"""The study: a recipe with its seeds and grids written out, so that every stage sees plain named things.

With one seed names stay as they are. With several, whatever depends on the seed exists once per seed under the name
`<name>-seed<k>`: models whose path holds `{seed}`, all pairings of such teachers, and every training run. What does
not depend on the seed stays single, so it is generated, scored and referenced once.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deltaray.evaluate.suites import expand_suites
from deltaray.recipe.deltas import Pairing
from deltaray.recipe.extensions import Extensions
from deltaray.recipe.merging import MergeMethod
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.scorers import Judge, RewardModel, Scorer, scorer_name
from deltaray.recipe.training import Run

M = TypeVar("M", bound=Model)


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
    def early(self) -> dict[int, str]:
        """The names of the students that are kept on the way, by the step after which."""
        base = base_name(self.name)
        return {step: f"{base}-step{step}{self.name[len(base) :]}" for step in self.settings.early}


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
        """The candidates among which `name` is chosen; empty if it is no grid."""
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


def expand(recipe: Recipe) -> Study:
    """Writes out seeds, grids and suites. Pure."""
    if recipe.evaluation is not None:
        recipe = recipe.model_copy(update={"evaluation": expand_suites(recipe.evaluation)})
    teachers: dict[str, Teacher] = {}
    students: dict[str, Student] = {}
    pairings: dict[str, Pairing] = {}
    runs: dict[str, TrainingRun] = {}
    evaluated: dict[str, EvaluatedModel] = {}
    merges: dict[str, AdapterMerge] = {}
    for seed in recipe.seeds:
        names = _Names(recipe, seed)
        for name, teacher in recipe.teachers.items():
            teachers[names.teacher(name)] = _at_seed(teacher, seed)
        if recipe.student:
            students[names.student()] = _at_seed(recipe.student, seed)
        for name, pairing in recipe.pairings.items():
            pairings[names.pairing(name)] = names.renamed(pairing)
        for name, run in (recipe.training.runs if recipe.training else {}).items():
            for item in _grid(run, names.run(name)):
                settings = item[1].model_copy(update={"seed": run.seed + seed})
                candidate_of = names.run(name) if item[0] != names.run(name) else None
                paired = tuple(names.pairing(pairing) for pairing in run.pairings)
                after = names.run(run.after) if run.after else None
                runs[item[0]] = TrainingRun(item[0], names.student(), paired, settings, candidate_of, after)
        merges |= {merge.name: merge for merge in _merges(recipe, names)}
        evaluated |= {model.name: model for model in _evaluated(recipe, names, seed)}
    scorers = {name: _scorer_at(scorer, recipe.seeds[0]) for name, scorer in recipe.scorers.items()}
    extensions = recipe.extensions and _written_by(recipe.extensions, recipe.seeds[0])
    ordered = _in_order(runs)
    return Study(recipe, teachers, students, pairings, ordered, evaluated, scorers, merges, extensions)


def _in_order(runs: dict[str, TrainingRun]) -> dict[str, TrainingRun]:
    """Each run behind the one that it goes on from, otherwise as they stand."""
    ordered: dict[str, TrainingRun] = {}

    def add(run: TrainingRun) -> None:
        if run.after is not None:
            add(runs[run.after])
        ordered.setdefault(run.name, run)

    for run in runs.values():
        add(run)
    return ordered


def _merges(recipe: Recipe, names: "_Names") -> list[AdapterMerge]:
    merging = recipe.merging
    if merging is None:
        return []
    deltas = tuple(names.run(delta) for delta in merging.deltas)
    found = []
    for name, (method, count) in merging.names().items():
        settings = merging.methods[method]
        merge = AdapterMerge(names.run(name), names.student(), deltas, count, settings.method or method, settings)
        found.append(merge)
    return found


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


class _Names:
    """Who carries a seed suffix."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.suffix = f"-seed{seed}" if len(recipe.seeds) > 1 else ""

    def teacher(self, name: str) -> str:
        teacher = self.recipe.teachers.get(name)  # the sides of a preference data set are none
        return name + (self.suffix if teacher and _depends_on_seed(teacher) else "")

    def renamed(self, pairing: Pairing) -> Pairing:
        """The pairing with the names that its teachers have at this seed."""
        update: dict[str, object] = {"teachers": [self.teacher(name) for name in pairing.teachers]}
        update |= {"chosen": self.teacher(pairing.chosen), "rejected": self.teacher(pairing.rejected)}
        if pairing.draw is not None:
            weak = [self.teacher(name) for name in pairing.draw.weak_teachers]
            update["draw"] = pairing.draw.model_copy(update={"weak_teachers": weak})
        return pairing.model_copy(update=update)

    def student(self) -> str:
        student = self.recipe.student
        assert student is not None
        return student.name + (self.suffix if _depends_on_seed(student) else "")

    def pairing(self, name: str) -> str:
        pairing = self.recipe.pairings[name]
        models: list[Model] = [it for name, it in self.recipe.teachers.items() if name in pairing.names]
        models += [self.recipe.student] if self.recipe.student else []
        return name + (self.suffix if any(_depends_on_seed(model) for model in models) else "")

    def run(self, name: str) -> str:
        return name + self.suffix


def _depends_on_seed(model: Model) -> bool:
    adapter = model.adapter if isinstance(model, Teacher) else None
    return "{seed}" in f"{model.model} {adapter}"


def _at_seed(model: M, seed: int) -> M:
    """The model of one seed, its folder absolute: workers run elsewhere.

    Sampling is seeded apart only if the model itself is another one at each seed.
    """
    update: dict[str, object] = {}
    if model.is_local and not (isinstance(model, Teacher) and model.endpoint):
        path = Path(model.model.replace("{seed}", str(seed))).expanduser()
        update["model"] = str(path.absolute())
    if isinstance(model, Teacher):
        update |= _teacher_at_seed(model, seed)
    return model.model_copy(update=update)


def _teacher_at_seed(teacher: Teacher, seed: int) -> dict[str, object]:
    update: dict[str, object] = {}
    if teacher.adapter is not None:
        update["adapter"] = str(Path(teacher.adapter.replace("{seed}", str(seed))).expanduser().absolute())
    if _depends_on_seed(teacher) and teacher.sampling.seed is not None:
        update["sampling"] = teacher.sampling.model_copy(update={"seed": teacher.sampling.seed + seed})
    return update


def _written_by(extensions: Extensions, seed: int) -> Extensions:
    return extensions.model_copy(update={"by": _at_seed(extensions.by, seed)})


def _scorer_at(scorer: Scorer, seed: int) -> Scorer:
    """A scorer whose model, if it has one, can be found from anywhere."""
    if isinstance(scorer, Judge):
        return scorer.model_copy(update={"by": _at_seed(scorer.by, seed)})
    return _at_seed(scorer, seed) if isinstance(scorer, RewardModel) else scorer


def _grid(run: Run, name: str) -> list[tuple[str, Run]]:
    if not isinstance(run.learning_rate, list):
        return [(name, run)]
    return [(f"{name}-lr{rate:g}", run.model_copy(update={"learning_rate": rate})) for rate in run.learning_rate]


def _evaluated(recipe: Recipe, names: _Names, seed: int) -> list[EvaluatedModel]:
    models = []
    if recipe.student:
        models.append(EvaluatedModel(names.student(), recipe.student.name, seed, "untouched"))
    for name, run in (recipe.training.runs if recipe.training else {}).items():
        for base in (*(f"{name}-step{step}" for step in run.early), name):
            models.append(EvaluatedModel(names.run(base), base, seed, "student"))
    for name in recipe.merging.names() if recipe.merging else []:
        models.append(EvaluatedModel(names.run(name), name, seed, "student"))
    paired = {name for pairing in recipe.pairings.values() for name in pairing.names} | explored_names(recipe)
    if recipe.evaluation and recipe.evaluation.teachers:
        for name in recipe.teachers:
            if name in paired or not (recipe.pairings or recipe.exploration):
                models.append(EvaluatedModel(names.teacher(name), name, seed, "teacher"))
    return models
