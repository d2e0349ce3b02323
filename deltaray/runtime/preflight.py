"""Everything that can be refused before a process is started or a file is written."""

import hashlib
from pathlib import Path
from typing import Any

from deltaray.chat import load_tokenizer
from deltaray.errors import UserError
from deltaray.prompts import PromptRow, is_hub_dataset, read_prompts
from deltaray.recipe.models import Model
from deltaray.recipe.study import Study, base_name

HUB_TIMEOUT = 20.0
"""Seconds."""
SAMPLED_BYTES = 1 << 20
"""How much of a weight file's beginning and end goes into its fingerprint."""


def check_inputs(study: Study) -> list[PromptRow]:
    """Reads all prompts and looks at all models; returns the prompts.

    Raises:
        UserError: the first mistake found, with file, key or row and the mend.
    """
    prompts = study_prompts(study)
    if study.recipe.evaluation:
        check_tasks(study)
    for key, model in models_of(study):
        check_model(model, key)
    return prompts


def check_local_inputs(study: Study) -> int | None:
    """The same for what lies on this machine; what is on a hub is looked at when it runs.

    Returns:
        the number of prompts; None if they are on a hub.
    """
    hub = is_hub_dataset(study.recipe.prompts.path)
    prompts = None if hub else len(study_prompts(study))
    if study.recipe.evaluation:
        check_tasks(study)
    for key, model in models_of(study):
        if model.is_local:
            check_model(model, key)
    return prompts


def study_prompts(study: Study) -> list[PromptRow]:
    prompts = study.recipe.prompts
    return read_prompts(prompts.path, "prompts.path", prompts.limit, prompts.duplicates == "drop")


def models_of(study: Study) -> list[tuple[str, Model]]:
    """All models of a study with the recipe's key that names them."""
    teachers: list[tuple[str, Model]] = [(f"teachers.{base_name(name)}", it) for name, it in study.teachers.items()]
    return [*teachers, *(("student", student) for student in study.students.values())]


def check_tasks(study: Study) -> None:
    """Every task can be read, has answers, and the selection shares no prompt with what is reported."""
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    prompts: dict[str, dict[str, str]] = {"tasks": {}, "selection": {}}
    for section, tasks in (("tasks", evaluation.tasks), ("selection", evaluation.selection)):
        for name, task in tasks.items():
            key = f"evaluation.{section}.{name}.path"
            rows = read_prompts(task.path, key, task.limit)
            unanswered = next((row for row in rows if row["answer"] is None), None)
            if unanswered is not None:
                raise UserError(f"{key}: {task.path}: prompt {unanswered['prompt_id']} has no `answer` to compare with")
            prompts[section] |= {str(row["messages"]): name for row in rows}
    shared = prompts["tasks"].keys() & prompts["selection"].keys()
    if shared:
        first = min(shared)
        raise UserError(
            f"evaluation.selection.{prompts['selection'][first]}: shares {len(shared)} prompts with evaluation.tasks."
            f"{prompts['tasks'][first]}; choose the grid's best on prompts that are not reported"
        )


def check_model(model: Model, key: str) -> None:
    """The model's folder is there and its tokenizer has a chat template."""
    if model.is_local and not Path(model.model).is_dir():
        raise UserError(
            f"{key}.model: there is no folder {model.model}; give a Hugging Face model folder or a hub id (owner/name)"
        )
    if model.is_local and not (Path(model.model) / "config.json").is_file():
        raise UserError(f"{key}.model: {model.model} holds no config.json; give a Hugging Face model folder")
    if not model.is_local:
        _find_on_hub(model, key)
    load_tokenizer(model, key)


def _find_on_hub(model: Model, key: str) -> None:
    """One quick question, where loading would retry for most of a minute; what is in the local cache needs none."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model.model, "config.json", revision=model.revision), str):
        return
    try:
        HfApi().model_info(model.model, revision=model.revision, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's and the network's errors are many; all mean that it cannot be had here
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{key}.model: there is no folder {model.model} here, and the hub does not give it: {reason}; correct the "
            "path or the id, or log in"
        ) from None


def definitions(study: Study) -> dict[str, dict[str, Any]]:
    """What each artifact is made from; the store refuses to mix two definitions under one name."""
    recipe = study.recipe
    found: dict[str, dict[str, Any]] = {"study": {"name": recipe.name}}
    for name, teacher in study.teachers.items():
        engine = {"dtype": teacher.engine.dtype, "max_model_len": teacher.engine.max_model_len}
        found[f"responses/teacher={name}"] = {**_model(teacher), **teacher.sampling.model_dump(mode="json"), **engine}
    for name, scorer in recipe.scorers.items():
        found[f"scores/scorer={name}"] = scorer.model_dump(mode="json")
    for name, student in study.students.items():
        found[f"students/{name}"] = {**_model(student), "max_length": student.max_length}
    for name, pairing in study.pairings.items():
        found[f"pairs/pairing={name}"] = pairing.model_dump(mode="json") | {"student": study.student_of(name)}
    for name, run in study.runs.items():
        dtype = recipe.training.dtype if recipe.training else None
        settings = run.settings.model_dump(mode="json")
        found[f"training/{name}"] = {**settings, "student": run.student, "pairing": run.pairing, "dtype": dtype}
    for section in ("tasks", "selection"):
        for name, task in getattr(recipe.evaluation, section, {}).items():
            found[f"evaluation/task={name}"] = task.model_dump(mode="json", exclude={"path", "limit"})
    return found


def _model(model: Model) -> dict[str, Any]:
    described = model.model_dump(mode="json", include=set(Model.model_fields))
    if model.is_local:  # what it is counts, not where it lies
        described["model"] = fingerprint(Path(model.model))
    return described


def fingerprint(folder: Path) -> str:
    """Tells two versions of a local model apart without reading all its weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name != "config.json" and file.suffix not in (".safetensors", ".jinja"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as source:
            digest.update(source.read(SAMPLED_BYTES))
            source.seek(max(0, size - SAMPLED_BYTES))
            digest.update(source.read())
    return digest.hexdigest()[:16]


def check_study_folder(out: Path) -> None:
    """UserError unless `out` is what a study has written."""
    if not (out / "recipe.yaml").is_file():
        raise UserError(f"{out}: is no output folder of deltaray (there is no recipe.yaml in it)")
