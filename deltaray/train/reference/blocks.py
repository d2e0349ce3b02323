"""What one unit of the reference pass is: some rows of a file of responses, committed as one file of references."""

from dataclasses import dataclass

from deltaray.data.storage.filesystem import together
from deltaray.data.store import Store
from deltaray.pair.token_ids import token_files

BLOCK = 4096
"""Responses per block: what a crash costs at most, per worker."""


@dataclass(frozen=True)
class Block:
    teacher: str
    responses: str  # path of the file
    tokens: str  # path of its file of tokens
    start: int
    rows: int

    @property
    def source(self) -> str:
        """What its references are worked out from: the name holds a digest of the responses."""
        return self.tokens.rpartition("/")[2]

    def path(self, student: str) -> str:
        """Where its references are committed: `<file of responses>-<first row>.parquet`."""
        name = self.responses.rpartition("/")[2].removesuffix(".parquet")
        return f"{Store.references(student, self.teacher)}/{name}-{self.start:08d}.parquet"


def blocks_of(store: Store, student: str, teacher: str) -> list[Block]:
    """All blocks of a teacher's committed responses."""
    return [
        Block(teacher, path, tokens, start, min(BLOCK, count - start))
        for path, tokens in token_files(store, student, teacher).items()
        for count in (store.count(path),)
        for start in range(0, count, BLOCK)
    ]


def missing_blocks(store: Store, student: str, teacher: str) -> list[Block]:
    """Those that this student has not judged yet, on these very tokens."""
    paths = store.committed(Store.references(student, teacher))
    done = dict(zip(paths, together(store.source, paths), strict=True))
    return [block for block in blocks_of(store, student, teacher) if done.get(block.path(student)) != block.source]
