"""Reading what is committed, on a local folder or an object store.

No reader looks at hidden names, nor, but where it is asked to, into hidden folders.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from deltaray.data.storage.filesystem import OBJECT_STORES, connect, patient, together
from deltaray.data.storage.parquet import CONTENT, REMEDY, SOURCE, open_parquet
from deltaray.data.storage.shape import Shape, misfit
from deltaray.errors import UserError, door
from deltaray.text.words import is_unicode


class Reader:
    """A local folder or a place in an object store (`s3://…`, `gs://…`). Cheap to pickle."""

    def __init__(self, out: str) -> None:
        if "\0" in out or not is_unicode(out):  # Arrow would end the process over such a path
            raise UserError(f"out: {out!r}: a study's folder has a name in Unicode, without NUL; name another one")
        with door(f"out: {out}", "is not a folder"):
            self.out = out if "://" in out else str(Path(out).expanduser().absolute())
            base, path = connect(self.out)
            self.local = Path(path) if isinstance(base, fs.LocalFileSystem) else None
            if self.local and self.local.exists() and not self.local.is_dir():
                raise UserError(f"out: {out} is a file; name a folder")
        self.filesystem = fs.SubTreeFileSystem(path, patient(base))
        self.has_folders = base.type_name not in OBJECT_STORES

    def address(self, path: str) -> str:
        """A file's full name, for messages."""
        base, mark, query = self.out.partition("?")
        return f"{base.rstrip('/')}/{path}" + (f"{mark}{query}" if self.local is None else "")

    def place(self, path: str) -> tuple[str, fs.FileSystem | None]:
        """A folder as others want it who write there themselves: its path, and in which file system if not here."""
        if self.local is not None:
            return str(self.local / path), None
        base, folder = connect(self.out)
        return f"{folder.rstrip('/')}/{path}", patient(base)

    def check_access(self) -> None:
        """Asks an object store once whether it can be reached.

        Raises:
            UserError: it cannot, refuses us, or the bucket does not exist (none is ever created).
        """
        if self.has_folders:
            return
        base, path = connect(self.out)  # impatient: a mistyped address is refused at once
        bucket = path.strip("/").partition("/")[0]
        try:
            found, _ = base.get_file_info([bucket, f"{path}/recipe.yaml"])
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be reached: {error}") from None
        if found.type == fs.FileType.NotFound:
            raise UserError(f"out: {self.out}: there is no bucket {bucket}; create it first")

    def __reduce__(self) -> tuple[type["Reader"], tuple[str]]:
        return type(self), (self.out,)

    # --- reading ----------------------------------------------------------------------------------------------
    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type != fs.FileType.NotFound

    def committed(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Committed files of a folder (not its subfolders), sorted; hidden names are work in progress."""
        found = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = [item.path for item in found if item.type == fs.FileType.File and item.path.endswith(suffix)]
        return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))

    def listing(self, folder: str, suffix: str = ".parquet") -> dict[str, fs.FileInfo]:
        """Committed files of a folder and of all below it, by path, with size and mtime; one request per 1,000.

        Hidden names below the folder are left out; the folder itself may be hidden.
        """
        found = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=True))
        start = len(folder.rstrip("/"))
        return {
            item.path: item
            for item in sorted(found, key=lambda item: item.path)
            if item.type == fs.FileType.File and item.path.endswith(suffix) and "/." not in f"/{item.path[start:]}"
        }

    def _refuse_endless(self, path: str) -> None:
        """UserError for what is there and is not a file: reading a pipe or a device may never end."""
        if self.local is None:
            return
        with door(self.address(path)):
            there = self.local / path
            if there.exists() and not there.is_file():
                raise UserError(f"{self.address(path)}: is not a file (a folder, a pipe or a device); {REMEDY}")

    def _open(self, path: str, schema: pa.Schema | None = None) -> Any:
        self._refuse_endless(path)
        return open_parquet(self.filesystem, path, self.address(path), schema)

    def read_table(self, path: str, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
        """One file's rows; with a schema they have all its columns (or those named), and only those.

        Raises:
            UserError: the file is not a Parquet file, is damaged, or does not have the schema's columns and types.
        """
        wanted = schema and pa.schema([schema.field(name) for name in columns or schema.names])
        names = wanted.names if wanted else columns
        with self._open(path, schema) as file:
            table = file.read(columns=names)
            table = table.select(names) if names else table  # it comes in the file's order
            return table.cast(wanted) if wanted else table.replace_schema_metadata(None)

    def read_tables(
        self, folder: str, schema: pa.Schema, columns: list[str] | None = None, prefix: str = ""
    ) -> pa.Table:
        """All rows of a folder's files (whose names start with `prefix`), in file order; empty if there are none.

        Raises:
            UserError: see `read_table`.
        """
        paths = [path for path in self.committed(folder) if path.rpartition("/")[2].startswith(prefix)]
        tables = [self.read_table(path, columns, schema) for path in paths]
        return pa.concat_tables([schema.empty_table().select(columns or schema.names), *tables])

    def footer(self, path: str) -> pq.FileMetaData:
        """One file's footer: rows, and per column how many are null."""
        with self._open(path) as file:
            return file.metadata

    def content(self, path: str) -> str:
        """Tells one file's content from any other's, from its footer; of a file that somebody else wrote, its size and
        time."""
        told = (self.footer(path).metadata or {}).get(CONTENT)
        if told is not None:
            return str(told.decode())
        info = self.filesystem.get_file_info(path)
        return f"{info.size} {info.mtime_ns}"

    def source(self, path: str) -> str | None:
        """What a file says that it was worked out from (`made_from` of `write_table`); None if it says nothing."""
        told = (self.footer(path).metadata or {}).get(SOURCE)
        return None if told is None else str(told.decode())

    def count(self, path: str) -> int:
        """Rows of one file, read from its footer."""
        return int(self.footer(path).num_rows)

    def folders(self, folder: str) -> list[str]:
        """Names of a folder's subfolders, sorted."""
        found = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return sorted(item.base_name for item in found if item.type == fs.FileType.Directory)

    def count_rows(self, folder: str) -> int:
        """Rows committed in a folder, read from the files' footers."""
        return sum(together(self.count, self.committed(folder)))

    def read_bytes(self, path: str) -> bytes:
        """A file's content.

        Raises:
            UserError: it is a folder, a pipe or a device.
            OSError: it is not there, or cannot be read.
        """
        self._refuse_endless(path)
        with self.filesystem.open_input_file(path) as source:
            return bytes(source.read())

    def read_json(self, path: str, shape: Shape = (dict, list)) -> Any:
        """One JSON file's value.

        Args:
            shape: what it must look like (`storage/shape.py`).

        Raises:
            UserError: it is damaged, or was changed by somebody: it is not JSON, or looks otherwise.
            OSError: it is not there, or the store does not answer.
        """
        content = self.read_bytes(path)
        with door(self.address(path), f"is damaged or no file of ours; {REMEDY}"):
            value = json.loads(content)
        if wrong := misfit(value, shape):
            raise UserError(f"{self.address(path)}: is damaged or no file of ours: {wrong}; {REMEDY}")
        return value

    def read_lines(self, path: str, shape: Shape = dict) -> list[Any]:
        """The values of a file with one JSON value per line; otherwise as `read_json`."""
        found = []
        for number, line in enumerate(self.read_bytes(path).split(b"\n"), start=1):
            where = f"{self.address(path)}:{number}"
            with door(where, f"is damaged or no line of ours; {REMEDY}"):
                value = json.loads(line) if line.strip() else None
            if line.strip() and (wrong := misfit(value, shape)):
                raise UserError(f"{where}: is damaged or no line of ours: {wrong}; {REMEDY}")
            found += [value] if line.strip() else []
        return found
