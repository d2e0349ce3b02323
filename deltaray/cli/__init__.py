"""The command line: a thin layer over `Pipeline`, with the exit codes that scripts rely on."""

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from deltaray.cli.options import app
from deltaray.errors import StageError, UserError, first_line
from deltaray.runtime.terminal import Terminal

# isort: off
from deltaray.cli import stages, inspect, jobs, tools  # noqa: F401 - verbs register themselves, in the order of the help
# isort: on

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: runs a command and turns failures into one message and an exit code.

    Args:
        arguments: the verb and what follows it; None: the process's own.
    """
    _quiet_libraries()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, _interrupt)
    terminal = Terminal()
    try:
        code = app(arguments, standalone_mode=False, obj=terminal) or 0
    except (UserError, StageError) as error:
        terminal.say(f"error: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except TyperException as error:
        terminal.say(f"error: {error.format_message()}")
        code = 2
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a mistake of ours; also a panic of Rust code, which is not an `Exception`
        terminal.say(_unforeseen(error, terminal.log))
        code = StageError.exit_code
    if code == INTERRUPTED:
        terminal.say("interrupted; what is committed is safe: run the same command again to resume")
    _exit(terminal, code)


def _unforeseen(error: BaseException, log: Path | None) -> str:
    """The message of what nobody caught; its traceback goes into the stage's log, or one of its own."""
    said = "".join(traceback.format_exception(error))
    try:
        if log is None or log == Path(os.devnull):
            descriptor, name = tempfile.mkstemp(prefix="deltaray-", suffix=".log")
            log = Path(name)
            os.close(descriptor)
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(said)
        where = f"the traceback is in {log}"
    except OSError:
        where = "its traceback could not be written anywhere"
    what = f"{type(error).__name__}: {first_line(error).removeprefix(f'{type(error).__name__}: ')}"
    return f"error: {what}\nthis is a bug in deltaray; {where}: please report it (what is committed is safe)"


def _exit(terminal: Terminal, code: int) -> NoReturn:
    """After a failure at once: threads of the stage may still speak to Ray, whose processes end with this one.

    Shutting Ray down under such a thread ends the whole process from inside Ray with code 1 and no message.
    """
    ray = sys.modules.get("ray")
    if code == 0 or ray is None or not ray.is_initialized():
        sys.exit(code)
    terminal.out.file.flush()
    terminal.err.file.flush()
    os._exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _quiet_libraries() -> None:
    """Asks the libraries that we import for silence; what they still say while a stage runs goes to its log."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)
