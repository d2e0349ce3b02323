"""`deltaray submit`: sends a verb, follows it, lists and stops jobs."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from deltaray.cli.submit.client import connect, in_our_words
from deltaray.cli.submit.follow import Follower
from deltaray.cli.submit.job import OVER, VERBS, Job, running_job, send
from deltaray.errors import StageError, UserError
from deltaray.recipe import load_recipe
from deltaray.runtime.terminal import Terminal

STOP_SECONDS = 60.0


def submit_command(terminal: Terminal, job: Job, address: str | None, detach: bool) -> None:
    """Starts the job, or finds the one that does the same already, and follows it."""
    client = connect(address)
    with in_our_words(client.get_address()):
        name = running_job(client, job)
        terminal.say(f"job {name} does this already" if name else f"sending `{job.verb}` to {client.get_address()}")
        name = name or send(client, job)
    terminal.result(name)
    if detach:
        terminal.say("the same command follows it, `deltaray submit --list` shows all jobs")
        return
    with in_our_words(client.get_address()):
        try:
            Follower(client, name, terminal).follow()
        except KeyboardInterrupt:
            if client.get_job_info(name).status.value not in OVER:
                terminal.say(f"job {name} goes on: the same command follows it, `submit --stop {name}` stops it")
            raise


def asked_job(path: Path | None, verb: str, overrides: list[str], retry_failed: bool, variables: list[str]) -> Job:
    """The job of a command line.

    Raises:
        UserError: the recipe or the verb cannot be sent.
    """
    if path is None:
        raise UserError("submit: name a RECIPE, or --list or --stop ID")
    if verb not in VERBS:
        raise UserError(f"--verb {verb}: a job does one of {', '.join(VERBS)}")
    if retry_failed and verb not in ("generate", "score", "tune"):
        raise UserError("--retry-failed: it belongs to --verb generate, score or tune")
    return Job(verb, path, load_recipe(path, overrides), overrides, retry_failed, variables)


def list_command(terminal: Terminal, address: str | None, as_json: bool) -> None:
    """All jobs of the cluster, the latest last. Values of environment variables are not shown."""
    client = connect(address)
    with in_our_words(client.get_address()):
        jobs = sorted(filter(lambda job: job.submission_id, client.list_jobs()), key=lambda job: job.start_time or 0)
    rows = [_row(job) for job in jobs]
    if as_json:
        return terminal.result_json(rows)
    table, columns = Table(), ("id", "study", "verb", "status", "started", "out")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[column] or "") for column in columns))
    terminal.out.print(table)


def _row(job: Any) -> dict[str, Any]:
    metadata = job.metadata or {}
    started = (
        datetime.fromtimestamp(job.start_time / 1000, UTC).isoformat(timespec="seconds") if job.start_time else None
    )
    known = {name: metadata.get(name) for name in ("study", "verb", "out")}
    return {"id": job.submission_id, **known, "status": job.status.value.lower(), "started": started}


def stop_command(terminal: Terminal, address: str | None, name: str) -> None:
    """Stops a job and waits until it is over; what it has committed stays."""
    client = connect(address)
    with in_our_words(client.get_address()):
        if name not in [job.submission_id for job in client.list_jobs()]:
            raise UserError(f"--stop {name}: there is no such job; `deltaray submit --list` shows all")
        client.stop_job(name)
        deadline = time.monotonic() + STOP_SECONDS
        while (status := client.get_job_info(name).status.value) not in OVER:
            if time.monotonic() > deadline:
                raise StageError(f"job {name} is still {status.lower()} after {STOP_SECONDS:g} s; ask again")
            time.sleep(0.5)
    terminal.say(f"job {name}: {status.lower()}; submitting the same again resumes")
