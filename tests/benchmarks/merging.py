"""What merging costs at 8B shapes, beside PEFT's svd merge and GAM from dense SVDs.

    .venv/bin/python tests/benchmarks/merging.py [LAYERS]

Three rank-64 bfloat16 adapters of Qwen3-8B's shapes (7 projections x LAYERS, default 36) of random factors are merged
from folder to folder by `deltaray merge`. The dense routes take minutes per layer: PEFT's `svd` and dense GAM merge two
of its matrices, and beside each stands what deltaray takes for just these. Every route is a process of its own, so that
its peak memory is its own. Writes `results/merging.json`.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from miniature_seeds import hardware, installed

from deltaray.merge.adapter import Adapter
from deltaray.merge.asked import Merge
from deltaray.merge.factors import Factors
from deltaray.merge.matrix import merge_matrix
from deltaray.merge.methods import Options
from deltaray.merge.run import merge_adapters
from deltaray.merge.write import TensorFile, adapter_config

RESULT = Path(__file__).parent / "results" / "merging.json"
HIDDEN, KEYS, INNER, RANK, ADAPTERS = 4096, 1024, 12288, 64, 3
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
METHODS = ("gam", "mean", "knots", "tsv")
TWO = ("self_attn.q_proj", "self_attn.k_proj")


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 36
    with tempfile.TemporaryDirectory() as root:
        for seed in range(ADAPTERS):
            make_adapter(Path(root, f"whole-{seed}"), layers, tuple(SHAPES), seed)
            make_adapter(Path(root, f"two-{seed}"), 1, TWO, seed)
        routes = {f"deltaray {method}, {layers} layers": ("ours", "whole", method) for method in METHODS}
        routes |= {
            "deltaray mean of rank 64, 2 matrices": ("ours", "two", "mean", str(RANK)),
            "PEFT svd of rank 64, 2 matrices": ("peft", "two"),
            "deltaray gam, 2 matrices": ("gam", "two"),
            "dense gam, 2 matrices": ("dense_gam", "two"),
        }
        found = {name: in_a_process(root, *route) for name, route in routes.items()}
    record = {
        "command": f"python tests/benchmarks/merging.py {layers}",
        "hardware": hardware() | {"threads": torch.get_num_threads()},
        "versions": {name: installed(name) for name in ("torch", "peft", "safetensors")},
        "what": {"adapters": ADAPTERS, "rank": RANK, "shapes": SHAPES, "layers": layers, "dtype": "BF16"},
        "routes": found,
        "times_faster": {
            "than PEFT's svd": ratio(found, "PEFT svd of rank 64, 2 matrices", "deltaray mean of rank 64, 2 matrices"),
            "than dense gam": ratio(found, "dense gam, 2 matrices", "deltaray gam, 2 matrices"),
        },
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(found, indent=2), record["times_faster"], RESULT)


def ratio(found: dict[str, Any], slow: str, fast: str) -> float:
    return round(found[slow]["seconds"] / found[fast]["seconds"], 1)


def make_adapter(folder: Path, layers: int, modules: tuple[str, ...], seed: int) -> None:
    """Common factors plus as much of the adapter's own, scaled like a trained LoRA with alpha 2 r."""
    folder.mkdir()
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.{module}" for layer in range(layers) for module in modules]
    keys = [f"base_model.model.{name}.lora_{side}.weight" for name in names for side in "AB"]
    with TensorFile(folder / "adapter_model.safetensors", keys) as file:
        for key in keys:
            rows, columns = SHAPES[".".join(key.split(".")[5:7])]
            shape = (RANK, columns) if ".lora_A." in key else (rows, RANK)
            values = torch.randn(shape, generator=common) + 0.5 * torch.randn(shape, generator=own)
            file.add(key, (values * 0.01).bfloat16())
    targets = [module.rpartition(".")[2] for module in modules]
    config = adapter_config(dict.fromkeys(names, RANK), targets, "random", {}) | {"lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def in_a_process(root: str, *route: str) -> dict[str, Any]:
    print(*route, file=sys.stderr)
    command = [sys.executable, __file__, "--route", root, *route]
    before = os.getloadavg()[0]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1]) | {"load_before": round(before, 1)}


