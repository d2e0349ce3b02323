"""The sandbox: what programs of models try, as root and as an ordinary user, and what honest ones need."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deltaray.errors import UserError
from deltaray.recipe.scorers import PythonTests
from deltaray.score.programs import sandbox
from deltaray.score.response import Response, scored

NOBODY = 65534
SECRET = "planted-6f1d-planted"
CALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "")
"""
PARENT = "os.getppid()"

REFUSED = {
    "a file": "open('/etc/hostname')",
    "a file to write": "open('/tmp/x', 'w')",
    "its interpreter": "import sys; open(sys.executable, 'rb')",
    "its own process": "open('/proc/self/environ')",
    "its parent": f"import os; open(f'/proc/{{{PARENT}}}/environ')",
    "a folder": "import os; os.listdir('/')",
    "a folder by descriptor": "import os; os.listdir(3)",
    "whether a file exists": "import os; os.stat('/etc')",
    "a link": "import os; os.readlink('/proc/self/exe')",
    "where it is": "import os; os.getcwd()",
    "going elsewhere": "import os; os.chdir('/tmp')",
    "attributes": "import os; os.getxattr('/', 'user.x')",
    "the machine's name": "import os; os.uname()",
    "the network": "import socket; socket.socket()",
    "abstract sockets": "import socket; a, b = socket.socketpair(); a.bind('\\0x')",
    "datagrams": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "passing descriptors": "import socket; a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0])",
    "a signal": f"import os; os.kill({PARENT}, 9)",
    "a signal to all": "import os; os.kill(-1, 9)",
    "stopping itself": "import signal; signal.raise_signal(signal.SIGSTOP)",
    "a signal by descriptor": f"import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {PARENT})",
    "which signal": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, 10, 9)",
    "an owner by ioctl": "import fcntl, os; r, w = os.pipe(); fcntl.ioctl(r, 0x8901, bytes(4))",
    "a lease": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, 1024, 0)",
    "larger pipes": "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, 1031, 1 << 20)",
    "a process": "import os; os.fork()",
    "a program": "import subprocess; subprocess.run(['true'])",
    "processes of its own": "import multiprocessing as m; m.Process(target=print).start()",
    "limits": f"import os, resource; resource.prlimit({PARENT}, resource.RLIMIT_CPU)",
    "a processor": "import os; os.sched_setaffinity(0, {0})",
    "another's processors": f"import os; os.sched_getaffinity({PARENT})",
    "another's time": f"import os, time; time.clock_gettime(~{PARENT} << 3 | 2)",
    "out of band": "import socket; a, b = socket.socketpair(); a.send(b'x', socket.MSG_OOB)",
    "notifications": "import os; os.pipe2(0x80)",
    "rank": "import os; os.setuid(0)",
    "breaking memory": "import mmap; mmap.mmap(-1, 4096).madvise(100)",
    "huge pages": "import mmap; mmap.mmap(-1, 2 << 20, flags=0x40022)",
}
CALLS = {
    "ptrace": f"101, 16, {PARENT}, 0, 0", "process_vm_readv": f"310, {PARENT}, 0, 0, 0, 0, 0", "prctl": "157, 4, 1",
    "pidfd_open": f"434, {PARENT}, 0", "tgkill": f"234, {PARENT}, {PARENT}, 9", "shmget": "29, 1, 4096, 0o1600",
    "keyctl": "250, 0, -3, 0", "perf_event_open": "298, 0, 0, -1, -1, 0", "io_uring_setup": "425, 8, 0",
    "memfd_create": "319, b'x', 0", "execve": "59, b'/bin/sh', 0, 0", "execveat": "322, 3, b'', 0, 0, 0x1000",
    "openat2": "437, -100, b'/etc', 0, 24", "statx": "332, -100, b'/etc', 0, 0xfff, bytes(300)", "vfork": "58",
    "newfstatat": "262, -100, b'/etc', bytes(300), 0x1000", "unshare": "272, 0x10000000", "mount": "165, 0, b'/', 0, 0",
    "clone into a namespace": "56, 0x10000011, 0, 0, 0, 0", "bpf": "321, 0, 0, 0", "userfaultfd": "323, 0",
    "seccomp": "317, 1, 0, 0", "timer_create": "222, 0, 0, bytes(100)", "mq_open": "240, b'x', 64, 0o600, 0",
    "inotify_init": "294, 0", "futex that inherits": "202, bytes(8), 6, 0, 0, 0, 0", "setpriority": "141, 0, 0, 10",
}  # fmt: skip
WORKING = {
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n"
    "    return await asyncio.to_thread(sum, [1])"
    "\nassert asyncio.run(f()) == 1",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(30) as pool:\n"
    "    assert sum(pool.map(int, range(100))) == 4950",
    "dataclasses": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "from typing import ClassVar\n@dataclass\nclass A:\n    x: int\n    y: ClassVar[int] = 3\nassert A(1) == A(1)",
    "dates": "import datetime\nassert datetime.datetime.strptime('2020-02-01', '%Y-%m-%d').month == 2\n"
    "datetime.datetime.now().astimezone()",
    "chance": "import os, random, secrets, uuid\nrandom.random(), os.urandom(1), secrets.token_hex(), uuid.uuid4()",
    "digests": "import hashlib, hmac\nhashlib.md5(b'').hexdigest(); hmac.new(b'k', b'x', 'sha256')",
    "codecs": "'é'.encode('cp1252'); '日'.encode('shift_jis'); 'x'.encode('idna')",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
    "cases = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
    "assert unittest.TextTestRunner().run(cases).wasSuccessful()",
    "sqlite3": "import sqlite3\nassert sqlite3.connect(':memory:').execute('select 1').fetchall() == [(1,)]",
    "numbers": "from decimal import *\nfrom fractions import Fraction\nimport heapq, math, statistics\n"
    "getcontext().prec = 50\nassert Fraction(1, 3) * 3 == statistics.mean([1]) == math.comb(3, 3)",
    "recursion": "import sys\nsys.setrecursionlimit(9000)\ndef f(n): return n and f(n - 1)\nassert f(8000) == 0",
    "output": "import logging, sys, traceback, warnings\nprint('x' * 100)\nwarnings.warn('x'); logging.warning('x')\n"
    "try: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()",
    "input": "try: input()\nexcept EOFError: pass",
    "pickle": "import copy, enum, pickle\nclass C(enum.Enum):\n    A = 1\n"
    "assert pickle.loads(pickle.dumps(C.A)) is C.A",
    "rare modules": "import ctypes, email.mime.text, lzma, sched, tomllib, xml.etree.ElementTree, zipfile, zoneinfo",
    "an alarm": "import signal, time\nseen = []\nsignal.signal(signal.SIGALRM, lambda *_: seen.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile not seen: time.sleep(0.01)",
}
ENDED = {
    "a loop without alarms": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0)\nwhile 1: pass",
    "sleep without signals": "import signal as s, time\ns.pthread_sigmask(s.SIG_BLOCK, range(1, 65))\ntime.sleep(99)",
    "loud output": "while 1: print('x' * 100000)",
    "a large number": "10 ** 10 ** 10",
    "a slow pattern": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "threads": "import threading\nthreading.stack_size(32768)\nwhile 1: threading.Thread(target=lambda: [0 for _ in "
    "iter(int, 1)]).start()",
    "threads and alarms": "import signal, threading\nsignal.signal(signal.SIGALRM, lambda *_: None)\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)\nwhile 1:\n    try: threading.Thread(target=int).start()\n"
    "    except RuntimeError: pass",
    "memory": "x = []\nwhile 1: x.append(bytearray(10 ** 6))",
    "pipes": "import os\nwhile 1: os.write(os.pipe()[1], bytes(65536))",
    "nothing": "import ctypes; ctypes.string_at(0)",
    "brackets": "(" * 100000,
    "signs": "-" * 1000000 + "1",
    "no descriptors": "import os; os.closerange(0, 64)",
    "an early end": "import os; os._exit(0)",
    "a polite end": "raise SystemExit(0)",
    "what the tests are read from": "import os\nwhile 1: os.read(3, 100)",
}
FORGED = {
    "words": "import os\nfor _ in range(1000):\n    for d in range(64):\n        try: os.write(d, b'test passed\\n')\n"
    "        except OSError: pass",
    "zeros": "import os\nfor d in range(64):\n    try: os.write(d, bytes(9000))\n    except OSError: pass",
    "in a test": "import os\ndef f(): os.write(3, bytes(9000))",
    "the runner's write": "import os\nw = os.write\nos.write = lambda d, b: w(d, b[:-1] + bytes(1))",
    "the runner's exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *_: None",
    "the runner's types": "import builtins\nbuiltins.type = builtins.id = lambda _: 0\n"
    "builtins.bytes = lambda _: b'\\0'",
}


