"""The paper's controlled experiments in miniature: one recipe each, three seeds.

    .venv/bin/python tests/benchmarks/experiments.py [NAME …]

Runs `deltaray run jobs/recipes/experiments/<name>.yaml` for the named experiments or all (what is done already is not
done again) and writes what they found into `results/experiments.json`, under their names: every model's scores by
seed, the claims with their intervals, the measured deltas of all pairings, how far scorers agree, the learning rates
that were chosen, counted sections, the time of every stage, the hardware, the versions and the command. `--collect`
runs nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from miniature_seeds import PACKAGES, hardware, installed

from deltaray.evaluate.statistics import difference_over_seeds, mean_and_stderr
from deltaray.recipe import recipe_folder
from deltaray.recipe.study import base_name
from deltaray.score.surface import STATISTICS

RECIPES = recipe_folder() / "experiments"
RESULT = Path(__file__).parent / "results" / "experiments.json"
COUNTED = {"sections": ("outlines", "bold_sections")}
"""Experiments without a right answer: task and statistic of the text that is counted."""


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--collect"] or sorted(
        path.stem for path in RECIPES.glob("*.yaml")
    )
    for name in names:
        command = ["deltaray", "run", f"jobs/recipes/experiments/{name}.yaml"]
        if "--collect" not in sys.argv:
            subprocess.run([sys.executable, "-m", *command], check=True)
        record = {"command": " ".join(command), **collected(name)}
        found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps(dict(sorted({**found, name: record}.items())), indent=2) + "\n")
        print(f"{name}: {RESULT}")


def collected(name: str) -> dict[str, Any]:
    """What one experiment's folder tells."""
    out = Path("runs/experiments") / name
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    return {
        "seeds": summary["seeds"],
        "names": summary["names"],
        "claims": summary["comparisons"],
        "selected": selected(out),
        "deltas": deltas(out),
        "agreement": agreement(out),
        **({"counted": counted(out, *COUNTED[name])} if name in COUNTED else {}),
        "stages": [json.loads(line) for line in (out / ".deltaray" / "stages.jsonl").read_text().splitlines()],
        "hardware": hardware() | {"load_at_the_end": os.getloadavg()},
        "versions": {package: version for package in PACKAGES if (version := installed(package))},
    }


def selected(out: Path) -> dict[str, Any]:
    """The winners of grids, by model."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("evaluation/*.json"))}
    return {
        name: {"selected": result["selected"], "selection": result["selection"]}
        for name, result in results.items()
        if "selected" in result
    }


def deltas(out: Path) -> dict[str, Any]:
    """Per pairing: pairs, measured delta and chosen score, as means over seeds, and the values of the seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("pairs/pairing=*/_delta.json")):
        report = json.loads(path.read_text())
        if report["scored"]:
            found.setdefault(base_name(path.parent.name.partition("=")[2]), []).append(report)
    return {
        name: {
            "pairs": [report["pairs"] for report in reports],
            "delta": [report["delta"]["mean"]["value"] for report in reports],
            "chosen_score": [report["chosen_score"]["value"] for report in reports],
            "generator_delta": [(report["levels"] or {}).get("generator") for report in reports],
        }
        for name, reports in found.items()
    }


def agreement(out: Path) -> Any:
    """How far every two scorers agree, in all."""
    path = out / "agreement.json"
    found = json.loads(path.read_text())["agreement"] if path.exists() else []
    return [row for row in found if row["by"] in ("all", "teachers")]


def counted(out: Path, task: str, statistic: str) -> dict[str, Any]:
    """Mean counts of a statistic in the stored answers: by model over seeds, and against the untouched student."""
    values: dict[str, list[float]] = {}
    for folder in sorted(out.glob(f"evaluation/responses/model=*/task={task}")):
        texts = ds.dataset(folder, format="parquet").to_table(columns=["text"])["text"].to_pylist()
        mean = fmean(STATISTICS[statistic](text) for text in texts)
        values.setdefault(base_name(folder.parent.name.partition("=")[2]), []).append(mean)
    found = {}
    for name, means in values.items():
        mean, stderr = mean_and_stderr(np.array(means))
        _, low, high = difference_over_seeds(np.array(means), np.array(values["student"]))
        found[name] = {"values": means, "mean": mean, "stderr": stderr, "over_student": [low, high]}
    return found


if __name__ == "__main__":
    main()
