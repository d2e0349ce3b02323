"""Tasks of one's own: what scores their answers, and each prompt's value from the scores that are stored."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from deltaray.data.contracts import RESPONSES, SCORES
from deltaray.data.store import Store, numbers_of
from deltaray.errors import StageError
from deltaray.evaluate.statistics import mean_and_stderr, pass_at_k
from deltaray.recipe.evaluation import Task
from deltaray.recipe.scorers import Judge, Scorer, scorer_name, scorer_part
from deltaray.recipe.study import Study
from deltaray.score.files import Scoring, Unit, missing_units
from deltaray.score.registry import section_of

DEFAULT_METRIC = "exact_match"
ROWS = ["prompt_id", "sample"]


def task_scorer(study: Study, task: Task) -> Scorer:
    """The section that scores a task's answers."""
    if task.scorer is not None:
        return study.scorers[scorer_name(task.scorer)]
    scorer: Scorer = section_of({"kind": task.metric or DEFAULT_METRIC})
    return scorer


def metric_name(task: Task) -> str:
    """What a task's value is."""
    return f"pass@{task.k[0]}" if task.k else task.scorer or task.metric or DEFAULT_METRIC


def unscored_answers(study: Study, store: Store, model: str, name: str, task: Task) -> list[Unit]:
    """One unit per file of a model's answers to a task that is not scored yet."""
    return missing_units(store, _scoring(study, model, name, task))


def _scoring(study: Study, model: str, name: str, task: Task) -> Scoring:
    """A failed answer is scored for its empty text: a model that has unlearnt to speak is wrong, not absent."""
    spec = task_scorer(study, task)
    against = spec.against and _same_seed(study, spec.against, model) if isinstance(spec, Judge) else None
    return Scoring(
        scorer=scorer_name(task.scorer) if task.scorer else metric_name(task),
        spec=spec.model_dump(mode="json") | ({"against": against} if against else {}),
        teacher=model,
        prompts=Store.evaluation_prompts(name),
        responses=Store.evaluation_responses(model, name),
        destination=Store.evaluation_scores(model, name),
        questions=Store.evaluation_questions(model, name),
        judgements=Store.evaluation_judgements(model, name),
        others=Store.evaluation_responses(against, name) if against and against != model else None,
        failed=True,
    )


def _same_seed(study: Study, name: str, model: str) -> str:
    """Who `name` is at the seed of another model."""
    seeds = {it.seed for it in study.evaluated.values() if it.name == model} or {
        seed for seed in study.recipe.seeds if model.endswith(f"-seed{seed}")
    }
    at_seed = (it.name for it in study.evaluated.values() if it.base == name and it.seed in seeds)
    return next(at_seed, name)


def values_by_prompt(store: Store, model: str, name: str, task: Task) -> dict[str, float]:
    """Each prompt's value: the mean over its samples' scores, or pass@k; prompts without a score are left out."""
    return _values(_scores(store, model, name, task), task.k[0] if task.k else None)


def _values(scores: dict[str, list[float]], k: int | None) -> dict[str, float]:
    if k is None:
        return {prompt: float(np.mean(of)) for prompt, of in scores.items()}
    return {prompt: pass_at_k(sum(score >= 1 for score in of), len(of), k) for prompt, of in scores.items()}


def _scores(store: Store, model: str, name: str, task: Task) -> dict[str, list[float]]:
    """The scores of every prompt's samples, prompts sorted."""
    part = scorer_part(task.scorer or "")
    columns = [*ROWS, "parts" if part else "score"]
    found: dict[str, list[float]] = defaultdict(list)
    for row in store.read_tables(Store.evaluation_scores(model, name), SCORES, columns).to_pylist():
        value = numbers_of(row["parts"]).get(part) if part else row["score"]
        if value is not None:
            found[row["prompt_id"]].append(value)
    least = max(task.k, default=1)
    return {prompt: of for prompt, of in sorted(found.items()) if len(of) >= least}


def task_result(store: Store, model: str, name: str, task: Task) -> dict[str, Any]:
    """A task's entry in `evaluation/<name>.json`: its value, and what became of the answers.

    Raises:
        StageError: no answer has a score.
    """
    scores, answers = _scores(store, model, name, task), _answers(store, model, name)
    if not scores:
        raise StageError(
            f"{model} on {name}: none of its {answers['total']:,} answers has a score ({answers['notes']}); fix the "
            "scorer, or leave the task out"
        )
    value, stderr = mean_and_stderr(np.array(list(_values(scores, task.k[0] if task.k else None).values())))
    result = {"metric": metric_name(task), "value": value, "stderr": stderr, "n": len(scores)}
    if task.k:
        at = {k: mean_and_stderr(np.array(list(_values(scores, k).values()))) for k in task.k}
        result["pass_at_k"] = {str(k): {"value": value, "stderr": stderr} for k, (value, stderr) in at.items()}
    return result | {"answers": answers}


def _answers(store: Store, model: str, name: str) -> dict[str, Any]:
    """How many answers there are, failed, were cut at max_tokens or have no score, and what the scorer noted."""
    columns = [*ROWS, "finish_reason", "error"]
    answers = store.read_tables(Store.evaluation_responses(model, name), RESPONSES, columns).to_pylist()
    scores = store.read_tables(Store.evaluation_scores(model, name), SCORES, [*ROWS, "score", "note"]).to_pylist()
    notes = Counter(row["note"].partition(":")[0] for row in scores if row["note"])
    return {
        "total": len(answers),
        "failed": sum(row["error"] is not None for row in answers),
        "cut": sum(row["finish_reason"] == "length" for row in answers),
        "unscored": sum(row["score"] is None for row in scores),
        "notes": dict(notes.most_common()),
    }
