"""Programs of models and their tests: the worker's side of the process that runs them (`supervisor.py`).

Where programs cannot be confined none is run, which each process that runs any finds out once. What goes wrong after
that is a failure of the program's row.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

from deltaray.errors import UserError
from deltaray.recipe.scorers import PythonTests
from deltaray.score.answers import python_programs
from deltaray.score.programs.supervisor import receive, send
from deltaray.score.response import UNANSWERED, Response, Score, ScoreFunction

ROOT = Path(__file__).parents[3]
BEGIN = "import sys; sys.path.append(sys.argv[1]); from deltaray.score.programs.supervisor import main; main()"
PATIENCE = 300.0
"""Seconds in which a supervisor that is alive answers, besides the program's own."""
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4


@dataclass(frozen=True)
class Outcome:
    """How a program did in its tests."""

    passed: int
    failure: str | None
    """`kind: words` of the first thing that went wrong."""


def run_tests(program: str | list[str], tests: list[str], seconds: float, memory_mib: int) -> Outcome:
    """Runs the program once and then each test in its namespace; what is not run to its end has not passed.

    Args:
        program: of several the last is taken that compiles.
    Raises:
        UserError: programs cannot be confined here, so nothing was run.
        RuntimeError: the process that runs programs was not there, or died.
    """
    programs = [program] if isinstance(program, str) else program
    request = {"programs": programs, "seconds": seconds, "memory": memory_mib << 20}
    with _AT_ONCE, _unreadable():
        said = _asked(request, tests)
    return Outcome(min(said["passed"], len(tests)), said["failure"])


# --- supervisors --------------------------------------------------------------------------------------------------
class Supervisor:
    """A process that runs one program after the other; it ends with this one, or when it is closed."""

    def __init__(self) -> None:
        """
        Raises:
            UserError: it cannot confine programs.
            RuntimeError, OSError, EOFError: it did not start.
        """
        self.socket, theirs = socket.socketpair()
        with theirs:
            # no secrets in it: neither environment nor descriptors; a session of its own, or Ctrl-C would end it
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-c", BEGIN, str(ROOT)],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"}, cwd="/", start_new_session=True,
            )  # fmt: skip
        try:
            said = self._answer(0)
            if "unconfined" in said:
                raise UserError(
                    f"python_tests: programs cannot be confined on this machine ({said['unconfined']}), and are not "
                    "run without; it takes Linux on x86_64 or aarch64 whose container allows seccomp filters"
                )
        except BaseException:
            self.close()
            raise

    def run(self, request: dict[str, Any], tests: list[str]) -> dict[str, Any]:
        """
        Raises:
            RuntimeError, OSError, EOFError: it died, or said what it cannot say.
        """
        send(self.socket, request)
        send(self.socket, tests)
        said = self._answer(request["seconds"])
        if "unconfined" in said:  # it could be when this supervisor started
            raise RuntimeError(f"the program could not be confined: {said['unconfined']}")
        return said

    def _answer(self, seconds: float) -> dict[str, Any]:
        self.socket.settimeout(seconds + PATIENCE)
        said: dict[str, Any] = receive(self.socket)
        self.socket.settimeout(None)
        if "broken" in said:
            raise RuntimeError(said["broken"])
        return said

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


_IDLE: list[Supervisor] = []
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_AT_ONCE = BoundedSemaphore(CORES)


def _idle() -> Supervisor | None:
    while _IDLE:
        supervisor = _IDLE.pop()
        if supervisor.process.poll() is None:
            return supervisor
        supervisor.close()
    return None


def _asked(request: dict[str, Any], tests: list[str]) -> dict[str, Any]:
    if sys.platform != "linux":
        raise UserError("python_tests: programs can be confined on Linux only, and are not run without")
    try:
        supervisor = _idle() or Supervisor()
        try:
            said = supervisor.run(request, tests)
        except BaseException:
            supervisor.close()
            raise
    except (OSError, EOFError) as error:
        raise RuntimeError(f"the process that runs programs is gone: {str(error) or type(error).__name__}") from None
    _IDLE.append(supervisor)
    return said


# --- this process -------------------------------------------------------------------------------------------------
_READABLE, _RUNNING, _BEFORE = Lock(), 0, 1


@contextmanager
def _unreadable() -> Iterator[None]:
    """While programs run, no process of the same user can read this one's memory and environment through /proc."""
    global _RUNNING, _BEFORE
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    with _READABLE:
        if not _RUNNING and prctl:
            _BEFORE = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
            prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        _RUNNING += 1
    try:
        yield
    finally:
        with _READABLE:
            _RUNNING -= 1
            if not _RUNNING and prctl:
                prctl(PR_SET_DUMPABLE, _BEFORE, 0, 0, 0)


def _forget() -> None:
    """In a process that was forked from this one, whose programs are not its own."""
    global _AT_ONCE, _READABLE, _RUNNING
    _IDLE.clear()
    _AT_ONCE, _READABLE, _RUNNING = BoundedSemaphore(CORES), Lock(), 0


os.register_at_fork(after_in_child=_forget)


# --- scorer -------------------------------------------------------------------------------------------------------
def tests_of(answer: str) -> list[str] | None:
    """The tests in a prompt's answer: a JSON list of sources, or one source; None if it holds none."""
    try:
        tests = json.loads(answer)
    except (ValueError, RecursionError):
        return [answer] if answer.strip() else None
    good = isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests)
    return tests if good else None


def python_tests_scorer(spec: PythonTests) -> ScoreFunction:
    def function(response: Response) -> Score:
        if response.answer is None:
            return UNANSWERED
        tests = tests_of(response.answer)
        if tests is None:
            return Score(None, "the answer holds no tests")
        outcome = run_tests(python_programs(response.text), tests, spec.seconds, spec.memory_mib)
        parts = {"passed": float(outcome.passed), "tests": float(len(tests))}
        return Score(outcome.passed / len(tests), outcome.failure, parts)

    return function
