"""The command line: a thin layer over `Pipeline`, with the exit codes that scripts rely on."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from typer.exceptions import TyperException

from deltaray.errors import StageError, UserError
from deltaray.runtime.terminal import Terminal

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Delta learning on Ray."
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The study's YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Overrides a key of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="A study's output: a folder, or s3://… and the like.")]

INTERRUPTED = 130
MIN_CALIBRATED = 8
"""Prompts: fewer tell nothing about a spread."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: runs a command and turns failures into one message and an exit code.

    Args:
        arguments: the verb and what follows it; None: the process's own.
    """
    _quiet_libraries()
    signal.signal(signal.SIGTERM, _interrupt)
    terminal = Terminal()
    try:
        code = app(arguments, standalone_mode=False, obj=terminal) or 0
    except (UserError, StageError) as error:
        terminal.say(f"error: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except TyperException as error:
        terminal.say(f"error: {error.format_message()}")
        code = 2
    if code == INTERRUPTED:
        terminal.say("interrupted; what is committed is safe: run the same command again to resume")
    _exit(terminal, code)


def _exit(terminal: Terminal, code: int) -> NoReturn:
    """After a failure at once: threads of the stage may still speak to Ray, whose processes end with this one.

    Shutting Ray down under such a thread ends the whole process from inside Ray with code 1 and no message.
    """
    ray = sys.modules.get("ray")
    if code == 0 or ray is None or not ray.is_initialized():
        sys.exit(code)
    terminal.out.file.flush()
    terminal.err.file.flush()
    os._exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Asks the libraries that we import for silence; what they still say while a stage runs goes to its log."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)


def _pipeline(context: typer.Context, recipe: Path, overrides: list[str], retry_failed: bool = False) -> Any:
    from deltaray.pipeline import Pipeline
    from deltaray.recipe import load_recipe

    return Pipeline(load_recipe(recipe, overrides), context.obj, retry_failed)


@app.command()
def demo(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: each makes its own family of models.")] = 1,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """The miniature study end to end: models, pairs, students, evaluation, report."""
    from deltaray.recipe import shipped_recipe

    several = [f"seeds={list(range(seeds))}", f"out=runs/miniature-{seeds}-seeds"] if seeds > 1 else []
    run(context, shipped_recipe("miniature"), [*several, *overrides])


@app.command()
def run(context: typer.Context, recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
    """All stages that the recipe names, in order."""
    pipeline = _pipeline(context, recipe, overrides)
    pipeline.run()
    _conclude(context.obj, pipeline)


def _conclude(terminal: Terminal, pipeline: Any) -> None:
    """The result table and where the report is."""
    from deltaray.aggregate.table import aggregation_table, order_lines
    from deltaray.evaluate.results import evaluations
    from deltaray.evaluate.table import answers_text, claims_text, result_table

    if pipeline.store.exists("evaluation/summary.json"):
        summary = pipeline.store.read_json("evaluation/summary.json")
        terminal.out.print(result_table(summary))
        for line in (*claims_text(summary), *answers_text(evaluations(pipeline.study, pipeline.store))):
            terminal.result(line)
        for name, why in summary["missing"].items():
            terminal.result(f"not evaluated: {name}: {why}")
        if found := summary.get("aggregation"):
            terminal.out.print(aggregation_table(found, summary["tasks"]))
            for line in order_lines(found):
                terminal.result(line)
    if pipeline.store.exists("report.html"):
        terminal.result(f"report: {pipeline.store.address('report.html')}")


def _stage_command(stage: str, help_text: str) -> None:
    def command(context: typer.Context, recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006
        _pipeline(context, recipe, overrides).run([stage])

    app.command(stage, help=help_text)(command)


@app.command()
def generate(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the responses again that failed in earlier runs.")
    ] = False,
) -> None:
    """Teacher responses."""
    _pipeline(context, recipe, overrides, retry_failed).run(["generate"])


@app.command()
def score(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask judges again what they failed to answer in earlier runs.")
    ] = False,
) -> None:
    """Scores of all responses, and how far the scorers agree."""
    from deltaray.score.compare import agreement_tables, read_agreement

    pipeline = _pipeline(context, recipe, overrides, retry_failed)
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

    pipeline = _pipeline(context, recipe, overrides)
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
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also tries the trials again that failed in earlier runs.")
    ] = False,
) -> None:
    """The exploration: trials over pairings, deltas and training settings, and the delta landscape."""
    from deltaray.tune.table import best_line, trial_table

    pipeline = _pipeline(context, recipe, overrides, retry_failed)
    evaluated = ["evaluate"] if pipeline.recipe.evaluation else []
    pipeline.run(["generate", *evaluated, "tune", "report"])
    context.obj.out.print(trial_table(pipeline.store))
    context.obj.result(pipeline.store.read_json("tuning/landscape.json")["summary"])
    context.obj.result(best_line(pipeline.store))
    context.obj.result(f"report: {pipeline.store.address('report.html')}")


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
    from deltaray.calibrate.run import calibrate as run_calibration
    from deltaray.calibrate.run import latest_prediction
    from deltaray.calibrate.table import calibration_json, calibration_table, prediction_lines
    from deltaray.evaluate.suites import missing_in
    from deltaray.plan import plan_json
    from deltaray.runtime.cluster_file import fits, fits_json, fits_table, read_cluster_file, refuse_never
    from deltaray.runtime.demands import largest

    pipeline = _pipeline(context, recipe, overrides)
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
    table = Table(title=f"{pipeline.recipe.name} -> {pipeline.store.out}", title_justify="left")
    for column in ("stage", "what", "done", "of", "unit", "where"):
        table.add_column(column, justify="right" if column in ("done", "of") else "left")
    for item in items:
        total = "?" if item.total is None else f"{item.total:,}"
        table.add_row(item.stage, item.name, f"{item.done:,}", total, item.unit, item.where)
    context.obj.out.print(table)
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
    from deltaray.merge.asked import Merge
    from deltaray.merge.command import merge_command, parse_options, recipe_among

    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    recipe = recipe_among(adapters, given)
    if recipe is not None:
        return _pipeline(context, recipe, overrides).run(["merge"])
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
    from deltaray.theory.command import theory_command
    from deltaray.theory.experiment import Asked
    from deltaray.theory.setting import Setting

    overlaps = (chosen_overlap, rejected_overlap, teacher_overlap)
    setting = Setting(dimension, student, chosen, rejected, *overlaps, batch)
    theory_command(context.obj, Asked(setting, draws, steps, step_size, seed), out, as_json)


@app.command()
def submit(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The study's YAML file.")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The job server, http://HEAD:8265; or RAY_API_SERVER_ADDRESS.")
    ] = None,
    verb: Annotated[str, typer.Option(metavar="VERB", help="What the job does.")] = "run",
    overrides: Overrides = [],  # noqa: B006
    variables: Annotated[
        list[str], typer.Option("--env", metavar="NAME", help="A variable that the job gets from here; repeatable.")
    ] = [],  # noqa: B006
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="As with generate and score.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow; the same command does so later.")] = False,
    list_jobs: Annotated[bool, typer.Option("--list", help="Shows all jobs of the cluster.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stops a job; submitting again resumes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs a verb as a Ray job on a remote cluster and follows its log. Submitted again, it resumes."""
    from deltaray.submit.command import asked_job, list_command, stop_command, submit_command

    if list_jobs:
        return list_command(context.obj, address, as_json)
    if stop is not None:
        return stop_command(context.obj, address, stop)
    submit_command(context.obj, asked_job(recipe, verb, overrides, retry_failed, variables), address, detach)


@app.command()
def status(context: typer.Context, out: Out, as_json: AsJson = False) -> None:
    """How far a study is, with throughput and time left."""
    from deltaray.status import study_status

    study_status(out, context.obj, as_json)


@app.command()
def report(context: typer.Context, out: Out) -> None:
    """Writes the HTML report of a study from what its folder holds."""
    from deltaray.report import write_report
    from deltaray.status import open_study

    context.obj.result(write_report(open_study(out)))


if __name__ == "__main__":
    main()
