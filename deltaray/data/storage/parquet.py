"""Parquet files that say what is in them, and are checked when they are opened: a foreign or damaged one is named."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from deltaray.errors import UserError

REMEDY = "remove it (the same command makes again what is missing) or use another `out`"
CHECKED = {"write_page_checksum": True}
CONTENT, SOURCE = b"deltaray.content", b"deltaray.made_from"
"""Keys in the footer: a digest of the file's own data, and that of what it was worked out from."""


class _Digesting:
    """A sink that digests what goes through it."""

    closed = False

    def __init__(self, sink: pa.NativeFile) -> None:
        self.sink, self.digest = sink, hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self.sink.write(data))

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        self.closed = True


@contextmanager
def parquet_writer(sink: pa.NativeFile, schema: pa.Schema, made_from: str | None = None) -> Iterator[pq.ParquetWriter]:
    """Writes tables as one Parquet file whose footer tells its content from any other.

    Args:
        made_from: kept in the footer, for `Reader.source`.
    """
    digesting = _Digesting(sink)
    with pq.ParquetWriter(pa.PythonFile(digesting, mode="w"), schema, compression="zstd", **CHECKED) as writer:
        yield writer
        told = {CONTENT: digesting.digest.hexdigest().encode()}  # all pages are written by now; only the footer is not
        writer.add_key_value_metadata(told | ({SOURCE: made_from.encode()} if made_from is not None else {}))


@contextmanager
def open_parquet(
    filesystem: fs.FileSystem, path: str, address: str, schema: pa.Schema | None = None
) -> Iterator[pq.ParquetFile]:
    """An open file with, if a schema is given, all its columns in their types (more columns may be there).

    What we write ourselves appears only when it is complete, so anything else was put there or changed by somebody:
    the user's mistake. The schema stands in the footer, which every reader needs, so checking it costs nothing.

    Args:
        address: the file's name in messages.

    Raises:
        UserError: it is not a Parquet file, is damaged, or is a table of another kind.
        FileNotFoundError: it is not there.
    """
    with filesystem.open_input_file(path) as source:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if sum(groups) != file.metadata.num_rows or min(groups, default=0) < 0:
                raise ValueError(f"{file.metadata.num_rows:,} rows, but its groups have {sum(groups):,}")
            refuse_foreign(file.schema_arrow, schema, address)
            yield file
        except ValueError as error:  # pyarrow's ArrowInvalid is one
            raise _damaged(address, error) from None
        except OSError as error:
            # pyarrow reports damaged pages without an errno, and so it does a network's failures
            if error.errno is not None or not isinstance(filesystem_below(filesystem), fs.LocalFileSystem):
                raise
            raise _damaged(address, error) from None


def refuse_foreign(found: pa.Schema, wanted: pa.Schema | None, address: str) -> None:
    """UserError if a wanted column is not there or has another type."""
    wrong = [line for field in wanted or [] if (line := _difference(found, field))]
    if wrong:
        raise UserError(f"{address}: is not a table of this kind: {'; '.join(wrong)}; {REMEDY}")


def _difference(found: pa.Schema, field: pa.Field) -> str | None:
    at = found.get_field_index(field.name)
    if at < 0:
        return f"column {field.name} ({field.type}) is missing"
    there = found.field(at).type
    if pa.types.is_map(there) and field.type.equals(
        pa.list_(pa.struct([("key", there.key_type), ("value", there.item_type)]))
    ):
        return None  # as an earlier version wrote it; reading casts it
    return None if there.equals(field.type) else f"column {field.name} is {there} instead of {field.type}"


def _damaged(address: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return UserError(f"{address}: is damaged or no Parquet file of ours: {reason}; {REMEDY}")


def filesystem_below(filesystem: fs.FileSystem) -> fs.FileSystem:
    return filesystem.base_fs if isinstance(filesystem, fs.SubTreeFileSystem) else filesystem
