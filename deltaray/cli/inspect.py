"""The verbs that look at a study: what will run, how far it is, what came out."""

from pathlib import Path
from typing import Annotated

import typer

from deltaray.cli.options import AsJson, Out, Overrides, RecipePath, app, pipeline_of

MIN_CALIBRATED = 8
"""Prompts: fewer tell nothing about a spread."""


@app.command()
def plan(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
    calibrate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=MIN_CALIBRATED,
            help="Measures N prompts per teacher first; best twice as many as one engine has in its batch.",
        ),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also what fits on the nodes of this KubeRay or `ray up` file."),
    ] = None,
) -> None:
    """What each stage will run, where, on how much. Starts and writes nothing but to calibrate."""
    from deltaray.recipe.suites import missing_in
    from deltaray.runtime.demands import largest
    from deltaray.study.calibrate.run import calibrate as run_calibration
    from deltaray.study.calibrate.run import latest_prediction
    from deltaray.study.calibrate.table import calibration_json, calibration_table, prediction_lines
    from deltaray.study.cluster_file import read_cluster_file
    from deltaray.study.fits import fits, fits_json, fits_table, refuse_never
    from deltaray.study.plan import plan_json, plan_table

    pipeline = pipeline_of(context, recipe, overrides)
    groups = read_cluster_file(cluster) if cluster else []
    items, capacity = pipeline.plan(largest(groups) if cluster else None)
    found = fits(pipeline.study, groups, str(cluster)) if cluster else []
    if calibrate is not None:
        run_calibration(pipeline.study, pipeline.store, calibrate, context.obj)
    latest = latest_prediction(pipeline.study, pipeline.store, items)
    if as_json:
        more = (calibration_json(*latest) if latest else {}) | (fits_json(found, groups) if cluster else {})
        context.obj.result_json(plan_json(pipeline.study, pipeline.store, items, capacity) | more)
        return refuse_never(found)
    context.obj.out.print(plan_table(items, f"{pipeline.recipe.name} -> {pipeline.store.out}"))
    if pipeline.recipe.miniature and any(item.total is None for item in items[:1]):
        context.obj.result("the miniature family is made first (once, then cached)")
    for name, why in missing_in(pipeline.study.recipe.evaluation).items():
        context.obj.result(f"not evaluated: {name}: {why}")
    context.obj.result(f"cluster: {capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs")
    if latest:
        context.obj.out.print(calibration_table(*latest))
        for line in prediction_lines(*latest):
            context.obj.result(line)
    if cluster:
        context.obj.out.print(fits_table(found, str(cluster)))
        refuse_never(found)


@app.command()
def status(context: typer.Context, out: Out, as_json: AsJson = False) -> None:
    """How far a study is, with throughput and time left."""
    from deltaray.study.status import study_status

    study_status(out, context.obj, as_json)


@app.command()
def report(context: typer.Context, out: Out) -> None:
    """Writes the HTML report of a study from what its folder holds."""
    from deltaray.report import write_report
    from deltaray.study.status import open_study

    context.obj.result(write_report(open_study(out)))
