"""Teachers spread over two processes answer like transformers: real vLLM on CPU, tensor- and pipeline-parallel.

    .venv/bin/python tests/benchmarks/parallel_teachers.py

No part of the suite, for each engine takes most of a minute to start.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from character_model import encode, greedy_answers, make_model

from deltaray.generate.spec import EngineSpec

PROMPTS = ["add 1+2=", "what is 3", "so 3+4="]
TOKENS = 12


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"), seed=1)
        for kind in ("tensor_parallel", "pipeline_parallel"):
            subprocess.run([sys.executable, __file__, model, kind], check=True)


def check(model: str, kind: str) -> None:
    spec = EngineSpec(model, dtype="float32", max_model_len=64, gpus=0, cpus=2, **{kind: 2})
    os.environ.update(spec.environment)
    began = time.monotonic()
    engine = spec.start()
    started = time.monotonic()
    outputs = asyncio.run(engine.generate(unit_of(model)))
    print(f"{kind} 2: start {started - began:.0f} s, answers {time.monotonic() - started:.1f} s", flush=True)
    engine.close()
    assert [output["token_ids"] for [output] in outputs] == greedy_answers(model, PROMPTS, TOKENS)
    print("the answers are those of transformers", flush=True)


def unit_of(model: str) -> dict[str, object]:
    sampling = json.dumps({"temperature": 0.0, "max_tokens": TOKENS})
    ids = [encode(prompt) for prompt in PROMPTS]
    asked = {"prompt_ids": PROMPTS, "token_ids": ids, "samples": [0], "sampling": sampling}
    return {"unit_id": "unit", "name": "teacher", "model": model} | asked


if __name__ == "__main__":  # vLLM's processes import this file, too
    if len(sys.argv) == 1:
        main()
    else:
        check(sys.argv[1], sys.argv[2])
