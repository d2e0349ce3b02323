"""The store under `out`: where every artifact lives, atomic commits, and which definition each artifact belongs to.

A file appears under its final name only when it is complete: written under a hidden temporary name, then renamed (on
an object store a put is atomic by itself). Names are deterministic, so a retried unit of work overwrites itself
instead of adding a second copy.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from deltaray.errors import UserError

COMPLETE = ".complete"
"""Written last into a committed folder."""


class Store:
    """One study's outputs on a local folder or an object store (`s3://…`, `gs://…`). Cheap to pickle."""

    def __init__(self, out: str) -> None:
        self.out = out if "://" in out else str(Path(out).expanduser().absolute())
        try:
            base, path = fs.FileSystem.from_uri(self.out) if "://" in self.out else (fs.LocalFileSystem(), self.out)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"out: {out} is no folder and no address of an object store: {error}") from None
        self.local = Path(path) if isinstance(base, fs.LocalFileSystem) else None
        if self.local and self.local.exists() and not self.local.is_dir():
            raise UserError(f"out: {out} is a file; name a folder")
        self.filesystem = fs.SubTreeFileSystem(path, base)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.out,)

    # --- where things are -------------------------------------------------------------------------------------
    prompts = "prompts"

    @staticmethod
    def responses(teacher: str) -> str:
        return f"responses/teacher={teacher}"

    @staticmethod
    def scores(scorer: str, teacher: str) -> str:
        return f"scores/scorer={scorer}/teacher={teacher}"

    @staticmethod
    def references(student: str, teacher: str) -> str:
        return f"references/student={student}/teacher={teacher}"

    @staticmethod
    def pairs(pairing: str) -> str:
        return f"pairs/pairing={pairing}"

    @staticmethod
    def student(name: str) -> str:
        return f"students/{name}"

    @staticmethod
    def training(name: str) -> str:
        return f"training/{name}"

    @staticmethod
    def evaluation(name: str) -> str:
        return f"evaluation/{name}.json"

    @staticmethod
    def evaluation_prompts(task: str) -> str:
        return f"evaluation/prompts/task={task}"

    @staticmethod
    def evaluation_responses(model: str, task: str) -> str:
        return f"evaluation/responses/model={model}/task={task}"

    # --- reading ----------------------------------------------------------------------------------------------
    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(path).type != fs.FileType.NotFound

    def committed(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Committed files of a folder (not its subfolders), sorted; hidden names are work in progress."""
        found = self.filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = [item.path for item in found if item.type == fs.FileType.File and item.path.endswith(suffix)]
        return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        with self.filesystem.open_input_file(path) as source:
            return pq.read_table(source, columns=columns)

    def read_tables(
        self, folder: str, schema: pa.Schema, columns: list[str] | None = None, prefix: str = ""
    ) -> pa.Table:
        """All rows of a folder's files (whose names start with `prefix`), in file order; empty if there are none."""
        paths = [path for path in self.committed(folder) if path.rpartition("/")[2].startswith(prefix)]
        if columns:
            schema = pa.schema([schema.field(name) for name in columns])
        return pa.concat_tables([schema.empty_table(), *(self.read_table(path, columns) for path in paths)])

    def count_rows(self, folder: str) -> int:
        """Rows committed in a folder, read from the files' footers."""
        rows = 0
        for path in self.committed(folder):
            with self.filesystem.open_input_file(path) as source:
                rows += pq.ParquetFile(source).metadata.num_rows
        return rows

    def read_json(self, path: str) -> Any:
        with self.filesystem.open_input_file(path) as source:
            return json.loads(source.read())

    # --- committing -------------------------------------------------------------------------------------------
    def write_table(self, path: str, table: pa.Table, schema: pa.Schema) -> None:
        """Commits one Parquet file with exactly this schema."""
        table = table.select(schema.names).cast(schema)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(path, sink.getvalue())

    def write_json(self, path: str, value: Any) -> None:
        self.write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def write_bytes(self, path: str, content: bytes | pa.Buffer) -> None:
        folder, _, name = path.rpartition("/")
        if self.local is None:
            if folder:
                self.filesystem.create_dir(folder, recursive=True)
            with self.filesystem.open_output_stream(path) as sink:
                sink.write(content)
            return
        (self.local / folder).mkdir(parents=True, exist_ok=True)
        hidden = self.local / folder / f".{name}.{uuid.uuid4().hex}"
        with hidden.open("wb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        hidden.replace(self.local / path)

    def append_line(self, path: str, value: Any) -> None:
        """Adds one JSON line to a small log; on an object store the file is put anew."""
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        if self.local is not None:
            (self.local / path).parent.mkdir(parents=True, exist_ok=True)
            with (self.local / path).open("ab") as sink:
                sink.write(line)
            return
        before = self.filesystem.open_input_file(path).read() if self.exists(path) else b""
        self.write_bytes(path, before + line)

    def has_student(self, name: str) -> bool:
        """Whether a trained student is there, complete."""
        return self.exists(f"{Store.student(name)}/{COMPLETE}")

    def put_folder(self, local: Path, path: str) -> None:
        """Commits a whole folder (a Hugging Face model); nothing of it is visible before it is complete."""
        if self.local is None:
            fs.copy_files(str(local), path, fs.LocalFileSystem(), self.filesystem)
            # an object store cannot rename a folder; the mark also tells this version from others in local caches
            self.write_bytes(f"{path}/{COMPLETE}", uuid.uuid4().hex.encode())
            return
        target = self.local / path
        hidden = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        shutil.copytree(local, hidden)
        (hidden / COMPLETE).touch()
        if target.exists():
            shutil.rmtree(target)
        hidden.replace(target)

    def local_folder(self, path: str) -> str:
        """A committed folder as a local path (fetched once from an object store), for libraries that need one."""
        if self.local is not None:
            return str(self.local / path)
        with self.filesystem.open_input_file(f"{path}/{COMPLETE}") as mark:
            version = mark.read().decode()
        cache = Path.home() / ".cache" / "deltaray" / version
        if not cache.exists():
            part = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")
            part.mkdir(parents=True)
            fs.copy_files(path, str(part), self.filesystem, fs.LocalFileSystem())
            part.replace(cache)
        return str(cache)

    # --- definitions ------------------------------------------------------------------------------------------
    def claim(self, definitions: dict[str, dict[str, Any]], write: bool = True) -> None:
        """Binds artifacts to the definitions that they are made from, so that two never mix under one name.

        Raises:
            UserError: an artifact here was made from another definition; nothing is written then.
        """
        changed = [line for name, value in definitions.items() for line in self._changes(name, value)]
        if changed:
            raise UserError(
                f"{self.out} belongs to another recipe:\n" + "\n".join(f"  {line}" for line in changed)
                + "\nuse another `out` (--set out=FOLDER), another name for what changed, or undo the change"
            )  # fmt: skip
        for name, value in definitions.items() if write else []:
            if not self.exists(_definition(name)):
                self.write_json(_definition(name), value)

    def _changes(self, name: str, value: dict[str, Any]) -> Iterable[str]:
        if not self.exists(_definition(name)):
            return []
        before, after = self.read_json(_definition(name)), json.loads(json.dumps(value))
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        return [f"{name}: {key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in keys]


def _definition(name: str) -> str:
    return f".deltaray/definitions/{name.replace('/', '.')}.json"


def keys_of(table: pa.Table) -> pa.ChunkedArray:
    """The key of each row, `<prompt_id>#<sample>`, for joins and for finding what is missing."""
    return pc.binary_join_element_wise(table["prompt_id"], pc.cast(table["sample"], pa.string()), "#")
