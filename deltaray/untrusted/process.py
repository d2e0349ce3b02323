"""The process that asks another one, and ends it when that goes too far."""

import atexit
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any

from deltaray.untrusted.child import LENGTH

START = "import sys, json; sys.path[:] = json.loads(sys.argv.pop()); from deltaray.untrusted.child import main; main()"
PASSED_ON = ("HOME", "LANG", "LC_ALL", "LOCAL_RANK", "NLTK_DATA", "TMPDIR", "TZ", "XDG_CACHE_HOME")
"""All of the environment that the process sees: no key of anything."""
WALL = 60.0
"""Seconds on the clock for each of computing, and at least these: only for a process that stands still."""


class OverLimitError(ValueError):
    """Somebody else's text wanted more time, memory or output than it may have."""


class RaisedError(Exception):
    """What the function raised over there; its subclasses are called as the exceptions were."""


class Limited:
    """Calls a module's functions with limits. Safe to share between threads; a forked process gets its own.

    What goes over a limit ends the process; the next call starts another (0.1 s and what the module's imports take).
    """

    def __init__(self, module: str, seconds: float, mebibytes: int) -> None:
        """
        Args:
            seconds: of computing that one call may take.
            mebibytes: that calls may take beside what the module takes by itself.
        """
        self.module, self.seconds, self.mebibytes = module, seconds, mebibytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def call(self, name: str, *arguments: Any, seconds: float | None = None) -> Any:
        """What the function returns, as JSON brings it over.

        Args:
            arguments: whatever pickles.
        Raises:
            OverLimitError: it took too much time, memory or output, or the process died of it.
            RaisedError: the function, or the module's import, raised; an exception of the same name and message.
        """
        allowed = self.seconds if seconds is None else seconds
        question = pickle.dumps((name, arguments, allowed))
        with self._lock:
            try:
                answer = json.loads(self._ask(question, max(WALL, WALL * allowed)))
            except EOFError:
                raise OverLimitError(self._cause(allowed)) from None
            except BaseException:
                self.close()  # half an answer may stand in the pipe
                raise
            if answer.get("over") == "memory" or answer.get("dead"):
                self.close()
        return self._value(answer)

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _forget(self) -> None:
        self._process, self._lock = None, threading.Lock()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()  # killed by somebody else while it was idle
        if self._process is None:
            path = json.dumps([os.path.abspath(place) for place in sys.path])  # noqa: PTH100
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", START, self.module, str(self.mebibytes), path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
                cwd="/",
            )
        return self._process

    def _ask(self, question: bytes, wall: float) -> bytes:
        """EOFError where the process ends before it has answered, or does not answer."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(question).to_bytes(LENGTH, "big") + question)
            process.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None
        until = time.monotonic() + wall
        size = int.from_bytes(_read(process.stdout.fileno(), LENGTH, until), "big")
        return _read(process.stdout.fileno(), size, until)

    def _cause(self, allowed: float) -> str:
        """Why the process has not answered; ends what is left of it."""
        process = self._process
        assert process is not None
        try:
            code: int | None = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code == -signal.SIGPROF:
            return f"it takes more than {allowed:g} s of computing"
        if code is None:
            return "it stands still"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the process that computes it died ({how}); it may need more than {self.mebibytes:,} MiB of memory"

    def _value(self, answer: dict[str, Any]) -> Any:
        if answer.get("over") == "memory":
            raise OverLimitError(f"it needs more than {self.mebibytes:,} MiB of memory")
        if answer.get("over") == "output":
            raise OverLimitError(f"it writes more than {answer['limit']:,} bytes")
        if "error" in answer:
            module, name, message = answer["error"]
            raise type(name.rpartition(".")[2], (RaisedError,), {"__module__": module, "__qualname__": name})(message)
        return answer["value"]


def _read(pipe: int, size: int, until: float) -> bytes:
    found, ready = bytearray(), select.poll()
    ready.register(pipe, select.POLLIN)
    while len(found) < size:
        if not ready.poll(max(0.0, until - time.monotonic()) * 1000):
            raise EOFError
        if not (part := os.read(pipe, size - len(found))):
            raise EOFError
        found += part
    return bytes(found)


@cache
def limited(module: str, seconds: float, mebibytes: int = 1024) -> Limited:
    """This process's one beside it for a module of `deltaray.untrusted`."""
    return Limited(module, seconds, mebibytes)
