"""The verb that sends the others to a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from deltaray.cli.options import AsJson, Overrides, RetryFailed, app


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
    retry_failed: RetryFailed = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow; the same command does so later.")] = False,
    list_jobs: Annotated[bool, typer.Option("--list", help="Shows all jobs of the cluster.")] = False,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stops a job; submitting again resumes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs a verb as a Ray job on a remote cluster and follows its log. Submitted again, it resumes."""
    from deltaray.cli.submit.command import asked_job, list_command, stop_command, submit_command

    if list_jobs:
        return list_command(context.obj, address, as_json)
    if stop is not None:
        return stop_command(context.obj, address, stop)
    submit_command(context.obj, asked_job(recipe, verb, overrides, retry_failed, variables), address, detach)
