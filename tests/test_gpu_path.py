"""What only a GPU runs, as far as it can be checked without one: against stand-ins of the same interface."""

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from deltaray.errors import UserError
from deltaray.recipe.load import load_recipe
from deltaray.recipe.shipped import recipe_folder
from deltaray.runtime.session import Capacity
from deltaray.train import attention
from deltaray.train.attention_layout import Layout
from deltaray.train.stage import _environment


def flash(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *_: int, scale: float | None, **more: Any
) -> Tensor:
    """What FlashAttention's variable-length call says that it computes, segment by segment in float64."""
    window, parts = more["window_size"], []
    for (q0, q1), (k0, k1) in zip(pairwise(queries), pairwise(keys), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * (scale or query.shape[-1] ** -0.5)
        behind = torch.arange(int(k1 - k0)) - torch.arange(int(q1 - q0))[:, None] - int(k1 - k0 - (q1 - q0))
        seen = (behind <= window[1]) & ((behind >= -window[0]) if window[0] >= 0 else True)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
    return torch.cat(parts)


def newer(*states: Any, enable_gqa: bool = False, **more: Any) -> Tensor:
    """torch 2.12 and later: keys and values may have fewer heads, if that is said."""
    query, key, value, *rest = states
    repeats = query.shape[1] // key.shape[1]
    assert enable_gqa == (repeats > 1)
    return flash(query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), *rest, **more)


def older(*states: Any, scale: float | None, window_size: tuple[int, int]) -> Tensor:
    """torch 2.11: as many heads of keys and values as of queries."""
    assert states[0].shape[1] == states[1].shape[1] == states[2].shape[1]
    return flash(*states, scale=scale, window_size=window_size)


@pytest.mark.parametrize("call", [newer, older])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_the_flash_call_computes_what_the_padded_batches_do(
    call: Any, heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", call)
    torch.manual_seed(0)
    query = torch.randn(12, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(12, heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # a prompt of 5, two responses of 4 and 1 that share it, and a segment of its own
    own = [*range(5)], [*range(9)], [*range(5), 9], [10, 11]
    layout = Layout([5, 4, 1, 2], [len(keys) for keys in own], torch.tensor([place for keys in own for place in keys]))
    found = attention._flash(query, key, value, layout, None, window)
    expected = attention._grouped(query, key, value, layout, None, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_reserves_no_gpu_sees_none() -> None:
    assert Capacity(8, 4).hidden_gpus(0) == {"CUDA_VISIBLE_DEVICES": ""}
    assert not Capacity(8, 4).hidden_gpus(0.5) and not Capacity(8, 0).hidden_gpus(0)


def test_ray_data_hands_on_that_no_gpu_is_visible(ray_session: Any) -> None:
    """As the reference pass and reward models do; the workers of Ray Train get their environment the same way."""

    def seen(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"visible": os.environ.get("CUDA_VISIBLE_DEVICES", "all")}

    hidden = {"env_vars": Capacity(8, 4).hidden_gpus(0)}
    rows = ray_session.data.from_items([{"row": 1}]).map(seen, runtime_env=hidden, num_cpus=0.5).take_all()
    assert rows == [{"row": 1, "visible": ""}]


def test_a_training_worker_uses_one_gpu() -> None:
    with pytest.raises(UserError, match=r"gpus_per_worker: .*less than or equal to 1"):
        load_recipe(recipe_folder() / "miniature.yaml", ["training.gpus_per_worker=2"])


def test_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert _environment(1)[
        "PYTORCH_ALLOC_CONF"
    ] == "expandable_segments:True" and "OMP_NUM_THREADS" not in _environment(1)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert _environment(1)["PYTORCH_ALLOC_CONF"] == "backend:cudaMallocAsync"
    assert _environment(0)["DS_ACCELERATOR"] == "cpu"
