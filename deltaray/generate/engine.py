"""vLLM behind one small door: a unit of prompts in, token ids, texts and finish reasons out.

vllm is imported only once an engine is made, so the driver needs none.

One mechanism everywhere: vLLM's `LLMEngine`, stepped by a thread of ours (what vLLM's offline `LLM` does), so that
several units share one running batch. What differs is where its core lives, and one variable decides that:

* on CPU (and with the `ray` executor) in this very process: one import of torch and vllm instead of three saves
  15-35 s a start, decoding is faster without the hop, and no child process can outlive the actor;
* on GPUs in a child process, vLLM's default, so that scheduling overlaps with detokenizing.
"""

import asyncio
import collections
import dataclasses
import functools
import itertools
import logging
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

from deltaray.data.tokens.serve import tokenizer_arguments
from deltaray.failures import reason_of
from deltaray.generate.engine_settings import EngineSettings
from deltaray.generate.metrics import EngineMetrics
from deltaray.generate.reasoning import Splitter
from deltaray.generate.requests import Output, failed, output_of, prompt_logprobs, sampling_parameters
from deltaray.generate.watchdog import StallWatch
from deltaray.generate.weights import Adapters, check_same_model, load_weights
from deltaray.imports import quick_imports
from deltaray.runtime import last_words

log = logging.getLogger(__name__)

CLOSE_SECONDS = 30.0  # how long a closing engine may take to end its child processes


@dataclasses.dataclass
class _Job:
    """A unit on its way through the engine: its answers as they come and how many are missing."""

    unit: Mapping[str, Any]
    done: "Future[list[list[Output]]]"
    outputs: list[list[Output]]
    missing: int = 0
    adapter: Any = None  # vLLM's LoRARequest
    splitter: Splitter | None = None


class Engine:
    """One vLLM engine that several units may use at once. Every call into vLLM happens on its one thread.

    A prompt that the engine refuses becomes an answer with finish_reason "error". An engine that breaks or stands still
    ends the process: nothing in it can be trusted afterwards, and Ray starts a new actor and repeats its units.
    """

    def __init__(self, spec: EngineSettings) -> None:
        """Starts the engine and waits until it is ready; raises what vLLM raises when it cannot start."""
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        run = functools.partial(_Stepper.run, spec, self._inbox, ready)
        self._thread = threading.Thread(target=run, name="vllm", daemon=True)
        self._thread.start()
        ready.result()

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        """The answers of a unit, one list per prompt with one `Output` per entry of the unit's `samples`.

        `model` names the weights to use, `adapter` a LoRA adapter on top of them, `reasoning` vLLM's parser that
        tells the reasoning from the answer. Raises ValueError for a sampling setting or a parser that vLLM does not
        know and for weights or an adapter that do not fit the engine.
        """
        if len(unit["prompt_ids"]) != len(unit["token_ids"]):
            raise ValueError(f"unit {unit['unit_id']}: prompt_ids and token_ids differ in length")
        job = _Job(unit, Future(), [[{} for _ in unit["samples"]] for _ in unit["token_ids"]])
        job.done.set_running_or_notify_cancel()  # from here on nobody can cancel it under the engine's feet
        self._inbox.put(job)
        return await asyncio.wrap_future(job.done)

    def close(self) -> None:
        """Ends the engine and its child processes; what is still unfinished never finishes."""
        self._inbox.put(None)
        self._thread.join(CLOSE_SECONDS)


