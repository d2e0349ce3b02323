"""How one member is trained: the same arguments give the same weights, bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from deltaray.labs.miniature.member import TRAINING, Batch, Member, Training
from deltaray.labs.miniature.tokenizer import BOS, EOS, PAD, vocabulary
from deltaray.train.small import one_thread

Progress = Callable[[int, int], None]


def build_model(spec: Member, seed: int, training: Training = TRAINING) -> PreTrainedModel:
    """The untrained model; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(spec.config(training))
    table = vocabulary()
    model.generation_config = GenerationConfig(
        bos_token_id=table[BOS],
        eos_token_id=table[EOS],
        pad_token_id=table[PAD],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=spec.longest,
    )
    return model


def response_loss(model: PreTrainedModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats a token) of the responses of a batch (see `member.Batch`)."""
    logits = model(ids[:, :-1], logits_to_keep=targets.shape[1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build_optimizers(model: PreTrainedModel, training: Training) -> list[torch.optim.Optimizer]:
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


def train_model(
    spec: Member,
    seed: int,
    on_progress: Progress = lambda _step, _total: None,
    training: Training = TRAINING,
) -> PreTrainedModel:
    """Train one member of the family of `seed`: the same arguments give the same weights, bit by bit.

    `on_progress` is called with (step, steps) about twice a second.
    """
    model = build_model(spec, int(spec.rng(seed, 3).integers(2**31)), training).train()
    with one_thread():
        fit(model, spec, spec.batches(seed, training), training, on_progress)
    return model.eval()


def fit(model: PreTrainedModel, spec: Member, data: Iterator[Batch], training: Training, on_progress: Progress) -> None:
    """The training loop; `model` is changed in place."""
    optimizers = build_optimizers(model, training)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, spec.steps, training.warmup))
        for o in optimizers
    ]
    reported = time.monotonic()
    for step in range(spec.last_step):
        response_loss(model, *next(data)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad(set_to_none=True)
        if step + 1 == spec.last_step or time.monotonic() - reported > 0.5:
            reported = time.monotonic()
            on_progress(step + 1, spec.last_step)
