"""What a running engine tells Prometheus, through the metrics agent that every Ray node has: no server of ours.

`EngineMetrics` sits where vLLM keeps its stat loggers, adds up what the scheduler tells after every step and what the
answers tell at their end, and hands the sums to Ray every few seconds. vLLM's own logger for Ray wants Ray Serve, and
its statistics of every single token cost about 5 % where a model is tiny; these cost nothing that can be measured.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from deltaray.runtime.metrics import Metric, series

PERIOD = 2.0  # seconds between two reports to Ray
TAGS = ("model", "replica")
BY_NAME = (*TAGS, "name")


METRICS = {
    "deltaray_generation_tokens": Metric("counter", "Tokens of finished answers.", BY_NAME),
    "deltaray_prompt_tokens": Metric("counter", "Prompt tokens of finished answers.", BY_NAME),
    "deltaray_answers": Metric(
        "counter", "Finished answers by reason: stop, length, or error for a failed row.", (*BY_NAME, "reason")
    ),
    "deltaray_requests_running": Metric("gauge", "Requests in the running batch.", TAGS),
    "deltaray_requests_waiting": Metric("gauge", "Requests that wait for room in the batch (queue depth).", TAGS),
    "deltaray_kv_cache_usage": Metric("gauge", "Share of the KV cache in use, 0 to 1.", TAGS),
    "deltaray_prefix_cache_queries": Metric("counter", "Prompt tokens looked up in the prefix cache.", TAGS),
    "deltaray_prefix_cache_hits": Metric("counter", "Prompt tokens found in the prefix cache.", TAGS),
    "deltaray_preemptions": Metric("counter", "Requests that were put back because the KV cache was full.", TAGS),
}
"""Everything that is exported, by name; Ray puts `ray_` in front. Tags: `model` is what the engine was started with
(of a folder the last two parts), `replica` the id of its Ray actor, `name` the teacher or the evaluated model."""
GAUGES = [name for name, metric in METRICS.items() if metric.kind == "gauge"]


class EngineMetrics:
    """The metrics of one engine; all of it on the engine's thread. Without Ray in the process it is silent."""

    def __init__(self, model: str) -> None:
        self.tags = _tags(model)
        self.series = {name: series(name, METRICS[name]) for name in METRICS} if self.tags else {}
        self.sums: Counter[tuple[str, str, str]] = Counter()  # by series, name and reason
        self.reported = 0.0

    def attach(self, engine: Any) -> None:
        """Takes the place of vLLM's loggers; its scheduler goes on to tell its state, its tokens are counted here."""
        engine.logger_manager, engine.log_stats = self, False

    def answer(self, name: str, reason: str, prompt_tokens: int, tokens: int) -> None:
        """Counts one finished answer of a teacher or model."""
        self.sums["deltaray_answers", name, reason] += 1
        self.sums["deltaray_prompt_tokens", name, ""] += prompt_tokens
        self.sums["deltaray_generation_tokens", name, ""] += tokens

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """vLLM calls this after every step of the engine."""
        cache = scheduler_stats.prefix_cache_stats
        self.sums["deltaray_prefix_cache_queries", "", ""] += cache.queries
        self.sums["deltaray_prefix_cache_hits", "", ""] += cache.hits
        self.sums["deltaray_preemptions", "", ""] += cache.preempted_requests
        if time.monotonic() - self.reported > PERIOD:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.report([scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage])

    def log(self) -> None:
        """vLLM calls this now and then, for loggers that print."""

    def rest(self) -> None:
        """Reports an engine that has nothing to do."""
        self.report([0] * len(GAUGES))

    def report(self, states: list[float]) -> None:
        """Hands Ray the states, in the order of `GAUGES`, and what has come together since the last time."""
        self.reported = time.monotonic()
        if self.series:
            for gauge, state in zip(GAUGES, states, strict=True):
                self.series[gauge].set(state, tags=self.tags)
            for (counter, name, reason), number in self.sums.items():
                tags = self.tags | {"name": name, "reason": reason}
                if number:
                    self.series[counter].inc(number, {key: tags[key] for key in METRICS[counter].tags})
        self.sums.clear()


def _tags(model: str) -> dict[str, str]:
    """The tags of this process's engine; none without Ray."""
    try:
        import ray
    except ModuleNotFoundError:
        return {}
    if not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    return {"model": short_name(model), "replica": context.get_actor_id() or context.get_worker_id()}


def short_name(model: str) -> str:
    """A hub id, or the last two parts of a folder: what is before them may change from job to job."""
    return "/".join(Path(model).parts[-2:])
