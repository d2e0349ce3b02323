"""The process beside: imports a module and calls its functions, one after the other, as the pipe asks.

Time is that of the processor, so a busy machine costs nothing. It is limited by a signal that nobody here handles, and
memory by the kernel: both hold inside of C code as well.
"""

import importlib
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

OUTPUT_BYTES, OUTPUT_PER_INPUT = 1 << 20, 16
"""The longest answer: so many bytes, and so many more for each byte of the question."""
MESSAGE_CHARACTERS = 2_000
LENGTH = 8
"""Bytes before every message, which hold its length."""


def main() -> None:
    """Arguments: the module, and the MiB that its functions may take beside what it takes by itself."""
    asked, answers = _pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when it is over
    obey(signal.SIGPROF)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        functions = importlib.import_module(sys.argv[1])
        limit_memory(int(sys.argv[2]))
    except BaseException as error:
        _write(answers, json.dumps({"dead": True, **_told(error)}).encode())
        raise
    while len(head := asked.read(LENGTH)) == LENGTH:
        question = asked.read(int.from_bytes(head, "big"))
        name, arguments, seconds = pickle.loads(question)
        answer = _timed(getattr(functions, name), arguments, seconds, OUTPUT_BYTES + OUTPUT_PER_INPUT * len(question))
        _write(answers, answer)


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes; what libraries print goes nowhere."""
    asked, answers = (os.fdopen(os.dup(number), mode) for number, mode in ((0, "rb"), (1, "wb")))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)
    return asked, answers  # type: ignore[return-value]


def _write(answers: BinaryIO, answer: bytes) -> None:
    answers.write(len(answer).to_bytes(LENGTH, "big") + answer)
    answers.flush()


def _told(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    return {"error": [kind.__module__, kind.__qualname__, str(error)[:MESSAGE_CHARACTERS]]}


def obey(number: signal.Signals) -> None:
    """A signal ends this process, whatever the one that has started it did with it."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def limit_memory(mebibytes: int) -> None:
    """To so many beside what the process takes now. Where the system does not tell that (macOS) it stays as it is."""
    with suppress(FileNotFoundError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = pages * resource.getpagesize() + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def _timed(function: Callable[..., Any], arguments: Any, seconds: float, longest: int) -> bytes:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return _answer(function, arguments, longest)
    except MemoryError:
        return b'{"over": "memory"}'
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(function: Callable[..., Any], arguments: Any, longest: int) -> bytes:
    try:
        answer = json.dumps({"value": function(*arguments)}).encode()
    except MemoryError:
        raise
    except BaseException as error:
        return json.dumps(_told(error)).encode()
    return answer if len(answer) <= longest else json.dumps({"over": "output", "limit": longest}).encode()
