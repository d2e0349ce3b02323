"""Ray's node process on this machine: when it dies Ray ends us, too, often without a word. So we speak first."""

import os
import select
import threading
from collections.abc import Callable

LOST = (
    "error: Ray's node process (raylet) on this machine died: killed, or out of memory\n"
    "what is committed is safe: run the same command again to resume"
)


class RayletWatch:
    """Waits for the end of the raylet that this process has started; silent where it only joined a cluster."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.over = False
        pid = _raylet_of_ours()
        if pid is not None:
            threading.Thread(target=self._wait, args=(os.pidfd_open(pid),), daemon=True).start()

    def stop(self) -> None:
        """From now on its end is intended."""
        self.over = True

    def _wait(self, descriptor: int) -> None:
        select.select([descriptor], [], [])
        if not self.over:
            self.say(LOST)
            os._exit(1)


def _raylet_of_ours() -> int | None:
    import ray

    started = ray._private.worker._global_node.all_processes.get("raylet")
    return started[0].process.pid if started and hasattr(os, "pidfd_open") else None
