"""A server that speaks OpenAI's chat completions as a teacher: the same small door as vLLM's engine.

The talking is `runtime/server.py`'s. OpenAI's own client reads replies of any size, follows redirects, sends what other
variables of the environment hold, and its repeats count against no rate limit and give up after seconds of an outage.
"""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from deltaray.errors import StageError, UserError
from deltaray.failures import reason_of
from deltaray.generate.completions import (
    LONGEST_PAUSE,
    Trouble,
    most_tokens,
    output_of,
    pause_before,
    request_body,
    trouble_in,
)
from deltaray.generate.requests import Output, failed
from deltaray.recipe import models
from deltaray.runtime.process_watchdog import FROZEN
from deltaray.runtime.server import NO_KEY, NoReplyError, Server, below, is_address
from deltaray.text import keep_secret
from deltaray.text.forms import SHORTEST

log = logging.getLogger(__name__)

OURS = ("model", "messages", "n", "stream")  # fields that `body` cannot set


@dataclasses.dataclass(frozen=True)
class EndpointSpec:
    """What reaches a server. It carries the name of the key's environment variable, never the key.

    The variable must be set where the replica's process starts. Ray started by the command inherits the command's
    environment; on the nodes of a running cluster it must be set for `ray start`. (Ray's runtime environment would
    carry it there, but also shows it to everybody who can see the cluster's state.)

    One replica does it all, since limits are kept within a process: replicas or runs side by side add up.
    """

    model: str  # how the server calls it
    url: str
    key_variable: str | None = None
    in_flight: int = 64  # requests at once
    requests_per_minute: float | None = None
    retries: int = 8
    timeout: float = 600.0  # seconds that one attempt may take
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of a request; null drops one
    cpus: float = 0.25
    gpus: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1

    @classmethod
    def of(cls, model: str, endpoint: models.Endpoint) -> "EndpointSpec":
        """The spec of a recipe's `endpoint` section."""
        return cls(model, **endpoint.model_dump())

    @property
    def environment(self) -> dict[str, str]:
        return {}

    @property
    def ray_options(self) -> dict[str, Any]:
        return {}

    @property
    def stall_seconds(self) -> float:
        return FROZEN

    @property
    def requests_in_flight(self) -> int:
        return self.in_flight

    def start(self) -> "Endpoint":
        """The client, in this process; StageError if the key's variable is not set here."""
        key = None
        if self.key_variable is not None:
            keep_secret([self.key_variable])
            key = os.environ.get(self.key_variable, "").strip()
            if wrong := _no_key(self.key_variable, key):
                raise StageError(
                    f"{self.url}: {wrong} on the node where the replica runs; set it on every node before `ray start`"
                )
        return Endpoint(self, key)


def _no_key(variable: str, key: str) -> str | None:
    """Why what a variable holds is not a key; what it holds is not quoted."""
    if not key:
        return f"the environment variable {variable} is not set"
    if not key.isascii() or not key.isprintable() or " " in key:
        return f"what {variable} holds is not a key: it has spaces, line breaks or letters beyond ASCII"
    return None


def check_endpoint(endpoint: models.Endpoint, key: str) -> None:
    """Raises UserError unless the section `key` of a recipe can work from here; asks no server."""
    if not is_address(endpoint.url):
        raise UserError(f"{key}.url: {endpoint.url!r} is not an address such as https://host/v1")
    if ours := [name for name in OURS if name in endpoint.body]:
        raise UserError(f"{key}.body: {ours[0]} is set by deltaray; remove it")
    variable = endpoint.key_variable
    if variable is None:
        return
    secret = os.environ.get(variable, "").strip()
    if wrong := _no_key(variable, secret):
        raise UserError(
            f"{key}.key_variable: {wrong}; `export {variable}=…` before the command, and on the nodes of a running "
            "cluster before `ray start`"
        )
    if len(secret) < SHORTEST:
        log.warning(
            "%s.key_variable: what %s holds is too short to be told from words (%d characters of %d): it is taken out "
            "of the server's errors, but not out of its answers", key, variable, len(secret), SHORTEST,
        )  # fmt: skip


