"""File systems under a store: connecting to one, putting a file whole, and what a dead process leaves behind."""

import errno
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from deltaray.errors import StageError, UserError, door

REQUESTS = 16
"""Requests to an object store at a time, where there are many small ones."""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of those that know no folders: creating one would only leave an empty object of that name."""
ATTEMPTS = 10
"""Of a request to S3 that is not answered, or asked to come again: with growing pauses they take about a minute."""
ANSWER_SECONDS = 60.0
"""A request to S3 that is silent for so long is taken for lost."""
FULL = (errno.ENOSPC, errno.EDQUOT)
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")

Item = TypeVar("Item")
Result = TypeVar("Result")


def connect(out: str) -> tuple[fs.FileSystem, str]:
    """The file system of an `out` and the path in it.

    Credentials of an object store come from the environment or the provider's own configuration files only.

    Raises:
        UserError: it is neither a folder nor an address that pyarrow knows, or it holds credentials.
    """
    if "://" not in out:
        return fs.LocalFileSystem(), out
    with door(f"out: {out}", "is not an address of an object store"):
        parts = urlsplit(out)
    if "@" in parts.netloc:
        host = parts.netloc.rpartition("@")[2]
        raise UserError(
            f"out: {parts.scheme}://…@{host}{parts.path} holds credentials; give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
        )
    try:
        base, path = fs.FileSystem.from_uri(out)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"out: {out} is neither a folder nor the address of an object store: {error}") from None
    if not path.strip("/"):
        raise UserError(f"out: {out} names no folder to write to, such as s3://bucket/study")
    return base, path


class PatientS3(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """S3 that bears with an outage of about a minute and with answers that take as long.

    By itself an address's file system gives up after 30 pauses of 0.2 s (Arrow, `ConnectRetryStrategy`), and takes an
    answer that is silent for 3 s for lost (the AWS SDK). Pickled, pyarrow's own forgets how often it should try again.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        again = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
        super().__init__(**options | {"request_timeout": ANSWER_SECONDS}, retry_strategy=again)

    def __reduce__(self) -> tuple[type["PatientS3"], tuple[dict[str, Any]]]:
        return PatientS3, super().__reduce__()[1]


def patient(filesystem: fs.FileSystem) -> fs.FileSystem:
    """The file system, with patience where it is S3."""
    return PatientS3(*filesystem.__reduce__()[1]) if filesystem.type_name == "s3" else filesystem


def put(filesystem: fs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    """Writes one object; on an object store it becomes visible complete or not at all.

    pyarrow makes visible what was written so far when an exception ends the `with` block of a stream. Signals raise
    exceptions (Ctrl-C) in the main thread only, so the writing is done in another one.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_put, filesystem, path, content).result()


def _put(filesystem: fs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    with filesystem.open_output_stream(path) as sink:
        sink.write(content)


def together(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The function's results in order; it mostly waits for an object store, so many calls run at once."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


# --- a local disk -------------------------------------------------------------------------------------------------
def temporary(path: Path) -> Path:
    """A new hidden name beside a path, for work in progress."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> int:
    """Removes what a killed process had not committed in a folder tree; returns how many files and folders.

    Nothing else may work in the tree meanwhile.
    """
    found = [path for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name)]
    for path in found:
        remove(path)
    return len(found)


@contextmanager
def unless_full(path: Path) -> Iterator[None]:
    """StageError, and not a bare OSError, when the disk or a quota is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StageError(
            f"{path} cannot be written: {error.strerror}\n"
            "what is committed is safe: make room there and run the same command again to resume"
        ) from error


def copy_tree(source: Path, target: Path) -> None:
    """`shutil.copytree`, but the first failure ends it (it would go on and lose the reason)."""

    def copy(file: str, to: str) -> str:
        with unless_full(Path(to)):
            return shutil.copy2(file, to)

    with unless_full(target):
        shutil.copytree(source, target, copy_function=copy)
