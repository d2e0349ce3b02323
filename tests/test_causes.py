"""One cause out of whatever Ray, vLLM and exceptions wrap around it. No Ray is started."""

import traceback
from asyncio import CancelledError
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, UserCodeException
from ray.train import TrainingFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from deltaray.errors import StageError, UserError
from deltaray.failures import cause_of, failure_of, is_told, reason_of, told_in
from deltaray.runtime.last_words import root_cause

ADVICE = (
    "UDF failed to process a data block.\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`"
)


class PanicException(BaseException):
    """What Rust code raises."""


def caught(work: Callable[[], object]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError


def raiser(error: BaseException, source: BaseException | None = None) -> Callable[[], object]:
    def work() -> object:
        if source is None:
            raise error
        raise error from source

    return work


def as_task(error: BaseException) -> RayTaskError:
    """As a worker of Ray sends it."""
    text = "".join(traceback.format_exception(caught(raiser(error))))
    return RayTaskError("f", text, error, proctitle="ray::f", pid=1, ip="10.0.0.1")


def as_data(error: BaseException) -> BaseException:
    """As Ray Data hands it to the driver: the cause is text alone."""
    wrapped = caught(raiser(UserCodeException(ADVICE), caught(raiser(error))))
    task = as_task(wrapped)
    wrapped.__cause__ = None  # pickling leaves it behind
    return task.as_instanceof_cause()


WRAPS: list[Callable[[BaseException], BaseException]] = [
    lambda error: error,
    as_task,
    lambda error: as_task(error).as_instanceof_cause(),
    as_data,
    lambda error: WorkerGroupError("[Rank 0 Error Snippet]:", {0: as_task(error)}),
    lambda error: ControllerError(as_task(error)),
    lambda error: ExceptionGroup("several", [error]) if isinstance(error, Exception) else error,
    lambda error: as_data(ExceptionGroup("several", [error])) if isinstance(error, Exception) else error,
    lambda error: as_task(as_data(error)),
]


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_cause_is_shown_and_nothing_that_was_put_around_it(wrap: Callable[[BaseException], BaseException]) -> None:
    assert cause_of(wrap(ValueError("no layer is called s_aux"))) == "ValueError: no layer is called s_aux"
    assert cause_of(wrap(KeyError("content"))) == "KeyError: 'content'"
    assert (
        cause_of(wrap(RuntimeError("sizes differ:\n\tw: [2] and [3]")))
        == "RuntimeError: sizes differ:\n\tw: [2] and [3]"
    )
    assert cause_of(wrap(AssertionError())).startswith("AssertionError")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("kind", [StageError, UserError])
def test_our_own_words_come_through_as_they_are(kind: type, wrap: Callable[[BaseException], BaseException]) -> None:
    told = told_in(wrap(kind("teachers.a.model: no room\nask for less")))
    assert type(told) is kind and str(told) == "teachers.a.model: no room\nask for less"
    assert told_in(wrap(RuntimeError("deltaray.errors.UserError: quoted"))) is None


def test_of_two_exceptions_the_later_is_shown_with_the_earlier_behind_it() -> None:
    pair = caught(raiser(RuntimeError("the model cannot be loaded"), caught(raiser(OSError("disk on fire")))))
    for wrapped in (pair, as_task(pair), as_data(pair)):
        assert cause_of(wrapped) == "RuntimeError: the model cannot be loaded (caused by OSError: disk on fire)"
    again = caught(raiser(RuntimeError("failed: disk on fire"), OSError("disk on fire")))
    assert cause_of(again) == "RuntimeError: failed: disk on fire"


def test_an_exception_without_words_shows_its_type_and_where_it_was_raised() -> None:
    shown = cause_of(caught(raiser(AssertionError())))
    assert shown.startswith("AssertionError (raised in tests/test_causes.py:")
    assert cause_of(NotImplementedError()) == "NotImplementedError"


def test_long_messages_are_cut() -> None:
    shown = cause_of(ValueError("\n".join(f"line {number}" for number in range(50))))
    assert shown.splitlines()[0] == "ValueError: line 0" and len(shown.splitlines()) == 6


def test_an_actor_that_cannot_start_tells_its_own_exception() -> None:
    text = "".join(traceback.format_exception(caught(raiser(MemoryError("no cache blocks")))))
    actor = "its creation task, \x1b[36mray::Engine.__init__()\x1b[39m (pid=7, ip=10.0.0.1, actor_id=ab)"
    text = text.replace("Traceback (most recent call last):", f"The actor died because of an error raised in {actor}")
    assert cause_of(text) == "MemoryError: no cache blocks"
    assert is_told(ActorDiedError()) is False


def test_what_is_only_rays_is_said_by_ray() -> None:
    try:
        raise ActorUnavailableError("socket closed", b"\1" * 16) from None
    except ActorUnavailableError as error:
        assert cause_of(error).startswith("ActorUnavailableError: The actor") and "socket closed" in cause_of(error)
    assert isinstance(WorkerGroupError("", {}), TrainingFailedError)


# what vLLM 0.32 with a core in a process of its own prints, shortened
PRINTED = """\
(EngineCore pid=812) ERROR 11-28 19:02:11 [core.py:1104] EngineCore failed to start.
(EngineCore pid=812) ERROR 11-28 19:02:11 [core.py:1104] Traceback (most recent call last):
(EngineCore pid=812) ERROR 11-28 19:02:11 [core.py:1104]   File "/site/vllm/v1/engine/core.py", line 1078, in run
(EngineCore pid=812) ERROR 11-28 19:02:11 [core.py:1104]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=812) ERROR 11-28 19:02:11 [core.py:1104] torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
(EngineCore pid=812) Traceback (most recent call last):
(EngineCore pid=812)   File "/site/vllm/v1/engine/core.py", line 1108, in run
(EngineCore pid=812)     raise e
(EngineCore pid=812) torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
"""


# the same where a worker of tensor parallelism broke in a step
BROKEN = """\
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063] WorkerProc hit an exception.
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063] Traceback (most recent call last):
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063]   File "/site/torch/_ops.py", line 1279, in __call__
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063]     return self._op(*args, **kwargs)
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063] RuntimeError: no attention for heads of 7
(Worker pid=627) ERROR 11-28 19:57:11 [multiproc_executor.py:1063]
(EngineCore pid=347) ERROR 11-28 19:57:11 [dump_input.py:72] Dumping input data for V1 LLM engine
(EngineCore pid=347) ERROR 11-28 19:57:11 [core.py:1512] Traceback (most recent call last):
(EngineCore pid=347) ERROR 11-28 19:57:11 [core.py:1512]   File "/site/vllm/v1/engine/core.py", line 1496, in run
(EngineCore pid=347) ERROR 11-28 19:57:11 [core.py:1512]     engine_core.run_busy_loop()
(EngineCore pid=347) ERROR 11-28 19:57:11 [core.py:1512] RuntimeError: Worker failed with error 'no attention for \
heads of 7', please check the stack trace above for the root cause
"""


class EngineDeadError(Exception):
    """As vLLM calls it."""


def test_where_vllm_points_elsewhere_what_its_processes_printed_is_the_cause() -> None:
    pointing = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert root_cause(pointing, PRINTED) == "OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    dead = EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    assert root_cause(dead, BROKEN) == "RuntimeError: no attention for heads of 7"
    assert root_cause(pointing, "nothing of use").startswith("RuntimeError: Engine core initialization failed")
    assert root_cause(ValueError("max_model_len is 0"), PRINTED) == "ValueError: max_model_len is 0"


def test_a_failure_names_its_log_and_how_to_go_on() -> None:
    words = str(failure_of("reference pass of s", as_data(KeyError("s_aux")), "out/x.log"))
    assert words.splitlines()[0] == "reference pass of s failed: KeyError: 's_aux'"
    assert "the log is out/x.log" in words and "run the same command again to resume" in words
    assert "DataContext" not in words


def test_what_fails_a_row_and_what_does_not() -> None:
    assert reason_of(PanicException("index out of\nbounds")) == "PanicException: index out of bounds"
    assert reason_of(RecursionError("too deep")) == "RecursionError: too deep"
    for error in (KeyboardInterrupt(), SystemExit(), CancelledError(), UserError("x"), StageError("x")):
        with pytest.raises(type(error)):
            reason_of(error)