class Endpoint:
    """Asks the server for the answers of several units at once, within the spec's limits.

    A request that fails for good becomes an answer with finish_reason "error" and the server's words; a server that
    refuses everybody, or that cannot be reached, ends it all.
    """

    def __init__(self, spec: EndpointSpec, key: str | None) -> None:
        self._server = Server(below(spec.url, "chat/completions"), spec.timeout, key or NO_KEY, spec.in_flight)
        self._spec = spec
        self._slots = asyncio.Semaphore(spec.in_flight)
        self._pace = Pace(spec.requests_per_minute)
        self._answered = False  # whether the server ever answered a request
        self._stopped: str | None = None  # why nothing more is asked
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        """The answers of a unit, one list per prompt with one `Output` per entry of the unit's `samples`.

        Raises StageError when the server refuses everybody or cannot be reached.
        """
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(self._answer(unit, place, sample)) for sample in unit["samples"]]
                    for place in range(len(unit["prompt_ids"]))
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [[task.result() for task in row] for row in tasks]

    def close(self) -> None:
        """Drops the connections; may be called from any thread."""
        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop)

    async def _answer(self, unit: Mapping[str, Any], place: int, sample: int) -> Output:
        """One answer. The slot is kept through the pauses, so that a troubled server is asked less."""
        try:
            body = request_body(unit, place, sample, self._spec.body)
        except BaseException as error:
            return failed(reason_of(error))
        async with self._slots:
            attempt = 0
            while isinstance(result := await self._attempt(unit, body), Trouble):
                result = dataclasses.replace(result, words=self._server.shown(result.words))
                if not result.again or attempt == self._spec.retries:
                    return self._give_up(result)
                level = logging.WARNING if result.wait > LONGEST_PAUSE else logging.INFO
                log.log(level, "%s: repeating a request in %g s: %s", self._spec.url, result.wait, result.words)
                self._pace.hold(result.wait)
                await asyncio.sleep(result.wait + pause_before(attempt))
                attempt += 1
        return result

    async def _attempt(self, unit: Mapping[str, Any], body: dict[str, Any]) -> Output | Trouble:
        await self._pace.turn()
        if self._stopped is not None:
            raise StageError(self._stopped)
        try:
            reply = await self._server.ask(body)
            if trouble := trouble_in(reply, self._answered):
                return trouble
            output = output_of(reply.body, bool(unit["reasoning"]), most_tokens(body))
        except NoReplyError as error:
            return Trouble(str(error), again=error.again, everybody=error.unreachable)
        except ValueError as error:
            return Trouble(f"unusable answer: {error}", again=True)
        except BaseException as error:  # whatever a reply may hold
            return failed(reason_of(error))
        self._answered = True
        return output

    def _give_up(self, trouble: Trouble) -> Output:
        """The failed answer of one row, or the end of everything."""
        if not trouble.everybody:
            return failed(trouble.words)
        self._stopped = (
            f"{self._spec.url} gives no answers of {self._spec.model}: {trouble.words} (key_variable: "
            f"{self._spec.key_variable}); when that is fixed, the same command goes on from here"
        )
        raise StageError(self._stopped)


class Pace:
    """Lets requests go at an even rate, and none while the server wants a pause."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0  # on the loop's clock
        self._turns = asyncio.Lock()  # first come, first served

    async def turn(self) -> None:
        """Returns when the next request may go."""
        clock = asyncio.get_running_loop().time
        async with self._turns:
            while (wait := self._next - clock()) > 0:
                await asyncio.sleep(wait)
            self._next = clock() + self._interval

    def hold(self, seconds: float) -> None:
        """Nobody goes for so long."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)
