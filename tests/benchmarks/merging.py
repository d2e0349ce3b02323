"""What merging costs at 8B shapes, beside PEFT's svd merge and GAM from dense SVDs.

    .venv/bin/python tests/benchmarks/merging.py [LAYERS] [THREADS]

Three rank-64 bfloat16 adapters of Qwen3-8B's shapes (7 projections x LAYERS, default 36) of random factors are merged
from folder to folder by every method of `deltaray merge`. TIES and DARE on the weights make dense matrices: they merge
one layer. The dense routes take minutes per layer: PEFT's `svd` and dense GAM merge two of its matrices, beside each
stands what deltaray takes for just these, and their time for all layers is extrapolated by the operations of a dense
SVD, m n^2 of an m x n matrix. Every route is a process of its own with THREADS threads (default: the cores), so that
its peak memory is its own. `cpu_seconds` of all threads are given beside the seconds on the clock, which suffer from
other work on the machine; `load_before` says how much there was. Writes `results/merging.json`.
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
from torch import Tensor

from deltaray.merge.adapter import Adapter
from deltaray.merge.arguments import Merge
from deltaray.merge.factors import Factors
from deltaray.merge.matrix import merge_matrix
from deltaray.merge.methods import METHODS, Options
from deltaray.merge.run import merge_adapters
from deltaray.merge.write import adapter_config
from deltaray.model_files.tensor_file import TensorFile

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
TWO = ("self_attn.q_proj", "self_attn.k_proj")
RIVALS = {  # a dense route, and what stands beside it
    "PEFT svd of rank 64, 2 matrices": "mean of rank 64, 2 matrices",
    "dense gam in float32, 2 matrices": "gam, 2 matrices",
    "dense gam in float64, 2 matrices": "gam, 2 matrices",
}


def main(layers: int = 36, threads: int = os.cpu_count() or 1) -> None:
    with tempfile.TemporaryDirectory() as root:
        for seed in range(ADAPTERS):
            make_adapter(Path(root, f"all-{seed}"), layers, tuple(SHAPES), seed)
            make_adapter(Path(root, f"one-{seed}"), 1, tuple(SHAPES), seed)
            make_adapter(Path(root, f"two-{seed}"), 1, TWO, seed)
        found = {name: in_a_process(root, threads, *route) for name, route in routes(layers).items()}
    record = {
        "command": f"python tests/benchmarks/merging.py {layers} {threads}",
        "hardware": hardware() | {"threads": threads},
        "versions": {name: installed(name) for name in ("torch", "peft", "safetensors")},
        "what": {"adapters": ADAPTERS, "rank": RANK, "shapes": SHAPES, "layers": layers, "dtype": "BF16"},
        "routes": found,
        "times_faster": {slow: times_faster(found, slow, fast) for slow, fast in RIVALS.items()},
        "extrapolated_hours": {slow: extrapolated(found[slow]["cpu_seconds"], layers) for slow in RIVALS},
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), RESULT)


def routes(layers: int) -> dict[str, tuple[str, ...]]:
    """Every route's arguments, by its name in the result."""
    factored = [name for name, method in METHODS.items() if not method.dense]
    dense = [name for name, method in METHODS.items() if method.dense]
    return (
        {f"{name}, {layers} layers": ("ours", "all", name) for name in factored}
        | {f"{name}, 1 layer": ("ours", "one", name) for name in dense}
        | {
            "mean of rank 64, 2 matrices": ("ours", "two", "mean", str(RANK)),
            "PEFT svd of rank 64, 2 matrices": ("peft", "two"),
            "gam, 2 matrices": ("gam", "two"),
            "dense gam in float32, 2 matrices": ("dense_gam", "two", "float32"),
            "dense gam in float64, 2 matrices": ("dense_gam", "two", "float64"),
        }
    )


def times_faster(found: dict[str, Any], slow: str, fast: str) -> dict[str, float]:
    """By the clock, and by the time that all threads computed."""
    return {clock: round(found[slow][clock] / found[fast][clock], 1) for clock in ("seconds", "cpu_seconds")}


def extrapolated(seconds: float, layers: int) -> float:
    """Hours of computing for all matrices, from seconds for two."""
    cost = {name: max(shape) * min(shape) ** 2 for name, shape in SHAPES.items()}
    return round(seconds / 3600 * layers * sum(cost.values()) / sum(cost[name] for name in TWO), 1)


def make_adapter(folder: Path, layers: int, modules: tuple[str, ...], seed: int) -> None:
    """Common factors plus half as much of the adapter's own."""
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


