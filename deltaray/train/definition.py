"""What decides the students: the models that training starts from, and the settings of its runs."""

from typing import Any

from deltaray.generate.fingerprint import model_identity
from deltaray.recipe.study import Study


def student_definitions(study: Study) -> dict[str, dict[str, Any]]:
    """The untouched students, and the type in which their reference log-probabilities are computed."""
    found: dict[str, dict[str, Any]] = {}
    for name, student in study.students.items():
        found[f"students/{name}"] = {**model_identity(student), "max_length": student.max_length}
        found[f"students/{name}"] |= {"quantize": student.quantize} if student.quantize else {}
        if study.recipe.training:
            found[f"references/student={name}"] = {"dtype": study.recipe.training.dtype}
    return found


def run_definitions(study: Study) -> dict[str, dict[str, Any]]:
    """The settings of every training run."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in study.runs.items():
        assert study.recipe.training is not None
        common = {"dtype": study.recipe.training.dtype, "heldout": study.recipe.training.heldout}
        settings = run.settings.model_dump(mode="json")
        found[f"training/{name}"] = {**settings, "student": run.student, "pairing": " + ".join(run.pairings), **common}
    return found
