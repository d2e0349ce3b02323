"""What decides each artifact of a study, put together from the stages that make them."""

from typing import Any

from deltaray.data.store import Store
from deltaray.evaluate.tasks import task_definitions
from deltaray.generate.fingerprint import generation_identity, model_identity
from deltaray.pair.definition import pairing_definitions
from deltaray.recipe.study import Study
from deltaray.score.identity import scorer_identity
from deltaray.train.definition import run_definitions, student_definitions

DATE = "date"
"""The definition that holds the day which chat templates take for today."""


def definitions(study: Study) -> dict[str, dict[str, Any]]:
    """What each artifact is made from; the store refuses to mix two definitions under one name."""
    recipe = study.recipe
    return {
        "study": {"name": recipe.name},
        DATE: {"date": recipe.date},
        Store.prompts: _extensions_identity(study),
        **{Store.responses(name): generation_identity(teacher) for name, teacher in study.teachers.items()},
        **{f"scores/scorer={name}": scorer_identity(scorer) for name, scorer in study.scorers.items()},
        **student_definitions(study),
        **pairing_definitions(study),
        **run_definitions(study),
        **task_definitions(study),
    }


def _extensions_identity(study: Study) -> dict[str, Any]:
    """What decides which conversations the teachers answer."""
    section = study.extensions
    if section is None:
        return {"extensions": None}
    students = list(study.students.values())
    plain = section.model_dump(mode="json", exclude={"by"})
    return {"extensions": {**plain, "by": generation_identity(section.by), "student": model_identity(students[0])}}
