"""Checkpoints that any number of workers can write and any other number can resume from.

A checkpoint holds weights and moments whole, not by worker: ZeRO's own files are bound to the number of workers. Each
worker copies its share to the machine's memory and writes it while training goes on; a manifest with the sizes and
checksums of all files comes last, and without it a checkpoint does not exist.
"""

import json
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from deltaray.data.store import Store
from deltaray.errors import PASSING, StageError
from deltaray.train.full_state import Shapes, full_shapes, own_parts, prepare_moments, set_full

PART = 2 << 30
"""Bytes of one file."""
WAITING = 2
"""Files that wait in memory to be written, per worker; further ones wait until one of them is."""
KEPT = 2
"""Checkpoints that are kept of a run, beside its best."""
Written = dict[str, list[int]]
"""The files that a worker has written: name -> [bytes, checksum]."""


@dataclass
class Pending:
    """A checkpoint whose files are being written."""

    name: str
    state: dict[str, Any]
    keep: str | None
    files: list["Future[Written]"] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run. `begin`, `finish` and `load` are collective calls."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.folder = store, Store.checkpoints(run)
        self.pending: Pending | None = None
        self.writer = ThreadPoolExecutor(1)

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
    def begin(self, engine: Any, name: str, state: dict[str, Any], keep: str | None = None) -> None:
        """Copies what a checkpoint under a `new_name` holds; training may go on, `finish` commits it.

        The checkpoint before must be finished.

        Args:
            state: JSON that is kept with it. keep: the checkpoint that `finish` leaves besides the newest ones.
        """
        self.pending = Pending(name, state, keep)
        for number, part in enumerate(own_parts(engine.module, PART)):
            files = self.pending.files
            if len(files) >= WAITING:
                files[-WAITING].exception()  # waits; `finish` tells what went wrong
            file = f"rank-{dist.get_rank():05d}-{number:05d}.safetensors"
            files.append(self.writer.submit(self._write, f"{self.folder}/{name}", file, part))

    def _write(self, folder: str, file: str, part: dict[str, Tensor]) -> Written:
        content = save(part)
        self.store.write_bytes(f"{folder}/{file}", content)
        return {file: [len(content), zlib.crc32(content)]}

    def finish(self) -> None:
        """Commits the checkpoint that was begun, if any, then removes all but the newest and the one to keep.

        Raises:
            StageError: on every worker, if one of them could not write; nothing counts then.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        own, error = _collected(pending.files)
        written: list[Written] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(written, own)
        _raise_together(error)
        if dist.get_rank() == 0:
            files = {file: size for part in written for file, size in part.items()}
            error = _attempt(lambda: self._commit(pending, files))
        _raise_together(error)
        dist.barrier()

    def _commit(self, pending: Pending, files: Written) -> None:
        told: dict[str, Any] = {"files": files, "state": pending.state}
        told["checksum"] = _checksum(told)
        self.store.write_json(self._manifest(pending.name), told)
        left = {*self.complete()[:KEPT], pending.keep}
        self._remove([other for other in self.store.folders(self.folder) if other not in left])

    def new_name(self, step: int) -> str:
        """One name for all workers; a torn checkpoint of the same step never mixes with a new one."""
        name = [f"step-{step:09d}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name, src=0)
        return name[0]

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

        Each file is read twice, by any number of workers: once to see that all files are whole before anything is set,
        and once by the worker that sends it to the others.

        Args:
            data: `Data.fingerprint` of the pairs.

        Returns:
            None, and nothing is set, if any worker finds it damaged, of other weights, or made on other pairs.
        """
        manifest, rank, workers = self.manifest(name, data), dist.get_rank(), dist.get_world_size()
        files = sorted(manifest["files"]) if manifest else []
        shares: list[dict[str, Shapes] | None] = [None] * workers
        dist.all_gather_object(shares, self.shapes(name, manifest, files[rank::workers]) if manifest else None)
        found = {file: shapes for share in shares if share is not None for file, shapes in share.items()}
        if manifest is None or None in shares or _merged(found) != full_shapes(engine.module):
            return None
        prepare_moments(engine, int(manifest["state"]["step"]))
        parameters = dict(engine.module.named_parameters())
        for number, file in enumerate(files):
            set_full(parameters, self._sent(name, file, found[file], number % workers, engine.device))
        return dict(manifest["state"])

    def manifest(self, name: str, data: int) -> dict[str, Any] | None:
        """A checkpoint's manifest; None if it is damaged or of other pairs."""
        try:
            manifest: dict[str, Any] = self.store.read_json(self._manifest(name))
            sound = manifest["state"]["data"] == data and manifest["checksum"] == _checksum(manifest)
        except PASSING:
            raise
        except BaseException:  # whatever damage does to it: an older one will do
            return None
        return manifest if sound else None

    def shapes(self, name: str, manifest: dict[str, Any], files: list[str]) -> dict[str, Shapes] | None:
        """What some of its files hold, by file; None if one of them is damaged."""
        found: dict[str, Shapes] = {}
        try:
            for file in files:
                content = self.store.read_bytes(f"{self.folder}/{name}/{file}")
                if [len(content), zlib.crc32(content)] != manifest["files"][file]:
                    return None
                found[file] = {key: tuple(tensor.shape) for key, tensor in load(content).items()}
        except PASSING:
            raise
        except BaseException:  # also panics of Rust code
            return None
        return found

    def _sent(
        self, name: str, file: str, shapes: Shapes, owner: int, device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """A file's tensors on every worker, in the order of their names; one worker reads them."""
        mine = dist.get_rank() == owner
        content = load(self.store.read_bytes(f"{self.folder}/{name}/{file}")) if mine else {}
        for key, shape in sorted(shapes.items()):
            tensor = content.pop(key).to(device) if mine else torch.empty(shape, device=device)
            dist.broadcast(tensor, src=owner)
            yield key, tensor


def _merged(found: dict[str, Shapes]) -> Shapes:
    return {key: shape for shapes in found.values() for key, shape in shapes.items()}


def _collected(files: list["Future[Written]"]) -> tuple[Written, Exception | None]:
    """What a worker has written, once it has; the first thing that went wrong, if any did."""
    written: Written = {}
    error: Exception | None = None
    for future in files:
        failed = _attempt(lambda future=future: written.update(future.result()))
        error = error or failed
    return written, error


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
