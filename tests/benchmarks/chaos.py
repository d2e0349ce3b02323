"""Exactly once under chaos: random kills of a generation's processes, then every identity counted.

    python tests/benchmarks/chaos.py [--kills 100] [--seed 1]           a fake engine; the recipe changes, too
    python tests/benchmarks/chaos.py --real [--kills 12] [--seed 1]     vLLM on the miniature family

Fails where a row is lost, doubled or not what it must be, or where a published row disappears. Writes
`results/chaos-fake.json` or `results/chaos-real.json`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from miniature_seeds import PACKAGES, hardware, installed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from chaos import FAKE, REAL, Command, chaos  # noqa: E402
from fake_engine import Behaviour  # noqa: E402
from lab import Key, Lab, Reader, generated_again, rows_of  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FAMILY = ROOT / "runs" / "miniature-family"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="vLLM instead of the fake engine")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kills = arguments.kills or (12 if arguments.real else 100)
    with tempfile.TemporaryDirectory(prefix="deltaray-chaos-", ignore_cleanup_errors=True) as folder:
        began = time.monotonic()
        result = (real if arguments.real else fake)(Path(folder), kills, arguments.seed)
        result["seconds"] = round(time.monotonic() - began)
    kind = "real" if arguments.real else "fake"
    record = {
        "command": " ".join(["python tests/benchmarks/chaos.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "seed": arguments.seed,
        **result,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"chaos-{kind}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def fake(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Every row's content is known, and the engines tell what they generated."""
    marks = folder / "marks"
    marks.mkdir()
    behaviour = Behaviour(delay=0.1, marks=str(marks))
    lab = Lab(folder / "study", behaviour=behaviour, settings={"cluster": {"cpus": 4}})
    result = _run(lab, kills, seed, FAKE)
    generated, again = generated_again(marks)
    bound = lab.in_flight() * sum(result["kills"].values())
    assert again <= bound, f"{again} rows generated again, more than {bound}"
    return result | {"rows_generated": generated, "rows_generated_again": again, "rows_in_flight": lab.in_flight()}


def real(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The same rows are generated once more in peace: seeded sampling says the same again, killed or not."""
    shape = {"prompts": 4096, "shard_size": 512, "unit_size": 64, "units_in_flight": 2, "samples": 2}
    lab, calm = Family(folder / "study", **shape), Family(folder / "calm", **shape)
    result = _run(lab, kills, seed, REAL)
    code, stderr = Command(calm, "generate", str(calm.write()), program=REAL).result()
    assert code == 0, stderr
    assert result["rows"] == 2 * 2 * lab.prompts
    equal = sum(len(said(lab, name) & said(calm, name)) for name in lab.temperatures)
    return result | {"rows_equal_to_an_undisturbed_run": equal, "rows_in_flight": lab.in_flight()}


def said(lab: Lab, name: str) -> set[tuple[str, int, str]]:
    return {(row["prompt_id"], row["sample"], row["text"]) for row in rows_of(lab.out / f"responses/teacher={name}")}


def _run(lab: Lab, kills: int, seed: int, program: tuple[str, ...]) -> dict[str, Any]:
    reader = Reader(lab.out)
    reader.start()
    outcome = chaos(lab, random.Random(seed), kills, program=program, changes=program == FAKE)
    reader.stop()
    return {
        "kills": dict(outcome.kills),
        "commands": len(outcome.exits) + 1,
        "changes_of_the_recipe": len(outcome.changes),
        "rows": outcome.rows,
        "rows_lost": 0,  # `chaos` fails otherwise
        "rows_doubled": 0,
        "reads_meanwhile": reader.snapshots,
    }


# --- real models --------------------------------------------------------------------------------------------------
@dataclass
class Family(Lab):
    """The lab over the miniature's teachers; what they say is compared with an undisturbed run at the end."""

    def replicas(self, teacher: str) -> int:
        return 1

    def wanted(self) -> set[Key]:
        prompts = [pq.read_table(path)["prompt_id"].to_pylist() for path in (self.out / "prompts").glob("*.parquet")]
        return {(prompt, sample) for ids in prompts for prompt in ids for sample in range(self.samples)}

    def check_rows(self, name: str, rows: list[dict[str, Any]]) -> float | None:
        assert all(row["teacher"] == name for row in rows)
        return self.temperatures[name] if rows else None

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"prompts": {"path": str(FAMILY / "prompts.jsonl"), "limit": self.prompts}}

    def teacher(self, name: str) -> dict[str, Any]:
        return {
            "model": str(FAMILY / "seed0" / {"strong": "mini-m", "weak": "mini-xs"}[name]),
            "sampling": {"temperature": self.temperatures[name], "max_tokens": 12, "samples": self.samples},
            "engine": {
                "dtype": "float32",
                "max_model_len": 32,
                "arguments": {"max_num_seqs": 64},
                "units_in_flight": self.units_in_flight,
            },
        }


if __name__ == "__main__":
    main()
