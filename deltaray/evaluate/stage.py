"""Evaluate: untouched students, trained students and teachers answer the tasks; the best of each grid is chosen.

Models of one architecture share one vLLM engine, whose weights are swapped between their units.
"""

from collections.abc import Callable
from typing import Any

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import check_source, store_source
from deltaray.data.shapes import SUMMARY
from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.evaluate.local import unscored_answers
from deltaray.evaluate.results import evaluation_of, evaluations, summarise
from deltaray.evaluate.select import choose_candidates
from deltaray.evaluate.tasks import task_sources
from deltaray.generate.answer import Work, answer, refuse_failed, work_of
from deltaray.generate.fingerprint import generation_identity, identity_digest
from deltaray.generate.pools import AGAIN, EMPTY, OnRows
from deltaray.generate.search.retrievers import search_identity, searching
from deltaray.generate.stage import responses_table
from deltaray.generate.stream import Spec
from deltaray.generate.units import Assignment
from deltaray.recipe.evaluation import Task
from deltaray.recipe.models import Model, Student, Teacher
from deltaray.recipe.recipe import Failures
from deltaray.recipe.study import Study, TrainingRun
from deltaray.runtime.session import Capacity
from deltaray.score.files import Unit as ScoreUnit
from deltaray.score.stage import refuse_unscored, score_units

Aggregate = Callable[[Study, Store, dict[str, Any]], dict[str, Any] | None]


def store_task_prompts(study: Study, store: Store) -> None:
    """Brings the tasks' prompts into the store."""
    recipe = study.recipe
    for name, source in task_sources(study).items():
        check_source(store, source, Store.evaluation_prompts(name))
        store_source(store, source, recipe.shard_size, recipe.unit_size, Store.evaluation_prompts(name))


def all_tasks(study: Study) -> dict[str, Task]:
    evaluation = study.recipe.evaluation
    return {**evaluation.tasks, **evaluation.selection} if evaluation else {}


def models_to_evaluate(study: Study, store: Store) -> dict[str, tuple[Teacher, list[str]]]:
    """Name -> (model, tasks) of every model that exists by now, the candidates of grids included."""
    evaluation, student = study.recipe.evaluation, study.recipe.student
    assert evaluation is not None
    found: dict[str, tuple[Teacher, list[str]]] = {}
    for evaluated in study.evaluated.values():
        if evaluated.role == "untouched":
            untouched = study.students[evaluated.name]
            found[evaluated.name] = (_answering(untouched), list(evaluation.tasks))
        elif evaluated.role == "teacher":
            found[evaluated.name] = (study.teachers[evaluated.name], list(evaluation.tasks))
    for run in study.runs.values():
        tasks = [*evaluation.tasks, *study.selected_on(run.name)]
        for name in (*run.intermediate_checkpoints.values(), run.name):
            if student and (path := store.trained(name)):
                found[name] = (_trained(study.students[run.student], store.local_folder(path), run), tasks)
    for merge in study.merges.values():
        if path := store.trained(merge.name):
            adapted = _adapted(study.students[merge.student], store.local_folder(path))
            found[merge.name] = (adapted, list(evaluation.tasks))
    return found


def _trained(untouched: Student, folder: str, run: TrainingRun) -> Teacher:
    if run.settings.lora:
        return _adapted(untouched, folder)
    own = {"model": folder, "revision": None, "chat_template": None}
    return _answering(untouched.model_copy(update=own))


def _adapted(untouched: Student, folder: str) -> Teacher:
    return _answering(untouched).model_copy(update={"adapter": folder})


def _answering(student: Student) -> Teacher:
    """A student in the role of one who answers."""
    return Teacher(**student.model_dump(include=set(Model.model_fields)), engine=student.engine)


def evaluation_work(study: Study, store: Store) -> list[Work]:
    """What every model still has to answer in each of its tasks."""
    tasks, searched = all_tasks(study), search_identity(study.recipe)
    return [
        _task_work(study, store, name, model, task, tasks[task], searched if tasks[task].search else {})
        for name, (model, names) in models_to_evaluate(study, store).items()
        for task in names
    ]


def _task_work(
    study: Study, store: Store, name: str, model: Teacher, task: str, spec: Task, searched: dict[str, Any]
) -> Work:
    destination, prompts = Store.evaluation_responses(name, task), Store.evaluation_prompts(task)
    asked = model.model_copy(update={"sampling": spec.sampling})
    identity = identity_digest(generation_identity(asked) | searched)
    size = study.recipe.unit_size
    return work_of(store, Assignment(name, asked, prompts, destination, identity, size, search=spec.search))


