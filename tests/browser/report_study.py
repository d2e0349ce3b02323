"""A small invented study for the report's tests: no model runs, all numbers come from seeded generators."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltaray.pair.delta_report import Collected, Difference, numbers_of
from deltaray.pair.removed import REMOVED
from deltaray.pair.sums import Histogram, Moments, features, resampled

SCRIPT = "<script>alert(1)</script>"
LONG = "First the units, then the tens, then the carry. " * 120
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_model", pa.string()),
        ("rejected_model", pa.string()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("delta", pa.float64()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("source", pa.string()),
        ("answer", pa.string()),
        ("chosen_sample", pa.int32()),
        ("rejected_sample", pa.int32()),
    ]
)
RECIPE = """name: miniature
out: runs/miniature
teachers:
  - {name: small, model: models/small}
  - {name: weak, model: models/weak}
pairings:
  - {name: delta, chosen: small, rejected: weak}
"""


def build_study(out: Path, pairs: int = 600, seeds: tuple[int, ...] = (0,)) -> Path:
    """A complete output folder with `pairs` pairs in each of three pairings and one empty pairing."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for name in ("delta", "reversed", "wrong"):
        write_pairing(out, name, pairs)
    write_pairing(out, "unused", 0)
    for name in ("delta", "sft", "reversed", "wrong"):
        for seed in seeds:
            write_run(out, name if len(seeds) == 1 else f"{name}-seed{seed}", 150, sft=name == "sft")
    write_evaluations(out, seeds)
    write_stages(out)
    return out


def write_pairing(out: Path, name: str, rows: int, shards: int = 2) -> None:
    """Shards and funnel of one pairing; the first rows hold the awkward texts."""
    chance = random.Random(name)
    folder = out / "pairs" / f"pairing={name}"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([pair(chance, name, i) for i in range(rows)], PAIRS)
    step = math.ceil(rows / shards) or 1
    for shard in range(shards):
        pq.write_table(table.slice(shard * step, step), folder / f"part-{shard:05d}.parquet")
    counts = {
        "prompts": 4096,
        "both teachers answered": 3990,
        "answers differ": 1310,
        f"kept for {name}": rows,
    }
    funnel, before = [], 4096
    for stage, left in counts.items():
        funnel.append({"stage": stage, "in": before, "out": left, "removed": before - left})
        before = left
    (folder / "_funnel.json").write_text(json.dumps(funnel), encoding="utf-8")
    if rows:
        (folder / "_delta.json").write_text(json.dumps(description(table)), encoding="utf-8")
        write_removed(out, name, table)


def description(table: pa.Table) -> dict[str, Any]:
    """The numbers that the pair stage tells of these rows; the examples are the first ones."""
    chosen, rejected = (table[f"{side}_score"].to_numpy() for side in ("chosen", "rejected"))
    gap = table["chosen_tokens"].to_numpy() - table["rejected_tokens"].to_numpy()
    prompts, delta = np.arange(len(table)), chosen - rejected
    found = Collected(
        resampled(features(chosen, rejected, gap.astype(float)), prompts, "report"),
        len(table),
        Histogram.of(delta[np.isfinite(delta)]),
        {("small", "weak"): Moments.of(delta[np.isfinite(delta)])},
        {"small": Moments(9, 0.6, 1.0), "weak": Moments(9, 0.3, 1.0)},
        {"exact": Difference.of(chosen, rejected, prompts), "same": Difference.of(chosen, chosen, prompts)},
    )
    examples = {"largest": table.slice(0, 5).to_pylist(), "most_negative": [], "nearest_zero": []}
    examples["largest"] = [row for row in examples["largest"] if row["delta"] is not None]
    return {"inputs": "0", "scorer": "exact", **numbers_of(found), "examples": examples}


def write_removed(out: Path, name: str, table: pa.Table) -> None:
    """50 rows without texts and those of the table's first ten with, all removed by one of two rules."""
    folder = out / ".deltaray" / "removed" / f"pairing={name}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = table.slice(0, 10).to_pylist()
    rows += [{**rows[0], "prompt": None, "chosen": None, "rejected": None}] * 50
    reasons = [{**row, "reason": "identical" if n % 2 else f"filter {SCRIPT}"} for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(reasons, REMOVED), folder / "part-00000.parquet")


def pair(chance: random.Random, name: str, i: int) -> dict[str, Any]:
    """One pair about an addition; 0 to 4 carry markup, unicode, long text, many turns, no scores."""
    a, b = chance.randint(10, 99), chance.randint(10, 99)
    right = {"delta": (0.62, 0.3), "reversed": (0.3, 0.62), "wrong": (0.0, 0.3)}.get(name, (0.5, 0.5))
    scores: list[float | None] = [float(chance.random() < share) for share in right]
    answers = [str(a + b) if score else str(a + b - 10) for score in scores]
    prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]
    if i == 0:
        answers[0] = f"The sum is {a + b}. {SCRIPT}<img src=x onerror=alert(2)> </script><!-- &amp;"
    elif i == 1:
        answers = [f"答えは {a + b} です。🎉", f"الجواب هو {a + b - 10}"]
    elif i == 2:
        answers[0] = LONG + answers[0]
    elif i == 3:
        prompt = [
            {"role": "system", "content": "You add numbers and show the carry."},
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": f"And {a} + {b}?"},
        ]
    elif i == 4:
        scores = [None, None]
    known = scores[0] is not None and scores[1] is not None
    models = ("weak", "small") if name == "reversed" else ("small", "weak")
    return {
        "prompt_id": f"{name}-{i:04d}",
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": answers[0]}],
        "rejected": [{"role": "assistant", "content": answers[1]}],
        "chosen_model": models[0],
        "rejected_model": models[1],
        "chosen_score": scores[0],
        "rejected_score": scores[1],
        "delta": (scores[0] or 0.0) - (scores[1] or 0.0) if known else None,
        "chosen_tokens": max(2, int(chance.gauss(14, 4))),
        "rejected_tokens": max(2, int(chance.gauss(11, 4))),
        "source": "additions",
        "answer": str(a + b),
        "chosen_sample": 0,
        "rejected_sample": i % 2,
    }


