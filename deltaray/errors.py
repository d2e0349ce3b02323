"""The two kinds of failure a user can meet, each with its exit code.

A mistake of the user's is one message without a traceback; a failure while running says what failed, where the
log is and how to resume. Everything else is a bug and keeps its traceback (in the log).
"""


class UserError(Exception):
    """The user's mistake: the message names the file, key or row, and what to write instead. Exit code 2."""

    exit_code = 2


class StageError(Exception):
    """A stage failed while running: the message says what, where the log is, how to resume. Exit code 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
