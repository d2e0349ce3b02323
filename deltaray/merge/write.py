"""Writing what has been merged: safetensors tensor by tensor, and a folder that is there whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from deltaray.errors import UserError
from deltaray.storage.filesystem import remove, temporary, unless_full

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


class TensorFile:
    """A safetensors file that is written as tensors come; the library's own writer wants all of them in memory.

    The format is 8 bytes with the header's length, a JSON header that spaces may fill up, and the tensors' bytes. The
    header's room is reserved first (`keys`: all names that will come) and filled in at the end.
    """

    def __init__(self, path: Path, keys: list[str]) -> None:
        room = sum(len(json.dumps(key)) + 128 for key in keys) + 64
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._room = room + -room % ALIGNMENT
        self._end = 0
        self._file: IO[bytes] = path.open("wb")
        self._file.seek(8 + self._room)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Appends one tensor."""
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        start, self._end = self._end, self._end + content.nbytes
        self._file.write(content.data)
        offsets = [start, self._end]
        self._header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode()
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


@contextmanager
def whole_folder(out: Path, mark: str) -> Iterator[Path]:
    """A hidden folder to write into, which takes the name `out` when all is well.

    Args:
        mark: a file that folders of this kind hold; one that is there already is replaced only if it has it.

    Raises:
        UserError: something else is at `out`, or it cannot be written.
        StageError: the disk is full.
    """
    refuse_occupied(out, mark)
    hidden = temporary(out)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    try:
        with unless_full(out):
            yield hidden
            remove(out)
            hidden.replace(out)
    finally:
        remove(hidden)


def refuse_occupied(out: Path, mark: str) -> None:
    """UserError unless `out` is free, an empty folder, or an earlier result of ours."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / mark).is_file()):
        raise UserError(f"--out {out}: is there already and no earlier merge; name another folder")


def adapter_config(
    ranks: Mapping[str, int], targets: list[str], base: str | None, like: Mapping[str, Any]
) -> dict[str, Any]:
    """The merged adapter's adapter_config.json: scaling 1 everywhere, written such that all readers agree on it.

    alpha equals the rank in every module, also for readers that know no patterns. Nothing else is set that PEFT or
    vLLM would not take for granted.
    """
    rank = max(ranks.values())
    pattern = {module: lower for module, lower in ranks.items() if lower != rank}
    kept = {key: like[key] for key in ("task_type", "fan_in_fan_out", "auto_mapping", "revision") if like.get(key)}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        **kept,
    }
