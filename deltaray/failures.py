"""What a failure began with, in one or a few lines, whatever frameworks have wrapped around it; what fails one row.

Ray, Ray Data, Ray Train and vLLM raise exceptions of their own in place of the one that was raised in a worker. Some
keep it as an object, some only as the text of its traceback, some only tell the reader to look elsewhere.
"""

import re
from asyncio import CancelledError
from collections.abc import Iterator
from dataclasses import dataclass

from deltaray.errors import StageError, UserError
from deltaray.text.screen import one_line

OURS = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in (StageError, UserError)}

WRAPPER = re.compile(r"ray\.|(?:\w+\.)*(?:RayTaskError|(?:Base)?ExceptionGroup|EngineDeadError)\b")
"""Names of exceptions that say no more than that something failed elsewhere."""
POINTER = re.compile(r"(?:see|check) (?:the )?(?:root cause|stack ?trace|logs?|error|above)|background process", re.I)
"""Messages that send the reader elsewhere."""
AFTERMATH = re.compile(r"(?:\w+\.)*(?:BrokenPipe|ConnectionReset|EOF|Cancelled)Error\b|SystemExit|KeyboardInterrupt")
"""What other processes raise because one has died."""
ADVICE = re.compile(
    r"^(?:To change retry attempts|For further information visit|During handling of|Set the environment)"
)
LINKS = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)

_HEADER = re.compile(r"^(?:(?:Exception Group )?Traceback \(most recent call last\)|.*\bray::.*\(pid=)")
_FRAME = re.compile(r'^\s+File "?(?P<file>[^"]+?)"?, line (?P<line>\d+)')
_RAISED = re.compile(r"^(?P<name>[A-Za-z_][\w.<>]*(?:\([\w.]*\))?)(?:: ?(?P<message>.*))?$")
_BORDER = re.compile(r"^ *\+[-+]+(?: \d+ -+)?$", re.MULTILINE)
"""Between the members of an exception group."""
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|^ *(?:\| ?|\+ (?=Exception Group))", re.MULTILINE)
"""Colours and the edge of exception groups."""
_PREFIX = re.compile(
    r"(?:\([\w .-]+ pid=\d+(?:, ip=[\d.]+)?\) )?"
    r"(?:(?:ERROR|WARNING|INFO|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
)
"""What vLLM's processes put before their lines."""

LINES, WIDTH = 5, 500
"""Lines of a message that are shown, and characters of each."""
ROW_WIDTH = 300
"""Characters of a row's reason."""


@dataclass(frozen=True)
class Raised:
    """An exception: its qualified name, what it says and, where known, the place."""

    name: str
    message: str
    place: str = ""

    def shown(self) -> str:
        lines = [line.rstrip()[:WIDTH] for line in self.message.splitlines() if line.strip() and not ADVICE.match(line)]
        name = self.name.rpartition(".")[2]
        if not lines:
            return f"{name} (raised in {self.place})" if self.place else name
        return "\n".join([f"{name}: {lines[0].strip()}", *lines[1:LINES], *(["  …"] if len(lines) > LINES else [])])


def told_in(error: BaseException) -> StageError | UserError | None:
    """Our own exception that a Ray task ended with; None if it ended with another. Pure.

    Ray raises an exception of its own in the driver. `ray.get` makes it look like ours, but with the remote traceback
    in its text; Ray Data keeps nothing of ours but that text.
    """
    if isinstance(error, StageError | UserError) and type(error) in OURS.values():
        return error
    found = next((it for it in raised_in(error) if it.name in OURS), None)
    return OURS[found.name](found.message) if found else None


def cause_of(error: BaseException | str) -> str:
    """Name and message of the exception, or text of one, that a failure began with, in a few lines. Pure.

    Where one exception was raised from another the later one is shown, which was meant to be read, and the earlier
    one after it if it says more.
    """
    known = telling(raised_in(error))
    if not known:
        return _last_line(str(error)) if isinstance(error, str) else Raised(_name(error), str(error)).shown()
    first, last = known[0], known[-1]
    if first.message.strip() in last.message or first.name == last.name:
        return last.shown()
    shown = last.shown()
    return f"{shown}{chr(10) if chr(10) in shown else ' '}(caused by {first.shown().splitlines()[0]})"


def is_told(error: BaseException) -> bool:
    """Whether a failure says by itself what it began with. Pure."""
    return any(not _says_nothing(it) for it in raised_in(error))


