"""The student as training and the reference pass see it. Knows nothing of DeepSpeed."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deltaray.errors import StageError
from deltaray.recipe.models import Student
from deltaray.train.logprobs import ResponseLogProbs


def load_module(student: Student, dtype: str) -> ResponseLogProbs:
    """The student with its response log-probabilities as output; dropout is off, so that the reference is exact.

    Raises:
        StageError: weights are missing from the student's files.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        student.model,
        revision=student.revision,
        trust_remote_code=student.trust_remote_code,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise StageError(f"{student.model}: no weights for {sorted(info['missing_keys'])[0]} (and maybe others)")
    _switch_dropout_off(model)
    return ResponseLogProbs(model)


def _switch_dropout_off(model: nn.Module) -> None:
    """Not by eval(): gradient checkpointing works in training mode only."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):
            vars(module)["attention_dropout"] = 0.0
