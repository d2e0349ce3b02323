"""What decides the pairs of a pairing."""

from typing import Any

from deltaray.recipe.study import Study


def pairing_definitions(study: Study) -> dict[str, dict[str, Any]]:
    """The section of every pairing and the student that it is for, by the name of its pairs."""
    return {
        f"pairs/pairing={name}": pairing.model_dump(mode="json") | {"student": study.student_of(name)}
        for name, pairing in study.pairings.items()
    }
