"""Writes a recipe's seeds, grids and suites out into a study.

With one seed names stay as they are. With several, whatever depends on the seed exists once per seed under the name
`<name>-seed<k>`: models whose path holds `{seed}`, all pairings of such teachers, and every training run. What does
not depend on the seed stays single, so it is generated, scored and referenced once.
"""

from pathlib import Path
from typing import TypeVar

from deltaray.errors import UserError
from deltaray.recipe.extensions import Extensions
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.pairing import Pairing
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.scorers import Judge, RewardModel, Scorer
from deltaray.recipe.study import AdapterMerge, EvaluatedModel, Study, TrainingRun, explored_names
from deltaray.recipe.suites import expand_suites
from deltaray.recipe.training import Run
from deltaray.text.words import exact

M = TypeVar("M", bound=Model)


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
    alone = _Alone()
    for seed in recipe.seeds:
        names = _Names(recipe, seed)
        for name, teacher in recipe.teachers.items():
            teachers[alone("teachers", names.teacher(name), name)] = _dated(recipe, _at_seed(teacher, seed))
        if recipe.student:
            students[names.student()] = _dated(recipe, _at_seed(recipe.student, seed))
        for name, pairing in recipe.pairings.items():
            pairings[alone("pairings", names.pairing(name), name)] = names.renamed(pairing)
        for name, run in (recipe.training.runs if recipe.training else {}).items():
            for item in _grid(run, names.run(name)):
                settings = item[1].model_copy(update={"seed": run.seed + seed})
                candidate_of = names.run(name) if item[0] != names.run(name) else None
                paired = tuple(names.pairing(pairing) for pairing in run.pairings)
                after = names.run(run.after) if run.after else None
                runs[alone("training.runs", item[0], name)] = TrainingRun(
                    item[0], names.student(), paired, settings, candidate_of, after
                )
        merges |= {
            alone("training.runs", merge.name, f"merging.methods {merge.name}"): merge
            for merge in _merges(recipe, names)
        }
        for model in _evaluated(recipe, names, seed):
            evaluated[alone("evaluated models", model.name, f"{model.role} {model.base}")] = model
    scorers = {name: _scorer_at(scorer, recipe) for name, scorer in recipe.scorers.items()}
    extensions = recipe.extensions and _written_by(recipe.extensions, recipe)
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


class _Alone:
    """Refuses that two things of a recipe become one: a run `a` at seed 1 and another that is called `a-seed1`."""

    def __init__(self) -> None:
        self.owners: dict[tuple[str, str], str] = {}

    def __call__(self, section: str, name: str, owner: str) -> str:
        """The name.

        Raises:
            UserError: it belongs to another owner of the section already, or did but for its case.
        """
        other = self.owners.setdefault((section, name.lower()), owner)
        if other != owner:
            raise UserError(f"{section}: {owner} and {other} would both be called {name}; rename one of them")
        return name


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


def _dated(recipe: Recipe, model: M) -> M:
    """The model with the study's day for its template, unless it has its own."""
    return model if model.date else model.model_copy(update={"date": recipe.date})


def _written_by(extensions: Extensions, recipe: Recipe) -> Extensions:
    return extensions.model_copy(update={"by": _dated(recipe, _at_seed(extensions.by, recipe.seeds[0]))})


def _scorer_at(scorer: Scorer, recipe: Recipe) -> Scorer:
    """A scorer whose model, if it has one, can be found from anywhere."""
    if isinstance(scorer, Judge):
        return scorer.model_copy(update={"by": _dated(recipe, _at_seed(scorer.by, recipe.seeds[0]))})
    return _dated(recipe, _at_seed(scorer, recipe.seeds[0])) if isinstance(scorer, RewardModel) else scorer


def _grid(run: Run, name: str) -> list[tuple[str, Run]]:
    if not isinstance(run.learning_rate, list):
        return [(name, run)]
    return [(f"{name}-lr{exact(rate)}", run.model_copy(update={"learning_rate": rate})) for rate in run.learning_rate]


def _evaluated(recipe: Recipe, names: _Names, seed: int) -> list[EvaluatedModel]:
    models = []
    if recipe.student:
        models.append(EvaluatedModel(names.student(), recipe.student.name, seed, "untouched"))
    for name, run in (recipe.training.runs if recipe.training else {}).items():
        for base in (*(f"{name}-step{step}" for step in run.intermediate_checkpoints), name):
            models.append(EvaluatedModel(names.run(base), base, seed, "student"))
    for name in recipe.merging.names() if recipe.merging else []:
        models.append(EvaluatedModel(names.run(name), name, seed, "student"))
    paired = {name for pairing in recipe.pairings.values() for name in pairing.names} | explored_names(recipe)
    if recipe.evaluation and recipe.evaluation.teachers:
        for name in recipe.teachers:
            if name in paired or not (recipe.pairings or recipe.exploration):
                models.append(EvaluatedModel(names.teacher(name), name, seed, "teacher"))
    return models
