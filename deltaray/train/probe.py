"""Whether our log-probs are the model's own, found out by comparison instead of by a list of names.

Twice: on a small copy of the architecture in float32, which needs no weights and takes a second, and on the loaded
model itself with a few short texts. What differs packed runs padded; what differs padded is refused.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from deltaray.errors import UserError
from deltaray.recipe.models import Student
from deltaray.train.compare import Verdict, compare, own_log_probs, singles, texts
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.noise import switch_noise_off
from deltaray.train.packing import Item
from deltaray.train.small import narrowest, one_thread, small_copy, turning_point

SMALL = [(9, [12]), (11, [9, 5]), (3, [4, 10])]
LOADED = [(18, [12]), (20, [12, 9])]
"""Tokens of each prompt and of the responses to it: of one alone, and of several that share it; longer than windows."""


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
    if found.way == "refused" and longest is not None:
        shorter = _try(settings.config, trust_remote_code, narrow=False)
        if shorter.way not in ("refused", "unknown"):  # a packed row is longer than any text in it
            reason = f"beyond its window of {longest} tokens {found.reason}"
            return replace(shorter, way="padded", reason=reason, longest=longest, beyond=reason)
    if (limit := turning_point(settings.config)) is not None:
        reason = f"beyond {limit} tokens its position embeddings are others, for all texts that are computed together"
        return replace(found, longest=limit, beyond=reason)
    return found


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
        found, tolerance = own_log_probs(model, items, "cpu")
        model.set_attn_implementation("eager")
        expected, _ = own_log_probs(model, items, "cpu")
    except Exception:  # it has one implementation alone, or fails in any: then the comparison says so
        return None
    finally:
        model.set_attn_implementation(default)
    lengths = torch.tensor([len(response) for _, response in singles(items)])
    return "eager" if bool(((found - expected).abs() / lengths > tolerance).any()) else None


def why_not(verdict: Verdict, max_length: int) -> str:
    if verdict.longest is not None and max_length > verdict.longest:
        return f"max_length is {max_length}; {verdict.beyond}"
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