# --- the routes, each in its own process ------------------------------------------------------------------------------
def route(root: str, name: str, kind: str, *rest: str) -> None:
    adapters = [Path(root, f"{kind}-{seed}") for seed in range(ADAPTERS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work: Callable[..., dict[str, Any]] = {"ours": ours, "peft": peft, "gam": gam, "dense_gam": dense_gam}[name]
    found = work(adapters, Path(root), *rest)
    peaks = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, peak)
    print(
        json.dumps(found | {"peak_gib": round(peaks[0] / 2**20, 2), "of_that_imports_gib": round(peaks[1] / 2**20, 2)})
    )


def ours(adapters: list[Path], root: Path, method: str, rank: str | None = None) -> dict[str, Any]:
    """From folders to a folder."""
    started = time.perf_counter()
    report = merge_adapters(Merge(adapters, method, Options(rank=int(rank) if rank else None)), root / "out")
    found = {"seconds": round(time.perf_counter() - started, 2), "matrices": len(report.modules), "rank": report.rank}
    if rank:
        found["error"] = cut_error(adapters, Adapter(root / "out"))
    return found


def cut_error(adapters: list[Path], merged: Adapter) -> float:
    """Relative distance from the mean of one matrix: that of the best cut to the rank, and no less."""
    module = "model.layers.0.self_attn.k_proj"
    parts = [Adapter(adapter).factors(module) for adapter in adapters]
    wanted = sum(part.dense() for part in parts if part) / len(parts)
    update = merged.factors(module)
    assert update is not None
    return float((update.dense() - wanted).norm() / wanted.norm())


def peft(adapters: list[Path], root: Path) -> dict[str, Any]:
    """`add_weighted_adapter(combination_type="svd")`, as fast as it goes (thin SVDs)."""
    from peft import PeftModel

    layer = torch.nn.Module()
    for name in TWO:
        (rows, columns) = SHAPES[name]
        parent, _, child = name.partition(".")
        if not hasattr(layer, parent):
            setattr(layer, parent, torch.nn.Module())
        setattr(
            getattr(layer, parent),
            child,
            torch.nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu"),
        )
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    wrapped = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        wrapped.load_adapter(adapter, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    started = time.perf_counter()
    options = {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": False}
    wrapped.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", **options)
    seconds = time.perf_counter() - started
    wrapped.save_pretrained(root / "peft", selected_adapters=["merged"])
    error = cut_error(adapters, Adapter(root / "peft" / "merged"))
    return {"seconds": round(seconds, 2), "matrices": len(TWO), "rank": RANK, "error": error}


def some(adapters: list[Path]) -> list[list[Factors]]:
    opened = [Adapter(adapter) for adapter in adapters]
    return [[each.factors(f"model.layers.0.{name}") for each in opened] for name in TWO]  # type: ignore[misc]


def gam(adapters: list[Path], root: Path) -> dict[str, Any]:
    matrices = some(adapters)
    started = time.perf_counter()
    found = [merge_matrix(updates, "gam").update.dense() for updates in matrices]
    seconds = time.perf_counter() - started
    torch.save(found, root / "gam.pt")
    return {"seconds": round(seconds, 2), "matrices": len(found)}


def dense_gam(adapters: list[Path], root: Path) -> dict[str, Any]:
    """The paper's formulas on the SVDs of the dense updates, in float32; how far deltaray's result is from it."""
    matrices = [[update.dense().float() for update in updates] for updates in some(adapters)]
    started = time.perf_counter()
    found = []
    for updates in matrices:
        parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
        cut = [(u[:, :RANK], s[:RANK].diag(), vt[:RANK].T) for u, s, vt in parts]
        turned = [(rotation(u, cut[0][0]), rotation(v, cut[0][2])) for u, _, v in cut]
        left = sum(u @ a for (u, _, _), (a, _) in zip(cut, turned, strict=True)) / len(cut)
        middle = sum(a.T @ s @ b for (_, s, _), (a, b) in zip(cut, turned, strict=True)) / len(cut)
        right = sum(v @ b for (_, _, v), (_, b) in zip(cut, turned, strict=True)) / len(cut)
        found.append(left @ middle @ right.T)
    seconds = time.perf_counter() - started
    own = torch.load(root / "gam.pt")
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, own, strict=True)]
    return {"seconds": round(seconds, 2), "matrices": len(found), "distance_to_deltaray": errors}


def rotation(basis: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(basis.T @ target)
    return left @ right


if __name__ == "__main__":
    if sys.argv[1:2] == ["--route"]:
        route(*sys.argv[2:])
    else:
        main()
