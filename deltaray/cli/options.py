"""What the verbs share: the application, the arguments that many of them take, the way to a study."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltaray.study.pipeline import Pipeline

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Delta learning on Ray."
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The study's YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Overrides a key of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed", help="Also tries again what failed earlier: responses, scores, trials."),
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="A study's output: a folder, or s3://… and the like.")]


def pipeline_of(context: typer.Context, recipe: Path, overrides: list[str], retry_failed: bool = False) -> "Pipeline":
    """The study of a recipe with its overrides, on this command's terminal.

    Raises:
        UserError: the recipe cannot be what it is.
    """
    from deltaray.recipe import load_recipe
    from deltaray.study.pipeline import Pipeline

    return Pipeline(load_recipe(recipe, overrides), context.obj, retry_failed)
