"""One verb of one study as a Ray job: what it runs, what is said of it, and which job does the same already."""

import hashlib
import os
import re
import secrets
import shlex
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaray.cli.submit.working_dir import pack
from deltaray.errors import UserError
from deltaray.recipe import Recipe
from deltaray.text import keep_secret

VERBS = ("run", "generate", "score", "pair", "train", "merge", "evaluate", "tune")
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
YOUNG_SECONDS = 120.0
"""For so long a head that has just started may answer but take no jobs."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """What is asked for."""

    verb: str
    path: Path  # of the recipe's file
    recipe: Recipe
    overrides: list[str]
    retry_failed: bool
    variables: list[str]  # names of environment variables that travel

    def entrypoint(self) -> str:
        """The command that the cluster runs, in the job's folder."""
        arguments = [part for item in self.overrides for part in ("--set", item)]
        arguments += ["--retry-failed"] if self.retry_failed else []
        return shlex.join(["python", "-m", "deltaray", self.verb, self.path.name, *arguments])

    def metadata(self) -> dict[str, str]:
        """What everybody who may see the cluster's jobs can read of it."""
        same = hashlib.sha256((self.entrypoint() + self.path.read_text(encoding="utf-8")).encode()).hexdigest()
        known = {"study": self.recipe.name, "verb": self.verb, "out": self.recipe.out}
        return {"deltaray": version("deltaray"), **known, "command": same[:16]}

    def environment(self) -> dict[str, str]:
        """The named variables with the caller's values; they go into the request and nowhere else.

        Raises:
            UserError: a name is none, or not set here.
        """
        keep_secret(self.variables)
        for name in self.variables:
            if not NAME.fullmatch(name):
                raise UserError(f"--env {name.partition('=')[0]}: names only; the value is taken from your environment")
            if name not in os.environ:
                raise UserError(f"--env {name}: it is not set here; export it before the command, or leave it out")
        return {name: os.environ[name] for name in self.variables}


def running_job(client: Any, job: Job) -> str | None:
    """The id of an unfinished job that does the same.

    Raises:
        UserError: another job works in the same `out`.
    """
    mine = job.metadata()
    for other in client.list_jobs():
        metadata = other.metadata or {}
        if metadata.get("out") != mine["out"] or str(other.status.value) in OVER:
            continue
        if metadata.get("command") == mine["command"]:
            return str(other.submission_id)
        name, verb = other.submission_id, metadata.get("verb")
        raise UserError(
            f"out: {job.recipe.out}: job {name} works there already (`{verb}`); wait for it, or stop it with "
            f"`deltaray submit --stop {name}`"
        )
    return None


def send(client: Any, job: Job) -> str:
    """Uploads what the job needs and starts it; its id."""
    name = f"{job.recipe.name}-{job.verb}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
    environment = job.environment()
    with tempfile.TemporaryDirectory(prefix="deltaray-job-") as folder:
        pack(job.path, job.recipe, Path(folder))
        deadline = time.monotonic() + YOUNG_SECONDS
        while True:
            try:
                client.submit_job(
                    entrypoint=job.entrypoint(),
                    submission_id=name,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata=job.metadata(),
                )
                return name
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)
