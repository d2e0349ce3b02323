"""Workers that hold their room for nobody: actors that Ray forgot to end, and processes that are frozen."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

JOB = """
import os, sys, ray
from deltaray.runtime import process_watchdog

@ray.remote(num_cpus=0, lifetime="detached", name="guarded-" + sys.argv[2], max_restarts=0)
class Left:
    def start(self, watched):
        process_watchdog.INTERVAL = 0.2
        if watched:
            process_watchdog.guard()
        return os.getpid()

ray.init(address=sys.argv[1], log_to_driver=False, namespace="guard")
print(ray.get(Left.remote().start.remote(sys.argv[2] == "watched")), flush=True)
sys.stdin.readline()
"""


def test_an_actor_lives_as_long_as_its_job(ray_session: Any) -> None:
    """One that outlives it by intention plays the part of one that was forgotten."""
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
    ray_session.kill(ray_session.get_actor("guarded-plain", namespace="guard"))


FREEZING = """
import subprocess, sys, time
from deltaray.runtime.process_watchdog import end_if_frozen
end_if_frozen(2.0)
child = subprocess.Popen(["sleep", "1000"])
print(child.pid, flush=True)
sys.stdin.readline()
child.kill()
"""


@pytest.fixture
def worker() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", FREEZING]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    process.kill()


def test_a_frozen_process_is_ended_with_its_children(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdout is not None and worker.stderr is not None
    child = int(worker.stdout.readline())
    time.sleep(3)  # it does nothing, and lives
    assert worker.poll() is None
    worker.send_signal(signal.SIGSTOP)
    assert worker.wait(60) == -signal.SIGKILL
    assert f"process {worker.pid} gave no sign of life for 2 s; ending it" in worker.stderr.readline()
    wait_until_gone(child)


def test_a_process_that_was_stopped_for_a_moment_goes_on_and_takes_its_watcher_along(
    worker: "subprocess.Popen[str]",
) -> None:
    assert worker.stdout is not None and worker.stdin is not None
    worker.stdout.readline()
    stopped = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children()]
    for process in stopped:
        process.suspend()
    time.sleep(3)  # the watcher, too: a terminal's Ctrl-Z
    for process in stopped:
        process.resume()
    time.sleep(1)
    assert worker.poll() is None
    worker.stdin.write("end\n")
    worker.stdin.close()
    assert worker.wait(60) == 0
    wait_until_gone(*(process.pid for process in stopped))


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
