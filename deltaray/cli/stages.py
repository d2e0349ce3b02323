"""The verbs that run stages of a study."""

from typing import TYPE_CHECKING, Annotated

import typer

from deltaray.cli.options import Overrides, RecipePath, RetryFailed, app, pipeline_of
from deltaray.runtime.terminal import Terminal

if TYPE_CHECKING:
    from deltaray.study.pipeline import Pipeline


@app.command()
def demo(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: each makes its own family of models.")] = 1,
    real: Annotated[
        bool, typer.Option("--real", help="A real language model (SmolLM2-135M); needs deltaray[real].")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """A small study end to end, in minutes: models, pairs, students, evaluation, report."""
    from deltaray.recipe import shipped_recipe

    name = "real" if real else "miniature"
    several = [f"seeds={list(range(seeds))}", f"out=runs/{name}-{seeds}-seeds"] if seeds > 1 else []
    run(context, shipped_recipe(name), [*several, *overrides])


@app.command()
def run(context: typer.Context, recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """All stages that the recipe names, in order."""
    pipeline = pipeline_of(context, recipe, overrides)
    pipeline.run()
    _conclude(context.obj, pipeline)


def _conclude(terminal: Terminal, pipeline: "Pipeline") -> None:
    """The result table and where the report is."""
    from deltaray.data.shapes import SUMMARY
    from deltaray.evaluate.results import evaluations
    from deltaray.evaluate.table import answers_text, claims_text, result_table
    from deltaray.merge.aggregate.table import aggregation_table, order_lines

    if pipeline.store.exists(pipeline.store.summary):
        summary = pipeline.store.read_json(pipeline.store.summary, SUMMARY)
        terminal.out.print(result_table(summary))
        for line in (*claims_text(summary), *answers_text(evaluations(pipeline.study, pipeline.store))):
            terminal.result(line)
        for name, why in summary["missing"].items():
            terminal.result(f"not evaluated: {name}: {why}")
        if found := summary.get("aggregation"):
            terminal.out.print(aggregation_table(found, summary["tasks"]))
            for line in order_lines(found):
                terminal.result(line)
    if pipeline.store.exists(pipeline.store.report):
        terminal.result(f"report: {pipeline.store.address('report.html')}")


def _stage_command(stage: str, help_text: str) -> None:
    def command(context: typer.Context, recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
        pipeline_of(context, recipe, overrides).run([stage])

    app.command(stage, help=help_text)(command)


@app.command()
def generate(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    retry_failed: RetryFailed = False,
) -> None:
    """Teacher responses."""
    pipeline_of(context, recipe, overrides, retry_failed).run(["generate"])


@app.command()
def score(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    retry_failed: RetryFailed = False,
) -> None:
    """Scores of all responses, and how far the scorers agree."""
    from deltaray.score.compare import agreement_tables, read_agreement

    pipeline = pipeline_of(context, recipe, overrides, retry_failed)
    pipeline.run(["score"])
    for table in agreement_tables(read_agreement(pipeline.store)):
        context.obj.out.print(table)


_stage_command("pair", "Pair shards and the funnel.")
_stage_command("train", "Reference log-probs and the students.")


@app.command()
def evaluate(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Also model A less model B by task."),
    ] = None,
) -> None:
    """Benchmarks of the students and the teachers."""
    from deltaray.evaluate.compare import check_names, compare_two
    from deltaray.evaluate.table import comparison_table

    pipeline = pipeline_of(context, recipe, overrides)
    if compare is not None:
        check_names(pipeline.study, compare)
    pipeline.run(["evaluate"])
    _conclude(context.obj, pipeline)
    if compare is not None:
        context.obj.out.print(comparison_table(*compare, compare_two(pipeline.study, pipeline.store, *compare)))


@app.command()
def tune(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    retry_failed: RetryFailed = False,
) -> None:
    """The exploration: trials over pairings, deltas and training settings, and the delta landscape."""
    from deltaray.tune.table import best_line, trial_table

    pipeline = pipeline_of(context, recipe, overrides, retry_failed)
    evaluated = ["evaluate"] if pipeline.recipe.evaluation else []
    pipeline.run(["generate", *evaluated, "tune", "report"])
    context.obj.out.print(trial_table(pipeline.store))
    context.obj.result(pipeline.store.read_json("tuning/landscape.json", {"summary": str})["summary"])
    context.obj.result(best_line(pipeline.store))
    context.obj.result(f"report: {pipeline.store.address('report.html')}")
