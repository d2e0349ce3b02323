"""Files on a local folder or an object store, each of which becomes visible complete.

A file is written under a hidden temporary name, then renamed; on an object store a put is atomic by itself.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from deltaray.data.paths import Paths
from deltaray.data.storage.filesystem import copy_tree, put, remove, sweep, temporary, together, unless_full
from deltaray.data.storage.lock import hold
from deltaray.data.storage.parquet import parquet_writer
from deltaray.data.storage.reader import Reader

COMPLETE = ".complete"
"""Written last into a committed folder."""


class Files(Reader):
    """What a `Reader` reads, and how it is written."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other deltaray processes out of a local `out`; freed by the kernel however this process ends.

        An object store has no lock: two commands at once there do work twice, and the second result replaces the
        first.

        Raises:
            UserError: another process works here (the message names it), or the folder cannot be written.
        """
        if self.local is None:
            yield
        else:
            with hold(self.local / Paths.lock_file, self.out):
                yield

    # --- committing -------------------------------------------------------------------------------------------
    def write_table(
        self,
        path: str,
        table: pa.Table,
        schema: pa.Schema,
        row_group_size: int | None = None,
        made_from: str | None = None,
    ) -> None:
        """Commits one Parquet file with exactly this schema.

        Args:
            row_group_size: rows that a reader who goes through the file piece by piece holds at a time.
            made_from: a digest of what it was worked out from, for `Reader.source`.

        Raises:
            StageError: the disk is full.
        """
        table = table.select(schema.names).cast(schema)
        sink = pa.BufferOutputStream()
        with parquet_writer(sink, schema, made_from) as writer:
            writer.write_table(table, row_group_size=row_group_size)
        self.write_bytes(path, sink.getvalue())

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def write_bytes(self, path: str, content: bytes | pa.Buffer) -> None:
        """Commits one file.

        Raises:
            StageError: the disk is full.
        """
        if self.local is None:
            folder = path.rpartition("/")[0]
            if folder and self.has_folders:
                self.filesystem.create_dir(folder, recursive=True)
            return put(self.filesystem, path, content)
        target = self.local / path
        hidden = temporary(target)
        try:
            with unless_full(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with hidden.open("wb") as sink:
                    sink.write(content)
                    sink.flush()
                    os.fsync(sink.fileno())
                hidden.replace(target)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes files; one that is not there is deleted already.

        In place of the last one of a folder pyarrow leaves an empty object `folder/` on S3; no reader sees it.
        """
        together(self._delete, paths)

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(path)

    def delete_folder(self, path: str) -> None:
        """Deletes a folder with all that is in it, hidden files, too; one that is not there is deleted already."""
        if self.local is not None:
            return remove(self.local / path)
        with suppress(FileNotFoundError):
            self.filesystem.delete_dir(path)

    def move(self, source: str, target: str) -> None:
        """Renames one file, over one that is there (on an object store: copies it whole, then deletes it)."""
        if self.local is not None:
            (self.local / target).parent.mkdir(parents=True, exist_ok=True)
            (self.local / source).replace(self.local / target)
            return
        if self.has_folders:
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        self.filesystem.copy_file(source, target)
        self._delete(source)

    def sweep(self, folder: str = "") -> int:
        """Removes the hidden files that killed processes left below a local folder; returns how many.

        Only the holder of the lock may, once none of its workers write. An object store has none: what was not put
        whole never appears there.
        """
        return sweep(self.local / folder) if self.local is not None else 0

    def append_line(self, path: str, value: Any) -> None:
        """Adds one JSON line to a small log, which is written again whole: it never ends in half a line."""
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        self.write_bytes(path, (self.read_bytes(path) if self.exists(path) else b"") + line)

    def put_folder(self, local: Path, path: str) -> None:
        """Commits a whole folder (a Hugging Face model); nothing of it counts before it is complete.

        Raises:
            StageError: the disk is full.
        """
        if self.local is None:
            return self._put_objects(local, path)
        target = self.local / path
        hidden = temporary(target)
        try:
            copy_tree(local, hidden)
            (hidden / COMPLETE).touch()
            remove(target)
            hidden.replace(target)
        except BaseException:
            remove(hidden)
            raise

    def _put_objects(self, local: Path, path: str) -> None:
        """An object store cannot rename a folder: the mark goes first and comes last."""
        mark = f"{path}/{COMPLETE}"
        before = self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
        self.delete([mark])
        new = {f"{path}/{file.relative_to(local).as_posix()}": file for file in local.rglob("*") if file.is_file()}
        for target, file in new.items():
            if self.has_folders:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            fs.copy_files(str(file), target, fs.LocalFileSystem(), self.filesystem)
        self.delete(item.path for item in before if item.type == fs.FileType.File and item.path not in new)
        self.write_bytes(mark, uuid.uuid4().hex.encode())  # a new version, also for the caches of readers

    def local_folder(self, path: str) -> str:
        """A committed folder as a local path (fetched once from an object store), for libraries that need one."""
        if self.local is not None:
            return str(self.local / path)
        version = self.read_bytes(f"{path}/{COMPLETE}").decode()
        cache = Path.home() / ".cache" / "deltaray" / version
        if not cache.exists():
            part = temporary(cache)
            part.mkdir(parents=True)
            fs.copy_files(path, str(part), self.filesystem, fs.LocalFileSystem())
            try:
                part.replace(cache)
            except OSError:
                remove(part)
                if not cache.exists():  # another process was not faster
                    raise
        return str(cache)
