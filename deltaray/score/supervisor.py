"""The process beside a worker that runs its programs: one clean interpreter, from which each program's is forked.

Imports nothing but the standard library, and loads all of it, because a confined child can open no file. It holds no
secret: it is started with an empty environment and no descriptor but the socket to its worker, and never more than one
program at a time. It shares no memory with a program, so that time, threads and results are bounded from outside.
"""

import errno
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaray.score.confined import (
    CONFINED,
    COUNTED,
    EXCEPTIONS,
    LIBC,
    OWN,
    PASSED,
    PR_SET_DUMPABLE,
    WORD_BYTES,
    filters,
    run_confined,
)

Said = dict[str, Any]
"""What the worker is told: `passed` and `failure` of a program, or why it was not run: `broken` or `unconfined`."""

START_SECONDS = 60.0
"""What a child may take to confine itself, on however busy a machine."""
THREADS = 512
"""What a program may start, all told."""
STACK_BYTES = 2 << 20
"""Of a thread, unless the program wants another: it counts as memory before it is used."""
UNWANTED = {
    "antigravity", "curses", "distutils", "ensurepip", "idlelib", "lib2to3", "nis", "pydoc_data", "readline", "test",
    "this", "tkinter", "turtle", "turtledemo", "venv", "_curses", "_curses_panel", "_tkinter",
}  # fmt: skip
"""Of the standard library: what needs a screen or other files, or says something when it is imported."""
PROBES = [
    "import math, random, threading\nwith __import__('contextlib').suppress(RuntimeError):\n"
    "    threading.Thread(target=int).start()",
    *(
        f"import os, socket\ntry: {attack}\nexcept PermissionError: pass\nelse: raise SystemExit"
        for attack in ("open(os.devnull)", "os.stat('/')", "os.kill(0, 0)", "socket.socket()")
    ),
]
"""Tests that a program passes only where it is confined."""
NOTIFY_RECEIVE, NOTIFY_SEND, NOTICE_BYTES, CONTINUE = 0xC0502100, 0xC0182101, 80, 1
HUNG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)


def send(to: socket.socket, value: Any) -> None:
    body = json.dumps(value).encode()
    to.sendall(len(body).to_bytes(8, "big") + body)


def receive(source: socket.socket) -> Any:
    """What `send` sent.

    Raises:
        EOFError: the other side is gone.
    """
    return json.loads(_exactly(source, int.from_bytes(_exactly(source, 8), "big")))


def _exactly(source: socket.socket, count: int) -> bytearray:
    said = bytearray()
    while len(said) < count:
        part = source.recv(min(count - len(said), 1 << 20))
        if not part:
            raise EOFError
        said += part
    return said


def main() -> None:
    """Runs what comes through standard input, a socket, until that is closed."""
    worker = socket.socket(fileno=0)
    _prepare()
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    probe = {"programs": [""], "seconds": 60.0, "memory": own + (256 << 20)}
    send(worker, _probed(run(worker, probe, PROBES)))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request = receive(worker)
            request["memory"] += own  # what the interpreter takes is not the program's
            try:
                send(worker, run(worker, request))
            except OSError as error:  # no process or memory is left for the child: the worker starts another of us
                return send(worker, {"broken": f"a program could not be started: {error}"})


def _prepare() -> None:
    with suppress(OSError):  # where memory runs out the kernel takes a program, not the worker
        Path("/proc/self/oom_score_adj").write_text("1000")
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    threading.stack_size(STACK_BYTES)
    warnings.simplefilter("ignore")
    # a module before its helper in C, which looks for the module when it is loaded
    for name in sorted(sys.stdlib_module_names - UNWANTED, key=lambda name: (name.startswith("_"), name)):
        if not name.startswith("__"):
            _load(name)
    warnings.resetwarnings()
    sys.argv, sys.orig_argv = [""], []
    sys.path.clear()
    sys.path_importer_cache.clear()
    os.environ.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "deltaray"]:
        del sys.modules[name]
    with suppress(OSError):
        filters()
    gc.collect()
    gc.freeze()
    gc.disable()


def _load(name: str) -> None:
    """A module with all that is below it, if it can be had."""
    with suppress(Exception, SystemExit):
        module = importlib.import_module(name)
        for found in pkgutil.iter_modules(getattr(module, "__path__", []), name + "."):
            if found.name.rpartition(".")[2] not in ("test", "tests", "idle_test", "__main__"):
                _load(found.name)


def _probed(said: Said) -> Said:
    if "passed" in said and said["passed"] < len(PROBES):
        kind = "unconfined" if said["failure"].startswith("test") else "broken"
        return {kind: "the filter does not hold" if kind == "unconfined" else said["failure"]}
    return said


