"""The student as training and the reference pass see it. Knows nothing of DeepSpeed."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deltaray.errors import StageError
from deltaray.model_files.fit import misfit
from deltaray.recipe.models import Student
from deltaray.recipe.training import Lora
from deltaray.train.adapter import with_adapter
from deltaray.train.attention import PACKED
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.noise import switch_noise_off
from deltaray.train.probe import follow


def load_module(student: Student, dtype: str, lora: Lora | None = None, start: str | None = None) -> ResponseLogProbs:
    """The student with its response log-probabilities as output; dropout is off, so that the reference is exact.

    It takes packed or padded rows, as a small copy of it has shown; `probe.settle` looks at the model itself.

    Args:
        lora: freeze the student and put a fresh adapter on it; an adapter's own dropout stays.
        start: a folder with what training goes on from: with `lora` an adapter like it, else a student.

    Raises:
        UserError: our log-probs would not be its own, or the adapter's targets cannot be had.
        StageError: weights are missing from the student's files, too many, or of another shape.
    """
    own_weights = start is not None and lora is None
    model, info = AutoModelForCausalLM.from_pretrained(
        start if own_weights else student.model,
        revision=None if own_weights else student.revision,
        trust_remote_code=student.trust_remote_code,
        dtype=getattr(torch, dtype),
        quantization_config=_four_bits(dtype) if student.quantize else None,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        output_loading_info=True,
    )
    if wrong := misfit(info):
        raise StageError(f"{start if own_weights else student.model}: {wrong}")
    switch_noise_off(model)
    _keep_four_bits(model)
    module = ResponseLogProbs(model if lora is None else with_adapter(model, lora, start))
    follow(module, student)
    return module


def is_packed(module: ResponseLogProbs) -> bool:
    """Whether the model takes packed rows; otherwise padded ones."""
    return bool(module.model.config._attn_implementation == PACKED)


def _four_bits(dtype: str) -> Any:
    """NormalFloat with doubly quantised constants, stored as floats: ZeRO 3 partitions no integers."""
    from transformers import BitsAndBytesConfig

    kind = getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
        bnb_4bit_quant_storage=kind,
    )


def _keep_four_bits(model: nn.Module) -> None:
    """On some CPUs bitsandbytes repacks and rounds quantised weights at the first evaluation: other numbers from then
    on than training saw."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
