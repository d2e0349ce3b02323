"""The recipe: one YAML file describes a study."""

from deltaray.recipe.expand import expand
from deltaray.recipe.load import dump_recipe, load_recipe
from deltaray.recipe.recipe import Recipe
from deltaray.recipe.shipped import recipe_folder, shipped_recipe
from deltaray.recipe.study import Study

__all__ = ["Recipe", "Study", "dump_recipe", "expand", "load_recipe", "recipe_folder", "shipped_recipe"]
