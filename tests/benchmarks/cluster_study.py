"""Studies of `cluster_chaos.py`: what they ask for, the commands that do them, and what must be there afterwards."""

import hashlib
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from chaos import FAKE
from lab import Lab, check_complete, leftovers, visible
from machine_cluster import MachineCluster, alive
from pyarrow import fs
from s3_server import Server

BUCKET = "study"
STAGES = ("generate", "score", "pair", "reference", "train")
COMMANDS = 15
"""At most so many commands may a study take."""
SECONDS = 900
"""In so many must a study end that nothing disturbs any more."""


@dataclass
class Study(Lab):
    """A study whose `out` is a folder of the bucket; the property `out` is where `fetch` puts a copy of it."""

    student: str = ""
    server: Server | None = None
    cluster: MachineCluster | None = None

    @property
    def address(self) -> str:
        assert self.server is not None
        return (
            f"s3://{BUCKET}/{self.folder.name}?endpoint_override={self.server.address}:{self.server.port}&scheme=http"
        )

    def recipe(self) -> dict[str, Any]:
        assert self.cluster is not None
        run = {"pairing": "delta", "loss": "dpo_norm", "beta": 5, "batch_size": 8, "epochs": 2, "learning_rate": 1e-4}
        training = {"workers": 2, "cpus_per_worker": self.cluster.cpus}  # one worker a node
        training |= {"zero_stage": 3, "dtype": "float32", "checkpoint_steps": 10, "max_failures": 30}
        return super().recipe() | {
            "out": self.address,
            "cluster": {"address": self.cluster.address},
            "scorers": {"exact": {"kind": "exact_match"}},
            "pairings": {"delta": {"chosen": "strong", "rejected": "weak", "scorer": "exact"}},
            "student": {"model": self.student, "max_length": 96},
            "training": training | {"runs": {"delta": run}},
        }

    def fetch(self) -> None:
        base, path = fs.FileSystem.from_uri(self.address)
        shutil.rmtree(self.out, ignore_errors=True)
        fs.copy_files(path, str(self.out), source_filesystem=base, destination_filesystem=fs.LocalFileSystem())

    def check(self) -> "Result":
        """Every response and every pair exactly once."""
        self.fetch()
        shutil.rmtree(self.out / ".deltaray/train", ignore_errors=True)  # what Ray Train kept for killed commands
        rows = check_complete(self)
        assert not leftovers(self.out), leftovers(self.out)
        files = [path for path in visible(self.out / "pairs/pairing=delta") if path.suffix == ".parquet"]
        pairs = [row for path in files for row in pq.read_table(path).to_pylist()]
        assert pairs
        doubled = [key for key, count in Counter(row["prompt_id"] for row in pairs).items() if count > 1]
        assert not doubled, f"{len(doubled)} doubled pairs, such as {doubled[0]}"
        student = (self.out / "students/delta/model.safetensors").read_bytes()
        return Result(rows, sorted(pairs, key=lambda row: str(row["prompt_id"])), hashlib.sha256(student).hexdigest())


@dataclass(frozen=True)
class Result:
    """What two runs of one study are compared by."""

    rows: int
    pairs: list[dict[str, Any]]
    student: str  # digest


@dataclass
class Ending:
    """How a command ended that had not finished the study."""

    code: int
    during: str
    said: str


@dataclass
class Attempts:
    """The commands of one study, one after the other until it is done, as somebody at the desk would give them."""

    cluster: MachineCluster
    recipe: Path
    program: tuple[str, ...] = FAKE
    environment: dict[str, str] = field(default_factory=dict)
    endings: list[Ending] = field(default_factory=list)
    commands: int = 0
    seconds: float | None = None  # that all took, once the study is done

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self._give()

    @property
    def log(self) -> Path:
        return self.recipe.parent / f"command-{self.commands}.log"

    @property
    def done(self) -> bool:
        return self.seconds is not None

    def _give(self) -> None:
        self.commands += 1
        words = (*self.program, "run", str(self.recipe))
        self.running: Any = self.cluster.command(*words, environment=self.environment, log=self.log)

    def tend(self) -> None:
        """Gives the command again where one has ended too early, as soon as the desk is part of the cluster."""
        if self.running is not None and (code := self.running.poll()) is not None:
            self.running = None
            if code == 0:
                self.seconds = time.monotonic() - self.began
            else:
                said = self.log.read_text().strip().splitlines()[-4:]
                self.endings.append(Ending(code, self.stage(), "\n".join(said)))
        if self.running is None and not self.done:
            assert self.commands < COMMANDS, f"{COMMANDS} commands were not enough: {self.endings}"
            if self.cluster.desk.address in alive(self.cluster.address):
                self._give()

    def finish(self) -> None:
        """Until the study is done, with nothing more in its way."""
        deadline = time.monotonic() + SECONDS
        while not self.done:
            assert time.monotonic() < deadline, f"{self.recipe.parent.name} hangs in {self.stage()}: {self.log}"
            self.cluster.tend()
            self.tend()
            time.sleep(0.5)

    def stage(self) -> str:
        """Where the command of now is."""
        said = self.log.read_text().replace(":", " ").split() if self.log.exists() else []
        return next((word for word in reversed(said) if word in STAGES), "start")
