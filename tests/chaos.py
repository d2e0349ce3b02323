"""Chaos: the real command line on a study whose processes are killed at random moments.

`Command` is a running command and its processes, `chaos` the schedule. Used by the tests and the benchmarks.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from lab import Lab, Published, check_complete, leftovers, published

ROOT = Path(__file__).parent.parent
FAKE = (sys.executable, str(ROOT / "tests" / "fake_engine.py"))
REAL = (sys.executable, "-m", "deltaray")


# --- commands and kills -------------------------------------------------------------------------------------------
class Command:
    """A command in processes of its own, and what can be killed of it."""

    def __init__(self, lab: Lab, *arguments: str, program: tuple[str, ...] = FAKE, heard: bool = True) -> None:
        self.lab = lab
        environment = os.environ | lab.behaviour.variable() | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*program, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        if not heard:
            self.process.stderr.close()
        self.stderr: list[str] = []
        self.workers: list[psutil.Process] = []  # whoever was seen to write
        self.reader = threading.Thread(target=self._read if heard else list, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.stderr.extend(self.process.stderr)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def result(self, timeout: float = 240) -> tuple[int, str]:
        """(exit code, stderr) once it has ended; the processes below it are gone then, too."""
        code = self.process.wait(timeout)
        _, alive = psutil.wait_procs(self.workers, timeout=30)
        assert not alive, f"outlived their command: {alive}"
        self.reader.join()
        return code, "".join(self.stderr)

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def find(self, kind: str) -> list[psutil.Process]:
        """The living processes of a kind: driver, raylet, gcs, engine, worker (a task's) or publish."""
        if kind == "driver":
            return [psutil.Process(self.process.pid)] if self.runs else []
        found = [process for process in self.children() if kind_of(process) == kind]
        if kind in GENTLE:
            self.workers += [process for process in found if process not in self.workers]
        return found

    def kill(self, kind: str, draw: random.Random, patience: float = 20.0) -> bool:
        """SIGKILL to one process of the kind as soon as there is one; False: the command ended before."""
        until = time.monotonic() + patience
        while self.runs:
            if found := self.find(kind):
                try:
                    draw.choice(sorted(found, key=lambda process: process.pid)).kill()
                except psutil.NoSuchProcess:
                    continue
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return False


def kind_of(process: psutil.Process) -> str | None:
    """Ray writes into a worker's title what it runs."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return None
    if "ray::" in title:
        name = title.partition("ray::")[2]
        return next((kind for mark, kind in TITLES.items() if name.startswith(mark)), None)
    program = title.partition(" ")[0].rpartition("/")[2]
    return {"raylet": "raylet", "gcs_server": "gcs"}.get(program)


TITLES = {"publish": "publish", "MapWorker(Map": "engine", "Map(": "worker"}


# --- the schedule -------------------------------------------------------------------------------------------------
GENTLE = ("engine", "worker", "publish")
"""A command survives these."""
FATAL = ("driver", "raylet")
"""These end it; the next one resumes."""


@dataclass
class Outcome:
    """What a chaos did and found."""

    kills: Counter[str] = field(default_factory=Counter)
    changes: list[str] = field(default_factory=list)
    exits: list[tuple[str, int, str]] = field(default_factory=list)  # what was killed last, exit code, stderr
    rows: int = 0


def chaos(
    lab: Lab,
    draw: random.Random,
    kills: int,
    per_command: int = 6,
    pause: float = 0.6,
    say: Callable[[str], None] = print,
    program: tuple[str, ...] = FAKE,
    changes: bool = True,
) -> Outcome:
    """Runs commands and kills in them until there were `kills`, then one to the end; checks after each command.

    Args:
        pause: at most so many seconds between two kills.
    """
    outcome = Outcome()
    recipe = str(lab.write())
    before: dict[str, Published] = {}
    while (left := kills - outcome.kills.total()) > 0:
        gentle = [draw.choice(GENTLE) for _ in range(min(per_command, left) - 1)]
        fatal = FATAL[len(outcome.exits) % len(FATAL)]
        last = _disturb(Command(lab, "generate", recipe, program=program), [*gentle, fatal], draw, pause, outcome)
        now = {name: published(lab, name) for name in lab.temperatures}
        for name, then in before.items():
            assert then.kept_in(now[name]), f"{name}: {len(then.keys - now[name].keys)} published rows are gone"
        before = now
        say(f"{last}: {dict(outcome.kills)}, {sum(len(it.keys) for it in now.values())} rows published")
        if changes and (last == "finished" or draw.random() < 0.5):
            outcome.changes.append(lab.change(draw))
            say(outcome.changes[-1])
    code, stderr = Command(lab, "generate", recipe, program=program).result()
    assert code == 0, stderr[-3000:]
    outcome.rows = check_complete(lab)
    assert not leftovers(lab.out), leftovers(lab.out)
    return outcome


def _disturb(command: Command, planned: list[str], draw: random.Random, pause: float, outcome: Outcome) -> str:
    """Kills as planned; returns the last kind, or `finished` where the command was done first."""
    last = "finished"
    for kind in planned:
        if command.kill(kind, draw):
            outcome.kills[kind] += 1
            last = kind
        time.sleep(draw.uniform(0, pause))
    if last not in FATAL and command.runs:
        command.process.send_signal(signal.SIGKILL)
    code, stderr = command.result()
    allowed = {"finished": (0,), "driver": (-signal.SIGKILL,), "raylet": (0, 1)}.get(last, (0, 1, -signal.SIGKILL))
    assert code in allowed, f"exit code {code} after {last}: {stderr[-2000:]}"
    outcome.exits.append((last, code, stderr))
    return last
