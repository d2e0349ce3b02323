"""The recipes that come with deltaray: `jobs/recipes/` of a checkout, or their copy inside an installed package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def recipe_folder() -> Path:
    checkout = PACKAGE.parent / "jobs" / "recipes"
    return checkout if checkout.is_dir() else PACKAGE / "recipes"


def shipped_recipe(name: str) -> Path:
    return recipe_folder() / f"{name}.yaml"
