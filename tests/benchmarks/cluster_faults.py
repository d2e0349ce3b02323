"""What befalls a cluster of machines: one fault after the other, drawn by a seed, each put right after a while."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from machine_cluster import GCS, RAYLET, MachineCluster, title
from machines import Machine, command_line
from s3_server import Gate

PAUSE = 16.0
"""At most so many seconds between two faults."""
SHORT, LONG = 2.0, 30.0
"""Seconds that a fault lasts. The head takes a node for dead after about 15 without an answer."""
HOUR = 3600.0
OURS, AGENT = ("Map", "RayTrainWorker", "publish"), "Agent"
"""How the titles of processes begin that work for us, and what is in those of Ray's agents."""
Name = Callable[[psutil.Process], str]
"""What a process is called; empty if it is not meant."""


@dataclass(frozen=True)
class Fault:
    """What was done."""

    kind: str
    what: str
    lasted: float  # seconds until it was put right; 0 where there is nothing to put right
    during: str  # the stage

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"lasted": round(self.lasted, 1)}


class Faults:
    """Draws faults and lets them happen; `tend` is called all the time meanwhile."""

    def __init__(
        self,
        cluster: MachineCluster,
        gate: Gate,
        draw: random.Random,
        tend: Callable[[], None],
        stage: Callable[[], str],
    ) -> None:
        self.cluster, self.gate, self.draw, self.tend, self.stage = cluster, gate, draw, tend, stage
        self.kinds: dict[str, Callable[[], str]] = {
            "worker killed": self.worker,
            "agent killed": self.agent,
            "actor of a command killed": self.actor,
            "process frozen": self.freeze,
            "node killed and added": self.node,
            "head killed and started": self.head,
            "cable pulled": self.cable,
            "way between two nodes cut": self.way,
            "storage slow and failing": self.storage,
            "storage away": self.outage,
            "disk full": self.disk,
            "clock wrong": self.clock,
            "command killed": self.command,
        }
        self.waiting: list[str] = []
        self.done: list[Fault] = []

    def next(self) -> None:
        """One fault, after a pause; each kind comes once before one comes again."""
        self.let_pass(self.draw.uniform(0, PAUSE))
        if not self.waiting:
            self.waiting = self.draw.sample(list(self.kinds), len(self.kinds))
        kind, stage, began = self.waiting.pop(), self.stage(), time.monotonic()
        what = self.kinds[kind]()
        self.done.append(Fault(kind, what, time.monotonic() - began, stage))

    def let_pass(self, seconds: float) -> float:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tend()
            time.sleep(0.2)
        return seconds

    def _a_while(self, least: float = SHORT, most: float = LONG) -> None:
        self.let_pass(self.draw.uniform(least, most))

    # --- processes and machines -------------------------------------------------------------------------------------
    def worker(self) -> str:
        """A process that works for us: an engine, a task, a training worker."""
        return self._kill(working, self.cluster.workers)

    def agent(self) -> str:
        """One of Ray's agents on a node."""
        return self._kill(lambda process: title(process) if AGENT in title(process) else "", self.cluster.workers)

    def actor(self) -> str:
        """An actor beside the command: Ray Train's controller, what gathers progress, Ray Data's own."""
        return self._kill(lambda process: "" if AGENT in title(process) else title(process), [self.cluster.desk])

    def _kill(self, name: Name, machines: Sequence[Machine]) -> str:
        what, victim = self._victim(machines, name)
        if victim is not None:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        return what

    def freeze(self) -> str:
        """A process that works for us, a raylet or the head's GCS, for a while."""
        what, victim = self._victim([self.cluster.head, *self.cluster.workers], lambda it: working(it) or daemon(it))
        if victim is not None:
            with suppress(psutil.NoSuchProcess):
                victim.suspend()
                self._a_while()
                victim.resume()
        return what

    def _victim(self, machines: Sequence[Machine], name: Name) -> tuple[str, psutil.Process | None]:
        """One of the processes there that have a name, as soon as there is one."""
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            found = [(it, machine, name(it)) for machine in machines for it in machine.processes()]
            if named := [entry for entry in found if entry[2]]:
                victim, machine, called = self.draw.choice(named)
                return f"{called} on {machine.name}", victim
            self.let_pass(0.2)
        return "nobody was there", None

    def node(self) -> str:
        machine = self.draw.choice(self.cluster.workers)
        self.cluster.kill(machine)
        self._a_while(most=15)
        self.cluster.restore(machine)
        return machine.name

    def head(self) -> str:
        self.cluster.kill(self.cluster.head)
        self._a_while(most=15)
        self.cluster.restore(self.cluster.head)
        return "head"

    def command(self) -> str:
        """What is given at the desk; the desk itself stays."""
        for process in self.cluster.desk.processes():
            if "fake_engine.py" in command_line(process):
                process.kill()
        return "desk"

    # --- the network ------------------------------------------------------------------------------------------------
    def cable(self) -> str:
        machine = self.draw.choice(self.cluster.machines)
        machine.pull_cable()
        self._a_while()
        machine.plug_cable()
        return machine.name

    def way(self) -> str:
        """Two workers do not reach each other; the head and the storage reach both."""
        one, other = self.draw.sample(self.cluster.workers, 2)
        _both(one, other, Machine.block)
        self._a_while()
        one.unblock()
        other.unblock()
        return f"{one.name}, {other.name}"

    # --- storage and disks -----------------------------------------------------------------------------------------
    def storage(self) -> str:
        self.gate.delay, self.gate.busy = self.draw.uniform(0.1, 1), self.draw.uniform(0.1, 0.5)
        what = f"{self.gate.delay:.1f} s a request, {self.gate.busy:.0%} refused with 500 or 503"
        self._a_while()
        self.gate.delay = self.gate.busy = 0.0
        return what

    def outage(self) -> str:
        self.gate.busy = 1.0
        self._a_while()
        self.gate.busy = 0.0
        return "all requests refused with 500 or 503"

    def disk(self) -> str:
        machine = self.draw.choice(self.cluster.workers)
        machine.fill_disk()
        self._a_while(most=15)
        machine.free_disk()
        return machine.name

    def clock(self) -> str:
        """The time of day jumps, and after a while back."""
        machine, ahead = self.draw.choice(self.cluster.machines), self.draw.choice((-1, 1)) * self.draw.uniform(1, HOUR)
        machine.set_clock(ahead)
        self._a_while()
        machine.set_clock(0)
        return f"{machine.name} by {ahead:+.0f} s"


def _both(one: Machine, other: Machine, act: Callable[[Machine, Machine], None]) -> None:
    act(one, other)
    act(other, one)


def working(process: psutil.Process) -> str:
    """What a process does for us; empty for Ray's own."""
    name = title(process)
    return name if name.startswith(OURS) else ""


def daemon(process: psutil.Process) -> str:
    """What of Ray itself a process is."""
    line = command_line(process)
    return next((name for name, mark in {"raylet": RAYLET, "GCS": GCS}.items() if mark in line), "")