def write_run(out: Path, name: str, steps: int, sft: bool = False) -> None:
    """The metrics of one run; supervised runs have no rewards and no rejected answers."""
    chance = random.Random(name)
    sign = -0.4 if name.startswith("reversed") else 1.0
    folder = out / "training" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        margin = sign * 1.4 * (1 - math.exp(-step / 50)) + chance.gauss(0, 0.08)
        row = {
            "step": step, "epoch": step / 75, "learning_rate": 1e-4 * (1 - step / (steps + 1)),
            "loss": math.log1p(math.exp(-abs(margin))) + chance.gauss(0, 0.01),
            "logps_chosen": -0.5 - step / 900 + chance.gauss(0, 0.02),
            "logps_rejected": None if sft else -0.9 - step / 220 + chance.gauss(0, 0.02),
            "rewards_chosen": None if sft else -0.1 * margin,
            "rewards_rejected": None if sft else -1.1 * margin,
            "rewards_margin": None if sft else margin,
            "rewards_accuracy": None if sft else min(1.0, 0.5 + abs(margin) / 3.2 + chance.gauss(0, 0.03)),
            "grad_norm": 1.0 + chance.random(), "tokens": 1600,
            "tokens_per_second": 9000 + chance.gauss(0, 500),
        }  # fmt: skip
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_evaluations(out: Path, seeds: tuple[int, ...] = (0,)) -> None:
    """Result files and their summary."""
    folder = out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "delta": ("student", 0.731, 0.664),
        "sft": ("student", 0.618, 0.552),
        "reversed": ("student", 0.402, 0.331),
        "wrong": ("student", 0.671, 0.609),
        "student": ("untouched", 0.644, 0.581),
        "small": ("teacher", 0.598, 0.540),
        "weak": ("teacher", 0.312, 0.287),
    }
    tasks = ["addition", "addition_sampled"]
    names = {}
    for name, (role, greedy, sampled) in values.items():
        measures = dict(zip(tasks, [measure(greedy, seeds, 0.011), measure(sampled, seeds, 0.009)], strict=True))
        names[name] = {"role": role, "tasks": measures, "mean": measure((greedy + sampled) / 2, seeds, 0.008)}
        result = {
            task: {"metric": "exact match", "value": row["mean"], "stderr": row["stderr"], "n": 2000}
            for task, row in measures.items()
        }
        content = {"model": f"students/{name}", "tasks": result, "mean": (greedy + sampled) / 2}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    comparisons = [
        comparison("delta", "student", "mean", 0.085, 0.066, 0.104),
        comparison("delta", "sft", "addition", 0.113, 0.089, 0.137),
        comparison("wrong", "student", "mean", 0.0275, -0.002, 0.057),
        comparison("reversed", "student", "addition_sampled", -0.25, -0.274, -0.226),
    ]
    summary = {"tasks": tasks, "seeds": list(seeds), "names": names, "comparisons": comparisons}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def measure(mean: float, seeds: tuple[int, ...], stderr: float) -> dict[str, Any]:
    """A score of the summary, its seeds spread evenly around the mean."""
    values = [mean + 0.012 * (i - (len(seeds) - 1) / 2) for i in range(len(seeds))]
    return {"mean": mean, "stderr": stderr, "values": values, "n": 2000}


def comparison(better: str, worse: str, task: str, difference: float, low: float, high: float) -> dict[str, Any]:
    """One checked claim."""
    return {
        "better": better, "worse": worse, "task": task, "difference": difference, "low": low, "high": high,
        "holds": low > 0, "method": "paired bootstrap, 95 %",
    }  # fmt: skip


def write_stages(out: Path) -> None:
    """The stage log of a study that was run, interrupted in training and run again."""
    stages = [
        ("generate small", 1780000000.0, 46.2, 8192, 0, "responses", 114000, 1.9),
        ("generate weak", 1780000047.0, 41.8, 8192, 0, "responses", 108000, 1.8),
        ("score", 1780000090.0, 1.4, 16384, 0, "responses", None, 0.4),
        ("pair", 1780000092.0, 0.9, 1800, 0, "pairs", None, 0.4),
        ("train delta", 1780000095.0, 12.5, 80, 0, "steps", 128000, 0.7),
        ("train delta", 1780000120.0, 11.0, 70, 80, "steps", 112000, 0.7),
        ("evaluate", 1780000140.0, 33.3, 28000, 0, "answers", 320000, 1.6),
    ]
    keys = ("stage", "started", "seconds", "done", "skipped", "unit", "tokens", "peak_gib")
    folder = out / ".deltaray"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dict(zip(keys, stage, strict=True))) for stage in stages)
    (folder / "stages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
