"""The process in which one program and its tests run: forked from the supervisor, confined before it looks at either.

Imports nothing but the standard library. What it may still do is listed in `syscalls.py`: compute, wait, talk to the
supervisor through one socket, and start threads if the supervisor allows it. The library is loaded beforehand
(`supervisor.py`), so that no file need be opened. A program that is out to fool its tests from within can (it shares
their interpreter); one that is out to harm the machine, or to learn anything about it, cannot.
"""

import builtins
import ctypes
import errno
import gc
import os
import platform
import resource
import signal
import socket
import struct
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

from deltaray.score.programs.syscalls import ASK, FAIL, SECCOMP, seccomp_program, thread_program

globals()["__builtins__"] = dict(vars(builtins))  # the functions below keep these, whatever a program does to others
read, write = os.read, os.write

EXCEPTIONS = [kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, BaseException)]
CODES = {id(kind): 1 + place for place, kind in enumerate(EXCEPTIONS)}
PASSED, OWN = 0, 255
"""What a source ended with, in a byte; those between are 1 + a place in `EXCEPTIONS`, 255 is any other exception."""
WORD_BYTES = 16
"""The word comes with the tests, when the program has run, and stands before every result."""
COUNTED, UNCOUNTED, CONFINED, UNCONFINED = b"T", b"-", b"C", b"U"
"""What the child says before the program: whether threads are counted, then whether it is confined."""
CHANNEL = 3
"""The descriptor of the socket to the supervisor."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITIES = struct.pack("Ii", 0x20080522, 0), bytes(24)
"""For `capset`: the version of the structure and this process, and none of the capabilities."""
SET_FILTER, NEW_LISTENER = 1, 8

LIMITS = [
    (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_MEMLOCK, 0),
]  # fmt: skip
MACHINE = platform.machine()
LIBC = ctypes.CDLL(None, use_errno=True)


def run_confined(channel: socket.socket, request: dict[str, Any], supervisor: int) -> None:
    """Runs a program and then the tests that the supervisor sends; never returns.

    Args:
        request: `programs`, of which the last that compiles is taken; `memory` in bytes.
        supervisor: the process id of the one that forked this process.
    """
    try:
        os.dup2(channel.detach(), CHANNEL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.closerange(CHANNEL + 1, 256)
        try:
            confine(request["memory"], supervisor)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) not in (errno.EAGAIN, errno.ENOMEM):  # which pass
                write(CHANNEL, UNCONFINED + str(error).encode()[:500])
            return
        write(CHANNEL, CONFINED)
        _run(request["programs"])
    finally:
        os._exit(0)


def confine(memory: int, supervisor: int) -> None:
    """Limits this process for good and tells the supervisor whether it is asked about threads.

    Raises:
        OSError: the kernel does not allow it.
    """
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        raise OSError("the supervisor is gone")
    for kind, value in ((resource.RLIMIT_AS, memory), *LIMITS):
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    call("capset", *CAPABILITIES)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    asked, none, program = filters()
    _count_threads(asked, none)
    install(program, 0)


@lru_cache  # the supervisor has them made before it forks
def filters() -> tuple[bytes, bytes, bytes]:
    """Has the supervisor asked about threads, allows none, and the filter for all calls."""
    asked, none = (thread_program(MACHINE, answer) for answer in (ASK, FAIL | errno.EAGAIN))
    return asked, none, seccomp_program(MACHINE)


def _count_threads(asked: bytes, none: bytes) -> None:
    """Hands the supervisor what it is asked through; where the kernel has no such thing there are no threads."""
    try:
        listener = install(asked, NEW_LISTENER)
    except OSError:
        install(none, 0)
        write(CHANNEL, UNCOUNTED)
        return
    with socket.socket(fileno=os.dup(CHANNEL)) as channel:
        socket.send_fds(channel, [COUNTED], [listener])
    os.close(listener)


def install(program: bytes, flags: int) -> int:
    """Installs a filter; returns what the kernel does.

    Raises:
        OSError: the kernel does not allow it.
    """
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HL", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog, padded as C does
    return call("syscall", SECCOMP[MACHINE], SET_FILTER, flags, head)


def call(name: str, *arguments: int | bytes) -> int:
    """A function of libc.

    Raises:
        OSError: it returned -1.
    """
    result: int = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _run(programs: list[str]) -> None:
    module = ModuleType("solution")
    sys.modules["solution"] = module
    gc.enable()
    ended = _attempt(programs, module.__dict__)
    write(CHANNEL, bytes([ended]))
    if ended != PASSED:
        return
    word = _read(WORD_BYTES)
    while True:
        test = _read(int.from_bytes(_read(8), "big")).decode("utf-8", "surrogatepass")
        write(CHANNEL, word + bytes([_attempt([test], module.__dict__)]))


def _read(count: int) -> bytes:
    parts = []
    while count:
        parts.append(read(CHANNEL, min(count, 1 << 20)))
        count -= len(parts[-1])
        if not parts[-1]:
            os._exit(0)
    return b"".join(parts)


def _attempt(sources: list[str], namespace: dict[str, object]) -> int:
    """What the last source that compiles ends with."""
    try:
        exec(_compiled(sources), namespace)
    except BaseException as error:
        return CODES.get(id(type(error)), OWN)
    return PASSED


def _compiled(sources: list[str]) -> Any:
    for source in reversed(sources[1:]):
        try:
            return compile(source, "<source>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return compile(sources[0], "<source>", "exec")
