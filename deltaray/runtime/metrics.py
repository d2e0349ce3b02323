"""What a command tells Prometheus while it works, through the metrics agent that every Ray node has.

Engines tell of themselves (`deltaray/generate/metrics.py`); here is what only the command knows: how far its stages
are, what became of candidate pairs, how students train, what has been spent.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """One exported series: a `gauge` is a state, a `counter` only grows (and is exported with the suffix `_total`)."""

    kind: str
    what: str
    tags: tuple[str, ...]


def series(name: str, metric: Metric) -> Any:
    """Ray's object behind a series; Ray must run in this process."""
    from ray.util import metrics

    kind = metrics.Gauge if metric.kind == "gauge" else metrics.Counter
    return kind(name, description=metric.what, tag_keys=metric.tags)


_ITEM, _RUN = ("study", "stage", "item"), ("study", "run")
TRAINING = {
    "loss": "Loss of the last step.",
    "rewards_margin": "Mean reward of chosen over rejected.",
    "rewards_accuracy": "Share of pairs whose chosen response has the larger reward.",
    "logps_chosen": "Mean log-prob of a chosen response's token.",
    "logps_rejected": "Mean log-prob of a rejected response's token.",
    "grad_norm": "Norm of the gradient before clipping.",
    "tokens_per_second": "Tokens of both conversations per second, all workers.",
}
"""What is exported of a line of `metrics.jsonl`."""
STUDY_METRICS = {
    "deltaray_stage_done": Metric("gauge", "Units of a stage that this command has done, by item.", _ITEM),
    "deltaray_stage_total": Metric("gauge", "Units that the item has in this command.", _ITEM),
    "deltaray_pairs": Metric("gauge", "Pairs in the shards.", ("study", "pairing")),
    "deltaray_pairs_removed": Metric(
        "gauge", "Candidates that a stage of the funnel removed.", ("study", "pairing", "stage")
    ),
    **{f"deltaray_training_{key}": Metric("gauge", what, _RUN) for key, what in TRAINING.items()},
    "deltaray_training_step": Metric("gauge", "Optimizer steps done.", _RUN),
    "deltaray_training_alarms": Metric("counter", "Failure signatures that fired, by name.", (*_RUN, "signature")),
    "deltaray_trials": Metric("gauge", "Trials of this command by state.", ("study", "state")),
    "deltaray_gpu_hours": Metric("gauge", "GPUs of the cluster times the hours of this command's stages.", ("study",)),
    "deltaray_cost": Metric("gauge", "Those at `cluster.gpu_hour_price`.", ("study",)),
}
"""Everything that a command exports, by name; Ray puts `ray_` in front. `study` is the recipe's name."""


class StudyMetrics:
    """The metrics of one command. Silent as long as there is no Ray in the process."""

    def __init__(self, study: str, gpu_hour_price: float | None) -> None:
        self.study, self.price = study, gpu_hour_price
        self.series: dict[str, Any] = {}
        self.gpu_seconds = 0.0
        self.seen = time.monotonic()

    def stage(self, stage: str, item: str, done: int, total: int) -> None:
        """Progress of an item of a stage, in the stage's units."""
        self._tell("deltaray_stage_done", done, stage=stage, item=item)
        self._tell("deltaray_stage_total", total, stage=stage, item=item)

    def funnel(self, pairing: str, funnel: list[dict[str, Any]]) -> None:
        """What became of the candidates of a pairing, as in its `_funnel.json`."""
        for part in funnel:
            self._tell("deltaray_pairs_removed", part["removed"], pairing=pairing, stage=part["stage"])
        self._tell("deltaray_pairs", funnel[-1]["out"], pairing=pairing)

    def training(self, run: str, step: int, line: Mapping[str, Any]) -> None:
        """A step of a run, as in its `metrics.jsonl`."""
        self._tell("deltaray_training_step", step, run=run)
        for key in TRAINING:
            if line.get(key) is not None:
                self._tell(f"deltaray_training_{key}", line[key], run=run)
        for signature in line.get("signatures", ()):
            self._tell("deltaray_training_alarms", 1, run=run, signature=signature)

    def trials(self, states: Mapping[str, int]) -> None:
        """How many trials of an exploration are in each state: waiting, running, finished, stopped, failed."""
        for state, number in states.items():
            self._tell("deltaray_trials", number, state=state)

    def spent(self, gpus: float, working: bool) -> None:
        """Counts the time since the last call, if a stage was working."""
        now = time.monotonic()
        self.gpu_seconds += (now - self.seen) * gpus if working else 0.0
        self.seen = now
        hours = self.gpu_seconds / 3600
        self._tell("deltaray_gpu_hours", hours)
        if self.price is not None:
            self._tell("deltaray_cost", hours * self.price)

    def _tell(self, name: str, value: float, **tags: str) -> None:
        import ray

        if not ray.is_initialized():
            return
        if name not in self.series:
            self.series[name] = series(name, STUDY_METRICS[name])
        found, tags = self.series[name], {"study": self.study, **tags}
        tags = {key: tag.encode("ascii", "replace").decode() for key, tag in tags.items()}  # Ray takes no other
        found.inc(value, tags) if STUDY_METRICS[name].kind == "counter" else found.set(value, tags)
