"""The long run: many inputs for every door, each door in a process of its own that is watched.

    nice -n 10 .venv/bin/python -m tests.fuzz --inputs 100000 --seed 1

Counts tracebacks (anything but a result or one of our two errors), hangs (an input that takes more than 5 s of this
process's CPU time, or 60 s on the clock: then the process is ended and goes on behind it), deaths of the process, and
its peak memory. Writes `tests/benchmarks/results/fuzz.json`; every failure stands there with its number, and
`--door D --seed S --only N` makes it again.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.run import only, work

SHARES = {"recipes": 0.6, "prompts": 0.25, "models": 0.05, "outs": 0.1}
"""Of all inputs, by door: a folder of a model takes longest."""
CLOCK_SECONDS = 60.0
KEPT = 40
"""Failures that are written down."""
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"


def run_door(door: str, seed: int, inputs: int) -> dict[str, Any]:
    """All inputs of one door."""
    record: dict[str, Any] = {"inputs": 0, "ended": Counter(), "failures": [], "peak_mib": 0, "slowest_cpu_s": 0.0}
    began, left = time.monotonic(), list(range(inputs))
    while left:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(door, seed, left, there), daemon=True)
        process.start()
        there.close()
        left = _follow(process, here, record, left)
        process.kill()
        process.join()
    return record | {"ended": dict(record["ended"]), "seconds": round(time.monotonic() - began)}


def _follow(process: Any, here: Any, record: dict[str, Any], left: list[int]) -> list[int]:
    """Reads what a process tells until it ends or hangs; the inputs that are left then."""
    current = None
    while True:
        try:
            if not here.poll(CLOCK_SECONDS if current is not None else 600):
                _count(
                    record, {"number": current, "ended": "hang", "why": f"more than {CLOCK_SECONDS:g} s on the clock"}
                )
                break
            told = here.recv()
        except EOFError:
            process.join(10)
            if current is not None:
                _count(record, {"number": current, "ended": "death", "why": f"exit code {process.exitcode}"})
            break
        if "starts" in told:
            current = told["starts"]
        elif "ended" in told:
            _count(record, told)
            current = None
            if record["inputs"] % 200 == 0:
                print(f"{record['inputs']:,} {dict(record['ended'])}", file=sys.stderr, flush=True)
        else:
            record |= {name: max(value, record.get(name, 0)) for name, value in told.items()}
            return []
    if current is None:
        raise RuntimeError("the door's process ended before its first input, or between two")
    return [number for number in left if number > current]


def _count(record: dict[str, Any], told: dict[str, Any]) -> None:
    record["inputs"] += 1
    record["ended"][told["ended"]] += 1
    record["slowest_cpu_s"] = round(max(record["slowest_cpu_s"], told.get("cpu", 0.0)), 2)
    if told["ended"] in ("traceback", "hang", "death"):
        print(
            f"input {told['number']}: {told['ended']}: {told['why'].strip().splitlines()[-1][:300]}",
            file=sys.stderr,
            flush=True,
        )
        if len(record["failures"]) < KEPT:
            record["failures"].append({"number": told["number"], "ended": told["ended"], "why": told["why"][-2000:]})


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz")
    asked.add_argument("--inputs", type=int, default=10_000, help="of all doors together")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--door", choices=list(SHARES))
    asked.add_argument("--only", type=int, help="one input of --door, in this process, with its traceback")
    asked.add_argument("--record", type=Path, default=RESULT, help="where the record goes")
    options = asked.parse_args()
    if options.only is not None:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(only, (options.door, options.seed, options.only)))
        return
    shares = {options.door: 1.0} if options.door else SHARES
    doors = {}
    for door, share in shares.items():
        print(f"--- {door}", file=sys.stderr, flush=True)
        doors[door] = run_door(door, options.seed, round(options.inputs * share))
    ended = sum((Counter(door["ended"]) for door in doors.values()), Counter[str]())
    total = {"inputs": sum(door["inputs"] for door in doors.values())}
    total |= {name: ended[name] for name in ("traceback", "hang", "death")}
    record = {
        "seed": options.seed,
        **total,
        "peak_mib": max(door["peak_mib"] for door in doors.values()),
        "doors": doors,
    }
    print(json.dumps(total, indent=1))
    options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
