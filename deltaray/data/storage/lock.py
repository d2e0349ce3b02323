"""One deltaray process works in an output folder at a time."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deltaray.errors import UserError

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold(path: Path, out: str) -> Iterator[None]:
    """Holds the lock file; the kernel frees it however the process ends, so no lock is ever stale.

    A file system without locks (some network mounts) is used without one.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"out: {out} cannot be written: {error.strerror or error}") from None
    with file:
        _acquire(file, out)
        yield


def _acquire(file: IO[str], out: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(_taken(file, out)) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()


def _taken(file: IO[str], out: str) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
        who = f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        who = "another process"
    return f"out: {out} is in use by {who}; wait for it or end it, or use another `out` (--set out=FOLDER)"
