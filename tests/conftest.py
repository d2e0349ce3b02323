"""What the suite shares: one Ray for tests inside this process, one study run through the command line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deltaray.data.store import Store
from deltaray.recipe import Recipe, load_recipe, shipped_recipe
from deltaray.runtime.session import init_ray

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    arguments = {"num_cpus": 8, "include_dashboard": False, "log_to_driver": False}
    with pytest.MonkeyPatch.context() as patch:  # programs of tests join it by Ray's own means, at the node's address
        patch.setattr("deltaray.runtime.session.on_localhost", nullcontext)
        init_ray(arguments | {"object_store_memory": 256 * 2**20})
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails ends its process at once, which in some tests is that of all tests."""
    monkeypatch.setattr("deltaray.cli._exit", lambda terminal, code: sys.exit(code))


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two adapters of one tiny model."""
    from adapters import make_adapter

    return [make_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    stdout: str
    stderr: str


def deltaray(*arguments: str, until: Callable[[], bool] | None = None, kill: int = signal.SIGKILL) -> Finished:
    """Runs a command in the checkout; as soon as `until` is true it gets the signal `kill`."""
    command = [sys.executable, "-m", "deltaray", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    while until is not None and process.poll() is None:
        if until():
            process.send_signal(kill)
            break
        time.sleep(0.02)
    stdout, stderr = process.communicate()
    return Finished(process.returncode, stdout, stderr)


@dataclass(frozen=True)
class StudyRun:
    """The miniature study of this session: where it is and how its commands went."""

    out: Path
    arguments: tuple[str, ...]
    killed: Finished  # while generating
    interrupted: Finished  # while training
    finished: Finished

    @property
    def store(self) -> Store:
        return Store(str(self.out))

    @property
    def recipe(self) -> Recipe:
        return load_recipe(self.out / "recipe.yaml")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    """The shipped miniature, killed once, interrupted once, then run to its end. Its family is cached in runs/."""
    out = tmp_path_factory.mktemp("miniature") / "study"
    recipe = str(shipped_recipe("miniature"))
    smaller = ["training.runs.sft.learning_rate=[1e-4,1e-3]"]
    smaller += [f"evaluation.tasks.{task}.limit=1024" for task in ("addition", "addition_sampled")]
    arguments = ("--set", f"out={out}", *(word for setting in smaller for word in ("--set", setting)))

    def there_are(files: int, pattern: str) -> Callable[[], bool]:
        return lambda: len(list(out.glob(pattern))) >= files

    units, students = ".deltaray/units/**/*.parquet", "students/[a-z]*/config.json"
    killed = deltaray("generate", recipe, *arguments, until=there_are(1, units), kill=signal.SIGKILL)
    interrupted = deltaray("run", recipe, *arguments, until=there_are(2, students), kill=signal.SIGINT)
    finished = deltaray("run", recipe, *arguments)
    assert finished.code == 0, finished.stderr[-3000:]
    return StudyRun(out, arguments, killed, interrupted, finished)
