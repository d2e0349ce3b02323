"""Generation through deltaray against a bare vLLM AsyncLLM loop: the same engine arguments, prompts and sampling.

    .venv/bin/python tests/benchmarks/generation_speed.py

Two models with random weights, each measured in turns (bare, ours, bare, ours), every turn in a fresh process:

* `engine-bound`: 25 M parameters. On two cores a step of its batch of 64 takes most of a tenth of a second, and the
  Python around it a few milliseconds: what is measured is whether the pipeline keeps the engine full.
* `tiny`: the shape of the miniature's student, where Python around the engine takes about as long as the engine.

Bare is one coroutine per request around AsyncLLM, with token ids made beforehand and nothing written. Ours is all that
`deltaray generate` does: prompts read from the store and tokenized, units through Ray Data, responses written to
Parquet and published. Both are timed alike: an event is a finished unit of prompts with the tokens so far, and the
steady rate is that between the events at which 15 % and 85 % of all tokens were there, so that neither the start of
the engine nor the emptying of its last batch counts. Writes `results/generation-speed.json`.
"""

import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniature_seeds import PACKAGES, hardware, installed

from deltaray.generate.spec import EngineSpec
from deltaray.recipe.models import Engine, Sampling, Teacher
from deltaray.recipe.recipe import Cluster, Failures

RESULT = Path(__file__).parent / "results" / "generation-speed.json"
TURNS = ("bare", "ours", "bare", "ours")
STEADY = (0.15, 0.85)  # shares of all tokens between which the rate is taken
CPUS = os.cpu_count() or 1

Event = tuple[float, int]
"""(seconds on the monotonic clock, tokens of all finished units)."""


@dataclass(frozen=True)
class Case:
    """A model of random weights and how much it is asked."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    prompts: int
    max_tokens: int
    max_num_seqs: int
    unit_size: int


CASES = {
    "engine-bound": Case(512, 8, 1536, 8, 4, 64, prompts=512, max_tokens=64, max_num_seqs=64, unit_size=16),
    "tiny": Case(64, 3, 256, 4, 4, 32, prompts=8192, max_tokens=32, max_num_seqs=256, unit_size=256),
}


def main() -> None:
    record = {
        "command": shlex.join([".venv/bin/python", *sys.argv]),
        "hardware": hardware(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "steady_between": STEADY,
        "cases": {name: measure(name) for name in CASES},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(RESULT)


def measure(name: str) -> dict[str, Any]:
    """All turns of one case."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(Path(folder, "model"), CASES[name])
        turns = [turn(name, kind, Path(folder, f"{number}")) for number, kind in enumerate(TURNS)]
    rates = {kind: [one["tokens_per_second"] for one in turns if one["kind"] == kind] for kind in TURNS}
    ratio = round(statistics.mean(rates["ours"]) / statistics.mean(rates["bare"]), 3)
    print(f"{name}: {ratio} of bare, {rates}", flush=True)
    return {"parameters": parameters, "case": asdict(CASES[name]), "ratio": ratio, "turns": turns}


def turn(name: str, kind: str, folder: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    folder.mkdir()
    began = time.monotonic()
    command = [sys.executable, __file__, name, kind, str(folder)]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | environment(folder, kind)).returncode
    if code != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {code}:\n{(folder / 'log').read_text()[-3000:]}")
    events = [(seconds, tokens) for seconds, tokens in json.loads((folder / "events").read_text())]
    found = {"kind": kind, "tokens_per_second": round(steady_rate(events), 1), "tokens": events[-1][1]}
    return found | {"first_unit_after_seconds": round(events[0][0] - began, 1), "units": len(events)}


def steady_rate(events: list[Event]) -> float:
    """Tokens per second between the two events at which the shares `STEADY` of all tokens were there. Pure."""
    low, high = (next(event for event in events if event[1] >= share * events[-1][1]) for share in STEADY)
    return (high[1] - low[1]) / (high[0] - low[0])


def environment(folder: Path, kind: str) -> dict[str, str]:
    """That of our engines; AsyncLLM always has its core in a process of its own."""
    variables = dict(EngineSpec(str(folder.parent / "model"), gpus=0, cpus=CPUS).environment)
    if kind == "bare":
        del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return variables | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}


