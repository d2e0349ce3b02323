"""Other people's small files (settings, templates, tables of contents): read whole, and only if they are small."""

import json
from pathlib import Path
from typing import Any

from deltaray.errors import UserError, door
from deltaray.limits import CONFIG_BYTES


def read_small(path: Path, most: int = CONFIG_BYTES) -> bytes:
    """A file's content.

    Raises:
        UserError: it is larger, a pipe or a device (which may never end), or cannot be read; led by its path.
    """
    with door(str(path)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is a folder, a pipe or a device; put an ordinary file there")
        with path.open("rb") as file:
            content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes, which no such file is")
    return content


def read_settings(path: Path, most: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object of settings.

    Raises:
        UserError: as `read_small`, or it is not a JSON object; led by its path.
    """
    content = read_small(path, most)
    with door(str(path), "cannot be read as JSON; fetch or save it again"):
        value = json.loads(content)
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object; fetch or save it again")
    return value
