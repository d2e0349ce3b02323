"""deltaray against the script with which the authors of the delta learning paper made their model ladder.

    git clone https://github.com/scottgeng00/delta_learning CHECKOUT
    .venv/bin/python tests/benchmarks/authors_script.py --script CHECKOUT/scripts/generate_model_ladder_data.py

Both answer the same prompts greedily with the four teachers of the miniature family (`make demo` makes it), on this
machine's CPU, in turns. Then each is killed (SIGKILL to all its processes) when half of the answers are finished, and
the same command is run again. Writes `results/authors-script.json`: total times, what survived, what was made twice.

The authors' code runs as it is but for `ADAPTATIONS`, which its newest libraries or the lack of a GPU and a network
force on it. It is also timed with vLLM's engine in the process that asks (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), as
deltaray runs it on CPUs: how much of the difference is only that.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from miniature_seeds import PACKAGES, hardware, installed

from deltaray.generate.spec import EngineSpec

HERE = Path(__file__).parent
RESULT = HERE / "results" / "authors-script.json"
FAMILY = Path("runs/miniature-family")
TEACHERS = {name: str(FAMILY.resolve() / "seed0" / name) for name in ("mini-xs", "mini-s", "mini-m", "mini-l")}
MAX_TOKENS, MAX_MODEL_LEN, REQUESTS = 12, 32, 256
UNIT_SIZE, UNITS_IN_FLIGHT = 256, 2  # deltaray's defaults, written out because they bound what a kill costs
POLL_SECONDS = 0.3
ADAPTATIONS = [
    "MODEL_MAP names the four miniature teachers (folders) instead of seven Qwen2.5 models",
    "vllm.LLM is given the engine arguments that deltaray gives its engines (`engine_arguments`)",
    "load_dataset's result is turned into lists: since datasets 4 a column is not a list, and json.dump refuses it",
    "push_to_hub writes a local Parquet file: there is no network",
    "--tensor_parallel_size 1 and --max_tokens 12; the input data set is a local folder",
]
PREAMBLE = """
import functools, json, os, vllm
vllm.LLM = functools.partial(vllm.LLM, **json.loads(os.environ["BENCHMARK_ENGINE"]))
"""


def engine_arguments() -> dict[str, Any]:
    """What deltaray passes to vLLM for these teachers, but for the model and the parallelism."""
    spec = EngineSpec("", "float32", MAX_MODEL_LEN, gpus=0, engine_kwargs={"max_num_seqs": REQUESTS})
    return {key: value for key, value in spec.arguments.items() if key not in ("model", "tensor_parallel_size")}


def run_adapted(script: str, *arguments: str) -> None:
    """The authors' script with `ADAPTATIONS`; called in a process of its own."""
    import datasets

    found = importlib.util.spec_from_file_location("generate_model_ladder_data", script)
    assert found and found.loader
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.MODEL_MAP = TEACHERS
    module.WORKER_CODE = PREAMBLE + module.WORKER_CODE
    module.load_dataset = lambda *args, **options: datasets.load_dataset(*args, **options).to_dict()
    datasets.Dataset.push_to_hub = lambda self, name: self.to_parquet(name)
    sys.argv = [script, *arguments]
    module.main()


