"""What `plan` asks about students, in seconds and without their weights."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from deltaray.errors import UserError, first_line
from deltaray.recipe.models import Student
from deltaray.recipe.study import Study
from deltaray.recipe.training import Lora
from deltaray.train.adapter import ALL, targets_of, with_adapter
from deltaray.train.compare import Verdict
from deltaray.train.probe import judge, refusal, why_not
from deltaray.train.small import small_copy


def check_trainable(student: Student, key: str) -> Verdict:
    """How a student is trained, found out on a small copy.

    Raises:
        UserError: transformers cannot load it as a causal language model, or our log-probs would not be its own.
    """
    config = _config(student, key)
    remote = student.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not remote:
        raise UserError(
            f"{key}.model: transformers has no causal language model for the type `{config.model_type}` of "
            f"{student.model}; choose another student" + _own_code(config, student)
        )
    verdict = judge(config, student.trust_remote_code)
    if reason := why_not(verdict, student.max_length):
        raise UserError(f"{key}.model: {refusal(student.model, config, reason)}")
    return verdict


def check_adapters(study: Study, on_hub: bool = True) -> None:
    """The targets of every run's adapter are layers of its student that can have one.

    Args:
        on_hub: look also at students that are on a hub.

    Raises:
        UserError: they are none.
    """
    asked = {
        (run.student, run.settings.lora.model_dump_json()): run for run in study.runs.values() if run.settings.lora
    }
    for run in asked.values():
        student, lora = study.students[run.student], run.settings.lora
        if lora is not None and (on_hub or student.is_local) and (model := _copy(student)) is not None:
            with_adapter(model, lora)


def targets_said(student: Student, lora: Lora) -> str:
    """` on q_proj, …` where the default targets are not all linear layers; a student on a hub is not looked at."""
    model = _copy(student) if lora.targets == ALL and student.is_local else None
    found = ALL if model is None else targets_of(model, lora)
    return "" if found == ALL else f" on {', '.join(found)}"


def _copy(student: Student) -> Any:
    """None where none can be made: what cannot be tried here is tried when it is trained."""
    try:
        return small_copy(_config(student, "student"), student.trust_remote_code)
    except (ValueError, UserError):
        return None


def _config(student: Student, key: str) -> Any:
    options = {"revision": student.revision, "trust_remote_code": student.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(student.model, **options)
    except Exception as error:  # every configuration class raises what it likes
        raise UserError(f"{key}.model: {student.model}: config.json cannot be read: {first_line(error)}") from None


def _own_code(config: Any, student: Student) -> str:
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return (
        ", or set trust_remote_code: true if you trust its code" if has_code and not student.trust_remote_code else ""
    )
