"""What failed in a process of Ray's, in our own words."""

import re

from deltaray.errors import StageError, UserError

OURS = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (StageError, UserError)}
NAMES = "|".join(map(re.escape, OURS))
TOLD = re.compile(rf"^({NAMES}): (.*?)(?=\n\n(?:The above exception|During handling)|\Z)", re.DOTALL | re.MULTILINE)

RAISED = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception|Exit|Interrupt): .+)$", re.MULTILINE)
"""The line of a traceback that names an exception."""


def told_in(error: BaseException) -> StageError | UserError | None:
    """Our own exception that a Ray task ended with; None if it ended with another. Pure.

    Ray raises an exception of its own in the driver. `ray.get` makes it look like ours, but with the remote traceback
    in its text; Ray Data keeps nothing of ours but that text.
    """
    if isinstance(error, StageError | UserError) and type(error) in OURS.values():
        return error
    found = TOLD.search(str(error))
    return OURS[found[1]](found[2].strip()) if found else None


def cause_of(error: BaseException | str) -> str:
    """Name and message of the exception, or text of one, that a failure began with, in one line. Pure.

    Ray's exceptions hold the remote traceback as text. Its first exception is the cause of those after it.
    """
    text = str(error)
    if found := RAISED.search(text):
        return found[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() and "https://" not in line]
    last = (telling or lines or ["no message"])[-1]
    return last if isinstance(error, str) else f"{type(error).__name__}: {last}"
