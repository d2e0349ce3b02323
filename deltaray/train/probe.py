"""Whether our log-probs are the model's own, found out by comparison instead of by a list of names.

Twice: on a small copy of the architecture in float32, which needs no weights and takes a second, and on the loaded
model itself with a few short texts. What differs packed runs padded; what differs padded is refused.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from deltaray.errors import UserError, first_line
from deltaray.recipe.models import Student
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.noise import switch_noise_off
from deltaray.train.packing import Inputs, Item, pack, pad
from deltaray.train.small import narrowest, one_thread, small_copy

SMALL = [(9, [12]), (11, [9, 5]), (3, [4, 10])]
LOADED = [(18, [12]), (20, [12, 9])]
"""Tokens of each prompt and of the responses to it: of one alone, and of several that share it; longer than windows."""

SLACK = 6.0
"""How many times what rounding is expected to do passes for equal."""


@dataclass(frozen=True)
class Verdict:
    """How an architecture is trained."""

    way: str  # "packed", "padded", "refused", or "unknown": no small copy could be made
    reason: str = ""  # why not packed
    head: str = ""  # "product", or "own": the logits are more than the output layer's product
    attention: str | None = None  # the implementation to use, where transformers' default computes something else
    longest: int | None = None  # tokens of a text beyond which it would be refused

    @property
    def packed(self) -> bool:
        return self.way == "packed"


# --- on a small copy --------------------------------------------------------------------------------------------
def judge(config: PreTrainedConfig, trust_remote_code: bool = False) -> Verdict:
    """Without weights, on the CPU, the same on every machine; kept for the next call with the same settings."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _judge(_Settings(settings, config), trust_remote_code)


class _Settings(str):
    """Settings as a text that can be compared, with the object that they were read from."""

    config: PreTrainedConfig

    def __new__(cls, text: str, config: PreTrainedConfig) -> "_Settings":
        found = super().__new__(cls, text)
        found.config = config
        return found


@lru_cache(maxsize=64)
def _judge(settings: _Settings, trust_remote_code: bool) -> Verdict:
    with one_thread():
        return _tried(settings, trust_remote_code)


def _tried(settings: _Settings, trust_remote_code: bool) -> Verdict:
    found = _try(settings.config, trust_remote_code, narrow=True)
    longest = narrowest(settings.config)
    if found.way != "refused" or longest is None:
        return found
    shorter = _try(settings.config, trust_remote_code, narrow=False)
    if shorter.way == "refused":
        return found
    # A packed row is longer than any text in it.
    return replace(shorter, way="padded", reason=f"beyond its window: {found.reason}", longest=longest)


def _try(config: PreTrainedConfig, trust_remote_code: bool, narrow: bool) -> Verdict:
    try:
        model = small_copy(config, trust_remote_code, narrow)
    except ValueError as error:
        return Verdict("unknown", str(error))
    switch_noise_off(model)
    try:
        module = ResponseLogProbs(model)
    except ValueError as error:
        return Verdict("refused", str(error))
    items = texts(model, SMALL)
    attention = _better_attention(model, items)
    if attention is not None:
        module.own_attention = attention
    return replace(compare(module, items, "cpu", in_training=True), attention=attention)


def _better_attention(model: Any, items: Sequence[Item]) -> str | None:
    """`eager` where the default gives other logits: it is written with the model, others leave out what they lack."""
    default = model.config._attn_implementation
    try:
        found, tolerance = _own(model, items, "cpu")
        model.set_attn_implementation("eager")
        expected, _ = _own(model, items, "cpu")
    except Exception:  # it has one implementation alone, or fails in any: then the comparison says so
        return None
    finally:
        model.set_attn_implementation(default)
    lengths = torch.tensor([len(response) for _, response in _singles(items)])
    return "eager" if bool(((found - expected).abs() / lengths > tolerance).any()) else None


def why_not(verdict: Verdict, max_length: int) -> str:
    if verdict.longest is not None and max_length > verdict.longest:
        return f"max_length is {max_length}; {verdict.reason} (its window has {verdict.longest} tokens)"
    return verdict.reason if verdict.way == "refused" else ""


def refusal(name: str, config: Any, reason: str) -> str:
    return (
        f"{name} (type `{config.model_type}`) cannot be trained: {reason}. Log-probs that are not the model's own "
        "would train it wrongly; choose a student of another type"
    )


# --- on the loaded model ----------------------------------------------------------------------------------------
def follow(module: ResponseLogProbs, student: Student) -> Verdict:
    """Makes a model take the rows that are right for its small copy; padded ones where there is none.

    Raises:
        UserError: none are.
    """
    verdict = judge(module.model.config, student.trust_remote_code)
    if reason := why_not(verdict, student.max_length):
        raise UserError(refusal(student.model, module.model.config, reason))
    module.own_attention = verdict.attention or module.own_attention
    module.take(verdict.packed)
    return verdict


def settle(module: ResponseLogProbs, student: Student, device: torch.device | str) -> None:
    """Makes a loaded model take packed or padded rows, whichever gives its own log-probs.

    A collective call under DeepSpeed: all workers compare the same texts, and agree.

    Raises:
        UserError: neither does.
    """
    known = follow(module, student)
    was_training = module.training
    module.eval()
    found = _agreed(compare(module, texts(module.model, LOADED), device, known))
    module.train(was_training)
    if found.way == "refused":
        raise UserError(refusal(student.model, module.model.config, found.reason))
    module.take(found.packed)


def _agreed(verdict: Verdict) -> Verdict:
    """The most careful one of all workers."""
    if not (dist.is_available() and dist.is_initialized()):
        return verdict
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, verdict)
    return min(found, key=lambda item: ("refused", "padded", "packed").index(item.way))


# --- the comparison ---------------------------------------------------------------------------------------------
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
        expected, tolerance = _own(module.model, items, device)
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
def _own(model: Any, items: Sequence[Item], device: torch.device | str) -> tuple[Tensor, float]:
    """(sums of log-probs by the definition, each response alone, float32 [R]; what per token passes for equal)."""
    sums, spreads = [], []
    for prompt, response in _singles(items):
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
    """Why it is no causal model: a text's first logits change with what comes after."""
    prompt, response = next(_singles(items))
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


def _singles(items: Sequence[Item]) -> Iterator[tuple[Any, Any]]:
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
