"""The comparison of our log-probs of a few texts with those that a model's own logits give."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaray.errors import first_line
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.packing import Inputs, Item, pack, pad

SLACK = 6.0
"""How many times what rounding is expected to do passes for equal."""
LEAST = 1e-3
"""Nats per token that always pass with trained weights: a few of their activations may be thousands of times others."""


@dataclass(frozen=True)
class Verdict:
    """How an architecture is trained."""

    way: str  # "packed", "padded", "refused", or "unknown": no small copy could be made
    reason: str = ""  # why not packed
    head: str = ""  # "product", or "own": the logits are more than the output layer's product
    attention: str | None = None  # the implementation to use, where transformers' default computes something else
    longest: int | None = None  # tokens of a text beyond which it would be refused
    beyond: str = ""  # why

    @property
    def packed(self) -> bool:
        return self.way == "packed"


def compare(
    module: ResponseLogProbs,
    items: Sequence[Item],
    device: torch.device | str,
    known: Verdict | None = None,
    in_training: bool = False,
) -> Verdict:
    """
    Args:
        module: in evaluation mode.
        known: what the small copy said; what it found padded is not tried packed.
        in_training: also in training mode, where chance and changes of weights would show.
    """
    head = "product" if module.head.own.plain else "own"
    small = known is None
    try:
        module.take(packed=False)
        expected, tolerance = own_log_probs(module.model, items, device)
        tolerance = tolerance if small else max(tolerance, LEAST)
    except Exception as error:  # models raise what they like
        reason = f"its own forward pass fails: {first_line(error)}"
        return Verdict("unknown" if small else "refused", reason, head)
    if not torch.isfinite(expected).all():
        return Verdict("unknown" if small else "refused", "its own log-probs are not finite", head)
    rows = pad(items, _pad_id(module.model.config))
    lengths = rows.lengths.float()
    found = _difference(module, rows, expected, lengths, device)
    if in_training and not isinstance(found, str):
        with _training(module):
            trained = _difference(module, rows, expected, lengths, device)
        found = trained if isinstance(trained, str) else max(found, trained)
    if (reason := _said(found, tolerance, "padded")) or (
        reason := _hears_later(module.model, items, device, tolerance)
    ):
        return Verdict("refused", reason, head)
    if known is not None and known.way == "padded":
        return Verdict("padded", known.reason, head)
    try:
        module.take(packed=True)
    except Exception as error:
        module.take(packed=False)
        return Verdict("padded", first_line(error), head)
    reason = _said(_difference(module, pack(items), expected, lengths, device), tolerance, "packed")
    module.take(packed=False)
    return Verdict("padded" if reason else "packed", reason, head)


@contextmanager
def _training(module: ResponseLogProbs) -> Iterator[None]:
    module.train()
    try:
        yield
    finally:
        module.eval()


@torch.no_grad()
def own_log_probs(model: Any, items: Sequence[Item], device: torch.device | str) -> tuple[Tensor, float]:
    """(sums of log-probs by the definition, each response alone, float32 [R]; what per token passes for equal)."""
    sums, spreads = [], []
    for prompt, response in singles(items):
        logits = _logits(model, np.concatenate([prompt, response]), device)[len(prompt) - 1 : -1]
        targets = torch.from_numpy(response.astype(np.int64)).to(logits.device)
        sums.append(logits.log_softmax(dim=-1).gather(1, targets[:, None]).sum())
        spreads.append(logits.std(dim=-1).mean())
    return torch.stack(sums).cpu(), _tolerance(model, float(torch.stack(spreads).mean()))


def _tolerance(model: Any, spread: float) -> float:
    """Nats per token that rounding may make: of what every layer writes in the model's type, and of float32 sums."""
    config = model.config.get_text_config()
    kind = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    layers, width = getattr(config, "num_hidden_layers", 32), getattr(config, "hidden_size", 4096)
    rounding = torch.finfo(kind).eps / 2 + torch.finfo(torch.float32).eps / 2 * width**0.5
    return float(SLACK * max(spread, 1.0) * (2 * layers + 2) ** 0.5 * rounding)


def _hears_later(model: Any, items: Sequence[Item], device: torch.device | str, tolerance: float) -> str:
    """Why it is not a causal model: a text's first logits change with what comes after."""
    prompt, response = next(singles(items))
    whole = np.concatenate([prompt, response])
    with torch.no_grad():
        short = _logits(model, whole[: len(prompt)], device).log_softmax(dim=-1)
        long = _logits(model, whole, device)[: len(prompt)].log_softmax(dim=-1)
    moved = float((short - long).abs().mean())
    return f"its tokens see what comes after them (by {moved:.3g} nats)" if not moved <= tolerance else ""


def _logits(model: Any, ids: Any, device: torch.device | str) -> Tensor:
    """float32 [T, V] of the plain forward pass."""
    row = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
    found = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)
    logits: Tensor = found.logits if hasattr(found, "logits") else found[0]
    return logits[0].float()


@torch.no_grad()
def _difference(
    module: ResponseLogProbs, inputs: Inputs, expected: Tensor, lengths: Tensor, device: torch.device | str
) -> float | str:
    """The largest difference in nats per token; or what went wrong."""
    try:
        found = module(**inputs.to(device).arguments()).float().cpu()
    except Exception as error:
        return first_line(error)
    return float(((found - expected).abs() / lengths).nan_to_num(nan=float("inf")).max())


def _said(found: float | str, tolerance: float, way: str) -> str:
    if isinstance(found, str):
        return f"{way} rows fail: {found}"
    if found > tolerance:
        return f"log-probs of {way} rows differ from the model's own by {found:.3g} nats per token"
    return ""


def singles(items: Sequence[Item]) -> Iterator[tuple[Any, Any]]:
    return ((prompt, response) for prompt, responses in items for response in responses)


def texts(model: Any, sizes: Sequence[tuple[int, list[int]]]) -> list[Item]:
    """Random tokens that are none of the special ones, always the same."""
    config = model.config.get_text_config()
    special = set(_special(model.config.to_dict()))
    allowed = np.array([token for token in range(min(config.vocab_size, 4096)) if token not in special], np.int32)
    draw = np.random.default_rng(0).choice
    return [(draw(allowed, prompt), [draw(allowed, count) for count in responses]) for prompt, responses in sizes]


def _special(settings: dict[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(name).endswith(("_token_id", "_index", "_idx")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _pad_id(config: Any) -> int:
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((item for item in found if isinstance(item, int) and 0 <= item < config.vocab_size), 0)
