"""Optimizer steps with and without a restart between them, for several layouts of DeepSpeed: run by test_engines.py.

    python tests/engine_matrix.py OUT '[[{"zero_stage": 2, …}, {"loss": "dpo", …}], …]'

One process, no Ray. Prints one JSON line per pair of layout and settings: losses and gradient norms of every step,
whether the weights after a restart are those of the run without one, bit for bit, and how far they moved.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import torch
import torch.distributed as dist
from pair_examples import TEXTS, examples, with_references
from tiny_model import make_tokenizer, save_capped, save_tiny

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.recipe.models import Student
from deltaray.recipe.study import TrainingRun
from deltaray.recipe.training import Generation, Run, Training
from deltaray.train.checkpoint import Checkpoints
from deltaray.train.engine import gathered_weights, join_process_group, stop_engine
from deltaray.train.examples import Data
from deltaray.train.generation import Answering, Question, answering_model
from deltaray.train.student import load_module
from deltaray.train.trainer import Trainer

STEPS, RESTART = 4, 2


class FullStore(Store):
    """A disk that is full when the manifest comes."""

    def write_json(self, path: str, value: object) -> None:
        raise StageError(f"no space left for {path.rpartition('/')[2]}")


def size_of(folder: str | None) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) if folder else 0


def refused(work) -> str:
    try:
        work()
    except StageError as error:
        return str(error)
    return ""


def main(out: Path, cases: list[tuple[dict, dict]]) -> None:
    out.mkdir(exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=0, world_size=1)
    join_process_group()
    for number, (layout, settings) in enumerate(cases):
        print(json.dumps(compare(out / str(number), layout, settings)), flush=True)


def answers_of(trainer: Trainer, student: Student, training: Training, run: TrainingRun, pairs, weights):
    """Greedy answers in the middle of training, all in one batch; and by transformers alone, one by one."""
    questions = [Question(pairs.item(place)[0], [], None) for place in range(len(TEXTS))]
    answering = Answering(Generation(max_tokens=6), questions, make_tokenizer(), 1000, None)
    means = answering(trainer.engine)
    with answering_model(trainer.engine) as model, torch.no_grad():
        found = answering.answers(model, questions, "cpu")
    assert means == {"generated_tokens": sum(map(len, found)) / len(found)}
    plain = load_module(student, training.dtype, run.settings.lora).eval().model
    plain.load_state_dict(weights, strict=False)
    plain.set_attn_implementation("eager")
    alone = []
    for question in questions:
        ids = torch.from_numpy(question.ids).long()[None]
        row = plain.generate(input_ids=ids, do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=0)
        alone.append(row[0, ids.shape[1] :].tolist())
    return found, alone


def compare(out: Path, layout: dict, settings: dict) -> dict:
    save = save_capped if layout.pop("capped", False) else save_tiny
    student = Student(model=save(out / "student", vocabulary=2048), quantize=layout.pop("quantize", None))
    address = layout.pop("store", str(out / "store"))
    if folder := layout.get("offload_folder"):
        layout["offload_folder"] = str(out / folder)
    training = Training(runs={}, micro_batch_tokens=80, **{"dtype": "float32"} | layout)
    settings = {"batch_size": 5, "learning_rate": 1e-3, "weight_decay": 0.01} | settings
    run = TrainingRun("run", "student", ("pairs",), Run(pairing="pairs", **settings), None)
    pairs = examples(TEXTS * 3)
    data = Data(with_references(load_module(student, training.dtype).eval(), pairs), pairs.select([]), {})

    def steps(trainer: Trainer, first: int, last: int) -> list[dict]:
        return [trainer.step(step, STEPS) for step in range(first, last)]

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        return gathered_weights(trainer.engine.module.model, trained_only=True)

    whole = Trainer(training, student, run, data, 0)
    before = weights(whole)
    lines = steps(whole, 0, STEPS - 1)
    answers, plain_answers = answers_of(whole, student, training, run, pairs, weights(whole))
    lines += steps(whole, STEPS - 1, STEPS)
    expected = weights(whole)
    on_disk = size_of(training.offload_folder)
    stop_engine(whole.engine)

    checkpoints = Checkpoints(Store(address), "run")
    first = Trainer(training, student, run, data, 0)
    again = steps(first, 0, RESTART)
    checkpoints.begin(first.engine, checkpoints.new_name(RESTART), {"step": RESTART, "data": data.fingerprint})
    steps(first, RESTART, RESTART + 1)  # what is trained meanwhile is not in it
    checkpoints.finish()
    full = Checkpoints(FullStore(address), "run")
    full.begin(first.engine, full.new_name(RESTART + 1), {"step": 9, "data": data.fingerprint})
    refusal = refused(full.finish)
    stop_engine(first.engine)
    second = Trainer(training, student, run, data, 0)
    state, left_out = checkpoints.load(second.engine, data.fingerprint)
    again += steps(second, state["step"], STEPS)
    found = weights(second)
    stop_engine(second.engine)
    return {
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "losses_with_restart": [line["loss"] for line in again],
        "left_out": left_out,
        "left_on_disk": size_of(training.offload_folder),
        "refused": refusal,
        "on_disk": on_disk,
        "answers": answers,
        "plain_answers": plain_answers,
        "names": len(expected),
        "same": all(torch.equal(expected[name], found[name]) for name in expected) and len(found) == len(expected),
        "moved": min(float((expected[name] - before[name]).abs().max()) for name in expected),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
