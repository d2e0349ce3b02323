"""The real demo of the README: SmolLM2-135M-Instruct and two weaker selves, over three seeds.

    .venv/bin/python tests/benchmarks/demo_real.py

Runs `deltaray demo --real --seeds 3` (what is done already is not done again) and writes `results/real-3-seeds.json`:
the summary of the evaluation with all claims, the measured deltas, the learning rates that were chosen, what was
counted in the answers, the time of every stage, the hardware, the versions and the command. The seeds share models,
responses, scores and references; training and evaluation are repeated. `--collect` runs nothing; SEEDS=1 in the
environment takes one seed (`real-1-seed.json`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.dataset as ds
from experiments import deltas, selected
from miniature_seeds import PACKAGES, hardware, installed

from deltaray.score.surface import STATISTICS

SEEDS = int(os.environ.get("SEEDS", "3"))
OUT = Path("runs/real" if SEEDS == 1 else f"runs/real-{SEEDS}-seeds")
RESULT = Path(__file__).parent / "results" / f"real-{SEEDS}-seed{'s' * (SEEDS > 1)}.json"
COUNTED = ("words", "distinct_words", "list_items")
"""Statistics that would show that the score was won by something else than sentences."""


def main() -> None:
    command = ["deltaray", "demo", "--real", "--seeds", str(SEEDS)]
    if "--collect" not in sys.argv:
        subprocess.run([sys.executable, "-m", *command], check=True)
    summary = json.loads((OUT / "evaluation" / "summary.json").read_text())
    record = {
        "command": " ".join(command),
        "names": summary["names"],
        "claims": summary["comparisons"],
        "selected": selected(OUT),
        "deltas": deltas(OUT),
        "counted": counted(),
        "stages": [json.loads(line) for line in (OUT / ".deltaray" / "stages.jsonl").read_text().splitlines()],
        "hardware": hardware() | {"load_at_the_end": os.getloadavg()},
        "versions": {name: found for name in (*PACKAGES, "peft", "gguf", "lm-eval") if (found := installed(name))},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)


def counted() -> dict[str, Any]:
    """Means over the stored answers, by model and task, and the first three answers."""
    found: dict[str, Any] = {}
    for folder in sorted(OUT.glob("evaluation/responses/model=*/task=words*")):
        rows = ds.dataset(folder, format="parquet").to_table(columns=["prompt_id", "text"]).sort_by("prompt_id")
        texts = rows["text"].to_pylist()
        means = {name: fmean(STATISTICS[name](text) for text in texts) for name in COUNTED}
        model, task = (part.name.partition("=")[2] for part in (folder.parent, folder))
        found.setdefault(model, {})[task] = {**means, "first": texts[:3]}
    return found


if __name__ == "__main__":
    main()
