"""Checkpoints without DeepSpeed: what is in memory at a time, and what training waits for."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deltaray.data.store import Store
from deltaray.errors import StageError
from deltaray.train import full_state
from deltaray.train.checkpoint import WAITING, Checkpoints
from deltaray.train.full_state import full_shapes, own_parts

LAYERS = 6


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Six weights, gathered by stand-ins for DeepSpeed's functions; one that is not trained."""
    made = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(LAYERS)), nn.Linear(4, 4).requires_grad_(False))
    monkeypatch.setattr(full_state, "safe_get_full_fp32_param", lambda parameter: parameter.detach().clone())
    monkeypatch.setattr(
        full_state, "safe_get_full_optimizer_state", lambda parameter, kind: torch.full_like(parameter, len(kind))
    )
    return made


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_tensor_is_gathered_at_a_time_and_only_its_owner_copies_it(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    gathered = full_state._gathered

    def watched(parameter: nn.Parameter, kind: str) -> Tensor:
        assert all(other() is None for other in alive)
        whole = gathered(parameter, kind)
        alive.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(full_state, "_gathered", watched)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found: dict[str, Tensor] = {}
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        own = {key: tensor for part in own_parts(module, 1) for key, tensor in part.items()}
        assert len(own) == 3 * LAYERS / 2 and not found.keys() & own.keys()
        found |= own
    assert len(alive) == 2 * 3 * LAYERS  # every worker takes part in every gather
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == full_shapes(module)


class Slow(Store):
    """A store that writes files only when it is let."""

    def __init__(self, out: str) -> None:
        super().__init__(out)
        self.let, self.writing = threading.Event(), threading.Event()

    def write_bytes(self, path: str, content: bytes) -> None:
        self.writing.set()
        assert self.let.wait(60)
        super().write_bytes(path, content)


def test_training_goes_on_while_a_checkpoint_is_written(module: nn.Module, alone: None, tmp_path: Path) -> None:
    store = Slow(str(tmp_path / "out"))
    checkpoints = Checkpoints(store, "run")
    engine = SimpleNamespace(module=module)
    checkpoints.begin(engine, "step", {"step": 1, "data": 7})
    assert store.writing.wait(60) and not checkpoints.complete()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # the next step
    store.let.set()
    checkpoints.finish()
    assert checkpoints.complete() == ["step"]
    manifest = checkpoints.manifest("step", 7)
    assert manifest is not None
    [file] = manifest["files"]
    [saved] = [dict(checkpoints._sent("step", file, full_shapes(module), 0, torch.device("cpu")))]
    for number in range(LAYERS):
        torch.testing.assert_close(saved[f"{number}.weight|weight"] + 1.0, module[number].weight.data)


def test_at_most_two_files_wait_to_be_written(
    module: nn.Module, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaray.train.checkpoint.PART", 1)  # a file for each weight
    store = Slow(str(tmp_path / "out"))
    checkpoints = Checkpoints(store, "run")
    begun = threading.Thread(target=checkpoints.begin, args=(SimpleNamespace(module=module), "step", {"step": 1}))
    begun.start()
    assert store.writing.wait(60)
    begun.join(0.5)
    assert begun.is_alive() and checkpoints.pending is not None and len(checkpoints.pending.files) == WAITING
    store.let.set()
    begun.join(60)
    checkpoints.finish()
    assert len(store.committed(f"{checkpoints.folder}/step", ".safetensors")) == LAYERS


def test_a_checkpoint_that_could_not_be_written_does_not_exist(
    module: nn.Module, alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(Store(str(tmp_path / "out")), "run")

    def full(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.store, "write_bytes", full)
        checkpoints.begin(SimpleNamespace(module=module), "torn", {"step": 1})
        with pytest.raises(StageError, match=r"a checkpoint cannot be written: .*No space left"):
            checkpoints.finish()
    assert not checkpoints.complete()
    checkpoints.begin(SimpleNamespace(module=module), "whole", {"step": 2})
    checkpoints.finish()
    assert checkpoints.complete() == ["whole"]