# --- the two contestants: how they are started and what of their work can be seen from outside -----------------------
@dataclass(frozen=True)
class Authors:
    """Their script in a folder. Finished models wait in a temporary folder; the result is written once, at the end."""

    name: str
    script: Path
    folder: Path
    prompts: list[dict[str, Any]]
    environment: dict[str, str]

    def command(self) -> list[str]:
        (self.folder / "prompts").mkdir(parents=True, exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        write_prompts(self.folder / "prompts" / "prompts.jsonl", self.prompts)
        call = "import sys, authors_script; authors_script.run_adapted(*sys.argv[1:])"
        data = ["--input_dataset", str(self.folder / "prompts"), "--output_dataset", str(self.folder / "out.parquet")]
        limits = ["--max_tokens", str(MAX_TOKENS), "--tensor_parallel_size", "1"]
        return [sys.executable, "-c", call, str(self.script), *data, *limits]

    def variables(self) -> dict[str, str]:
        own = {"TMPDIR": str(self.folder / "tmp"), "HF_DATASETS_CACHE": str(self.folder / "cache")}
        engine = {"BENCHMARK_ENGINE": json.dumps(engine_arguments()), "PYTHONPATH": str(HERE)}
        return own | engine | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | self.environment

    def finished(self) -> int:
        """Answers in its temporary files: complete models only, as it writes nothing else."""
        rows = 0
        for path in (self.folder / "tmp").glob("*/mini-*.json"):
            with contextlib.suppress(OSError, ValueError):  # being written, or just deleted
                rows += len(json.loads(path.read_text()))
        return rows

    def answers(self) -> dict[tuple[str, str], list[str]]:
        """(teacher, prompt id) -> texts, from the result that a later run would find."""
        if not (self.folder / "out.parquet").exists():
            return {}
        table = pq.read_table(self.folder / "out.parquet")
        ids = [prompt["id"] for prompt in self.prompts]
        return {
            (teacher, key): [text]
            for teacher in TEACHERS
            for key, text in zip(ids, table[teacher].to_pylist(), strict=True)
        }

    def generated(self, log: str) -> int:
        """Answers that a completed run made, from what it printed."""
        return log.count("Generating with ") * len(self.prompts)


@dataclass(frozen=True)
class Deltaray:
    """`deltaray generate` in a folder."""

    name: str
    folder: Path
    prompts: list[dict[str, Any]]

    def command(self) -> list[str]:
        self.folder.mkdir(exist_ok=True)
        write_prompts(self.folder / "prompts.jsonl", self.prompts)
        (self.folder / "recipe.yaml").write_text(json.dumps(self.recipe()))  # JSON is YAML
        return [sys.executable, "-m", "deltaray", "generate", str(self.folder / "recipe.yaml")]

    def recipe(self) -> dict[str, Any]:
        engine = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "arguments": {"max_num_seqs": REQUESTS}}
        engine["units_in_flight"] = UNITS_IN_FLIGHT
        settings = {"sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS}, "engine": engine}
        return {
            "name": "ladder",
            "out": str(self.folder / "out"),
            "unit_size": UNIT_SIZE,
            "cluster": {"gpus": 0},
            "prompts": {"path": str(self.folder / "prompts.jsonl")},
            "teachers": {name: {"model": path, **settings} for name, path in TEACHERS.items()},
        }

    def variables(self) -> dict[str, str]:
        return {}

    def finished(self) -> int:
        """Committed answers: published ones and those in units that wait to be published."""
        return sum(map(len, self.answers().values()))

    def answers(self) -> dict[tuple[str, str], list[str]]:
        """(teacher, prompt id) -> texts; more than one where a row is there twice, which may never happen."""
        found: dict[tuple[str, str], list[str]] = {}
        for table in filter(None, map(read_if_there, committed(self.folder / "out"))):
            for row in table.to_pylist():
                found.setdefault((row["teacher"], row["prompt_id"]), []).append(row["text"])
        return found

    def generated(self, log: str) -> int:
        """Answers that the last completed run made, from the record of its stage."""
        records = (self.folder / "out" / ".deltaray" / "stages.jsonl").read_text().splitlines()
        return int(json.loads(records[-1])["done"])


Contestant = Authors | Deltaray


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def committed(out: Path) -> list[Path]:
    """The files of responses under `out` that a resumed run finds."""
    folders = [out / "responses", out / ".deltaray" / "units" / "responses"]
    return [path for folder in folders for path in folder.rglob("*.parquet") if not path.name.startswith(".")]


def read_if_there(path: Path) -> pa.Table | None:
    """The rows of a file; None if it was published or deleted since it was listed."""
    with contextlib.suppress(FileNotFoundError):
        table = pq.ParquetFile(path).read(["prompt_id", "text"])
        teacher = next(part for part in path.parts if part.startswith("teacher=")).removeprefix("teacher=")
        return table.append_column("teacher", pa.repeat(teacher, len(table)))
    return None


# --- measuring -------------------------------------------------------------------------------------------------------
def started(contestant: Contestant) -> psutil.Popen:
    """The contestant's command, running; what it says goes to `log.txt` in its folder."""
    command = contestant.command()
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment = inherited | {"PYTHONUNBUFFERED": "1"} | contestant.variables()
    with (contestant.folder / "log.txt").open("wb") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def tree_of(process: psutil.Popen) -> list[psutil.Process]:
    """The process and everything below it, parents first; empty if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def complete(contestant: Contestant) -> dict[str, float]:
    """Runs the command to its end; returns its seconds, its processes' CPU seconds (sampled), the load before."""
    began, spent, load = time.monotonic(), dict[psutil.Process, float](), round(os.getloadavg()[0], 1)
    process = started(contestant)
    while process.poll() is None:
        for member in tree_of(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent[member] = sum(member.cpu_times()[:2])
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{contestant.name} ended with {process.returncode}:\n{log_of(contestant)[-3000:]}")
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "cpu_seconds": round(sum(spent.values()), 1), "load_before": load}


def log_of(contestant: Contestant) -> str:
    return (contestant.folder / "log.txt").read_text(errors="replace")


def kill_at_half(contestant: Contestant) -> float:
    """Starts the command and kills it with all its processes once half of the answers are finished; its seconds."""
    began, half = time.monotonic(), len(contestant.prompts) * len(TEACHERS) // 2
    process = started(contestant)
    while contestant.finished() < half:
        if process.poll() is not None:
            raise SystemExit(f"{contestant.name} ended before half of its answers were seen:\n{log_of(contestant)}")
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - began
    tree = tree_of(process)
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(tree, timeout=30)
    return round(seconds, 1)


def durability(contestant: Contestant) -> dict[str, Any]:
    """What a kill at half way leaves, and what the same command does then.

    What engines had answered but deltaray had not committed cannot be seen from outside; it is generated again and
    bounded by `deltaray_answers_in_flight_at_most`.
    """
    total = len(contestant.prompts) * len(TEACHERS)
    first = kill_at_half(contestant)
    finished, kept = contestant.finished(), sum(map(len, contestant.answers().values()))
    second = complete(contestant)
    answers, generated = contestant.answers(), contestant.generated(log_of(contestant))
    return {
        "seconds_until_the_kill": first,
        "answers_finished_at_the_kill": finished,
        "answers_that_the_same_command_finds": kept,
        "answers_left_where_it_does_not_look": finished - kept,
        "second_run": second,
        "answers_generated_by_the_second_run": generated,
        "finished_answers_generated_again": generated - (total - finished),
        "each_answer_exactly_once": len(answers) == total and all(len(texts) == 1 for texts in answers.values()),
    }


def compare(script: Path, folder: Path, prompts: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

    def contestants(label: str) -> list[Contestant]:
        return [
            Authors("authors", script, folder / f"authors-{label}", prompts, {}),
            Deltaray("deltaray", folder / f"deltaray-{label}", prompts),
            Authors("authors, engine in process", script, folder / f"in-process-{label}", prompts, in_process),
        ]

    runs: list[dict[str, Any]] = []
    answers: dict[str, dict[tuple[str, str], list[str]]] = {}
    for number in range(rounds):
        for contestant in contestants(str(number))[:: -1 if number % 2 else 1]:
            runs.append({"name": contestant.name} | complete(contestant))
            answers[contestant.name] = contestant.answers()
            print(runs[-1], file=sys.stderr)
    killed = {contestant.name: durability(contestant) for contestant in contestants("killed")[:2]}
    theirs, ours = answers["authors"], answers["deltaray"]
    same = sum(texts == ours.get(key) for key, texts in theirs.items())
    return {"total": runs, "same_text": same, "answers": len(theirs), "killed_at_half": killed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, help="their generate_model_ladder_data.py, in a checkout")
    parser.add_argument("--prompts", type=int, default=4096, help="how many of the miniature's prompts")
    parser.add_argument("--rounds", type=int, default=1, help="how often the total times are taken, in turns")
    options = parser.parse_args()
    if options.script is None or not options.script.is_file():
        parser.error(
            "--script: the authors' script is needed: `git clone https://github.com/scottgeng00/delta_learning "
            "CHECKOUT`, then --script CHECKOUT/scripts/generate_model_ladder_data.py"
        )
    lines = (FAMILY / "prompts.jsonl").read_text().splitlines()[: options.prompts]
    with tempfile.TemporaryDirectory(prefix="authors-script-", ignore_cleanup_errors=True) as folder:
        result = compare(options.script.resolve(), Path(folder), [json.loads(line) for line in lines], options.rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(described(options.script, len(lines)) | result, indent=2) + "\n")
    print(RESULT)


def described(script: Path, prompts: int) -> dict[str, Any]:
    """What was compared, on what."""
    return {
        "command": shlex.join(["python", *sys.argv]).replace(str(script), f"CHECKOUT/scripts/{script.name}"),
        "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "adaptations": ADAPTATIONS,
        "engine_arguments": engine_arguments(),
        "prompts": prompts,
        "teachers": list(TEACHERS),
        "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS},
        "deltaray_answers_in_flight_at_most": len(TEACHERS) * UNITS_IN_FLIGHT * UNIT_SIZE,
        "hardware": hardware(),
        "versions": {name: found for name in (*PACKAGES, "datasets") if (found := installed(name))},
    }


if __name__ == "__main__":
    main()