def in_a_process(root: str, threads: int, *route: str) -> dict[str, Any]:
    print(*route, file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--route", root, *route]
    load = os.getloadavg()[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found | {"load_before": round(load, 1)}


# --- the routes, each in its own process ------------------------------------------------------------------------------
def route(root: str, name: str, kind: str, *rest: str) -> None:
    adapters = [Path(root, f"{kind}-{seed}") for seed in range(ADAPTERS)]
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work: Callable[..., dict[str, Any]] = {"ours": ours, "peft": peft, "gam": gam, "dense_gam": dense_gam}[name]
    found = work(adapters, Path(root), *rest)
    peaks = {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "of_that_imports_gib": imports}
    print(json.dumps(found | {name: round(peak / 2**20, 2) for name, peak in peaks.items()}))


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def ours(adapters: list[Path], root: Path, method: str, rank: str | None = None) -> dict[str, Any]:
    """From folders to a folder; what PEFT is compared with in float32, as PEFT stores it."""
    asked = Merge(adapters, method, Options(rank=int(rank) if rank else None), dtype="F32" if rank else None)
    report, found = timed(lambda: merge_adapters(asked, root / "out"))
    found |= {"matrices": len(report.modules), "rank": report.rank}
    return found | ({"distance_to_mean": distances(adapters, root / "out")} if rank else {})


def distances(adapters: list[Path], merged: Path) -> list[float]:
    """Relative Frobenius distances of the two matrices from the adapters' exact mean."""
    wanted = [torch.stack([part.dense() for part in parts]).mean(0) for parts in some(adapters)]
    found = [parts[0].dense() for parts in some([merged])]
    return [distance(one, mean) for one, mean in zip(found, wanted, strict=True)]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def some(adapters: list[Path]) -> list[list[Factors]]:
    opened = [Adapter(adapter) for adapter in adapters]
    found = [[each.factors(f"model.layers.0.{name}") for each in opened] for name in TWO]
    return [[part for part in parts if part] for parts in found]


def peft(adapters: list[Path], root: Path) -> dict[str, Any]:
    """`add_weighted_adapter(combination_type="svd")` as fast as it goes (thin SVDs), without reading and writing."""
    from peft import PeftModel

    names = [f"adapter_{number}" for number in range(len(adapters))]
    wrapped = PeftModel.from_pretrained(empty_model(), adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        wrapped.load_adapter(adapter, adapter_name=name)
    options = {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": False}
    weights = [1 / len(names)] * len(names)
    _, found = timed(lambda: wrapped.add_weighted_adapter(names, weights, "merged", **options))
    wrapped.save_pretrained(root / "peft", selected_adapters=["merged"])
    merged, own = root / "peft" / "merged", root / "out"
    apart = {"distance_to_mean": distances(adapters, merged), "distance_of_ours": distances([merged], own)}
    return found | {"matrices": len(TWO), "rank": RANK} | apart


def empty_model() -> torch.nn.Module:
    """A model with nothing but the two matrices, under the names that the adapters know."""
    layer = torch.nn.Module()
    layer.self_attn = torch.nn.Module()
    for name in TWO:
        rows, columns = SHAPES[name]
        setattr(layer.self_attn, name.rpartition(".")[2], torch.nn.Linear(columns, rows, bias=False))
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    return model


def gam(adapters: list[Path], root: Path) -> dict[str, Any]:
    """deltaray's, from factors in memory to factors, its diagnosis included."""
    matrices = some(adapters)
    merged, found = timed(lambda: [merge_matrix(list(updates), "gam").update for updates in matrices])
    torch.save([update.dense() for update in merged], root / "gam.pt")
    return found | {"matrices": len(merged)}


def dense_gam(adapters: list[Path], root: Path, dtype: str) -> dict[str, Any]:
    """The paper's formulas on the SVDs of the dense updates, and how far deltaray's result is from theirs."""
    matrices = [[update.dense().to(getattr(torch, dtype)) for update in updates] for updates in some(adapters)]
    merged, found = timed(lambda: [dense_gam_of(updates) for updates in matrices])
    own = torch.load(root / "gam.pt")
    apart = [distance(one, other.double()) for one, other in zip(own, merged, strict=True)]
    return found | {"matrices": len(merged), "distance_of_ours": apart}


def dense_gam_of(updates: list[Tensor]) -> Tensor:
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    cut = [(u[:, :RANK], s[:RANK].diag(), vt[:RANK].T) for u, s, vt in parts]
    turned = [(rotation(u, cut[0][0]), rotation(v, cut[0][2])) for u, _, v in cut]
    left = torch.stack([u @ a for (u, _, _), (a, _) in zip(cut, turned, strict=True)]).mean(0)
    middle = torch.stack([a.T @ s @ b for (_, s, _), (a, b) in zip(cut, turned, strict=True)]).mean(0)
    right = torch.stack([v @ b for (_, _, v), (_, b) in zip(cut, turned, strict=True)]).mean(0)
    return left @ middle @ right.T


def rotation(basis: Tensor, target: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(basis.T @ target)
    return left @ right


if __name__ == "__main__":
    if sys.argv[1:2] == ["--route"]:
        route(*sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