# --- one turn -------------------------------------------------------------------------------------------------------
def teacher_of(case: Case, folder: Path) -> Teacher:
    sampling = Sampling(temperature=1.0, max_tokens=case.max_tokens, seed=1)
    arguments = {"max_num_seqs": case.max_num_seqs}
    engine = Engine(gpus=0, cpus=CPUS, dtype="float32", max_model_len=128, arguments=arguments)
    return Teacher(model=str(folder.parent / "model"), sampling=sampling, engine=engine)


def prompt_rows(case: Case) -> list[dict[str, Any]]:
    texts = [f"What is {n} + {n * 7919 % 10007}?" for n in range(case.prompts)]
    nothing = {"answer": None, "source": "", "error": None}
    return [
        {"prompt_id": f"p{n}", "messages": [{"role": "user", "content": text}]} | nothing
        for n, text in enumerate(texts)
    ]


def ours(case: Case, folder: Path) -> list[Event]:
    """What `deltaray generate` does with prompts that are in the store."""
    from deltaray.data.contracts import RESPONSES
    from deltaray.data.prompts.shards import store_prompts
    from deltaray.data.store import Store
    from deltaray.generate.answer import answer, work_of
    from deltaray.generate.fingerprint import generation_identity, identity_digest
    from deltaray.generate.stage import responses_table
    from deltaray.generate.units import Assignment
    from deltaray.runtime.session import start_ray, stop_ray

    store, events = Store(str(folder / "out")), []
    store_prompts(store, prompt_rows(case), case.prompts, unit_size=case.unit_size)
    teacher, responses = teacher_of(case, folder), Store.responses("t")
    identity = identity_digest(generation_identity(teacher))
    work = work_of(store, Assignment("t", teacher, Store.prompts, responses, identity, case.unit_size))

    def on_rows(name: str, done: int, total: int, tokens: int, note: str) -> None:
        if done:
            events.append((time.monotonic(), tokens))

    capacity = start_ray(Cluster(), print)
    answer(store, [work], capacity, responses_table, RESPONSES, Failures(), on_rows, print)
    stop_ray()
    assert store.count_rows(responses) == case.prompts
    return events


def bare(case: Case, folder: Path) -> list[Event]:
    """vLLM's AsyncLLM and a coroutine per request."""
    from deltaray.data.tokens import load_tokenizer
    from deltaray.data.tokens.chat import render_prompts
    from deltaray.generate.requests import sampling_parameters

    teacher, rows = teacher_of(case, folder), prompt_rows(case)
    token_ids, _ = render_prompts(load_tokenizer(teacher, "model"), [row["messages"] for row in rows])
    sampling = json.dumps(teacher.sampling.model_dump(exclude={"samples"}))
    parameters = sampling_parameters(sampling, [row["prompt_id"] for row in rows], [0])
    return asyncio.run(_async_loop(case, teacher, token_ids, parameters))


async def _async_loop(case: Case, teacher: Teacher, token_ids: list[list[int]], parameters: list[Any]) -> list[Event]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = teacher.engine
    spec = EngineSpec(
        teacher.model, engine.dtype, engine.max_model_len, engine_kwargs=engine.arguments, gpus=0, cpus=CPUS
    )
    arguments = AsyncEngineArgs(**spec.arguments, disable_log_stats=True)
    llm = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    events: list[Event] = []
    total = 0

    async def ask(number: int) -> int:
        prompt = {"prompt_token_ids": token_ids[number]}
        results = [result async for result in llm.generate(prompt, parameters[number], str(number))]
        return len(results[-1].outputs[0].token_ids)

    async def unit(first: int) -> None:
        nonlocal total
        numbers = range(first, min(first + case.unit_size, len(token_ids)))
        tokens = await asyncio.gather(*map(ask, numbers))
        total += sum(tokens)
        events.append((time.monotonic(), total))

    await asyncio.gather(*map(unit, range(0, len(token_ids), case.unit_size)))
    llm.shutdown()
    return events


def make_model(folder: Path, case: Case) -> int:
    """Saves a Llama of random weights with the miniature's tokenizer; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltaray.labs.miniature.tokenizer import VOCABULARY_SIZE, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        head_dim=case.head_dim,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        name, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
        found = {"ours": ours, "bare": bare}[kind](CASES[name], folder)
        (folder / "events").write_text(json.dumps(found))
