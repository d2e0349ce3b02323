"""The real demo of the README: SmolLM2-135M-Instruct and two weaker selves, over three seeds.

    .venv/bin/python tests/benchmarks/demo_real.py

Runs `deltaray demo --real --seeds 3` (what is done already is not done again) and writes `results/real-3-seeds.json`:
the summary of the evaluation with all claims, the measured deltas, what was counted in the answers, the time of every
stage, the hardware, the versions and the command. The seeds share models, responses, scores and references; training
and evaluation are repeated. `--collect` runs nothing; SEEDS=1 in the environment takes one seed (`real-1-seed.json`).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.dataset as ds
from experiments import deltas
from miniature_seeds import PACKAGES, hardware, installed

from deltaray.recipe import load_recipe, shipped_recipe
from deltaray.score.surface import STATISTICS

SEEDS = int(os.environ.get("SEEDS", "3"))
OUT = Path("runs/real" if SEEDS == 1 else f"runs/real-{SEEDS}-seeds")
RESULT = Path(__file__).parent / "results" / f"real-{SEEDS}-seed{'s' * (SEEDS > 1)}.json"
COUNTED = ("words", "distinct_words", "list_items")
"""Statistics that would show that the score was won by something else than sentences."""
SPEAKS = re.compile(load_recipe(shipped_recipe("real")).pairings["delta"].filters[0].patterns[0], re.IGNORECASE)


def main() -> None:
    command = ["deltaray", "demo", "--real", "--seeds", str(SEEDS)]
    if "--collect" not in sys.argv:
        subprocess.run([sys.executable, "-m", *command], check=True)
    summary = json.loads((OUT / "evaluation" / "summary.json").read_text())
    record = {
        "command": " ".join(command),
        "names": summary["names"],
        "claims": summary["comparisons"],
        "deltas": deltas(OUT),
        "counted": counted(),
        "stages": [json.loads(line) for line in (OUT / ".deltaray" / "stages.jsonl").read_text().splitlines()],
        "hardware": hardware() | {"load_at_the_end": os.getloadavg()},
        "versions": {name: found for name in (*PACKAGES, "peft", "gguf", "lm-eval") if (found := installed(name))},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)


def counted() -> dict[str, Any]:
    """Means over the stored answers, by model and task, and the first three answers.

    `speaks_of_words`: the share of answers that the pairs' filter would drop; `used`: the share of the things where
    such answers count nothing; `all`: the share of the answers that have all things.
    """
    found: dict[str, Any] = {}
    for folder in sorted(OUT.glob("evaluation/responses/model=*/task=words*")):
        model, task = (part.name.partition("=")[2] for part in (folder.parent, folder))
        asked = {row["prompt_id"]: row["answer"] for row in rows(OUT / "evaluation" / "prompts" / folder.name)}
        texts = [(row["text"], asked[row["prompt_id"]]) for row in rows(folder)]
        means = {name: fmean(STATISTICS[name](text) for text, _ in texts) for name in COUNTED}
        shares = [(share(text, answer), SPEAKS.search(text) is None) for text, answer in texts]
        means |= {
            "speaks_of_words": fmean(not silent for _, silent in shares),
            "used": fmean(part * silent for part, silent in shares),
            "all": fmean(part == 1 for part, _ in shares),
        }
        found.setdefault(model, {})[task] = {**means, "first": [text for text, _ in texts[:3]]}
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(ds.dataset(folder, format="parquet").to_table().sort_by("prompt_id").to_pylist())


def share(text: str, answer: str) -> float:
    """Of the things that a prompt asked for, those that a text has."""
    patterns = [pattern for given in json.loads(answer)["kwargs"] for pattern in given["keywords"]]
    return fmean(re.search(pattern, text, re.IGNORECASE) is not None for pattern in patterns)


if __name__ == "__main__":
    main()
