"""Ends an actor whose command is gone.

Ray does so itself, but for actors that were about to start when its head died: a head that comes back does not know of
them (seen with Ray 2.60, see ray-project/ray#66326), and their CPUs and GPUs would be lost to everybody.
"""

import os
import threading
import time
from contextlib import suppress
from typing import Any

INTERVAL = 30.0
"""Seconds between two looks; a job that is dead in two of them is dead."""


def end_with_job() -> None:
    """From now on a thread ends this process once the job that it works for has ended."""
    threading.Thread(target=_watch, name="orphan-watch", daemon=True).start()


def _watch() -> None:
    import ray

    context, looks = ray.get_runtime_context(), 0
    gcs = ray._raylet.GcsClient(address=context.gcs_address)
    while looks < 2:
        time.sleep(INTERVAL)
        with suppress(Exception):  # the head is away
            looks = looks + 1 if _is_dead(gcs, context.get_job_id()) else 0
    os._exit(1)


def _is_dead(gcs: Any, job: str) -> bool:
    options = {"skip_submission_job_info_field": True, "skip_is_running_tasks_field": True}
    found = gcs.get_all_job_info(job_or_submission_id=job, **options)
    return any(identity.hex() == job and info.is_dead for identity, info in found.items())
