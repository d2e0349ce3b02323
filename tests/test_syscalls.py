"""The filter of system calls, interpreted here as the kernel does: what it allows on both architectures."""

import struct
from functools import partial

import pytest

from deltaray.score.programs import syscalls


def judged(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """What the kernel would do with a call: an interpreter of the few instructions that the filter has."""
    values = [argument & (2**64 - 1) for argument in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<iIQ6Q", number, syscalls.AUDIT_ARCH[machine], 0, *values)
    lines = list(struct.iter_unpack("<HBBI", program))
    held = at = 0
    while True:
        code, true, false, operand = lines[at]
        at += 1
        if code == syscalls.RETURN:
            return operand
        if code == syscalls.LOAD:
            (held,) = struct.unpack_from("<I", data, operand)
        elif code == syscalls.AND:
            held &= operand
        else:
            holds = held == operand if code == syscalls.EQUAL else held >= operand
            at += true if holds else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_goes_by_command(machine: str) -> None:
    program, column = syscalls.seccomp_program(machine), list(syscalls.AUDIT_ARCH).index(machine)
    judge = partial(judged, program, machine)
    number = {name: numbers[column] for name, numbers in syscalls.CALLS.items() if numbers[column] is not None}
    known = set(number.values())
    fine, refused = syscalls.ALLOW, syscalls.FAIL | syscalls.EPERM
    assert all(judge(other) == refused for other in set(range(600)) - known)
    assert {judge(number["fcntl"], 0, command) for command in (0, 1, 2, 3, 4, 1030)} == {fine}
    assert {judge(number["fcntl"], 0, command) for command in (5, 6, 7, 8, 10, 14, 1024, 1031)} == {refused}
    assert [judge(number["madvise"], 0, 0, advice) for advice in (4, 12, 100, 101)] == [fine] + [refused] * 3
    assert [judge(number["clone"], flags) for flags in (0x3D0F00, 17, 0x3D0F00 | 0x20000)] == [fine, refused, refused]
    assert judge(number["clone3"]) == syscalls.FAIL | syscalls.ENOSYS
    assert judge(number["prlimit64"], 0, 3, 0) == fine and judge(number["prlimit64"], 0, 3, 1 << 32) == refused
    assert judge(number["sendto"], 3, 0, 0, 0, 0) == fine and judge(number["sendto"], 3, 0, 0, 0, 1 << 40) == refused
    assert {judge(number[name], 1, 0, 0, 1) for name in ("sendto", "recvfrom")} == {refused}  # out of band
    assert judge(number["pipe2"], 0, 0x80000) == fine and judge(number["pipe2"], 0, 0x80) == refused
    assert judge(number["clock_gettime"], 3) == fine and judge(number["clock_gettime"], ~77 << 3 | 2) == refused
    assert judge(number["read"]) == fine and judge(0x40000000 | 39) in (syscalls.KILL, refused)
    assert judged(syscalls.thread_program(machine, 7), machine, number["clone"]) == 7
