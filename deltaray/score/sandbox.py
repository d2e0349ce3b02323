"""Runs a program and its tests in a process that can compute and nothing else; see `confined.py`."""

import json
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deltaray.errors import UserError
from deltaray.recipe.scorers import PythonTests
from deltaray.score.answers import python_code
from deltaray.score.response import UNANSWERED, Response, Score, ScoreFunction

CONFINED = Path(__file__).with_name("confined.py")
START_SECONDS = 5.0
"""What the interpreter may take to start besides the program's own time."""


@dataclass(frozen=True)
class Outcome:
    """How a program did in its tests."""

    passed: int
    failure: str | None
    """`kind: words` of the first thing that went wrong."""


def run_tests(program: str, tests: list[str], seconds: float, memory_mib: int) -> Outcome:
    """Runs the program once and then each test in its namespace; what is not run to its end has not passed.

    Raises:
        UserError: processes cannot be confined here, so nothing was run.
        RuntimeError: the interpreter did not get as far as the program.
    """
    word = secrets.token_hex(16)  # what the program itself prints is no verdict
    request = {"word": word, "program": program, "tests": tests, "seconds": seconds, "memory": memory_mib << 20}
    command = [sys.executable, "-I", "-S", str(CONFINED)]
    environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
    with tempfile.TemporaryFile() as results:  # a file, because what is written to one has a limit
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=results, stderr=subprocess.DEVNULL, env=environment, cwd="/"
        )
        try:
            process.communicate(json.dumps(request).encode(), timeout=seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # it has no other processes
            process.wait()
        results.seek(0)
        said = results.read()
    lines = said.decode(errors="replace").splitlines()
    return _outcome(
        [line.removeprefix(f"{word} ") for line in lines if line.startswith(word)], len(tests), process.returncode < 0
    )


def _outcome(said: list[str], tests: int, killed: bool) -> Outcome:
    if not said:
        raise RuntimeError("the interpreter did not start in time" if killed else "the interpreter did not start")
    if said[0].startswith("unconfined"):
        raise UserError(
            f"python_tests: programs cannot be confined on this machine ({said[0].removeprefix('unconfined ')}), and "
            "are not run without; it takes Linux on x86_64 or aarch64 whose container allows seccomp filters"
        )
    results = [line.removeprefix("test ") for line in said if line.startswith("test ")]
    passed = results.count("passed")
    if said[-1].startswith("program "):
        return Outcome(0, f"program failed: {said[-1].removeprefix('program ')}")
    if len(results) < tests:
        return Outcome(passed, "out of time or memory" if killed else "ended early")
    return Outcome(passed, next((f"test failed: {result}" for result in results if result != "passed"), None))


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
        outcome = run_tests(python_code(response.text), tests, spec.seconds, spec.memory_mib)
        parts = {"passed": float(outcome.passed), "tests": float(len(tests))}
        return Score(outcome.passed / len(tests), outcome.failure, parts)

    return function
