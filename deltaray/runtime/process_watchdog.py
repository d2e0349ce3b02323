"""Ends a worker that would hold its CPUs and GPUs for nobody: its command is gone, or it is frozen.

A frozen process (stopped, or in a call that never lets Python's threads run) keeps its connections, and Ray takes it
for alive. Once it is dead its work is repeated by another.

Run as a program this file is what watches a worker from outside.
"""

import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import psutil

INTERVAL = 30.0
"""Seconds between two looks at the job; one that is dead in two of them is dead."""
FROZEN = 600.0
"""Seconds without a sign of life."""
LOOKS = 10
"""So often is a sign of life looked for in that time. The watcher may have been stopped together with its worker."""


def guard(frozen: float = FROZEN) -> None:
    """From now on this process ends with its job, and when it is frozen. What a long-lived worker calls first."""
    threading.Thread(target=_end_with_job, name="job-watch", daemon=True).start()
    end_if_frozen(frozen)


def guarded(worker: type[Any]) -> type[Any]:
    """The class of an actor whose process is guarded; a `worker` that is made elsewhere is not."""

    def start(self: Any, *arguments: Any, **named: Any) -> None:
        guard()
        worker.__init__(self, *arguments, **named)

    return type(worker.__name__, (worker,), {"__init__": start})


# --- the command is gone --------------------------------------------------------------------------------------------
def _end_with_job() -> None:
    """Ray ends actors itself, but for those that were about to start when its head died.

    A head that comes back does not know of them (seen with Ray 2.60, see ray-project/ray#66326).
    """
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


# --- the process is frozen ------------------------------------------------------------------------------------------
def end_if_frozen(seconds: float) -> None:
    """Starts a process that ends this one and its children when none of its threads has run for so long."""
    command = [sys.executable, "-P", __file__, str(os.getpid()), str(seconds / LOOKS)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    threading.Thread(target=_beat, args=(watcher, seconds / LOOKS / 2), name="beat", daemon=True).start()


def _beat(watcher: "subprocess.Popen[bytes]", interval: float) -> None:
    assert watcher.stdin is not None
    with suppress(OSError):  # the watcher was ended by somebody
        while True:
            os.write(watcher.stdin.fileno(), b".")
            time.sleep(interval)


def _watch(pid: int, interval: float) -> None:
    """Until the worker has ended, which closes standard input, or has to be."""
    worker, silent = psutil.Process(pid), 0
    while silent < LOOKS:
        if not select.select([sys.stdin], [], [], interval)[0]:
            silent += 1
        elif os.read(sys.stdin.fileno(), 4096):
            silent = 0
        else:
            return
    print(f"process {pid} gave no sign of life for {LOOKS * interval:g} s; ending it", file=sys.stderr)
    kill_tree(worker)


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL, which reaches those that are stopped or hang, to a process and its children; the caller is left out."""
    with suppress(psutil.NoSuchProcess):
        for it in (process, *process.children(recursive=True)):
            if it.pid != os.getpid():
                with suppress(psutil.NoSuchProcess):
                    it.kill()


if __name__ == "__main__":
    with suppress(psutil.NoSuchProcess):
        _watch(int(sys.argv[1]), float(sys.argv[2]))
