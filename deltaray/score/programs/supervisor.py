"""The process beside a worker that runs its programs: one clean interpreter, from which each program's is forked.

Imports nothing but the standard library, and loads all of it, because a confined child can open no file. It holds no
secret: it is started with an empty environment and no descriptor but the socket to its worker, and never more than one
program at a time. It shares no memory with a program, so that time, threads and results are bounded from outside.
"""

import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaray.score.programs.confinement import LIBC, PR_SET_DUMPABLE, filters, run_confined
from deltaray.score.programs.watch import Said, Watch

STACK_BYTES = 2 << 20
"""Of a thread, unless the program wants another: it counts as memory before it is used."""
UNWANTED = {
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "nis", "pydoc_data", "test",
    "this", "tkinter", "turtle", "turtledemo", "venv", "_tkinter",
}  # fmt: skip
"""Of the standard library: what needs a screen or other files, or says something when it is imported."""
PROBES = [
    f"import os, socket\ntry: {attack}\nexcept PermissionError: pass\nelse: raise SystemExit"
    for attack in ("open(os.devnull)", "os.stat('/')", "os.kill(0, 0)", "socket.socket()")
]
"""Tests that a program passes only where it is confined."""


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
