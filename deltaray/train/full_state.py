"""What a run has learnt, whole: per trained weight its float32 value and AdamW's two moments.

ZeRO spreads them over the workers; here they are gathered one at a time, and given back.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
Shapes = dict[str, tuple[int, ...]]


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights that training changes, by name."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def full_shapes(module: nn.Module) -> Shapes:
    """The shapes of all that `own_parts` yields on all workers together, by `<weight>|<kind>`."""
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained(module)}
    return {f"{name}|{kind}": shape for name, shape in shapes.items() for kind in (WEIGHT, *MOMENTS)}


def own_parts(module: nn.Module, size: int) -> Iterator[dict[str, Tensor]]:
    """This worker's share in the machine's memory, `size` bytes and more at a time; every worker must go through all.

    One tensor is gathered at a time, and only the worker that it falls to copies it: on a GPU a checkpoint takes no
    more room than the largest weight in float32.
    """
    part: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(trained(module)):
        for kind in (WEIGHT, *MOMENTS):
            whole = _gathered(parameter, kind)
            if number % dist.get_world_size() == dist.get_rank():
                part[f"{name}|{kind}"] = _copied(whole)
            del whole
        if sum(tensor.nbytes for tensor in part.values()) >= size:
            yield part
            part = {}
    if part:
        yield part


def _gathered(parameter: nn.Parameter, kind: str) -> Tensor:
    whole: Tensor = (
        safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
    )
    return whole


def _copied(whole: Tensor) -> Tensor:
    """A copy in the machine's memory; from a GPU into pinned memory, which is several times faster."""
    copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=whole.is_cuda)
    return copy.copy_(whole.detach())


def prepare_moments(engine: Any, steps: int) -> None:
    """Gives AdamW the state that it would make at its first step, so that it can be set."""
    zero = engine.optimizer
    inner = zero.optimizer
    flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    for number, flat in enumerate(flats or [flat for group in inner.param_groups for flat in group["params"]]):
        with _in_memory(zero, number):
            zeros = {moment: torch.zeros_like(flat, memory_format=torch.preserve_format) for moment in MOMENTS}
            inner.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **zeros}
    if flats is None:  # ZeRO 1 and 2
        zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def _in_memory(zero: Any, number: int) -> Iterator[None]:
    """A group of weights that may lie on a disk meanwhile (`offload_folder`)."""
    swapped = getattr(zero, "swap_optimizer", False) and zero._swappable_optimizer_subgroup(number)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if swapped:
        zero._optimizer_states_and_gradient_swap_out(number)


def set_full(parameters: dict[str, nn.Parameter], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Sets weights and moments on all workers.

    Args:
        tensors: (`<weight>|<kind>`, float32 [whole shape]), the same on every worker and in the same order.
    """
    for key, tensor in tensors:
        name, _, kind = key.rpartition("|")
        parameter = parameters[name]
        if kind != WEIGHT:
            safe_set_full_optimizer_state(parameter, tensor, kind)
            continue
        safe_set_full_fp32_param(parameter, tensor)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(tensor)
