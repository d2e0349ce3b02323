"""One door's inputs in this process: each told before it starts and when it has ended."""

import os
import random
import resource
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0
"""An input that takes longer counts as a hang."""
MEMORY = 12 << 30
"""Bytes of addresses that a door's process may take; what wants more fails."""


def generator(door: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{door} {seed} {number}")


def one(check: Any, door: str, seed: int, number: int) -> dict[str, Any]:
    """One input: how it ended, and how long it took."""
    began, clock = time.process_time(), time.monotonic()
    try:
        ended, why = check(generator(door, seed, number)), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        ended, why = "traceback", traceback.format_exc()
    spent = time.process_time() - began
    if spent > CPU_SECONDS and ended != "traceback":
        ended, why = "hang", f"{spent:.1f} s of CPU time"
    return {"number": number, "ended": ended, "why": why, "cpu": spent, "clock": time.monotonic() - clock}


def work(door: str, seed: int, numbers: list[int], told: Any, limited: bool = True) -> None:
    """In the door's process: tells before each input its number, behind it how it ended."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="deltaray-fuzz-") as folder:
        os.chdir(folder)
        check = import_module(f"tests.fuzz.{door}").prepare(Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        for number in numbers:
            told.send({"starts": number})
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            told.send(one(check, door, seed, number) | {"peak_mib": peak})
        told.send({"done": True, "before_mib": before // 1024})


class Told(list[Any]):
    """What a process would send."""

    send = list.append


def only(door: str, seed: int, number: int) -> str:
    """One input, as it was in the run of this seed, with its traceback."""
    told = Told()
    work(door, seed, [number], told, limited=False)
    found = told[1]
    return f"{found['ended']} ({found['cpu']:.2f} s)\n{found['why']}"