class _Stepper:
    """The engine's thread: takes units, swaps weights between them, steps vLLM, hands out answers."""

    def __init__(self, spec: EngineSettings, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        if shutil.which("nvcc") is None and find_spec("flashinfer_jit_cache") is None:
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it is compiled when it is first used
        with quick_imports():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.exceptions import VLLMClientError
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.exceptions import EngineDeadError
            from vllm.v1.engine.llm_engine import LLMEngine

        # LLM_CLASS: vLLM's larger batch defaults for offline work.
        self.folder = tempfile.TemporaryDirectory(prefix="deltaray-tokenizer-", ignore_cleanup_errors=True)
        arguments = spec.arguments | tokenizer_arguments(spec.arguments, self.folder.name)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments), UsageContext.LLM_CLASS)
        self.metrics = EngineMetrics(spec.model)
        self.metrics.attach(self.engine)
        self.watch = StallWatch(spec.stall_seconds, spec.model)
        self.adapters = Adapters(self.engine)
        self.splitters: dict[str, Splitter] = {}
        self.spec = spec
        self.inbox = inbox
        self.weights: str | None = spec.model
        self.waiting: collections.deque[_Job] = collections.deque()
        self.running: dict[str, tuple[_Job, int, int]] = {}  # request id -> unit, prompt, place in samples
        self.names = itertools.count()
        self.dead = EngineDeadError
        self.refusals = (VLLMClientError, ValueError, TypeError)  # raised for requests that vLLM will not take

    @classmethod
    def run(cls, spec: EngineSettings, inbox: "queue.SimpleQueue[_Job | None]", ready: "Future[None]") -> None:
        """The thread's life. An engine that breaks ends the process, so that Ray repeats its units elsewhere."""
        try:
            stepper = cls(spec, inbox)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while stepper.take():
                stepper.admit()
                if stepper.running:
                    stepper.step()
        except BaseException as error:
            log.exception("the engine of %s broke; ending its process", spec.model)
            last_words.leave(f"the engine of {spec.model} broke", error)
            os._exit(1)
        stepper.engine.engine_core.shutdown()

    def take(self) -> bool:
        """Moves new units from the inbox to `waiting`; sleeps while there is nothing to do. False: closed."""
        idle = not (self.waiting or self.running)
        if idle:
            self.metrics.rest()
        while True:
            try:
                job = self.inbox.get(block=idle)
            except queue.Empty:
                return True
            if job is None:
                return False
            self.waiting.append(job)
            idle = False

    def admit(self) -> None:
        """Starts the waiting units whose weights are loaded; others wait until the engine is empty, then swap."""
        if self.waiting and not self.running and self.waiting[0].unit["model"] != self.weights:
            self.swap(self.waiting[0].unit["model"])
        for job in list(self.waiting):
            if job.unit["model"] == self.weights:
                self.waiting.remove(job)
                self.start(job)

    def swap(self, model: str) -> None:
        """Loads other weights into the empty engine; where that fails, the units that want them fail."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            check_same_model(self.spec, model)
            self.weights = None  # until they are all in, the engine holds a mixture
            load_weights(self.engine, self.spec, model)
            self.weights = model
        except EngineDeadError:
            raise
        except Exception as error:
            for job in [job for job in self.waiting if job.unit["model"] == model]:
                self.waiting.remove(job)
                job.done.set_exception(error)

    def start(self, job: _Job) -> None:
        """Puts a unit's requests, one per sample, into the engine's queue."""
        unit = job.unit
        try:
            parameters = self.prepare(job)
        except self.refusals as error:  # the same for every row, so a mistake in the settings
            job.done.set_exception(ValueError(f"unit {unit['unit_id']}: {error}"))
            return
        job.missing = len(parameters)
        for number, parameter in enumerate(parameters):
            prompt, place = divmod(number, len(unit["samples"]))
            self.request(job, prompt, place, parameter)
        if not parameters:
            job.done.set_result(job.outputs)

    def prepare(self, job: _Job) -> list[Any]:
        """Gets a unit's parser and adapter ready; returns the sampling parameters of all its answers."""
        unit = job.unit
        if name := unit.get("reasoning"):
            if name not in self.splitters:
                self.splitters[name] = Splitter(name, self.engine.get_tokenizer())
            job.splitter = self.splitters[name]
        job.adapter = self.adapters.request(unit.get("adapter"))
        try:
            return sampling_parameters(unit["sampling"], unit["prompt_ids"], unit["samples"], bool(name))
        except self.refusals as error:
            raise ValueError(f"sampling {unit['sampling']}: {error}") from error

    def request(self, job: _Job, prompt: int, place: int, parameters: Any) -> None:
        """Asks for one answer; a prompt that vLLM refuses (too long, empty, unknown token) is answered at once."""
        name = str(next(self.names))
        ids = [int(token) for token in job.unit["token_ids"][prompt]]
        try:
            self.engine.add_request(name, {"prompt_token_ids": ids}, parameters, lora_request=job.adapter)
            self.running[name] = (job, prompt, place)
        except self.dead:
            raise
        except BaseException as error:
            refused = isinstance(error, self.refusals) and str(error)
            self.answer(job, prompt, place, failed(refused or reason_of(error)))

    def step(self) -> None:
        """One step of the running batch; with FINAL_ONLY vLLM returns just the requests that ended in it."""
        with self.watch.step():
            results = self.engine.step()
        for result in results:
            if result.request_id not in self.running:  # one that vLLM refused halfway
                continue
            job, prompt, place = self.running.pop(result.request_id)
            try:
                output = output_of(result.outputs[0]) | prompt_logprobs(result)
                if job.splitter:
                    output = job.splitter.divide(output, job.unit["token_ids"][prompt])
            except BaseException as error:
                output = failed(reason_of(error))
            self.answer(job, prompt, place, output)

    def answer(self, job: _Job, prompt: int, place: int, output: Output) -> None:
        """Files one answer and hands the unit back when it was the last."""
        prompt_tokens = len(job.unit["token_ids"][prompt])
        self.metrics.answer(job.unit["name"], output["finish_reason"], prompt_tokens, output["tokens"])
        job.outputs[prompt][place] = output
        job.missing -= 1
        if job.missing == 0:
            job.done.set_result(job.outputs)
