"""Machines on this computer, each with its own address, processes, host name, disk and clock, and their misfortunes.

A machine is a set of Linux namespaces under one process. It hangs on a bridge by a cable (a veth pair); when its first
process dies, the kernel kills all others and takes the network down with them. Root only.
"""

import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "cc": "gcc",
}
"""What is needed, and the Debian package that has it."""
CLOCK = Path(__file__).with_name("clock.c")
DISK = "/tmp/ray"
"""Where a machine has a disk of its own; everything else it shares with this computer."""
BOOT = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts && mount --bind /dev/null /etc/resolv.conf
mkdir -p {disk} && mount -t tmpfs -o size={room}m tmpfs {disk} && mkdir {disk}/tmp
ip link set lo up
echo up
while :; do sleep 1000 & wait; done
"""


def unavailable(*programs: str) -> str | None:
    """Why no machines can be made here, None if they can.

    Args:
        programs: what else must be installed.
    """
    if os.geteuid():
        return "network namespaces need root"
    lacking = [name for name in (*PROGRAMS, *programs) if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(PROGRAMS.get(name, name) for name in lacking)}"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.decode().strip()}"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machine:
    """One machine; made by `Network.machine`, which starts it."""

    def __init__(self, name: str, number: int, network: "Network", room: int) -> None:
        self.name, self.network, self.room = name, network, room
        self.address = f"{network.prefix}.{10 + number}"
        self.cable = f"{network.bridge}m{number}"
        self.folder = network.folder / name
        self.folder.mkdir()
        self.clock = self.folder / "clock"
        self.set_clock(0)
        self.first: subprocess.Popen[str] | None = None
        self.blocked: set[str] = set()

    # --- on and off -------------------------------------------------------------------------------------------------
    def boot(self) -> None:
        """Starts it, with an empty disk."""
        # As Debian's installer writes it: a machine's own name points to itself and helps nobody else.
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        script = BOOT.format(name=self.name, folder=self.folder, disk=DISK, room=self.room)
        spaces = ("--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        self.first = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.first.stdout is not None and self.first.stdout.readline() == "up\n", f"{self.name} does not start"
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", str(self.init))
        ip("link", "set", self.cable, "master", self.network.bridge, "up")
        self.inside("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.inside("ip", "link", "set", "eth0", "up")
        self.inside("ip", "route", "add", "default", "via", self.network.address)
        self.blocked.clear()

    def kill(self) -> None:
        """Power off: no process of it does anything any more."""
        if self.first is None:
            return
        left = self.processes()
        self.first.kill()  # the first process inside dies with it, and takes all others along
        self.first.wait()
        self.first = None
        _, alive = psutil.wait_procs(left, timeout=30)
        assert not alive, f"outlived their machine: {alive}"
        subprocess.run(["ip", "link", "del", self.cable], capture_output=True)  # gone with the namespace, but later

    @property
    def on(self) -> bool:
        return self.first is not None

    @property
    def init(self) -> int:
        """Its first process, as this computer numbers it."""
        assert self.first is not None, f"{self.name} is off"
        return psutil.Process(self.first.pid).children()[0].pid

    # --- what runs on it --------------------------------------------------------------------------------------------
    def command(self, *command: str) -> list[str]:
        """What this computer runs so that the command runs on the machine, in the network's folder."""
        entered = ("--mount", "--net", "--pid", "--uts", "--ipc")
        return ["nsenter", "--target", str(self.init), *entered, "env", f"--chdir={self.network.folder}", *command]

    def inside(self, *command: str) -> None:
        """Runs a command there to its end; it must succeed."""
        subprocess.run(self.command(*command), check=True, capture_output=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: IO[Any]) -> "subprocess.Popen[Any]":
        """Starts a command there; end it with `end`."""
        own = {"TMPDIR": f"{DISK}/tmp", "RAY_TMPDIR": str(Path(DISK).parent)}
        own |= {"LD_PRELOAD": str(self.network.clocks), "CLOCK_OFFSET": str(self.clock)}
        started = self.command(*command)
        return subprocess.Popen(started, env={**os.environ, **environment, **own}, stdout=log, stderr=log)

    def processes(self) -> list[psutil.Process]:
        """All that runs on it, in the order of their numbers, but for the first."""
        return [it for it in psutil.process_iter() if it.pid != self.init and _space(it.pid) == _space(self.init)]

    # --- misfortunes ------------------------------------------------------------------------------------------------
    def pull_cable(self) -> None:
        ip("link", "set", self.cable, "down")

    def plug_cable(self) -> None:
        ip("link", "set", self.cable, "up")

    def block(self, other: "Machine") -> None:
        """Nothing goes from here to there any more; all other ways stay open."""
        self.inside("ip", "route", "add", "blackhole", f"{other.address}/32")
        self.blocked.add(other.address)

    def unblock(self) -> None:
        while self.blocked:
            self.inside("ip", "route", "del", "blackhole", f"{self.blocked.pop()}/32")

    def set_clock(self, ahead: float) -> None:
        """Its time of day, at once and for all that runs there: so many seconds before that of this computer."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # the same file: it is mapped
            file.write(struct.pack("=d", ahead))

    def fill_disk(self) -> None:
        """Nothing more fits on its own disk."""
        with suppress(OSError), self._ballast().open("wb", buffering=0) as sink:
            while True:
                sink.write(bytes(2**20))

    def free_disk(self) -> None:
        self._ballast().unlink(missing_ok=True)

    def _ballast(self) -> Path:
        return Path(f"/proc/{self.init}/root{DISK}/ballast")


def _space(pid: int) -> Path | None:
    """The numbers that a process lives among, as a link; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None


def command_line(process: psutil.Process) -> str:
    """What it was started with, or the title that it has given itself; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def end(process: "subprocess.Popen[Any]") -> None:
    """SIGKILL to a command that was started on a machine, and to what it started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()


def clocks(folder: Path) -> Path:
    """The library that gives the processes of a machine its clock."""
    made = folder / "clock.so"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(CLOCK), "-o", str(made), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made


class Network:
    """A bridge, on which this computer is 1 and the machines are 10 and more."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid()
        self.bridge = f"dr{number}"
        self.prefix = f"10.{128 + number // 256 % 64}.{number % 256}"
        self.address = f"{self.prefix}.1"
        self.folder = folder
        self.clocks = clocks(folder)
        self.machines: list[Machine] = []

    def machine(self, name: str, room: int = 1024) -> Machine:
        """A new machine, started; `room`: MiB of its disk."""
        made = Machine(name, len(self.machines), self, room)
        self.machines.append(made)
        made.boot()
        return made

    def close(self) -> None:
        for machine in self.machines:
            machine.kill()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)


@contextmanager
def network() -> Iterator[Network]:
    """A network whose machines, and everything else that was made for it, are gone at the end."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix="dr", ignore_cleanup_errors=True) as folder:
        made = Network(Path(folder))
        try:
            # with an address of its own: otherwise it takes over that of a cable, and changes it when that goes
            ip("link", "add", made.bridge, "address", "02:00:00:00:00:01", "type", "bridge")
            ip("addr", "add", f"{made.address}/24", "dev", made.bridge)
            ip("link", "set", made.bridge, "up")
            yield made
        finally:
            made.close()


def _sweep() -> None:
    """Removes the bridges of those who were killed; their machines ended with them."""
    for link in Path("/sys/class/net").glob("dr*"):
        number = link.name.removeprefix("dr")
        if number.isdigit() and not psutil.pid_exists(int(number)):
            subprocess.run(["ip", "link", "del", link.name], capture_output=True)
