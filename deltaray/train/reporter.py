"""Rank 0's account of a run: live to the driver's actor, and `metrics.jsonl` at every checkpoint and at the end."""

import json
import math
import time
from typing import Any

import torch.distributed as dist

from deltaray.data.contracts import METRICS, MORE_METRICS
from deltaray.data.store import Store
from deltaray.train.health_checks import Signature

REPORT_INTERVAL = 0.2
"""Seconds between two progress messages of a run; metrics.jsonl has every step."""

Metrics = dict[str, Any]


class Reporter:
    """Every worker keeps the lines, so that all see the same signatures; only rank 0 tells and writes."""

    def __init__(self, store: Store, progress: Any, run: str, total: int, counts: dict[str, int]) -> None:
        self.store, self.progress, self.run, self.total, self.counts = store, progress, run, total, counts
        self.lines: list[Metrics] = []
        self.untold: list[str] = []  # signatures since the last message
        self.sent = 0.0
        self.first = dist.get_rank() == 0

    def begin(self, lines: list[Metrics]) -> None:
        """Goes on after the lines of a checkpoint."""
        self.lines = list(lines)
        self._send(len(lines), {})

    def __call__(self, metrics: Metrics, signatures: list[Signature]) -> None:
        line = {key: metrics[key] for key in (*METRICS, *MORE_METRICS) if key in metrics}
        if signatures:
            line["signatures"] = [item.name for item in signatures]
            self.untold += line["signatures"]
        self.lines.append(line)
        for item in signatures:
            self.say(f"step {item.step}: {item.name}: {item.message}")
        measured = "heldout_loss" in metrics  # the exploration decides by these
        if measured or len(self.lines) == self.total or time.monotonic() - self.sent >= REPORT_INTERVAL:
            self._send(len(self.lines), metrics | {"signatures": self.untold})
            self.untold = []

    def say(self, text: str) -> None:
        """A message for the user."""
        if self.first:
            self.progress.note.remote(self.run, text)

    def _send(self, step: int, metrics: Metrics) -> None:
        if self.first:
            self.progress.put.remote(self.run, step, self.total, metrics)
            self.sent = time.monotonic()

    def commit(self) -> None:
        """Writes what has been done so far."""
        if self.first:
            folder = Store.training(self.run)
            self.store.write_json(f"{folder}/data.json", self.counts)
            lines = "".join(f"{json.dumps(_without_nan(line))}\n" for line in self.lines)
            self.store.write_bytes(f"{folder}/metrics.jsonl", lines.encode())


def _without_nan(line: Metrics) -> Metrics:
    """JSON has no NaN; the signature of the same line tells that it was one."""
    odd = {key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in odd else value for key, value in line.items()}
