"""Peak memory of a study on this machine: the driver and every process below it, Ray's and vLLM's included."""

import threading
from types import TracebackType

import psutil

INTERVAL = 3.0
"""Seconds between two samples."""


class PeakMemory:
    """Samples the summed proportional set size (shared pages counted once) while the block runs."""

    def __init__(self) -> None:
        self.gib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        driver = psutil.Process()
        while True:
            processes = [driver, *driver.children(recursive=True)]
            self.gib = max(self.gib, sum(map(_memory, processes)) / 2**30)
            if self._over.wait(INTERVAL):
                return


def _memory(process: psutil.Process) -> int:
    try:
        return int(getattr(process.memory_full_info(), "pss", 0))  # only Linux tells it
    except psutil.Error:
        return 0  # it ended meanwhile
