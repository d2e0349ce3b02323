"""How every causal architecture of transformers would be trained: packed, padded, refused, or not to be tried here.

    .venv/bin/python tests/benchmarks/architectures.py

Each type's default configuration goes through what `deltaray plan` asks of a student: a small copy is built, and its
log-probs are compared with the model's own logits. Writes `results/architectures.json` and `results/architectures.md`.
"""

import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltaray.train.probe import judge

RESULTS = Path(__file__).parent / "results"
COMPLETED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6},
    "gemma2": {"sliding_window": 4096},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "phimoe": {"sliding_window": 2047},
}
"""Settings that the defaults lack and every checkpoint has."""


def look(kind: str) -> dict[str, Any]:
    started = time.monotonic()
    try:
        config = CONFIG_MAPPING[kind](**COMPLETED.get(kind, {}))
    except Exception as error:  # configurations raise what they like
        words = str(error).strip().splitlines()[0]
        return {"way": "not tried", "reason": f"no default configuration: {type(error).__name__}: {words}"}
    verdict = judge(config)
    found: dict[str, Any] = {"way": verdict.way if verdict.way != "unknown" else "not tried"}
    found |= {"reason": verdict.reason} if verdict.reason else {}
    found |= {"head": verdict.head} if verdict.head == "own" else {}
    found |= {"attention": verdict.attention} if verdict.attention else {}
    found |= {"longest": verdict.longest} if verdict.longest else {}
    return found | {"seconds": round(time.monotonic() - started, 2)}


def table(found: dict[str, dict[str, Any]]) -> str:
    counts = Counter(item["way"] for item in found.values())
    lines = [
        f"# Causal architectures of transformers {transformers.__version__}",
        "",
        "Made by `python tests/benchmarks/architectures.py` from each type's default configuration: "
        + ", ".join(f"{counts[way]} {way}" for way in ("packed", "padded", "refused", "not tried"))
        + '. "Own head": the logits are more than a matrix product, and the model\'s own code computes them. A type '
        "that was not tried is tried with its real weights before the reference pass.",
        "",
        "| type | way | why not packed; what else |",
        "|---|---|---|",
    ]
    for kind, item in found.items():
        more = [item["reason"].replace("|", "\\|")] if "reason" in item else []
        more += ["own head"] if "head" in item else []
        more += (
            [f"{item['attention']} attention, as the default one leaves something out"] if "attention" in item else []
        )
        more += [f"texts of at most {item['longest']} tokens"] if "longest" in item else []
        lines.append(f"| `{kind}` | {item['way']} | {'; '.join(more)} |")
    return "\n".join(lines) + "\n"


def main(only: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if not only or kind in only:
            found[kind] = look(kind)
            print(f"{kind:28s} {json.dumps(found[kind])}", flush=True)
    if not only:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        (RESULTS / "architectures.json").write_text(json.dumps({"versions": versions, "types": found}, indent=1) + "\n")
        (RESULTS / "architectures.md").write_text(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
