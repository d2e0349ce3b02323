"""An actor that Ray forgets to end ends with its job: one that outlives it by intention plays the part."""

import subprocess
import sys
import time
from typing import Any

import psutil

JOB = """
import os, sys, ray
from deltaray.runtime import orphans

@ray.remote(num_cpus=0, lifetime="detached", name="orphan-" + sys.argv[2], max_restarts=0)
class Left:
    def start(self, watched):
        orphans.INTERVAL = 0.2
        if watched:
            orphans.end_with_job()
        return os.getpid()

ray.init(address=sys.argv[1], log_to_driver=False, namespace="orphans")
print(ray.get(Left.remote().start.remote(sys.argv[2] == "watched")), flush=True)
sys.stdin.readline()
"""


def test_an_actor_lives_as_long_as_its_job(ray_session: Any) -> None:
    address = ray_session.get_runtime_context().gcs_address
    pids = {}
    jobs = {
        kind: subprocess.Popen(
            [sys.executable, "-c", JOB, address, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for kind in ("watched", "plain")
    }
    for kind, job in jobs.items():
        assert job.stdout is not None
        pids[kind] = int(job.stdout.readline())
    time.sleep(2)  # ten looks at a job that lives
    assert all(psutil.pid_exists(pid) for pid in pids.values())
    for job in jobs.values():
        job.communicate("\n", timeout=60)
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pids["watched"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pids["watched"])
    assert psutil.pid_exists(pids["plain"])  # Ray itself left it
    ray_session.kill(ray_session.get_actor("orphan-plain", namespace="orphans"))
