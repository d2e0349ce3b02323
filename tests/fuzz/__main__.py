"""The long run: many inputs for every door, each door in a process of its own that is watched.

    nice -n 10 .venv/bin/python -m tests.fuzz --inputs 100000 --seed 1

Counts tracebacks (anything but a result or one of our two errors), hangs (an input that takes more than 5 s of this
process's CPU time, or three minutes on the clock: then the process is ended and goes on behind it), deaths of the
process, and its peak memory. Writes `tests/benchmarks/results/fuzz.json`: every failure with its number, of which
`--door D --seed S --only N` makes the same input again.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.run import only, work

SHARES = {"recipes": 0.65, "prompts": 0.27, "models": 0.05, "outs": 0.03}
"""Of all inputs, by door: a tampered study takes longest."""
CLOCK_SECONDS = 180.0
BAD = ("traceback", "hang", "death")
KEPT = 40
"""Failures that are written down."""
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"


def run_door(door: str, seed: int, inputs: int, until: float) -> dict[str, Any]:
    """All inputs of one door, or as many as there is time for."""
    record: dict[str, Any] = {"inputs": 0, "ended": Counter(), "failures": [], "peak_mib": 0, "slowest_cpu_s": 0.0}
    began, left = time.monotonic(), list(range(inputs))
    while left:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(door, seed, left, there), daemon=True)
        process.start()
        there.close()
        left = _follow(process, here, record, left, until)
        process.kill()
        process.join()
    return record | {"ended": dict(record["ended"]), "seconds": round(time.monotonic() - began)}


def _follow(process: Any, here: Any, record: dict[str, Any], left: list[int], until: float) -> list[int]:
    """Reads what a process tells until it ends or hangs, or the time is over; the inputs that are left then."""
    current = None
    while time.monotonic() < until:
        try:
            told = here.recv() if here.poll(CLOCK_SECONDS if current is not None else 900) else {}
        except EOFError:
            process.join(10)
            told = {"died": f"exit code {process.exitcode}"}
        if "starts" in told:
            current = told["starts"]
        elif "ended" in told:
            _count(record, told)
            current = None
        elif "done" in told:
            record |= {"before_mib": told["before_mib"]}
            return []
        elif current is None:
            raise RuntimeError(f"the process ended before its first input, or between two: {told}")
        else:
            ended, why = ("death", told["died"]) if told else ("hang", f"more than {CLOCK_SECONDS:g} s on the clock")
            _count(record, {"number": current, "ended": ended, "why": why})
            return [number for number in left if number > current]
    return []


def _count(record: dict[str, Any], told: dict[str, Any]) -> None:
    record["inputs"] += 1
    record["ended"][told["ended"]] += 1
    record["slowest_cpu_s"] = round(max(record["slowest_cpu_s"], told.get("cpu", 0.0)), 2)
    record["peak_mib"] = max(record["peak_mib"], told.get("peak_mib", 0))
    if told["ended"] in BAD:
        last = told["why"].strip().splitlines()[-1][:300]
        print(f"input {told['number']}: {told['ended']}: {last}", file=sys.stderr, flush=True)
        if len(record["failures"]) < KEPT:
            record["failures"].append({"number": told["number"], "ended": told["ended"], "why": told["why"][-2000:]})
    elif record["inputs"] % 500 == 0:
        print(f"{record['inputs']:,} {dict(record['ended'])}", file=sys.stderr, flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz")
    asked.add_argument("--inputs", type=int, default=10_000, help="of all doors together")
    asked.add_argument("--minutes", type=float, default=24 * 60.0, help="what is not done by then is left")
    asked.add_argument("--seed", type=int, default=1)
    asked.add_argument("--door", choices=list(SHARES))
    asked.add_argument("--only", type=int, help="one input of --door, in this process, with its traceback")
    asked.add_argument("--record", type=Path, default=RESULT, help="where the record goes")
    options = asked.parse_args()
    if options.only is not None:
        print(only(options.door, options.seed, options.only))
        return
    shares = {options.door: 1.0} if options.door else SHARES
    until = time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(len(shares)) as side_by_side:
        started = {
            door: side_by_side.submit(run_door, door, options.seed, round(options.inputs * share), until)
            for door, share in shares.items()
        }
        doors = {door: it.result() for door, it in started.items()}
    ended = sum((Counter(door["ended"]) for door in doors.values()), Counter[str]())
    total = {"inputs": sum(door["inputs"] for door in doors.values()), **{name: ended[name] for name in BAD}}
    total |= {"peak_mib": max(door["peak_mib"] for door in doors.values())}
    options.record.write_text(json.dumps({"seed": options.seed, **total, "doors": doors}, indent=1) + "\n")
    print(json.dumps(total, indent=1))


if __name__ == "__main__":
    main()
