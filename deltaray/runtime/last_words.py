"""What a worker's process says before it ends itself, kept where the command can read it.

Ray tells of an actor that has died only that it has. Its words are in a file of Ray's on some node, so they are also
put into the cluster's key-value store, under a key that the command has given to the pool.
"""

import traceback
from contextlib import suppress
from pathlib import Path

from deltaray.failures import WRAPPER, cause_of, is_told, raised_in, telling
from deltaray.text import without_secrets

NAMESPACE = b"deltaray"
TAIL = 48 << 10
"""Bytes of the end of what the process and its children have printed."""
STARTS = 5
"""Starts of one actor without a single unit answered; then it is not started again."""

_key: str | None = None


def sign(key: str) -> None:
    """From now on this process leaves its last words under `key`."""
    global _key
    _key = key


def leave(what: str, error: BaseException | None = None) -> None:
    """Keeps what the process has to say before it ends; never raises."""
    printed = _printed()
    told = "" if error is None else "".join(traceback.format_exception(error))
    cause = what if error is None else f"{what}: {root_cause(error, printed)}"
    with suppress(Exception):
        _put(_key, without_secrets(f"{cause}\0{told}\n{printed}"))


def root_cause(error: BaseException, printed: str) -> str:
    """The error's cause; where it only says that a child process has died, what that process printed. Pure."""
    if not is_told(error):
        known = telling(raised_in(printed))
        if known and not WRAPPER.match(known[-1].name):
            return known[-1].shown()
    return cause_of(error)


def left(key: str) -> tuple[str, str] | None:
    """(the cause in few lines, everything) of the words under `key`; None if there are none."""
    with suppress(Exception):
        words = _get(key)
        if words is not None:
            cause, _, everything = words.partition("\0")
            return cause, everything
    return None


def forget(key: str) -> None:
    """Removes all that was kept under `key`."""
    with suppress(Exception):
        _delete(key)


# --- how often an actor has started -------------------------------------------------------------------------------
def count_start() -> int:
    """Starts of this actor since it last answered anything, this one included."""
    starts = 1
    with suppress(Exception):
        starts += int(_get(_starts_key()) or 0)
        _put(_starts_key(), str(starts))
    return starts


def forget_starts() -> None:
    forget(_starts_key())


def _starts_key() -> str:
    import ray

    return f"{_key} {ray.get_runtime_context().get_actor_id()}"


# --- the store ----------------------------------------------------------------------------------------------------
def _put(key: str | None, value: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    if key is not None:
        _internal_kv_put(key.encode(), value.encode(errors="replace"), overwrite=True, namespace=NAMESPACE)


def _get(key: str) -> str | None:
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(key.encode(), namespace=NAMESPACE)
    return None if found is None else bytes(found).decode()


def _delete(key: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key.encode(), del_by_prefix=True, namespace=NAMESPACE)


def _printed() -> str:
    """The end of what this process and its children have printed, where that goes to files."""
    return "\n".join(map(_end_of, (1, 2)))


def _end_of(descriptor: int) -> str:
    with suppress(OSError):
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        if file.is_file():
            with file.open("rb") as source:
                source.seek(max(0, file.stat().st_size - TAIL))
                return source.read().decode(errors="replace")
    return ""