def run(worker: socket.socket, request: dict[str, Any], tests: list[str] | None = None) -> Said:
    """Forks a child for a program; only then takes the tests from the worker, so that they are not in its memory."""
    ours, theirs = socket.socketpair()
    own, child = os.getpid(), os.fork()
    if child == 0:
        run_confined(theirs, request, own)
    theirs.close()
    try:
        wanted = receive(worker) if tests is None else tests
        return Watch(ours, worker, request["seconds"]).outcome(wanted)
    finally:
        os.kill(child, signal.SIGKILL)  # it has no children: nothing else is left
        os.waitpid(child, 0)
        ours.close()


class Watch:
    """What a child says, within its time. Whatever it does to its end of the socket, it is read no further than due."""

    def __init__(self, child: socket.socket, worker: socket.socket, seconds: float) -> None:
        self.child, self.worker, self.seconds = child, worker, seconds
        self.listener: int | None = None
        self.said, self.unsent, self.threads = bytearray(), memoryview(b""), 0
        self.deadline = time.monotonic() + START_SECONDS

    def outcome(self, tests: list[str]) -> Said:
        try:
            if refusal := self._confined():
                return refusal
            self.deadline = time.monotonic() + self.seconds
            return self._tested(tests)
        finally:
            if self.listener is not None:
                os.close(self.listener)

    def _confined(self) -> Said | None:
        self.child.settimeout(START_SECONDS)
        try:
            said, descriptors, _, _ = socket.recv_fds(self.child, 1, 1)
            if said == COUNTED:
                (self.listener,) = descriptors
            self.child.setblocking(False)
            said = said if said not in (COUNTED, b"-") else self._read(1)
            if said == CONFINED:
                return None
            with suppress(EOFError):
                self._read(500)
        except (EOFError, TimeoutError):
            return {"broken": "the process of a program could not be started"}
        return {"unconfined": self.said.decode(errors="replace")}

    def _tested(self, tests: list[str]) -> Said:
        passed, failure = 0, None
        try:
            code = self._read(1)[0]
            if code != PASSED:
                return {"passed": 0, "failure": f"program failed: {_name(code)}"}
            word = os.urandom(WORD_BYTES)
            self.unsent = memoryview(word + b"".join(map(_frame, tests)))
            for _ in tests:
                *begin, code = self._read(WORD_BYTES + 1)
                if bytes(begin) != word:
                    raise ValueError
                passed += code == PASSED
                failure = failure or (None if code == PASSED else f"test failed: {_name(code)}")
        except TimeoutError:
            failure = "out of time"
        except EOFError:
            failure = "ended early"
        except ValueError:
            passed, failure = 0, "program failed: it wrote where its results go"
        return {"passed": passed, "failure": failure}

    def _read(self, count: int) -> bytes:
        """
        Raises:
            TimeoutError: the time is over.
            EOFError: the child is gone, or has closed its end.
        """
        while len(self.said) < count:
            self._wait()
        taken = bytes(self.said[:count])
        del self.said[:count]
        return taken

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.worker, HUNG_UP)
        poll.register(self.child, select.POLLIN | (select.POLLOUT if self.unsent else 0))
        if self.listener is not None:
            poll.register(self.listener, select.POLLIN)
        left = self.deadline - time.monotonic()
        events = dict(poll.poll(max(0.0, left) * 1000))
        if left <= 0:
            raise TimeoutError
        if self.worker.fileno() in events:
            raise SystemExit  # nobody waits for the outcome
        if self.listener is not None and events.get(self.listener, 0) & select.POLLIN:
            self._admit(self.listener)
        if (event := events.get(self.child.fileno(), 0)) & select.POLLOUT:
            self._send()
        if event & ~select.POLLOUT:
            self._receive()

    def _receive(self) -> None:
        try:
            part = self.child.recv(1 << 16)
        except OSError:
            part = b""
        if not part:
            raise EOFError
        self.said += part

    def _send(self) -> None:
        try:
            self.unsent = self.unsent[self.child.send(self.unsent) :]
        except OSError:
            raise EOFError from None

    def _admit(self, listener: int) -> None:
        """Answers a thread that wants to start another. It may be gone by now."""
        notice = bytearray(NOTICE_BYTES)
        with suppress(OSError):
            fcntl.ioctl(listener, NOTIFY_RECEIVE, notice)
            self.threads += 1
            with suppress(OSError):
                if self.threads <= THREADS:
                    fcntl.ioctl(listener, NOTIFY_SEND, struct.pack("8sqiI", bytes(notice[:8]), 0, 0, CONTINUE))
                    return
            fcntl.ioctl(listener, NOTIFY_SEND, struct.pack("8sqiI", bytes(notice[:8]), 0, -errno.EAGAIN, 0))


def _name(code: int) -> str:
    """
    Raises:
        ValueError: no child of ours says that.
    """
    if code == OWN:
        return "an exception of its own"
    if code > len(EXCEPTIONS):
        raise ValueError
    return EXCEPTIONS[code - 1].__name__


def _frame(test: str) -> bytes:
    body = test.encode("utf-8", "surrogatepass")
    return len(body).to_bytes(8, "big") + body
