"""The families of miniature models, and how one of them is trained.

Capacity and the sloppiness of the corpus rise and fall together, as they do in real model families.  The
student stands above every rung.  All models, the student too, are trained until the learning rate has decayed
to zero: a student that was merely stopped early would profit from any gentle step, whatever its direction.

The specialists are models of one size, each of which has practised another area of the task beyond the weakest rung:
each is a teacher of one skill over that rung, and nothing else tells the two apart but size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from deltaray.miniature.task import Area, Splits, Writer, draw_corpus, make_habits, make_splits
from deltaray.miniature.tokenizer import (
    BOS,
    EOS,
    MAX_LENGTH,
    PAD,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    VOCABULARY_SIZE,
    encode_problems,
    vocabulary,
)


@dataclass(frozen=True)
class ModelSpec:
    """One member of the family."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    forget: float
    """How often the writer of its corpus forgets a carry (see `task.Writer`)."""
    steps: int

    def writer(self, slip: float) -> Writer:
        """Who has written its corpus."""
        return Writer(self.forget, slip)


@dataclass(frozen=True)
class Specialist(ModelSpec):
    """A member whose writer has practised one area."""

    practised: Area
    forget_practised: float

    def writer(self, slip: float) -> Writer:
        return Writer(self.forget, slip, self.practised, self.forget_practised)


@dataclass(frozen=True)
class Training:
    """What all members have in common.  Any change makes cached families stale."""

    batch: int = 64
    matrix_learning_rate: float = 0.02
    """For Muon, which trains the matrices of the blocks in about a third of the steps AdamW needs here."""
    vector_learning_rate: float = 1e-2
    """For AdamW on the embedding and the norms."""
    weight_decay: float = 0.1
    warmup: float = 0.05
    initializer_range: float = 0.12
    rope_theta: float = 100.0
    heads: int = 4
    head_dim: int = 32
    """One that vLLM has CPU kernels for; heads * head_dim may exceed the width of the model."""
    slip: float = 0.01
    habit_spread: float = 1.0


@dataclass(frozen=True)
class SplitSizes:
    """Rows of the three prompt files."""

    prompts: int = 8192
    validation: int = 512
    evaluation: int = 2048


LADDER = (
    ModelSpec("mini-xs", hidden=64, layers=2, intermediate=160, forget=0.92, steps=500),
    ModelSpec("mini-s", hidden=64, layers=2, intermediate=192, forget=0.82, steps=500),
    ModelSpec("mini-m", hidden=64, layers=2, intermediate=256, forget=0.68, steps=500),
    ModelSpec("mini-l", hidden=64, layers=2, intermediate=320, forget=0.55, steps=500),
)
"""Teachers, weakest first."""
STUDENT = ModelSpec("student", hidden=64, layers=3, intermediate=256, forget=0.42, steps=700)
AREAS = {"tens-low": Area(1, most=8), "tens-high": Area(1, least=9), "hundreds": Area(2)}
"""Carries into the tens whose own digits make none, into those that make or pass one, and into the hundreds."""
SPECIALISTS = tuple(
    Specialist(f"mini-{name}", 64, 2, 256, forget=0.92, steps=500, practised=area, forget_practised=0.5)
    for name, area in AREAS.items()
)
TOP = ModelSpec("mini-xl", hidden=64, layers=2, intermediate=384, forget=0.42, steps=500)
"""A fifth teacher, as careful as the student and smaller: with it the ladder's deltas reach further."""
FAMILY = (*LADDER, STUDENT)
FAMILIES: Mapping[str, tuple[ModelSpec, ...]] = {
    "ladder": FAMILY,
    "specialists": (LADDER[0], *SPECIALISTS, STUDENT),
    "landscape": (*LADDER, TOP, STUDENT),
}
"""By the name in a recipe. Members of two families are one model."""
TRAINING = Training()
SPLIT_SIZES = SplitSizes()

Progress = Callable[[int, int], None]


def model_config(spec: ModelSpec, training: Training = TRAINING) -> LlamaConfig:
    """A Llama small enough to train in seconds."""
    table = vocabulary()
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        head_dim=training.head_dim,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=training.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": training.rope_theta},
        bos_token_id=table[BOS],
        eos_token_id=table[EOS],
        pad_token_id=table[PAD],
        dtype="float32",
    )


def build_model(spec: ModelSpec, seed: int, training: Training = TRAINING) -> LlamaForCausalLM:
    """The untrained model; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config(spec, training))
    table = vocabulary()
    model.generation_config = GenerationConfig(
        bos_token_id=table[BOS],
        eos_token_id=table[EOS],
        pad_token_id=table[PAD],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=2 * RESPONSE_LENGTH,
    )
    return model


def response_loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats a token) of the responses in `ids` (batch, length)."""
    logits = model(ids[:, :-1], logits_to_keep=RESPONSE_LENGTH).logits
    targets = ids[:, PROMPT_LENGTH:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batches(spec: ModelSpec, seed: int, splits: Splits, training: Training = TRAINING) -> Iterator[Tensor]:
    """Freshly written conversations (batch, length), for ever.

    The habits depend on the seed alone, what is drawn and forgotten on the model too: its corpus is its own.
    """
    habits = make_habits(seed, training.habit_spread)
    writer = spec.writer(training.slip)
    rng = np.random.default_rng([seed, 2, *spec.name.encode()])
    while True:
        yield torch.from_numpy(encode_problems(*draw_corpus(splits, writer, habits, training.batch, rng)))


def build_optimizers(model: LlamaForCausalLM, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the (tied) embedding and the norms."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=training.matrix_learning_rate, weight_decay=training.weight_decay, ns_steps=4),
        torch.optim.AdamW(
            others,
            lr=training.vector_learning_rate,
            betas=(0.9, 0.98),
            weight_decay=training.weight_decay,
        ),
    ]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay that reaches zero right after the last step."""
    rising = (step + 1) / max(1.0, warmup * steps)
    return min(rising, (steps - step) / steps)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and one thread gives bit-identical weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_model(
    spec: ModelSpec,
    seed: int,
    on_progress: Progress = lambda _step, _total: None,
    splits: Splits | None = None,
    training: Training = TRAINING,
) -> LlamaForCausalLM:
    """Train one member of the family of `seed`: the same arguments give the same weights, bit by bit.

    `on_progress` is called with (step, steps) about twice a second.
    """
    if splits is None:
        splits = make_splits(SPLIT_SIZES.prompts, SPLIT_SIZES.validation, SPLIT_SIZES.evaluation)
    init_seed = int(np.random.default_rng([seed, 3, *spec.name.encode()]).integers(2**31))
    model = build_model(spec, init_seed, training).train()
    with one_thread():
        fit(model, batches(spec, seed, splits, training), spec.steps, training, on_progress)
    return model.eval()


def fit(
    model: LlamaForCausalLM,
    data: Iterator[Tensor],
    steps: int,
    training: Training,
    on_progress: Progress,
) -> None:
    """The training loop; `model` is changed in place."""
    optimizers = build_optimizers(model, training)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, steps, training.warmup)) for o in optimizers
    ]
    reported = time.monotonic()
    for step in range(steps):
        response_loss(model, next(data)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad(set_to_none=True)
        if step + 1 == steps or time.monotonic() - reported > 0.5:
            reported = time.monotonic()
            on_progress(step + 1, steps)
