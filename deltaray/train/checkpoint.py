"""Checkpoints that any number of workers can write and any other number can resume from.

A checkpoint holds, per trained weight, its float32 value and AdamW's two moments whole, not by worker: ZeRO's own
files are bound to the number of workers. Every worker gathers weight after weight and writes its share of them; a
manifest with the sizes and checksums of all files comes last, and without it a checkpoint does not exist.
"""

import json
import uuid
import zlib
from collections.abc import Iterator
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
from safetensors.torch import load, save
from torch import Tensor, nn

from deltaray.data.store import Store
from deltaray.errors import PASSING, StageError

MOMENTS = ("exp_avg", "exp_avg_sq")
PART = 2 << 30
"""Bytes of one file: what a worker holds of a checkpoint at a time."""

KEPT = 2
"""Checkpoints that are kept of a run, beside its best."""


class Checkpoints:
    """The checkpoints of one run. `save` and `load` are collective calls."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.folder = store, Store.checkpoints(run)

    # --- what is there ------------------------------------------------------------------------------------------
    def complete(self) -> list[str]:
        """Names of the complete checkpoints, the newest first."""
        names = self.store.folders(self.folder)
        return [name for name in sorted(names, reverse=True) if self.store.exists(self._manifest(name))]

    def _manifest(self, name: str) -> str:
        return f"{self.folder}/{name}/manifest.json"

    def clear(self) -> None:
        """Removes all of the run's checkpoints, torn ones, too."""
        self._remove(self.store.folders(self.folder))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            if self.store.exists(self._manifest(name)):
                self.store.delete([self._manifest(name)])  # from here on it does not exist
            self.store.delete(self.store.committed(f"{self.folder}/{name}", ""))
            if self.store.local:
                (self.store.local / self.folder / name).rmdir()

    # --- writing ------------------------------------------------------------------------------------------------
    def save(self, engine: Any, name: str, state: dict[str, Any], keep: str | None = None) -> None:
        """Commits a checkpoint under a `new_name`, then removes all but the newest and `keep`.

        Raises:
            StageError: on every worker, if one of them could not write; nothing counts then.
        """
        written: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
        own, error = self._write_parts(engine, name)
        dist.all_gather_object(written, own)
        _raise_together(error)
        if dist.get_rank() == 0:
            files = {file: size for part in written for file, size in part.items()}
            told: dict[str, Any] = {"files": files, "state": state}
            told["checksum"] = _checksum(told)
            error = _attempt(lambda: self.store.write_json(self._manifest(name), told))
        _raise_together(error)
        if dist.get_rank() == 0:
            newest = self.complete()[:KEPT]
            self._remove([other for other in self.store.folders(self.folder) if other not in (*newest, keep)])
        dist.barrier()

    def new_name(self, step: int) -> str:
        """One name for all workers; a torn checkpoint of the same step never mixes with a new one."""
        name = [f"step-{step:09d}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name, src=0)
        return name[0]

    def _write_parts(self, engine: Any, name: str) -> tuple[dict[str, list[int]], Exception | None]:
        """This worker's files ({name: [bytes, checksum]}); it goes on gathering after a failure, others wait for it."""
        files: dict[str, list[int]] = {}
        error: Exception | None = None
        for number, part in enumerate(_parts(engine.module)):
            file, content = f"rank-{dist.get_rank():05d}-{number:05d}.safetensors", save(part) if not error else b""
            files[file] = [len(content), zlib.crc32(content)]
            path = f"{self.folder}/{name}/{file}"
            error = error or _attempt(lambda path=path, content=content: self.store.write_bytes(path, content))
        return files, error

    # --- reading ------------------------------------------------------------------------------------------------
    def load(self, engine: Any, data: int) -> tuple[dict[str, Any] | None, list[str]]:
        """(what was saved with the newest sound checkpoint of this data, None if there is none; those left out)."""
        names = [self.complete()]
        dist.broadcast_object_list(names, src=0)
        for number, name in enumerate(names[0]):
            if state := self.load_one(engine, name, data):
                return state, names[0][:number]
        return None, names[0]

    def load_one(self, engine: Any, name: str, data: int) -> dict[str, Any] | None:
        """Sets weights and moments from one checkpoint.

        Args:
            data: `Data.fingerprint` of the pairs.

        Returns:
            None, and nothing is set, if any worker finds it damaged, of other weights, or made on other pairs.
        """
        sound: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(sound, self._is_sound(name, data, _wanted(engine.module)))
        if not all(sound):
            return None
        manifest = self.store.read_json(self._manifest(name))
        parameters = dict(engine.module.named_parameters())
        prepare_moments(engine, int(manifest["state"]["step"]))
        for file in sorted(manifest["files"]):
            _apply(parameters, load(self.store.read_bytes(f"{self.folder}/{name}/{file}")))
        return dict(manifest["state"])

    def _is_sound(self, name: str, data: int, wanted: dict[str, tuple[int, ...]]) -> bool:
        """`wanted`: the shapes of all that it must hold, and of nothing else."""
        found: dict[str, tuple[int, ...]] = {}
        try:
            manifest = self.store.read_json(self._manifest(name))
            checksum = _checksum(manifest)
            if manifest["state"]["data"] != data or manifest["checksum"] != checksum:
                return False
            for file, (size, checksum) in manifest["files"].items():
                content = self.store.read_bytes(f"{self.folder}/{name}/{file}")
                if (len(content), zlib.crc32(content)) != (size, checksum):
                    return False
                found |= {key: tuple(tensor.shape) for key, tensor in load(content).items()}
        except PASSING:
            raise
        except BaseException:  # whatever damage does to it, panics of Rust code included: an older one will do
            return False
        return found == wanted


def _checksum(manifest: dict[str, Any]) -> int:
    """Of what a manifest says."""
    told = {name: manifest[name] for name in ("files", "state")}
    return zlib.crc32(json.dumps(told, sort_keys=True).encode())


def _attempt(work: Any) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _raise_together(error: Exception | None) -> None:
    """Raises on all workers what one of them met."""
    errors: list[Exception | None] = [None] * dist.get_world_size()
    known = error is None or isinstance(error, StageError)
    dist.all_gather_object(errors, error if known else StageError(f"a checkpoint cannot be written: {error}"))
    for item in errors:
        if item is not None:
            raise item


# --- weights and moments ----------------------------------------------------------------------------------------
def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _wanted(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors."""
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _trained(module)}
    return {f"{name}|{kind}": shape for name, shape in shapes.items() for kind in ("weight", *MOMENTS)}


def _parts(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """This worker's share of the weights and moments, a file's worth at a time; gathering is collective."""
    part: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(_trained(module)):
        whole = {"weight": safe_get_full_fp32_param(parameter)}
        whole |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if number % dist.get_world_size() == dist.get_rank():
            part |= {f"{name}|{kind}": tensor.detach().to("cpu", copy=True) for kind, tensor in whole.items()}
        if sum(tensor.nbytes for tensor in part.values()) >= PART:
            yield part
            part = {}
    if part:
        yield part


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


def _apply(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name in sorted({key.rpartition("|")[0] for key in tensors}):
        parameter = parameters[name]
        weight = tensors[f"{name}|weight"]
        safe_set_full_fp32_param(parameter, weight)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[f"{name}|{moment}"], moment)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.data.copy_(weight)
