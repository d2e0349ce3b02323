"""The two kinds of failure a user can meet, each with its exit code.

A mistake of the user's is one message without a traceback; a failure while running says what failed, where the
log is and how to resume. Everything else is a bug and keeps its traceback (in the log).
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The user's mistake: the message names the file, key or row, and what to write instead. Exit code 2."""

    exit_code = 2


class StageError(Exception):
    """A stage failed while running: the message says what, where the log is, how to resume. Exit code 1."""

    exit_code = 1


WIDTH = 500
"""Characters of a library's words that are shown."""
PASSING = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a command and is not a failure of anything."""


@contextmanager
def door(where: str, what: str = "cannot be read") -> Iterator[None]:
    """Whatever a library raises over something from outside becomes one message of the user's.

    Panics of Rust code (tokenizers, safetensors) are no `Exception`, so all but `PASSING` is caught.

    Args:
        where: the file, or the recipe's key. `what`: what that means, with what to do.

    Raises:
        UserError: `{where}: {what}: {the first line of what was raised}`.
    """
    try:
        yield
    except (UserError, StageError, *PASSING):
        raise
    except BaseException as error:
        raise UserError(f"{where}: {what}: {first_line(error)}") from error


@contextmanager
def led_by(key: str) -> Iterator[None]:
    """Puts the recipe's key before a message that names a file.

    Raises:
        UserError: the one that was raised, as `{key}: …`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error.__cause__


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing, and with a bare key or index."""
    said = str(error).strip()
    if not said or isinstance(error, LookupError | RecursionError | MemoryError):
        said = f"{type(error).__name__}: {said}".removesuffix(": ")
    return said.splitlines()[0][:WIDTH]
