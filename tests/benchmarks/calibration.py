"""Prediction against truth on the miniature: `plan --calibrate`, then `generate`, right after each other.

    .venv/bin/python tests/benchmarks/calibration.py [RUNS]

Each of RUNS (default 3) works in a fresh folder; the miniature's family is made once and cached in runs/. Writes
`results/calibration.json`: per run what was predicted, what was true, and how busy the machine was; the worst error.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed

from deltaray.data.store import Store
from deltaray.study.calibrate.compare import compare

PROMPTS = 1024
RECIPE = "jobs/recipes/miniature.yaml"
RESULT = Path(__file__).parent / "results" / "calibration.json"


def main() -> None:
    runs = [run() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)]
    record = {
        "commands": [f"deltaray plan {RECIPE} --calibrate {PROMPTS}", f"deltaray generate {RECIPE}"],
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "worst": {what: max(abs(row["off"]) for run in runs for row in run["rows"] if row["what"] == what)
                  for what in ("tokens", "seconds")},
        "runs": runs,
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["worst"]), RESULT)


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = ("--set", f"out={folder}/study")
        loads = [os.getloadavg()[0]]
        for verb in (("plan", RECIPE, "--calibrate", str(PROMPTS)), ("generate", RECIPE)):
            subprocess.run([sys.executable, "-m", "deltaray", *verb, *out], check=True, stdout=subprocess.DEVNULL)
            loads.append(os.getloadavg()[0])
        return {"rows": compare(Store(f"{folder}/study")), "load_before_between_after": loads}


if __name__ == "__main__":
    main()