def python_for(user: int) -> str:
    """An interpreter that this user may start."""
    names = [sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""]
    asked = "import sys; sys.exit(sys.version_info < (3, 11))"
    for name in filter(None, names):
        try:
            if subprocess.run([name, "-c", asked], user=user, group=user, extra_groups=[]).returncode == 0:
                return name
        except PermissionError:
            continue
    pytest.skip("no interpreter that another user may start")


@pytest.fixture(params=["this user", "nobody"])
def user(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Programs run as the user who runs the tests; where that is root also as an ordinary user."""
    if request.param == "nobody":
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        monkeypatch.setattr(sandbox.sys, "executable", python_for(NOBODY))
        other = partial(subprocess.Popen, user=NOBODY, group=NOBODY, extra_groups=[])
        monkeypatch.setattr(sandbox.subprocess, "Popen", other)
    monkeypatch.setattr(sandbox, "_IDLE", [])
    yield request.param
    for supervisor in sandbox._IDLE:
        supervisor.close()


def run(program: str, *tests: str, seconds: float = 60.0) -> tuple[int, str | None]:
    outcome = sandbox.run_tests(program, list(tests or ["assert True"]), seconds, 256)
    return outcome.passed, outcome.failure


# --- what programs try --------------------------------------------------------------------------------------------
def test_nothing_of_the_machine_can_be_seen_or_touched(user: str) -> None:
    attacks = REFUSED if os.uname().machine != "x86_64" else REFUSED | {
        name: f"{CALL}call({arguments})" for name, arguments in CALLS.items()
    }  # fmt: skip
    found = {name: run(program) for name, program in attacks.items()}
    assert {name: said for name, said in found.items() if said != (0, "program failed: PermissionError")} == {}


def test_hostile_programs_end_in_time_and_pass_nothing(user: str) -> None:
    for name, program in ENDED.items():
        passed, failure = run(program, seconds=0.2)
        assert passed == 0 and failure, name


def test_results_cannot_be_written_by_the_program(user: str) -> None:
    for name, program in FORGED.items():
        passed, failure = run(program, "f()\nassert False", "assert False", "assert False")
        assert passed == 0 and failure, name
    assert run(FORGED["in a test"], "f()") == (0, "program failed: it wrote where its results go")
    assert run("import os\ndef f(): os._exit(0)", "assert True", "f()", "assert True") == (1, "ended early")


def test_only_names_of_builtin_exceptions_are_told() -> None:
    names = ["x" * 65536, SECRET, "ValueError", "\x1b[31mred\n"]
    for name in names:
        assert run(f"raise type({name!r}, (ValueError,), {{}})") == (0, "program failed: an exception of its own")
    hiding = "class M(type):\n    def __eq__(*_): raise KeyError\n    __hash__ = type.__hash__\nclass E(Exception, "
    assert run(hiding + "metaclass=M): pass\nraise E") == (0, "program failed: an exception of its own")
    assert run("x = {}", "x[1]", "raise SystemExit") == (0, "test failed: KeyError")


def test_programs_are_given_nothing_of_the_worker(user: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    kept = (tmp_path / "kept").open("w+")
    os.set_inheritable(kept.fileno(), True)
    kept.write(SECRET)
    kept.flush()
    halves = f"word = {SECRET[:8]!r} + {SECRET[8:]!r}\n"
    look = (
        f"{halves}import gc, os, sys\nassert not os.environ and sys.argv == [''] and not sys.path\n"
        "for d in range(64):\n    try: os.lseek(d, 0, 0); found = os.read(d, 100)\n    except OSError: continue\n"
        "    assert word.encode() not in found\n"
        "for o in gc.get_objects():\n"
        "    assert type(o) is not dict or o is globals() or word not in map(str, list(o.values()))\n"
        "assert not [name for name in sys.modules if 'deltaray' in name]"
    )
    assert run(look) == (1, None)
    assert run("import numpy") == (0, "program failed: ModuleNotFoundError")
    kept.close()


# --- what honest programs need ------------------------------------------------------------------------------------
def test_the_standard_library_works(user: str) -> None:
    found = {name: run(program) for name, program in WORKING.items()}
    assert {name: said for name, said in found.items() if said != (1, None)} == {}


def test_thousands_of_tests_are_all_counted() -> None:
    assert run("x = 1", *["assert x"] * 5000) == (5000, None)


def test_many_programs_at_once_are_all_run() -> None:
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda n: run(f"x = {n}", f"assert x == {n}"), range(100)))
    assert found == [(1, None)] * 100 and len(sandbox._IDLE) <= (os.cpu_count() or 1)


def test_the_last_block_that_compiles_is_the_program() -> None:
    function = sandbox.python_tests_scorer(PythonTests(kind="python_tests", memory_mib=256))
    blocks = ["x = 1", "x = 2", "x = (", "-" * 100000 + "1", "this is no python"]
    text = "\n".join(f"```python\n{block}\n```" for block in blocks)
    assert function(Response("t", text, "assert x == 2")).value == 1
    assert function(Response("t", "(" * 100000, "assert True")).note == "program failed: SyntaxError"
    assert function(Response("t", "x = '\ud800'", "assert len(x) == 1")).value == 0


# --- the processes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("begin", "told"),
    [
        ("import platform; platform.machine = lambda: 'riscv64'", "no table of system calls for riscv64"),
        (
            "from deltaray.score.programs import confinement; confinement.install = lambda *_: 0",
            "the filter does not hold",
        ),
    ],
)
def test_where_nothing_confines_nothing_is_run(begin: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_IDLE", [])
    path, _, rest = sandbox.BEGIN.partition("; from")
    monkeypatch.setattr(sandbox, "BEGIN", f"{path}; {begin}\nfrom{rest}")
    with pytest.raises(UserError, match=rf"programs cannot be confined on this machine \({told}\)"):
        run("x = 1")
    assert not sandbox._IDLE


def test_where_threads_cannot_be_counted_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_IDLE", [])
    path, _, rest = sandbox.BEGIN.partition("; from")
    refused = "from deltaray.score.programs import confinement; confinement.NEW_LISTENER = 1 << 20"
    monkeypatch.setattr(sandbox, "BEGIN", f"{path}; {refused}; from{rest}")
    assert run("import threading", "threading.Thread(target=int).start()", "1") == (1, "test failed: RuntimeError")
    sandbox._IDLE.pop().close()


def test_a_process_that_dies_is_its_row_s_failure_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_IDLE", [])
    function = sandbox.python_tests_scorer(PythonTests(kind="python_tests", seconds=60, memory_mib=256))
    asked = partial(scored, function, Response("t", "import time; time.sleep(0.5)", "assert time"))
    gone = "scorer failed: RuntimeError: the process that runs programs is gone"
    assert asked().value == 1
    killer = threading.Timer(0.1, sandbox._IDLE[0].process.kill)
    killer.start()
    assert str(asked().note).startswith(gone) and asked().value == 1
    sandbox._IDLE[0].process.kill()  # between two programs: nobody's fault
    sandbox._IDLE[0].process.wait()
    assert asked().value == 1
    monkeypatch.setattr(sandbox, "_IDLE", [])
    monkeypatch.setattr(sandbox, "BEGIN", "raise SystemExit")
    assert str(asked().note).startswith(gone)


def test_nobody_can_read_this_process_while_programs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    libc, seen, asked = ctypes.CDLL(None), [], sandbox._asked
    before = libc.prctl(sandbox.PR_GET_DUMPABLE, 0, 0, 0, 0)

    def watched(*arguments: Any) -> Any:
        seen.append(libc.prctl(sandbox.PR_GET_DUMPABLE, 0, 0, 0, 0))
        return asked(*arguments)

    monkeypatch.setattr(sandbox, "_asked", watched)
    run("x = 1")
    assert seen == [0] and libc.prctl(sandbox.PR_GET_DUMPABLE, 0, 0, 0, 0) == before


def test_the_process_that_runs_programs_ends_with_its_worker() -> None:
    begin = "from deltaray.score.programs import sandbox as s"
    code = f"{begin}\ns.run_tests('', ['1'], 1.0, 256)\nprint(s._IDLE[0].process.pid)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    stat = Path(f"/proc/{int(said)}/stat")
    for _ in range(200):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")
