"""Ends an engine that stands still inside a step.

A GPU that is gone, a collective that never ends or a child process that hangs raise nothing: the step does not come
back, and Ray takes the actor for alive. Once its process has ended another replica repeats its units.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from deltaray.runtime import last_words
from deltaray.runtime.process_watchdog import kill_tree

log = logging.getLogger(__name__)


class StallWatch:
    """A thread that ends this process and its children once a step has lasted longer than `seconds`."""

    def __init__(self, seconds: float, engine: str) -> None:
        self.seconds, self.engine = seconds, engine
        self.since: float | None = None  # when the step began that runs now
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _watch(self) -> None:
        while True:
            time.sleep(self.seconds / 10)
            since = self.since
            if since is not None and time.monotonic() - since > self.seconds:
                words = (
                    f"the engine of {self.engine} has not ended a step for {self.seconds:g} s (engine.stall_seconds)"
                )
                log.error("%s; ending its process", words)
                last_words.leave(words)
                kill_tree(psutil.Process())
                os._exit(1)
