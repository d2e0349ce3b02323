"""How many small programs of models a core runs and tests in the sandbox, beside a fresh interpreter for each.

    .venv/bin/python tests/benchmarks/programs.py [COUNT]

COUNT programs (default 1000) of the kind that HumanEval and MBPP ask for, three tests each, one after the other, as a
worker runs them. `cpu_ms` is the processor time of all processes together, which other work on the machine changes
little; `per_core` is what it comes to in a second; `wall_ms` is on the clock, with `load_before` beside it. Starting
the process that runs programs is done once per worker and stands by itself. Writes `results/programs.json`.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from miniature_seeds import hardware

from deltaray.score.programs import sandbox

RESULT = Path(__file__).parent / "results" / "programs.json"
PROGRAMS = [
    ("def add(a, b):\n    return a + b", ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]),
    (
        "from collections import Counter\nimport math\n\ndef common(words):\n"
        "    return Counter(words).most_common(1)[0][0]",
        ["assert common(['a', 'b', 'a']) == 'a'", "assert common('xyz') == 'x'", "assert math.isclose(1.0, 1.0)"],
    ),
    (
        "import re\nfrom functools import lru_cache\n\n@lru_cache(None)\ndef f(n):\n"
        "    return n if n < 2 else f(n - 1) + f(n - 2)",
        ["assert f(10) == 55", "assert f(80) > 10 ** 16", "assert re.match('a', 'abc')"],
    ),
    (
        "def primes(n):\n    return [p for p in range(2, n) if all(p % q for q in range(2, int(p ** 0.5) + 1))]",
        ["assert primes(10) == [2, 3, 5, 7]", "assert len(primes(500)) == 95", "assert primes(2) == []"],
    ),
]  # fmt: skip


def spent(work: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock and of processors, children that have ended included."""
    before, started = used(), time.perf_counter()
    work()
    return {"wall": time.perf_counter() - started, "cpu": used() - before}


def used() -> float:
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(it.ru_utime + it.ru_stime for it in times)


def sandboxed(count: int) -> None:
    """All in one supervisor, which is closed, so that its time is counted."""
    for number in range(count):
        program, tests = PROGRAMS[number % len(PROGRAMS)]
        outcome = sandbox.run_tests(program, tests, 5.0, 512)
        assert outcome.passed == len(tests), outcome
    while sandbox._IDLE:
        supervisor = sandbox._IDLE.pop()
        supervisor.socket.close()
        supervisor.process.wait()


def fresh(count: int) -> None:
    """No sandbox at all: what starting an interpreter for each costs."""
    for number in range(count):
        program, tests = PROGRAMS[number % len(PROGRAMS)]
        subprocess.run([sys.executable, "-I", "-S", "-c", "\n".join([program, *tests])], check=True)


def main(count: int = 1000) -> None:
    load = os.getloadavg()[0]
    start, all_of_them = spent(lambda: sandboxed(1)), spent(lambda: sandboxed(count + 1))
    each = {kind: 1000 * (all_of_them[kind] - start[kind]) / count for kind in start}
    other = {kind: 1000 * value / 100 for kind, value in spent(lambda: fresh(100)).items()}
    record = {
        "command": f"python tests/benchmarks/programs.py {count}",
        "hardware": hardware(),
        "load_before": round(load, 2),
        "programs": count,
        "start_ms": {kind: round(1000 * value, 1) for kind, value in start.items()},
        "sandbox": {"cpu_ms": round(each["cpu"], 2), "wall_ms": round(each["wall"], 2), "per_core": per_core(each)},
        "fresh_interpreter_without_sandbox": {"cpu_ms": round(other["cpu"], 2), "wall_ms": round(other["wall"], 2)},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def per_core(each: dict[str, float]) -> int:
    return int(1000 / each["cpu"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
