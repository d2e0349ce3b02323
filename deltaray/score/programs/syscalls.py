"""The system calls that a confined program may make, as a seccomp filter. Imports nothing but the standard library.

The list holds what computing takes and no call that names a file: not even that one exists can be learnt. Calls that
can do more than one thing are allowed by their command or flags. What is not listed fails with EPERM.

Why our own list: bubblewrap, nsjail and gVisor's runsc need namespaces, which Docker's default profile and most
Kubernetes clusters refuse; Landlock needs Linux 5.13, is switched off in some distributions and lets files be looked
up; pyseccomp needs a C library beside the wheel; Python on WebAssembly has no threads and starts slowly. A seccomp
filter works in all of these places, and costs a program well under a millisecond.
"""

import struct
from typing import NamedTuple

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}
"""The number of the call that installs a filter."""

EPERM, ENOSYS = 1, 38
WHOLE = 0xFFFFFFFF

# Numbers: (x86_64, aarch64), None where an architecture has no such call.
CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "poll": (7, None), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102),
    "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendto": (44, 206), "recvfrom": (45, 207),
    "socketpair": (53, 199), "clone": (56, 220), "exit": (60, 93), "fcntl": (72, 25), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "prlimit64": (302, 261), "getrandom": (318, 278), "rseq": (334, 293), "clone3": (435, 435),
    "close_range": (436, 436),
}  # fmt: skip


class Check(NamedTuple):
    """A word of the arguments, masked, must be one of some values."""

    offset: int  # in struct seccomp_data
    mask: int
    values: tuple[int, ...]
    errno: int = EPERM


def low(argument: int, values: tuple[int, ...], mask: int = WHOLE, errno: int = EPERM) -> Check:
    """Of an argument's lower half, which is all that flags and commands have."""
    return Check(16 + 8 * argument, mask, values, errno)


def flags(argument: int, allowed: int) -> Check:
    return Check(16 + 8 * argument, WHOLE ^ allowed, (0,))


def null(argument: int) -> list[Check]:
    return [low(argument, (0,)), Check(16 + 8 * argument + 4, WHOLE, (0,))]


CLOCKS = tuple(range(12))
"""The others are of processes."""
THREAD = 0x3D0F00
"""What libc starts a thread with; musl adds a flag that means nothing (0x400000)."""
ONLY = {
    "clone": [low(0, (THREAD, THREAD | 0x400000))],
    "clone3": [low(0, (), errno=ENOSYS)],  # its flags are in memory: libc then falls back on clone
    "fcntl": [low(1, (0, 1, 2, 3, 4, 1030))],  # duplicates, and flags of a descriptor; no owner, signal, lock or lease
    "ioctl": [low(1, (0x5401, 0x541B, 0x5421, 0x5450, 0x5451))],  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "madvise": [low(2, (0, 1, 2, 3, 4, 8, 14, 15))],  # how memory will be used
    "mmap": [flags(3, WHOLE ^ 0x40000)],  # no huge pages, of which the machine has a fixed number
    "futex": [low(1, (0, 1, 3, 4, 5, 9, 10), mask=0x7F)],  # waiting and waking; none that inherits priorities
    "prlimit64": [low(0, (0,)), *null(2)],  # its own limits may be read
    "socketpair": [low(0, (1,)), low(1, (1,), mask=0xF)],  # asyncio wakes itself through a connected pair
    "sendto": [flags(3, 0x4040), *null(4)],  # to where the socket is connected; nothing out of band
    "recvfrom": [flags(3, 0x4142)],
    "pipe2": [flags(1, 0x80800)],
    "sched_getaffinity": [low(0, (0,))],
    "clock_gettime": [low(0, CLOCKS)],
    "clock_getres": [low(0, CLOCKS)],
    "clock_nanosleep": [low(0, CLOCKS)],
}

Line = tuple[int, int, int, int]  # of a filter: code, lines to skip if true, if false, operand
LOAD, EQUAL, GREATER_EQUAL, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, FAIL, ASK = 0x7FFF0000, 0x80000000, 0x00050000, 0x7FC00000
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def seccomp_program(machine: str) -> bytes:
    """The filter as classic BPF. Pure.

    Raises:
        OSError: the numbers of this machine's system calls are not known here.
    """
    column = _column(machine)
    lines: list[Line] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls have numbers of their own
        lines += [(GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    for name, numbers in CALLS.items():
        lines += _allowed(numbers[column], ONLY.get(name, []))
    return _packed([*lines, _fail(EPERM)])


def thread_program(machine: str, answer: int) -> bytes:
    """A filter for new threads alone: the supervisor is asked about each (`ASK`), or there are none. Pure."""
    number = CALLS["clone"][_column(machine)]
    assert number is not None
    return _packed([(LOAD, 0, 0, NUMBER), (EQUAL, 0, 1, number), (RETURN, 0, 0, answer), (RETURN, 0, 0, ALLOW)])


def _column(machine: str) -> int:
    if machine not in AUDIT_ARCH:
        raise OSError(f"no table of system calls for {machine}")
    return list(AUDIT_ARCH).index(machine)


def _allowed(number: int | None, checks: list[Check]) -> list[Line]:
    """Allows a call if all checks hold."""
    if number is None:
        return []
    lines = [line for check in checks for line in _checked(check)]
    return [(EQUAL, 0, len(lines) + 1, number), *lines, (RETURN, 0, 0, ALLOW)]


def _checked(check: Check) -> list[Line]:
    """Falls through to the end if the check holds."""
    count = len(check.values)
    equal = [(EQUAL, count - place, 0, value) for place, value in enumerate(check.values)]
    return [(LOAD, 0, 0, check.offset), (AND, 0, 0, check.mask), *equal, _fail(check.errno)]


def _fail(errno: int) -> Line:
    return (RETURN, 0, 0, FAIL | errno)


def _packed(lines: list[Line]) -> bytes:
    return b"".join(struct.pack("HBBI", *line) for line in lines)
