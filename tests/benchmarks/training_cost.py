"""What a token of training costs with longer sequences, larger vocabularies and more workers.

    .venv/bin/python tests/benchmarks/training_cost.py

One small model (256 hidden, 4 layers, 8,192 tokens in the vocabulary, pairs of 256 + 2 x 256 tokens, one worker on one
thread, float32, ZeRO 1); one thing is changed at a time, the tokens in all stay. Every measurement is the second epoch
of a process of its own, twice in turns; the mean counts. Workers are processes on cores of this machine, so
more of them than cores cannot help. Writes `results/training-cost.json`.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed
from training_speed import Case, save_model, texts, train_ours

RESULT = Path(__file__).parent / "results" / "training-cost.json"
TOKENS, TURNS = 12_288, 2
BASE = Case(256, 4, 768, 8, 4, 8192, 256, 256, 0.0, 4096, TOKENS // 768, 8, (), 2048)


def of_length(tokens: int) -> Case:
    """Prompt and responses of a third each; as many tokens to a step as in the base."""
    part, pairs = tokens // 3, TOKENS // tokens
    return replace(
        BASE, prompt=part, response=part, pairs=pairs, batch_size=max(1, pairs // 4), micro_batch_tokens=2048
    )


CASES: dict[str, tuple[Case, int]] = {
    **{f"length {tokens}": (of_length(tokens), 1) for tokens in (192, 384, 768, 1536, 3072, 6144)},
    **{f"vocabulary {size}": (replace(BASE, vocabulary=size), 1) for size in (2048, 8192, 32768, 131072)},
    **{f"workers {count}": (BASE, count) for count in (1, 2)},
}


def main() -> None:
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="deltaray-cost-") as folder:
        for name, (case, _) in CASES.items():
            save_model(case, Path(folder) / name / "model")
        for _ in range(TURNS):
            for name in CASES:
                turns[name].append(measure(name, Path(folder) / name))
                print(name, turns[name][-1], flush=True)
    record = {
        "command": "python tests/benchmarks/training_cost.py",
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "base": dict(vars(BASE)),
        "cases": {name: summary(found) for name, found in turns.items()},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens_per_second": statistics.mean(item["tokens_per_second"] for item in turns),
        "peak_gib": max(item["peak_gib"] for item in turns),
        "turns": [item["tokens_per_second"] for item in turns],
    }


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One case in as many processes as it has workers; the slowest and the largest count."""
    workers, rendezvous = CASES[name][1], uuid.uuid4().hex
    processes = []
    for rank in range(workers):
        place = {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(workers), "RENDEZVOUS": rendezvous}
        environment = os.environ | place | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, name, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(ends[0][1].decode()[-3000:])
    found = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    return {
        "tokens_per_second": min(item["tokens_per_second"] for item in found),
        "peak_gib": max(item["peak_gib"] for item in found),
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    case, _ = CASES[name]
    rows = texts(case)
    seconds, _ = train_ours(case, folder, rows)
    tokens = sum(len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": round(tokens / seconds, 1), "peak_gib": round(peak / 2**30, 2)}


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(run(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
