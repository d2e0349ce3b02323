"""What every stage runs in: Ray started when first needed, progress, timing, records, and one way to fail."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.failures import failure_of
from deltaray.recipe.study import Study
from deltaray.runtime.demands import refuse_impossible
from deltaray.runtime.memory import PeakMemory
from deltaray.runtime.metrics import StudyMetrics
from deltaray.runtime.scheduling_hints import RoomWatch
from deltaray.runtime.session import Capacity, joins_cluster, logs_of_ray, start_ray
from deltaray.runtime.terminal import StageProgress, Terminal
from deltaray.text import without_secrets


class Runner:
    """Runs the stages of one study on one cluster."""

    def __init__(self, study: Study, store: Store, terminal: Terminal) -> None:
        self.study, self.store, self.terminal = study, store, terminal
        self.capacity: Capacity | None = None
        self.worked = self.bound = False
        self.named_log: Path | None = None
        self.records: list[dict[str, Any]] = []
        self.metrics = StudyMetrics(study.recipe.name, study.recipe.cluster.gpu_hour_price)

    def ray(self) -> Capacity:
        """Starts or joins Ray, once; what the cluster has."""
        if self.capacity is None:
            self.capacity = start_ray(self.study.recipe.cluster, self.terminal.say)
            refuse_impossible(self.study, self.capacity)
        return self.capacity

    def log_file(self) -> Path:
        """Where a command's chatter goes from now on."""
        folder = self.store.local / self.store.logs if self.store.local else Path("deltaray-logs")
        return folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}.log"

    def guarded(self, stage: str, work: Callable[[], None], log: Path) -> None:
        """Runs a stage; an unexpected failure becomes one message, its traceback goes to the log.

        Raises:
            UserError, StageError: the stage failed.
        """
        try:
            work()
        except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic of Rust code is not an `Exception`
            if type(error) is not StageError or error.__cause__ is not None:
                import traceback

                with suppress(OSError):  # the disk may be full
                    print(without_secrets(traceback.format_exc()), file=sys.stderr)  # descriptor 2 is the log here
            failure = failure_of(stage, error, log)
            if failure is not error:
                raise failure from error
            if error.__cause__ is None or "the log is " in str(error):
                raise
            raise StageError(f"{error}\nthe log is {log}") from error

    @contextmanager
    def stage(self, stage: str, unit: str, left: int, shown: str | None = None) -> Iterator[StageProgress]:
        """Progress, timing and peak memory of a stage that has `left` units to do; progress counts `shown`."""
        self.worked = True
        began, started = time.monotonic(), datetime.now(UTC)
        self.terminal.say(f"{stage}: {left:,} {unit} to do")
        self.ray()
        self._name_logs()
        self._spent(working=False)
        shown = shown or unit
        with (
            PeakMemory() as memory,
            self.terminal.progress(stage, shown, self._heard) as progress,
            self._room(stage, progress),
        ):
            yield progress
        self._spent()
        record = {
            "stage": stage,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
            "done": left,
            "unit": unit,
            "tokens": progress.tokens,
            "peak_gib": round(memory.gib, 2),
        }
        self.records.append(record)
        self.keep_records()
        self.terminal.say(f"{stage}: {left:,} {unit} in {record['seconds']:,} s, peak {memory.gib:.1f} GiB")

    def _room(self, stage: str, progress: StageProgress) -> AbstractContextManager[Any]:
        """On a cluster that others may use it is said why nothing happens."""
        if not joins_cluster(self.study.recipe.cluster):
            return nullcontext()
        return RoomWatch(lambda: (progress.done, progress.tokens), partial(self.say, stage))

    def _heard(self, stage: str, item: str, done: int, total: int) -> None:
        self.metrics.stage(stage, item, done, total)
        self._spent()

    def _spent(self, working: bool = True) -> None:
        self.metrics.spent(self.capacity.gpus if self.capacity else 0, working)

    def _name_logs(self) -> None:
        if self.terminal.log != self.named_log:
            self.named_log = self.terminal.log
            self.terminal.say(f"what Ray, vLLM and DeepSpeed say goes to {self.named_log} and {logs_of_ray()}")

    def keep_records(self) -> None:
        """Writes the stages' records once `out` is known to be this study's."""
        while self.bound and self.records:
            self.store.append_line(self.store.stages, self.records.pop(0))

    def say(self, stage: str, text: str) -> None:
        self.terminal.say(f"{stage}: {text}")

    def nothing(self, stage: str, what: str) -> None:
        self.say(stage, f"nothing to do ({what})")
