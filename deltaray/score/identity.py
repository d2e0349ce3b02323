"""What decides the scores of a scorer."""

from typing import Any

from deltaray.generate.fingerprint import generation_identity, model_identity
from deltaray.recipe.scorers import Judge, RewardModel, Scorer


def scorer_identity(scorer: Scorer) -> dict[str, Any]:
    """What decides a scorer's scores: its section, with models by what they are instead of where they lie."""
    if isinstance(scorer, Judge):
        return scorer.model_dump(mode="json", exclude={"by"}) | {"by": generation_identity(scorer.by)}
    if isinstance(scorer, RewardModel):
        speed = {"batch_size", "workers", "cpus", "gpus"}
        return scorer.model_dump(mode="json", exclude=speed) | model_identity(scorer)
    return scorer.model_dump(mode="json")
