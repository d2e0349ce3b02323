"""Limits for what a harness task does with one answer: math checkers (sympy) work for ever on 9**9**9**9.

A task's own function cannot be sent anywhere, so it runs in a process forked from this one, which has all of it.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from deltaray.untrusted import OverLimitError
from deltaray.untrusted.child import limit_memory, obey

SECONDS = 30.0
"""Of computing for one document; math checkers give up by themselves after five, where they can."""
WALL = 60.0
"""Seconds on the clock for each of computing: only for a process that stands still."""
MEBIBYTES = 4096
"""Beside what this process has."""


@contextmanager
def limited_scoring(tasks: Iterable[Any]) -> Iterator[list[Any]]:
    """Meanwhile an answer whose check goes too far counts as an empty one; the documents of such come into the list.

    Args:
        tasks: of the harness; those that only compare log-probs are left as they are.
    """
    over: list[Any] = []
    apart = [_limit(task, over) for task in tasks if task.get_config("output_type") == "generate_until"]
    try:
        yield over
    finally:
        for process in apart:
            process.close()


def _limit(task: Any, over: list[Any]) -> "Apart":
    own = task.process_results
    apart = Apart(own)

    def process_results(document: Any, results: Any) -> Any:
        try:
            return apart(document, results)
        except OverLimitError:
            over.append(document)
            return own(document, _emptied(results))

    task.process_results = process_results
    return apart


def _emptied(results: Any) -> Any:
    if isinstance(results, str):
        return ""
    return [_emptied(it) for it in results] if isinstance(results, list | tuple) else results


class Apart:
    """A function in a process of its own, one call after the other."""

    def __init__(self, function: Callable[..., Any], seconds: float | None = None) -> None:
        self.function, self.seconds = function, SECONDS if seconds is None else seconds
        self._process: Any = None
        self._pipe: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns; what it raises comes as a RuntimeError.

        Raises:
            OverLimitError: it took too much time or memory, or died.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send(arguments)
            if not self._pipe.poll(WALL * self.seconds):
                raise EOFError
            raised, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise OverLimitError(f"it takes more than {self.seconds:g} s of computing, or too much memory") from None
        if raised:
            raise value
        return value

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        # no daemon: tasks that run programs start processes of their own
        self._process = context.Process(target=_serve, args=(self.function, self._pipe, theirs, self.seconds))
        self._process.start()
        theirs.close()


def _serve(function: Callable[..., Any], ours: Connection, pipe: Connection, seconds: float) -> None:
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    obey(signal.SIGTERM)
    obey(signal.SIGPROF)
    limit_memory(MEBIBYTES)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            os._exit(0)  # nothing of the process that this one was forked from may run here
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            pipe.send((False, function(*arguments)))
        except MemoryError:
            os._exit(1)
        except BaseException as error:
            pipe.send((True, RuntimeError(f"{type(error).__name__}: {error}")))
        signal.setitimer(signal.ITIMER_PROF, 0)
