"""From adapters' folders to the merged adapter's folder, one weight matrix in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deltaray.data.storage.files import Files
from deltaray.data.storage.filesystem import remove
from deltaray.errors import UserError
from deltaray.merge.adapter import DTYPES, Adapter, widest
from deltaray.merge.arguments import Merge, find_reference, refuse_merge, refuse_own_input
from deltaray.merge.base import add_to_base, open_base
from deltaray.merge.check import base_copies, modules_of, refuse_strangers, target_modules
from deltaray.merge.diagnostics import SHRUNK, Diagnosis, by_kind, summarize
from deltaray.merge.factors import Factors
from deltaray.merge.matrix import Merged, merge_matrix
from deltaray.merge.methods import METHODS
from deltaray.merge.parallel import map_in_order
from deltaray.merge.write import adapter_config, refuse_occupied, whole_folder
from deltaray.model_files.lora import CONFIG, WEIGHTS
from deltaray.model_files.tensor_file import TensorFile

RECORD = "merge.json"
"""Beside the merged adapter: what it was made of, and the diagnosis of every matrix."""
SERVED_RANK = 512
"""The largest rank that vLLM serves."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What a merge tells: `modules` by name, and what the user should know."""

    method: str
    adapters: list[str]
    reference: str | None
    options: dict[str, Any]
    rank: int
    modules: dict[str, Diagnosis]
    warnings: list[str]

    def record(self) -> dict[str, Any]:
        """As merge.json and --json hold it."""
        return {
            "method": self.method,
            "adapters": self.adapters,
            "reference": self.reference,
            "options": self.options,
            "rank": self.rank,
            "summary": summarize(list(self.modules.values())),
            "kinds": {kind: summarize(list(found.values())) for kind, found in by_kind(self.modules).items()},
            "warnings": self.warnings,
            "modules": {name: found.record() for name, found in self.modules.items()},
        }


def merge_adapters(merge: Merge, out: Path, progress: Progress = lambda done, total: None) -> Report:
    """Merges PEFT LoRA adapters into a new one at `out`, or into a model.

    Raises:
        UserError: the adapters cannot be merged, or something asked for does not make sense.
    """
    refuse_merge(merge)
    lead = find_reference(merge.adapters, merge.reference)
    refuse_own_input(merge.adapters, out)
    refuse_occupied(out, RECORD)
    opened = [Adapter(Path(folder).expanduser()) for folder in merge.adapters]
    refuse_strangers(opened, merge.base)
    named = merge.base or opened[0].base
    base = open_base(named, opened[0].config.get("revision")) if merge.into_base else None
    with whole_folder(out, RECORD) as folder:
        target = folder / "adapter" if base else folder
        target.mkdir(exist_ok=True)
        found = _merge_modules(opened, target, merge, lead, progress)
        ranks = {module: max(1, diagnosis.rank) for module, diagnosis in found.items()}
        Files(str(target)).write_json(CONFIG, adapter_config(ranks, target_modules(opened), named, opened[0].config))
        if base:
            add_to_base(base, Adapter(target), folder, lambda done, total: None)
            remove(target)
        reference = str(merge.adapters[lead]) if merge.method == "gam" else None
        names = [str(folder) for folder in merge.adapters]
        told = _warnings(merge, found)
        report = Report(merge.method, names, reference, merge.asked, max(ranks.values()), found, told)
        Files(str(folder)).write_json(RECORD, report.record())
    return report


def _merge_modules(
    opened: Sequence[Adapter], folder: Path, merge: Merge, reference: int, progress: Progress
) -> dict[str, Diagnosis]:
    dtype = _dtype(merge, opened)
    copies = base_copies(opened)
    modules = modules_of(opened)
    keys = {module: next(each.modules[module] for each in opened if module in each.modules) for module in modules}
    names = [key for pair in keys.values() for key in (pair.down, pair.up)]
    found = {}
    tasks = (([each.factors(module) for each in opened], module) for module in modules)
    job = partial(_merge_one, merge, reference)
    with TensorFile(folder / WEIGHTS, [*names, *copies]) as file:
        for number, (module, merged) in enumerate(map_in_order(job, tasks, 1 if METHODS[merge.method].dense else None)):
            update = _at_least_one(merged.update)
            file.add(keys[module].down, _stored(update.right, dtype, module))
            file.add(keys[module].up, _stored(update.left, dtype, module))
            found[module] = merged.diagnosis
            progress(number + 1, len(modules))
        for key, tensor in copies.items():
            file.add(key, tensor)
    return found


def _merge_one(merge: Merge, reference: int, task: tuple[list[Factors | None], str]) -> tuple[str, Merged]:
    updates, module = task
    return module, merge_matrix(updates, merge.method, reference, merge.options, module)


def _dtype(merge: Merge, opened: Sequence[Adapter]) -> torch.dtype:
    """What the merged adapter is stored in; one that goes into a base is rounded there, not before."""
    if merge.into_base:
        return torch.float32
    return DTYPES[merge.dtype] if merge.dtype else widest(each.dtype for each in opened)


def _at_least_one(update: Factors) -> Factors:
    """No reader knows rank 0: an update that has vanished gets one direction of zeros."""
    if update.rank:
        return update
    return Factors(update.left.new_zeros(update.left.shape[0], 1), update.right.new_zeros(1, update.right.shape[1]))


def _stored(factor: torch.Tensor, dtype: torch.dtype, module: str) -> torch.Tensor:
    stored = factor.to(dtype)
    if not stored.isfinite().all():
        raise UserError(f"{module}: the merged update is too large for {dtype}; store it with --dtype F32")
    return stored


def _warnings(merge: Merge, found: Mapping[str, Diagnosis]) -> list[str]:
    options, rank = merge.options, max(each.rank for each in found.values())
    told = []
    ratio = summarize(list(found.values()))["norm_ratio"]
    as_it_is = merge.method == "gam" and not options.restore_norm and options.scale is None
    if as_it_is and ratio is not None and ratio < SHRUNK:
        told.append(
            f"the adapters' subspaces differ so much that GAM keeps {ratio:.2f} of the plain mean's norm (1 where "
            "they agree, about 0.35 for four unrelated ones): compare with --method mean or --restore-norm"
        )
    if count := sum(1 for each in found.values() if each.undetermined):
        told.append(
            f"in {count:,} matrices an adapter has directions orthogonal to all of the reference's: GAM does not "
            "determine how they are paired; one way was taken"
        )
    if count := sum(1 for each in found.values() if not each.norm and len(each.unchanged) < len(merge.adapters)):
        told.append(f"the merged update of {count:,} of {len(found):,} matrices is zero: the adapters cancel there")
    told += _unchanged(merge, found)
    if rank > SERVED_RANK and not merge.into_base:
        told.append(f"its rank is {rank}, and vLLM serves up to {SERVED_RANK}: cut it with --rank {SERVED_RANK}")
    if low := [each.kept for each in found.values() if each.kept < 0.9]:
        told.append(f"the rank keeps under 90 % of the squared norm of {len(low):,} matrices, {min(low):.0%} at worst")
    return told


def _unchanged(merge: Merge, found: Mapping[str, Diagnosis]) -> list[str]:
    """A line per adapter that does not change all matrices."""
    how = "are left out there" if merge.options.skip_missing else "count as zero there"
    counts = [sum(1 for each in found.values() if place in each.unchanged) for place in range(len(merge.adapters))]
    return [
        f"{adapter} does not change {count:,} of {len(found):,} matrices; such adapters {how}"
        for adapter, count in zip(merge.adapters, counts, strict=True)
        if count
    ]
