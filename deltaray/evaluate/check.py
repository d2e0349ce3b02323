"""What can be refused of an evaluation before it starts: answers that are missing, tasks that do not exist."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from deltaray.data.prompts import PromptRow, PromptSource
from deltaray.data.prompts.formats import open_rows, place
from deltaray.errors import UserError
from deltaray.evaluate.local import task_scorer
from deltaray.generate.search.corpus import check_corpus
from deltaray.recipe.check_pairing import unknown
from deltaray.recipe.study import Study
from deltaray.recipe.suites import suite_tasks
from deltaray.score.registry import SCORERS
from deltaray.score.response import Response, scored

KEY = "evaluation.harness"
COMPARING = ("exact_match", "numeric", "token_f1", "multiple_choice", "refusal", "python_tests", "ifeval")
"""Scorers that need an answer."""
RUNNING = ("python_tests",)
"""Those of them that are too slow to be tried out on every prompt."""


def check_answers(study: Study, task: str, source: PromptSource, rows: Sequence[PromptRow]) -> None:
    """Every prompt of a task has an answer that its scorer can compare with.

    Raises:
        UserError: names the file and the row (its line where the format has lines).
    """
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    spec = task_scorer(study, {**evaluation.tasks, **evaluation.selection}[task])
    if spec.kind not in COMPARING:
        return
    function = SCORERS[spec.kind](spec)
    for number, row in enumerate(rows):
        messages = [dict(turn) for turn in row["messages"]]
        found = None if row["answer"] is None else Response("", "", row["answer"], messages)
        note = "it has no `answer`" if found is None else None
        if found is not None and spec.kind not in RUNNING:
            score = scored(function, found)
            note = score.note or "no score" if score.value is None else None
        if note is not None:
            raise UserError(f"{_place(source, number)}: {source.key}: {note}; {spec.kind} compares with one")


def _place(source: PromptSource, number: int) -> str:
    """Where a prompt is, whatever stands between the rows of its file."""
    rows = open_rows(source.path, source.key, source.view.wanted, source.view)
    return place(source.path, next(islice((line for line, _ in rows), number, None), number + 1))


def check_search(study: Study) -> None:
    """The corpus that tasks search can be read.

    Raises:
        UserError: names the file, the row or the package that is missing.
    """
    evaluation = study.recipe.evaluation
    if evaluation is not None and evaluation.search is not None and evaluation.search.corpus is not None:
        check_corpus(evaluation.search.corpus)


def check_harness(study: Study) -> None:
    """Every task that the recipe names itself exists, and what runs models' code has consent.

    Raises:
        UserError: names the key and the nearest name.
    """
    evaluation = study.recipe.evaluation
    if evaluation is None or evaluation.harness is None or not evaluation.harness_tasks:
        return
    harness = evaluation.harness
    if find_spec("lm_eval") is None:
        raise UserError(f"{KEY}: needs lm-evaluation-harness: `pip install deltaray[harness]`")
    for folder in harness.include:
        if not Path(folder).expanduser().is_dir():
            raise UserError(f"{KEY}.include: there is no folder {folder}; name one with YAML tasks")
    for name, spec in evaluation.harness_tasks.items():
        if spec.task not in suite_tasks():
            _check_task(name, str(spec.task), tuple(harness.include), harness.unsafe_code)


def _check_task(name: str, task: str, include: tuple[str, ...], unsafe_code: bool) -> None:
    from deltaray.evaluate.harness_tasks import task_manager

    index = task_manager(include, task).task_index
    if task not in index:
        raise UserError(f"{KEY}.tasks.{name}: {unknown('task of lm-evaluation-harness', task, index)}")
    if json.dumps(index[task].cfg or {}, default=str).find('"unsafe_code": true') >= 0 and not unsafe_code:
        raise UserError(
            f"{KEY}.tasks.{name}: {task} runs what the models write, with your rights and without our sandbox; consent "
            f"with {KEY}.unsafe_code: true, or leave it out"
        )
