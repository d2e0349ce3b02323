"""The verbs that need no study: merging adapters, and the theory."""

from pathlib import Path
from typing import Annotated

import typer

from deltaray.cli.options import AsJson, Overrides, app, pipeline_of


@app.command()
def merge(
    context: typer.Context,
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER… | RECIPE", help="Folders of PEFT LoRA adapters, or a study.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the merged adapter goes.")] = None,
    overrides: Overrides = [],  # noqa: B006
    method: Annotated[str, typer.Option(help="How (see the README); gam is Geometric Alignment Merging.")] = "gam",
    reference: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="gam: aligns the others to this one; the first.")
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="W,W,…", help="One number per adapter.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Cuts the merged adapter to this rank.")] = None,
    scale: Annotated[float | None, typer.Option(metavar="X", help="Multiplies the merged update.")] = None,
    density: Annotated[float | None, typer.Option(metavar="X", help="TIES, DARE: share of numbers kept.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="DARE: of its random masks.")] = None,
    inner: Annotated[
        str | None, typer.Option(metavar="RULE", help="knots, core-space: mean, ties or dare in their space.")
    ] = None,
    restore_norm: Annotated[bool, typer.Option("--restore-norm", help="gam: at the norm of the plain mean.")] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Averages leave out adapters that do not change a matrix.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Stored in F32, BF16, F16 or F64.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="All are adapters of this model, whatever their files name.")
    ] = None,
    into_base: Annotated[bool, typer.Option("--into-base", help="DIR becomes the base with the merge added.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merges PEFT LoRA adapters of one base into one; with a RECIPE makes all merges of its `merging` section."""
    from deltaray.merge.arguments import Merge
    from deltaray.merge.command import merge_command, parse_options, recipe_among

    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    recipe = recipe_among(adapters, given)
    if recipe is not None:
        return pipeline_of(context, recipe, overrides).run(["merge"])
    assert out is not None
    options = parse_options(weights, rank, scale, density, seed, inner, restore_norm, skip_missing)
    name, stored = method.lower().replace("_", "-"), dtype.upper() if dtype else None
    asked = Merge(adapters, name, options, reference, base, stored, into_base)
    merge_command(context.obj, asked, out, as_json)


@app.command()
def theory(
    context: typer.Context,
    dimension: Annotated[int, typer.Option(help="Of the inputs.")] = 20_000,
    draws: Annotated[int, typer.Option(help="Students and teachers with errors of their own.")] = 50,
    student: Annotated[float, typer.Option(metavar="COSINE", help="The untouched student's to the truth.")] = 0.8,
    chosen: Annotated[float, typer.Option(metavar="COSINE", help="The chosen teacher's to the truth.")] = 0.6,
    rejected: Annotated[float, typer.Option(metavar="COSINE", help="The rejected teacher's to the truth.")] = 0.2,
    chosen_overlap: Annotated[
        float, typer.Option(metavar="COSINE", help="Of the chosen teacher's error to the student's.")
    ] = 0.0,
    rejected_overlap: Annotated[
        float, typer.Option(metavar="COSINE", help="Of the rejected teacher's error to the student's.")
    ] = 0.0,
    teacher_overlap: Annotated[
        float, typer.Option(metavar="COSINE", help="Of the teachers' errors to each other.")
    ] = 0.0,
    batch: Annotated[int, typer.Option(help="Inputs per step.")] = 4096,
    steps: Annotated[int, typer.Option(help="Steps.")] = 200,
    step_size: Annotated[
        float, typer.Option(help="0: the best stopping point without noise lies at a quarter of the steps.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of vectors and inputs.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where theory.json and theory.html go.")] = Path(
        "runs/theory"
    ),
    as_json: AsJson = False,
) -> None:
    """Delta learning where it can be computed: logistic regression, simulated and in closed form."""
    from deltaray.labs.theory.command import theory_command
    from deltaray.labs.theory.experiment import Asked
    from deltaray.labs.theory.setting import Setting

    overlaps = (chosen_overlap, rejected_overlap, teacher_overlap)
    setting = Setting(dimension, student, chosen, rejected, *overlaps, batch)
    theory_command(context.obj, Asked(setting, draws, steps, step_size, seed), out, as_json)