def failure_of(what: str, error: BaseException, log: object = None) -> StageError | UserError:
    """What the user is told of a failure: our own exception inside it, or else its cause, the log and how to go on.

    Without a `log` the runner names its own, in which all of the error is.
    """
    return told_in(error) or StageError(
        f"{what} failed: {cause_of(error)}\n{'' if log is None else f'the log is {log}{chr(10)}'}"
        "what is committed is safe: fix the cause and run the same command again to resume"
    )


def reason_of(error: BaseException) -> str:
    """Why a row failed, in one line, for whatever its template, tokenizer, parser or model may raise.

    Also for what is not an `Exception`: a panic of Rust code (tokenizers) is none.

    Raises:
        The error itself where it concerns more than a row: interruptions, and failures in our own words.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | CancelledError | UserError | StageError):
        raise error
    return one_line(cause_of(error))[:ROW_WIDTH]


# --- exceptions and texts of them ---------------------------------------------------------------------------------
def raised_in(error: BaseException | str) -> list[Raised]:
    """All exceptions that a failure tells of, the earliest first. Pure."""
    if isinstance(error, str):
        return list(_parsed(error))
    inner = _inner(error)
    if inner is not None:
        return raised_in(inner) or [Raised(_name(error), str(error))]
    own = Raised(_name(error), str(error), _place(error))
    if WRAPPER.match(own.name) and (parsed := list(_parsed(own.message))):
        return parsed
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [*(raised_in(before) if before is not None and before is not error else []), own]


def telling(known: list[Raised]) -> list[Raised]:
    """Those that say what failed; the others only where there are none. Pure."""
    for wanted in (
        [it for it in known if not _says_nothing(it) and not AFTERMATH.match(it.name)],
        [it for it in known if not _says_nothing(it)],
        [it for it in known if not WRAPPER.match(it.name)],
    ):
        if wanted:
            return wanted
    return [it for it in known if it.message][-1:] or known[-1:]


def _says_nothing(raised: Raised) -> bool:
    return bool(WRAPPER.match(raised.name) or POINTER.search(raised.message))


def _inner(error: BaseException) -> BaseException | None:
    """What an exception of Ray Train, or a group, is about."""
    if isinstance(error, BaseExceptionGroup) and not hasattr(error, "traceback_str"):
        return error.exceptions[0]
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict) and failures:
        told = [it for it in failures.values() if is_told(it)]
        return next(iter(told or failures.values()))
    found = getattr(error, "controller_failure", None)
    return found if isinstance(found, BaseException) else None


def _name(error: BaseException) -> str:
    kind = type(error)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else _short(trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def _short(file: str, line: int | str) -> str:
    return f"{'/'.join(file.split('/')[-2:])}:{line}"


def _parsed(text: str) -> Iterator[Raised]:
    """The exceptions in the text of tracebacks: each is the first line after frames that is not indented."""
    lines = list(
        map(_divided, _BORDER.sub("Traceback (most recent call last)", _DECORATION.sub("", text)).splitlines())
    )
    framed, place, at = False, "", 0
    while at < len(lines):
        prefix, line = lines[at]
        at += 1
        if frame := _FRAME.match(line):
            framed, place = True, _short(frame["file"], frame["line"])
        elif _HEADER.match(line):
            framed, place = True, ""
        elif framed and line[:1].strip() and (raised := _RAISED.match(line)):
            end = _end(lines, at, prefix)
            message = "\n".join([raised["message"] or "", *(line for _, line in lines[at:end])]).strip()
            yield Raised(raised["name"], message, place)
            framed, at = False, end


def _divided(line: str) -> tuple[str, str]:
    """(what its process has put before it, the line)."""
    prefix = _PREFIX.match(line)
    return (prefix[0], line[prefix.end() :]) if prefix else ("", line)


def _end(lines: list[tuple[str, str]], at: int, prefix: str) -> int:
    """Where the message ends that goes on at `at`."""
    while at < len(lines):
        before, line = lines[at]
        if line.strip() in LINKS or _HEADER.match(line) or before != prefix:
            break
        at += 1
    return at


def _last_line(text: str) -> str:
    """Of a text that holds no traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling_lines = [line for line in lines if "error" in line.lower() and "https://" not in line]
    return (telling_lines or lines or ["no message"])[-1]
