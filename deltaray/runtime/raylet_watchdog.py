"""Ray's node process on this machine: when it dies Ray ends us, too, often without a word. So we speak first."""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

LOST = (
    "error: Ray's node process (raylet) on this machine died: killed, out of memory, or cut off from the cluster\n"
    "what is committed is safe: run the same command again to resume"
)
CREDENTIALS = struct.Struct("3i")
"""Process, user and group at the other end of a socket (unix(7), SO_PEERCRED)."""


class RayletWatch:
    """Waits for the end of the raylet through which this process speaks to Ray, even if another process started it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.over = False
        pid = _raylet_here()
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


def _raylet_here() -> int | None:
    """Who listens at Ray's socket; None where the system does not tell, or the raylet is out of sight."""
    import ray

    if not hasattr(os, "pidfd_open") or not hasattr(socket, "SO_PEERCRED"):
        return None
    with suppress(OSError), socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(ray._private.worker._global_node.raylet_socket_name)
        told = visitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        return CREDENTIALS.unpack(told)[0] or None
    return None