def unscored(study: Study, store: Store, works: list[Work] | None = None) -> list[ScoreUnit]:
    """Files of answers that no scorer has looked at; with `works` only those that their answers are in."""
    tasks, wanted = all_tasks(study), works and {work.assignment.destination for work in works}
    return [
        unit
        for name, (_, names) in models_to_evaluate(study, store).items()
        for task in names
        if wanted is None or Store.evaluation_responses(name, task) in wanted
        for unit in unscored_answers(study, store, name, task, tasks[task])
    ]


def answer_tasks(
    study: Study, store: Store, works: list[Work], capacity: Capacity, on_rows: OnRows, say: Callable[[str], None]
) -> None:
    """Completes answers (of `evaluation_work`) and their scores.

    Raises:
        StageError: a model could not be asked, or its answers not be scored, too often (`failures`); the next command
            does that again.
    """
    failures = study.recipe.failures
    if not all(work.finished for work in works):
        anything = Failures(max_share=1)
        answer(store, works, capacity, responses_table, RESPONSES, anything, on_rows, say, _around(study, works))
        refuse_unasked(store, works, failures, say)
    units = unscored(study, store, works)
    # what a judge failed at is asked again: an evaluation knows no `--retry-failed`
    score_units(study, store, units, capacity, on_rows, say, retry_failed=True)
    folders = {f"{it['scorer']} of {it['teacher']}": it["destination"].rpartition("/")[0] for it in units}
    refuse_unscored(store, folders, failures, say, again=True)


def refuse_unasked(store: Store, works: list[Work], failures: Failures, say: Callable[[str], None]) -> None:
    """As `answer.refuse_failed`, of models that are evaluated: no value is reported of one that could not be asked.

    One that has unlearnt to speak is a result, and no failure: an empty answer does not count.
    """

    def counts(error: str) -> bool:
        return not error.startswith(EMPTY)

    for work in works:
        try:
            refuse_failed(store, [work], failures, say, AGAIN, counts)
        except StageError:
            store.delete(store.committed(work.assignment.destination))
            raise


def _around(study: Study, works: list[Work]) -> Callable[[Spec], Spec]:
    """Lets the replicas search where a task that has work left asks for it."""
    evaluation = study.recipe.evaluation
    if evaluation is None or evaluation.search is None or not any(it.units and it.assignment.search for it in works):
        return lambda spec: spec
    return searching(evaluation.search)


def models_for_harness(study: Study, store: Store) -> dict[str, Teacher]:
    """The models that are reported, by name: of a grid its best, under the grid's name."""
    found = {name: model for name, (model, _) in models_to_evaluate(study, store).items() if name in study.evaluated}
    for name in study.evaluated:
        candidates = study.grid(name)
        if candidates and (path := store.trained(name)):
            run = study.runs[candidates[0]]
            found[name] = _trained(study.students[run.student], store.local_folder(path), run)
    return found


def is_concluded(study: Study, store: Store) -> bool:
    """Whether the summary covers every model and claim of the recipe."""
    if study.recipe.evaluation is None or not store.exists(Store.summary):
        return False
    summary = store.read_json(Store.summary, SUMMARY)
    covered = {model.base for model in study.evaluated.values()} <= summary["names"].keys()
    evaluation = study.recipe.evaluation
    record = Store.evaluated
    if not store.exists(record) or store.read_json(record, {"inputs": str})["inputs"] != _inputs(store):
        return False
    return covered and summary["claims"] == evaluation.claims and summary["tasks"] == evaluation.names


def conclude(study: Study, store: Store, aggregate: Aggregate) -> None:
    """Writes every model's evaluation and the summary from the stored scores.

    Args:
        aggregate: makes the table of a study's merges from the evaluations by model.
    """
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    chosen, reported = choose_candidates(study, store), models_for_harness(study, store)
    benchmarked = [name for name, model in reported.items() if model.endpoint is None]
    for name in (*models_to_evaluate(study, store), *chosen):
        harness = evaluation.harness_tasks if name in benchmarked else ()
        choice = chosen.get(name, {})
        if evaluation.tasks or harness:
            result = evaluation_of(store, name, choice.get("selected", name), evaluation.tasks, harness)
            store.write_json(Store.evaluation(name), result | choice)
    summary = summarise(study, store)
    if study.merges:
        summary["aggregation"] = aggregate(study, store, evaluations(study, store))
    store.write_json(Store.summary, summary)
    store.write_json(Store.evaluated, {"inputs": _inputs(store)})


def _inputs(store: Store) -> str:
    """Tells apart what a summary is made from: all answers and their scores."""
    files = [path for kind in ("responses", "scores", "samples") for path in store.listing(f"evaluation/{kind}")]
    return store.digest(dict.fromkeys(path.rpartition("/")[0] for path in files))
