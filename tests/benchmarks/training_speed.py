"""Preference tuning by deltaray against TRL's DPOTrainer: the same model, pairs, batch, loss and optimizer.

    .venv/bin/python tests/benchmarks/training_speed.py [CASE …]

Both get random weights and pairs whose lengths are those of the miniature (`miniature`) or of a real mix, with a heavy
tail (`mix`); with a GPU also an 8B-shaped student (`8b-lora`, `8b-full`: bfloat16, gradient checkpointing, ZeRO 3).
Both run in turns, every turn in a fresh process on all cores. The reference is made beforehand on both sides and not
timed. TRL runs with every micro-batch size of the case and its best counts; its padding-free mode is switched off in
1.16 itself. A turn trains two epochs, and the second is timed: tokens/s count prompt and response of both sides, as if
nothing were shared. Memory is the process's peak (on a GPU: the GPU's). Writes `results/training-speed.json`.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniature_seeds import PACKAGES, hardware, installed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

RESULT = Path(__file__).parent / "results" / "training-speed.json"
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Dense bfloat16 operations per second, by the name that CUDA tells."""


@dataclass(frozen=True)
class Case:
    """A model's shape, how long the texts are (medians and spread of a log-normal), and how both sides are run."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    prompt: int
    response: int
    spread: float
    max_length: int
    pairs: int
    batch_size: int
    micro_batches: tuple[int, ...]  # TRL's
    micro_batch_tokens: int  # ours
    lora: bool = False
    gpu: bool = False


CASES = {
    "miniature": Case(64, 3, 256, 4, 4, 64, 7, 5, 0.2, 32, 2048, 64, (64, 32), 8192),
    "mix": Case(256, 6, 768, 8, 4, 32000, 60, 90, 0.9, 1024, 48, 16, (1, 2), 2048),
    "8b-lora": Case(4096, 32, 14336, 32, 8, 128256, 250, 500, 0.8, 4096, 96, 32, (1, 2, 4), 16384, lora=True, gpu=True),
    "8b-full": Case(4096, 32, 14336, 32, 8, 128256, 250, 500, 0.8, 4096, 96, 32, (1, 2), 16384, gpu=True),
}


def main() -> None:
    gpu = torch.cuda.is_available()
    names = sys.argv[1:] or [name for name, case in CASES.items() if gpu or not case.gpu]
    record: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"cases": {}}
    record |= {
        "command": "python tests/benchmarks/training_speed.py",
        "hardware": hardware(),
        "versions": {name: found for name in [*PACKAGES, "trl"] if (found := installed(name))},
    }
    for name in names:
        record["cases"][name] = measure(name)
        RESULT.write_text(json.dumps(record, indent=2) + "\n")


def measure(name: str) -> dict[str, Any]:
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="deltaray-training-") as folder:
        save_model(case, Path(folder) / "model")
        trl = {size: turn(name, folder, "trl", size) for size in case.micro_batches}
        best = max(trl, key=lambda size: trl[size]["tokens_per_second"])
        turns = [turn(name, folder, *side) for side in (("ours", 0), ("trl", best), ("ours", 0), ("trl", best))]
    ours, theirs = ([item["tokens_per_second"] for item in turns[start::2]] for start in (0, 1))
    return {
        "case": dict(vars(case)),
        "trl_by_micro_batch": trl,
        "turns": turns,
        "speed_ratio": round(statistics.fmean(ours) / statistics.fmean(theirs), 2),
        "memory_ratio": round(turns[0]["peak_gib"] / turns[1]["peak_gib"], 2),
    }


def turn(name: str, folder: str, side: str, micro_batch: int) -> dict[str, Any]:
    """One side in a process of its own."""
    alone = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    alone |= {"TOKENIZERS_PARALLELISM": "false"} | ({} if CASES[name].gpu else {"DS_ACCELERATOR": "cpu"})
    if side == "trl":
        alone = {"OMP_NUM_THREADS": alone["OMP_NUM_THREADS"]}
    command = [sys.executable, __file__, "--turn", name, folder, side, str(micro_batch)]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1]) | {"side": side}
    print(name, found, flush=True)
    return found


# --- one turn -----------------------------------------------------------------------------------------------------
def run_turn(name: str, folder: Path, side: str, micro_batch: int) -> dict[str, Any]:
    case = CASES[name]
    rows = texts(case)
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in rows)
    seconds, loss = train_ours(case, folder, rows) if side == "ours" else train_trl(case, folder, rows, micro_batch)
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 2), "tokens": tokens}
    found |= {"peak_gib": round(peak / 2**30, 2), "first_loss": loss, "micro_batch": micro_batch}
    if gpu and (most := PEAK_FLOPS.get(torch.cuda.get_device_name())):
        weights = (
            case.layers * case.hidden * (2 * case.hidden + 2 * case.hidden // (case.heads // case.key_value_heads))
        )
        weights += case.layers * 3 * case.hidden * case.intermediate + case.vocabulary * case.hidden
        found["mfu"] = round(6 * weights * tokens / seconds / most, 3)
    return found


def texts(case: Case) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids; none longer than max_length, each response ends with the end token 1."""
    chance = np.random.default_rng(0)

    def ids(median: int) -> list[int]:
        size = int(np.clip(chance.lognormal(np.log(median), case.spread), 1, case.max_length // 2 - 2))
        return [int(token) for token in chance.integers(4, case.vocabulary, size)]

    return [(ids(case.prompt), [*ids(case.response), 1], [*ids(case.response), 1]) for _ in range(case.pairs)]


def save_model(case: Case, folder: Path) -> None:
    from tiny_model import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.key_value_heads,
        max_position_embeddings=case.max_length, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if case.gpu else "cpu"):
        LlamaForCausalLM(config).to(torch.bfloat16 if case.gpu else torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


RATE, BETA = 1e-6, 5.0


def train_ours(case: Case, folder: Path, rows: list[Any]) -> tuple[float, float]:
    """(seconds of the second epoch, loss of the first step)."""
    import torch.distributed as dist
    from pair_examples import examples_of, with_references

    from deltaray.recipe.models import Student
    from deltaray.recipe.study import TrainingRun
    from deltaray.recipe.training import Lora, Run, Training
    from deltaray.train.engine import join_process_group
    from deltaray.train.examples import Data
    from deltaray.train.student import load_module
    from deltaray.train.trainer import Trainer

    address = f"file://{folder}/rendezvous-{os.environ.get('RENDEZVOUS', os.getpid())}"
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("nccl" if case.gpu else "gloo", init_method=address, **place)
    join_process_group()
    student, dtype = Student(model=str(folder / "model")), "bfloat16" if case.gpu else "float32"
    training = Training(
        runs={}, dtype=dtype, micro_batch_tokens=case.micro_batch_tokens, zero_stage=3 if case.gpu else 1,
        gradient_checkpointing=case.gpu, offload="optimizer" if case.gpu and not case.lora else "none",
    )  # fmt: skip
    lora = Lora(rank=64, alpha=128) if case.lora else None
    settings = Run(pairing="p", beta=BETA, learning_rate=RATE, batch_size=case.batch_size, epochs=2, lora=lora)
    pairs = examples_of(*zip(*rows, strict=True), case.max_length)
    reference = load_module(student, dtype).to("cuda" if case.gpu else "cpu")
    data = Data(with_references(reference, pairs), pairs.select([]), {})
    del reference
    trainer = Trainer(training, student, TrainingRun("run", "student", ("p",), settings, None), data, 0)
    steps = len(rows) // case.batch_size
    losses = [trainer.step(step, 2 * steps)["loss"] for step in range(steps)]
    started = time.monotonic()
    for step in range(steps, 2 * steps):
        trainer.step(step, 2 * steps)
    return time.monotonic() - started, losses[0]


def train_trl(case: Case, folder: Path, rows: list[Any], micro_batch: int) -> tuple[float, float]:
    """The same with DPOTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    steps = len(rows) // case.batch_size

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.monotonic())

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # the ids are given

    zero = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # fmt: skip
    if case.gpu and not case.lora:
        zero["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        zero["zero_force_ds_cpu_optimizer"] = False
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type=["sigmoid_norm"], beta=BETA, learning_rate=RATE, use_cpu=not case.gpu,
        bf16=case.gpu, report_to=[], per_device_train_batch_size=micro_batch, num_train_epochs=2, save_strategy="no",
        gradient_accumulation_steps=case.batch_size // micro_batch, gradient_checkpointing=case.gpu, logging_steps=1,
        max_length=case.max_length, precompute_ref_log_probs=True, dataloader_pin_memory=case.gpu, disable_tqdm=True,
        weight_decay=0.0, adam_beta2=0.95, deepspeed=zero if case.gpu else None,
    )  # fmt: skip
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, zip(*rows, strict=True)), strict=True))
    dtype = torch.bfloat16 if case.gpu else torch.float32
    trainer = Prepared(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype), args=arguments,
        train_dataset=Dataset.from_dict(columns), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear") if case.lora else None,
    )  # fmt: skip
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Clock.times[2 * steps - 1] - Clock.times[steps - 1], logged[0]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(run_turn(sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
    else:
        main()
