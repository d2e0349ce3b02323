"""Everything that can be refused before a process is started or a file is written."""

from importlib.util import find_spec
from typing import Literal

from deltaray.data.prompts import PromptSource, check_source, is_hub_dataset, refuse_changed_prompts
from deltaray.data.prompts.formats import Say, silent
from deltaray.data.prompts.preferences import check_preferences
from deltaray.data.prompts.read import read_prompts
from deltaray.data.prompts.view import View
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.evaluate.check import check_answers, check_harness, check_search
from deltaray.evaluate.tasks import task_sources
from deltaray.recipe.models import Model
from deltaray.recipe.scorers import Judge, RewardModel
from deltaray.recipe.study import Study, base_name
from deltaray.study.check_models import check_model, is_served


def check_inputs(study: Study, store: Store, say: Say = silent) -> None:
    """Reads all prompts, compares them with those in the store, and looks at all models.

    `say` is told what the user should know of the prompts.

    Raises:
        UserError: the first mistake found, with file, key or row and the fix.
    """
    _check_prompts(study, store, say)
    check_tasks(study, store, say=say)
    check_harness(study)
    check_search(study)
    check_deltas(study)
    check_models(study)
    _check_adapters(study)
    if any(student.quantize for student in study.students.values()) and find_spec("bitsandbytes") is None:
        raise UserError("student.quantize: needs bitsandbytes: `pip install deltaray[qlora]`")


def check_deltas(study: Study) -> None:
    """The packages that scorers and filters need are there, and so are the benchmark files."""
    from deltaray.pair.filters import text_filter
    from deltaray.score.registry import SCORERS

    for scorer in study.scorers.values():
        if scorer.kind in SCORERS:
            SCORERS[scorer.kind](scorer)
    for name, pairing in study.pairings.items():
        for place, item in enumerate(pairing.filters):
            text_filter(item)
            for path in getattr(item, "paths", []):
                next(read_prompts(path, f"pairings.{base_name(name)}.filters.{place}.paths", 1))


def _check_prompts(study: Study, store: Store, say: Say) -> int:
    given = study.recipe.preferences
    if given:
        return check_preferences(store, given, say)
    return check_source(store, prompt_source(study), prompt_folder(study), say)


def check_local_inputs(study: Study, store: Store, say: Say = silent) -> int | None:
    """The same for what lies on this machine; what is on a hub is looked at when it runs.

    Returns:
        the number of prompts; None if they are on a hub.
    """
    asked = study.recipe.preferences or study.recipe.prompts
    prompts = None if asked is None or is_hub_dataset(asked.path) else _check_prompts(study, store, say)
    check_tasks(study, store, on_hub=False, say=say)
    check_harness(study)
    check_search(study)
    check_models(study, on_hub=False)
    _check_adapters(study, on_hub=False)
    return prompts


def check_models(study: Study, on_hub: bool = True) -> None:
    """All models of a study; `on_hub`: also those that are on a hub.

    Raises:
        UserError: the first mistake of every model, each with its key.
    """
    saved = _saved(study)
    wrong: list[str] = []
    for key, model in models_of(study):
        if on_hub or model.is_local or is_served(model):
            try:
                check_model(model, key, saved.get(id(model)))
            except UserError as error:
                wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))


def _saved(study: Study) -> dict[int, Literal["model", "adapter"]]:
    """What training saves of each student, by the student's id(): a whole model takes more along than an adapter."""
    saved: dict[int, Literal["model", "adapter"]] = {}
    settings = [(run.student, run.settings.lora is None) for run in study.runs.values()]
    if tried := study.recipe.exploration:
        whole = None in (tried.space.lora or [tried.run.lora])
        settings += [(name, whole) for name in study.students]
    for name, whole in sorted(settings, key=lambda item: item[1]):
        saved[id(study.students[name])] = "model" if whole else "adapter"
    return saved


def prompt_source(study: Study) -> PromptSource:
    """The study's prompts, where they do not come from a preference data set."""
    prompts = study.recipe.prompts
    assert prompts is not None
    drop = prompts.duplicates == "drop"
    return PromptSource(prompts.path, "prompts.path", prompts.limit, drop, View.of(prompts))


def prompt_folder(study: Study) -> str:
    """Where the user's prompts are stored: as what the teachers answer, or as what extensions are drawn from."""
    return Store.prompts if study.extensions is None else Store.origins


def models_of(study: Study) -> list[tuple[str, Model]]:
    """All models of a study with the recipe's key that names them."""
    teachers: list[tuple[str, Model]] = [(f"teachers.{base_name(name)}", it) for name, it in study.teachers.items()]
    scorers: list[tuple[str, Model]] = []
    for name, scorer in study.scorers.items():
        scorers += [(f"scorers.{name}.by", scorer.by)] if isinstance(scorer, Judge) else []
        scorers += [(f"scorers.{name}", scorer)] if isinstance(scorer, RewardModel) else []
    writers = [("extensions.by", study.extensions.by)] if study.extensions else []
    return [*teachers, *writers, *scorers, *(("student", student) for student in study.students.values())]


def check_tasks(study: Study, store: Store, on_hub: bool = True, say: Say = silent) -> None:
    """Every task can be read, has answers, is what the store has, and the selection shares no prompt with the rest.

    `on_hub`: also those that are on a hub.
    """
    prompts: dict[str, dict[str, str]] = {"tasks": {}, "selection": {}}
    sources = {name: it for name, it in task_sources(study).items() if on_hub or not is_hub_dataset(it.path)}
    for name, source in sources.items():
        rows = list(source.rows(say))
        check_answers(study, name, source, rows)
        refuse_changed_prompts(store, rows, Store.evaluation_prompts(name))
        prompts[source.key.split(".")[1]] |= {str(row["messages"]): name for row in rows}
    shared = prompts["tasks"].keys() & prompts["selection"].keys()
    if shared:
        first = min(shared)
        raise UserError(
            f"evaluation.selection.{prompts['selection'][first]}: shares {len(shared)} prompts with evaluation.tasks."
            f"{prompts['tasks'][first]}; choose the grid's best on prompts that are not reported"
        )


def _check_adapters(study: Study, on_hub: bool = True) -> None:
    if any(run.settings.lora for run in study.runs.values()):
        from deltaray.train.check import check_adapters

        check_adapters(study, on_hub)
