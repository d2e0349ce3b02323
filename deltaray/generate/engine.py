"""vLLM behind one small door: a unit of prompts in, token ids, texts and finish reasons out.

This is the only file that imports vllm, and only once an engine is made, so the driver needs no vllm.

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
import hashlib
import itertools
import json
import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from deltaray.generate.spec import COSMETIC, EngineSpec

log = logging.getLogger(__name__)

Output = dict[str, Any]
"""One answer: `token_ids` (list of int, the end token included), `text` (without special tokens),
`finish_reason` (stop | length | error) and `error` (the engine's words, or None)."""

CLOSE_SECONDS = 30.0  # how long a closing engine may take to end its child processes


def request_seed(base: int, prompt_id: str, sample: int) -> int:
    """The seed of one answer: the same in every run, process and place, different for every answer."""
    key = json.dumps([base, prompt_id, sample]).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # vLLM wants a signed 64 bit number


@dataclasses.dataclass
class _Job:
    """A unit on its way through the engine: its answers as they come and how many are missing."""

    unit: Mapping[str, Any]
    done: "Future[list[list[Output]]]"
    outputs: list[list[Output]]
    missing: int


class Engine:
    """One vLLM engine that several units may use at once. Every call into vLLM happens on its one thread.

    A prompt that the engine refuses becomes an answer with finish_reason "error". An engine that breaks ends the
    process: nothing in it can be trusted afterwards, and Ray starts a new actor and repeats its units.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the engine and waits until it is ready; raises what vLLM raises when it cannot start."""
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        run = functools.partial(_Stepper.run, spec, self._inbox, ready)
        self._thread = threading.Thread(target=run, name="vllm", daemon=True)
        self._thread.start()
        ready.result()

    async def generate(self, unit: Mapping[str, Any]) -> list[list[Output]]:
        """The answers of a unit, one list per prompt with one `Output` per sample.

        The unit's `model` names the weights to use. Raises ValueError for a sampling setting that vLLM does not
        know and for weights that do not fit the engine.
        """
        if len(unit["prompt_ids"]) != len(unit["token_ids"]):
            raise ValueError(f"unit {unit['unit_id']}: prompt_ids and token_ids differ in length")
        job = _Job(unit, Future(), [[{}] * unit["samples"] for _ in unit["token_ids"]], 0)
        job.done.set_running_or_notify_cancel()  # from here on nobody can cancel it under the engine's feet
        self._inbox.put(job)
        return await asyncio.wrap_future(job.done)

    def close(self) -> None:
        """Ends the engine and its child processes; what is still unfinished never finishes."""
        self._inbox.put(None)
        self._thread.join(CLOSE_SECONDS)


class _Stepper:
    """The engine's thread: takes units, swaps weights between them, steps vLLM, hands out answers."""

    def __init__(self, spec: EngineSpec, inbox: "queue.SimpleQueue[_Job | None]") -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        # LLM_CLASS: vLLM's larger batch defaults for offline work.
        self.engine = LLMEngine.from_engine_args(EngineArgs(**spec.arguments), UsageContext.LLM_CLASS)
        self.spec = spec
        self.inbox = inbox
        self.weights: str | None = spec.model
        self.waiting: collections.deque[_Job] = collections.deque()
        self.running: dict[str, tuple[_Job, int, int]] = {}  # request id -> its unit, prompt and sample
        self.names = itertools.count()
        self.refusals = (VLLMClientError, ValueError, TypeError)  # raised for requests that vLLM will not take

    @classmethod
    def run(cls, spec: EngineSpec, inbox: "queue.SimpleQueue[_Job | None]", ready: "Future[None]") -> None:
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
        except BaseException:
            log.exception("the engine of %s broke; ending its process", spec.model)
            os._exit(1)
        stepper.engine.engine_core.shutdown()

    def take(self) -> bool:
        """Moves new units from the inbox to `waiting`; sleeps while there is nothing to do. False: closed."""
        idle = not (self.waiting or self.running)
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
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": model})
            if self.spec.gpus == 0:
                self.engine.collective_rpc(_repack_tied_head)
            if not self.engine.reset_prefix_cache():  # it holds keys and values of the old weights
                raise RuntimeError("vLLM would not empty its prefix cache")
            self.weights = model
        except EngineDeadError:
            raise
        except Exception as error:
            for job in [job for job in self.waiting if job.unit["model"] == model]:
                self.waiting.remove(job)
                job.done.set_exception(error)

    def start(self, job: _Job) -> None:
        """Puts a unit's requests, one per sample, into the engine's queue."""
        unit, samples = job.unit, job.unit["samples"]
        try:
            parameters = sampling_parameters(unit["sampling"], unit["prompt_ids"], samples)
        except self.refusals as error:  # the same for every row, so a mistake in the settings
            message = f"unit {unit['unit_id']}: sampling {unit['sampling']}: {error}"
            job.done.set_exception(ValueError(message))
            return
        job.missing = len(parameters)
        for place, parameter in enumerate(parameters):
            prompt, sample = divmod(place, samples)
            self.request(job, prompt, sample, parameter)
        if not parameters:
            job.done.set_result([])

    def request(self, job: _Job, prompt: int, sample: int, parameters: Any) -> None:
        """Asks for one answer; a prompt that vLLM refuses (too long, empty, unknown token) is answered at once."""
        name = str(next(self.names))
        ids = [int(token) for token in job.unit["token_ids"][prompt]]
        try:
            self.engine.add_request(name, {"prompt_token_ids": ids}, parameters)
            self.running[name] = (job, prompt, sample)
        except self.refusals as error:
            self.answer(job, prompt, sample, failed(str(error)))

    def step(self) -> None:
        """One step of the running batch; with FINAL_ONLY vLLM returns just the requests that ended in it."""
        for result in self.engine.step():
            job, prompt, sample = self.running.pop(result.request_id)
            self.answer(job, prompt, sample, output_of(result.outputs[0]))

    def answer(self, job: _Job, prompt: int, sample: int, output: Output) -> None:
        """Files one answer and hands the unit back when it was the last."""
        job.outputs[prompt][sample] = output
        job.missing -= 1
        if job.missing == 0:
            job.done.set_result(job.outputs)


def _repack_tied_head(worker: Any) -> None:
    """Mends vLLM 0.32's reload on CPU for models whose output layer shares the embedding's weights.

    Linear layers on CPU multiply with a packed copy of their weights. A tied output layer has no weights of its own
    in the checkpoint, so the reload does not pack it again, and it would silently go on with the old model's.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.model_runner.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def sampling_parameters(settings: str, prompt_ids: Sequence[str], samples: int) -> list[Any]:
    """vLLM's SamplingParams of every (prompt, sample), samples innermost.

    `settings` is JSON in vLLM's own words. `seed` (default 0) is the base of every answer's own seed; null leaves
    sampling unseeded: a little faster on GPUs, not repeatable. Greedy decoding needs and gets none.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    fields = json.loads(settings)
    base = fields.pop("seed", 0)
    if "n" in fields:
        raise ValueError("n is the unit's `samples`")
    make = functools.partial(SamplingParams, **fields, output_kind=RequestOutputKind.FINAL_ONLY)
    seeded = base is not None and fields.get("temperature", 1.0) > 0
    return [
        make(seed=request_seed(base, prompt_id, sample) if seeded else None)
        for prompt_id in prompt_ids
        for sample in range(samples)
    ]


def output_of(completion: Any) -> Output:
    """Ours from vLLM's `CompletionOutput`; a reason that is neither stop nor length is an error."""
    reason, error = completion.finish_reason, None
    if reason not in ("stop", "length"):
        reason, error = "error", f"vLLM ended the request: {reason}"
    ids = list(completion.token_ids)
    return {"token_ids": ids, "text": completion.text, "finish_reason": reason, "error": error}


def failed(message: str) -> Output:
    """The answer of a prompt that could not be answered."""
    return {"token_ids": [], "text": "", "finish_reason": "error", "error": message}


def check_same_model(spec: EngineSpec, model: str) -> None:
    """ValueError unless `model` has the engine's config, so that its weights fit.

    vLLM only warns of weights that it misses, which would leave a mixture of two models.
    """
    from transformers import AutoConfig

    if spec.engine_kwargs.get("revision"):
        raise ValueError(f"{spec.model}: with a pinned revision an engine cannot load other weights and come back")
    trust = bool(spec.engine_kwargs.get("trust_remote_code"))
    ours, theirs = (AutoConfig.from_pretrained(name, trust_remote_code=trust).to_dict() for name in (spec.model, model))
    keys = (ours.keys() | theirs.keys()) - COSMETIC
    different = sorted(key for key in keys if ours.get(key) != theirs.get(key))
    if different:
        what = ", ".join(different)
        raise ValueError(f"the weights of {model} do not fit an engine of {spec.model}: {what} differ")
