"""Pairing without models: a store of made-up responses of some teachers, all pairings of two with four filters.

    python tests/benchmarks/pairing.py [--rows 32768] [--teachers 7] [--words 20 120] [--in-process] [--folder DIR]

Seconds of scoring (two scorers, all responses), of tokenising (once per response; by characters here, which costs more
than a model's own tokens), and of pairing, with what is told of the deltas; processor seconds of pairing with
`--in-process`, which works through the shards one after the other without Ray, as a worker does. Peak memory is that of
all processes together, of which the driver's maximum is told apart. Writes `results/pairing.json`.

A million prompts with short responses, all 21 pairings (about 6 GB in DIR):

    python tests/benchmarks/pairing.py --rows 1000000 --words 5 15 --folder DIR
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
from miniature_seeds import PACKAGES, hardware, installed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from tiny_model import save_tiny  # noqa: E402

from deltaray.data.contracts import RESPONSES  # noqa: E402
from deltaray.data.prompts import store_prompts  # noqa: E402
from deltaray.data.store import Store  # noqa: E402
from deltaray.pair import describe as describing  # noqa: E402
from deltaray.pair import stage as pairing  # noqa: E402
from deltaray.pair.token_ids import missing_tokens, paired_sides, tokenize_file  # noqa: E402
from deltaray.recipe import Recipe, Study, expand  # noqa: E402
from deltaray.runtime.memory import PeakMemory  # noqa: E402
from deltaray.score import stage as scoring  # noqa: E402

RESULT = Path(__file__).parent / "results" / "pairing.json"
SHARD = 32_768
WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 8)) for n in range(400)]
FILTERS = [
    {"kind": "repetition", "side": "chosen"},
    {"kind": "cjk"},
    {"kind": "identity", "side": "chosen"},
    {"kind": "length_gap", "max_tokens": 400},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=SHARD, help="prompts")
    parser.add_argument("--teachers", type=int, default=7)
    parser.add_argument("--words", type=int, nargs=2, default=(20, 120), help="of a response, least and most")
    parser.add_argument("--in-process", action="store_true", help="without Ray")
    parser.add_argument("--folder", help="where the store is made, and removed in the end")
    arguments = parser.parse_args()
    temporary = {"prefix": "deltaray-pairing-", "ignore_cleanup_errors": True, "dir": arguments.folder}
    with tempfile.TemporaryDirectory(**temporary) as folder:
        teachers = [f"t{number}" for number in range(arguments.teachers)]
        store, study = Store(f"{folder}/out"), study_at(Path(folder), teachers)
        fill(store, arguments.rows, teachers, *arguments.words)
        if arguments.in_process:
            one_after_the_other()
        else:
            from deltaray.runtime.session import start_ray, stop_ray

            start_ray(study.recipe.cluster, print)
        found = measure(store, study, arguments.rows, arguments.in_process)
        if not arguments.in_process:
            stop_ray()
    where = "in one process" if arguments.in_process else "on Ray"
    words = "{} to {} words".format(*arguments.words)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    record[f"{arguments.rows} prompts, {arguments.teachers} teachers, {words}, {where}"] = found
    record |= {"hardware": hardware(), "packages": {name: installed(name) for name in PACKAGES}}
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def study_at(folder: Path, teachers: list[str]) -> Study:
    two = {"scorer": "words", "filters": FILTERS}
    pairs = {f"{a}-over-{b}": {"chosen": a, "rejected": b, **two} for a, b in combinations(teachers, 2)}
    recipe = {
        "name": "pairing",
        "out": str(folder / "out"),
        "prompts": {"path": "unused.jsonl"},
        "teachers": {name: {"model": "unused"} for name in teachers},
        "scorers": {
            "words": {"kind": "surface", "statistic": "words"},
            "number": {"kind": "numeric"},
        },
        "pairings": pairs,
        "student": {"model": save_tiny(folder / "student"), "max_length": 2048},
    }
    return expand(Recipe.model_validate(recipe))


def fill(store: Store, rows: int, teachers: list[str], least: int, most: int) -> None:
    """A new text for each prompt and response."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randrange(least, most + 1))) + f" {draw.randrange(100)}"

    prompts: Any = (
        {
            "prompt_id": f"p{n:07d}", "messages": [{"role": "user", "content": text()}], "answer": "42",
            "source": f"s{n % 7}", "error": None,
        }
        for n in range(rows)
    )  # fmt: skip
    store_prompts(store, prompts, SHARD)
    for number, start in enumerate(range(0, rows, SHARD)):
        ids = [f"p{n:07d}" for n in range(start, min(start + SHARD, rows))]
        for teacher in teachers:
            texts = [text() for _ in ids]
            same = {"prompt_token_ids": [[1]], "token_ids": [[1]], "tokens": [1], "finish_reason": ["stop"]}
            columns = {name: value * len(ids) for name, value in {**same, "error": [None], "reasoning": [None]}.items()}
            columns |= {"prompt_id": ids, "sample": [0] * len(ids), "teacher": [teacher] * len(ids), "text": texts}
            table = pa.Table.from_pydict(columns, schema=RESPONSES)
            store.write_table(f"{Store.responses(teacher)}/part-{number:05d}-x.parquet", table, RESPONSES)


def one_after_the_other() -> None:
    """Shards in this process, so that its peak memory is that of one worker."""

    def map_units(units: list[Any], work: Any) -> Any:
        return (json.loads(json.dumps(work(json.loads(json.dumps(unit))))) for unit in units)

    pairing.map_units = describing.map_units = scoring.map_units = map_units  # type: ignore[attr-defined]


def stored(store: Store, folder: str) -> int:
    assert store.local is not None
    return sum(path.stat().st_size for path in (store.local / folder).rglob("*") if path.is_file())


def newest_tokens(store: Store) -> float:
    """When the last tokens were written: on Ray the time for them is part of `seconds`."""
    return max(path.stat().st_mtime for path in Path(store.out, ".deltaray/tokens").rglob("*.parquet"))


def measure(store: Store, study: Study, rows: int, in_process: bool) -> dict[str, Any]:
    began = time.monotonic()
    scored = scoring.score(study, store, scoring.all_scores(study))
    between = time.monotonic()
    sides = paired_sides(study, list(study.pairings))
    for unit in missing_tokens(study, store, sides) if in_process else []:
        tokenize_file(store, unit)
    tokenised, processor, clock = time.monotonic(), time.process_time(), time.time()
    with PeakMemory() as memory:
        pairs = sum(pairing.pair(study, store).values())
    seconds, processor = time.monotonic() - tokenised, time.process_time() - processor
    candidates = rows * len(study.pairings)
    return {
        "prompts": rows,
        "teachers": len(study.teachers),
        "pairings": len(study.pairings),
        "scores_per_second": round(scored / (between - began)),
        "seconds_tokenising": round(tokenised - between if in_process else newest_tokens(store) - clock, 1),
        "candidates": candidates,
        "pairs": pairs,
        "seconds": round(seconds, 1),
        "candidates_per_second": round(candidates / seconds),
        "microseconds_per_candidate": round(1e6 * seconds / candidates, 1),
        "processor_microseconds_per_candidate": round(1e6 * processor / candidates, 1) if in_process else None,
        "peak_gib_of_all_processes": round(memory.gib, 2),
        "mib_of_pairs": round(stored(store, "pairs") / 2**20, 1),
        "mib_of_everything": round(stored(store, "") / 2**20, 1),
        "peak_mib_of_this_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
