"""Which deltas a merge is made of: their adapters' scores on the selection tasks rank them."""

from collections.abc import Mapping

from deltaray.data.store import Store
from deltaray.evaluate.results import evaluation_of
from deltaray.recipe.study import AdapterMerge, Study


def validation_scores(study: Study, store: Store) -> dict[str, float]:
    """Each delta's mean over the selection tasks; all of them must have answered."""
    evaluation = study.recipe.evaluation
    assert evaluation is not None
    return {name: evaluation_of(store, name, name, evaluation.selection)["mean"] for name in study.deltas()}


def ranked(deltas: tuple[str, ...], scores: Mapping[str, float]) -> list[str]:
    """The best first; of equals the one that the recipe names first."""
    return sorted(deltas, key=lambda delta: -scores[delta])


def merged_deltas(merge: AdapterMerge, scores: Mapping[str, float]) -> list[str]:
    """The runs whose adapters are merged; the first is GAM's reference (the paper's rule, section 3.2)."""
    return ranked(merge.deltas, scores)[: merge.count]
