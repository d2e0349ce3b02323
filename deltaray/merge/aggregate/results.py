"""The table of the paper: student, single deltas, other runs and every merge, each against student and best delta."""

from typing import Any

from deltaray.data.store import Store
from deltaray.evaluate.compare import compare, names_by_seed
from deltaray.evaluate.results import over_seeds
from deltaray.evaluate.values import TaskValues
from deltaray.merge.aggregate.ranking import ranked, validation_scores
from deltaray.recipe.study import Study


def aggregation(study: Study, store: Store, results: dict[str, Any]) -> dict[str, Any] | None:
    """The rows of the table, in the paper's order; None before all singles and merges are evaluated.

    The best single delta is the one that the selection tasks chose, at every seed for itself: no choice is made on the
    tasks that are reported.

    Args:
        results: what `evaluation_of` tells of each model that is evaluated, by name.
    """
    if not {*study.deltas(), *study.merges} <= results.keys():
        return None
    scores = validation_scores(study, store)
    best, values = [order[0] for order in _orders(study, scores)], TaskValues(study, store, results)
    rows = [_row(study, values, name, kind, count, best) for name, kind, count in _models(study, results)]
    merging = study.recipe.merging
    assert merging is not None
    singles = [row for row in rows if row["kind"] == "single"]
    chosen = {"name": "best single", "kind": "chosen", "deltas": 1} | _values(study, values, best, best)
    rows.insert(rows.index(singles[-1]) + 1, chosen)
    return {
        "deltas": list(merging.deltas),
        "order": {str(seed): order for seed, order in zip(study.recipe.seeds, _orders(study, scores), strict=True)},
        "validation": scores,
        "rows": rows,
    }


def _orders(study: Study, scores: dict[str, float]) -> list[list[str]]:
    """At every seed, the deltas from the best on the selection tasks to the worst."""
    by_seed = dict.fromkeys(merge.deltas for merge in study.merges.values())
    return [ranked(deltas, scores) for deltas in by_seed]


def _models(study: Study, results: dict[str, Any]) -> list[tuple[str, str, int | None]]:
    """(name, kind, how many deltas) of every row: student, singles, the other runs, merges."""
    recipe = study.recipe
    assert recipe.merging is not None and recipe.training is not None and recipe.student is not None
    singles = recipe.merging.deltas
    others = [name for name in recipe.training.runs if name not in singles]
    known = [name for name in others if all(at_seed in results for at_seed in names_by_seed(study, name))]
    return [
        (recipe.student.name, "student", 0),
        *((name, "single", 1) for name in singles),
        *((name, "run", None) for name in known),
        *((name, "merge", count) for name, (_, count) in recipe.merging.names().items()),
    ]


def _row(study: Study, values: TaskValues, name: str, kind: str, count: int | None, best: list[str]) -> dict[str, Any]:
    models = names_by_seed(study, name)
    return {"name": name, "kind": kind, "deltas": count} | _values(study, values, models, best)


def _values(study: Study, values: TaskValues, models: list[str], best: list[str]) -> dict[str, Any]:
    """Means with errors, and the differences from the untouched student and the best single delta."""
    assert study.recipe.student is not None
    student = names_by_seed(study, study.recipe.student.name)
    against = {"over_student": student, "over_best": best}
    differences = {key: compare(study, values, models, other) for key, other in against.items()}
    found = over_seeds([values.results[name] for name in dict.fromkeys(models)])
    return found | {key: None if models == against[key] else value for key, value in differences.items()}
