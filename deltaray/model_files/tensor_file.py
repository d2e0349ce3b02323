"""A safetensors file that is written tensor by tensor."""

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

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
