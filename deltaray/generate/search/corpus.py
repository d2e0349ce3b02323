"""A corpus of passages and its BM25 index (bm25s), on disk beside each other and memory-mapped.

An index serves every study that searches the same corpus, so it lies in the user's cache and not in a study's folder.
"""

import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pyarrow as pa

from deltaray.data.prompts.formats import files_of, is_hub_dataset, open_rows, place
from deltaray.data.prompts.view import View
from deltaray.data.storage.filesystem import remove, temporary
from deltaray.errors import UserError
from deltaray.generate.fingerprint import add_sampled
from deltaray.recipe.search import Corpus

KEY = "evaluation.search.corpus"
TEXTS = "passages.arrow"
BATCH = 10_000
"""Passages that are written at once."""
WORDS = "en"
"""Whose stop words do not count."""


class Passages:
    """What is searched."""

    def __init__(self, folder: Path) -> None:
        """Maps an index of `passages_of` into memory."""
        import bm25s

        self._index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False, verbosity=0)
        self._texts = pa.ipc.open_file(pa.memory_map(str(folder / TEXTS))).read_all()["text"]

    def find(self, queries: list[str], count: int) -> list[list[str]]:
        """The best passages of each query, best first; none that shares no word with it."""
        import bm25s

        words = bm25s.tokenize(queries, stopwords=WORDS, show_progress=False, return_ids=False)
        most = min(count, len(self._texts))
        places, scores = self._index.retrieve(words, k=most, show_progress=False)
        return [
            [self._texts[int(row)].as_py() for row, score in zip(of_query, its, strict=True) if score > 0]
            for of_query, its in zip(places, scores, strict=True)
        ]


def passages_of(corpus: Corpus) -> Passages:
    """The corpus with its index, which is made now if this version of it has none yet.

    Raises:
        UserError: a row has no text, or the file cannot be read.
    """
    folder = _cache() / corpus_digest(corpus)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = temporary(folder)
        try:
            _make(corpus, making)
            if not folder.is_dir():  # by another process meanwhile
                making.rename(folder)
        finally:
            remove(making)
    return Passages(folder)


def _make(corpus: Corpus, folder: Path) -> None:
    import bm25s

    folder.mkdir()
    schema, rows = pa.schema([("text", pa.large_string())]), _texts(corpus)
    with pa.ipc.new_file(str(folder / TEXTS), schema) as sink:
        while batch := list(islice(rows, BATCH)):
            sink.write_batch(pa.record_batch({"text": batch}, schema=schema))
    texts = pa.ipc.open_file(pa.memory_map(str(folder / TEXTS))).read_all()["text"].to_pylist()
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords=WORDS, show_progress=False), show_progress=False)
    index.save(str(folder), show_progress=False)


def _texts(corpus: Corpus) -> Iterator[str]:
    """Title and text of every passage."""
    wanted = (corpus.text,) if corpus.title is None else (corpus.title, corpus.text)
    number = 0
    for number, row in open_rows(corpus.path, f"{KEY}.path", wanted, View(corpus.config, corpus.split)):
        text, title = row.get(corpus.text), row.get(corpus.title) if corpus.title else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{place(corpus.path, number)}: {KEY}: no passage in {corpus.text!r}; name its column as {KEY}.text"
            )
        text = f"{title}\n{text}" if title else text
        yield text.encode(errors="replace").decode()  # lone surrogates stand for bytes that are not text
    if not number:
        raise UserError(f"{KEY}.path: {corpus.path} holds no passage")


def check_corpus(corpus: Corpus) -> None:
    """It is there, its first row has a passage, and bm25s is installed; what is on a hub is looked at when it runs.

    Raises:
        UserError: names the key and the fix.
    """
    if find_spec("bm25s") is None:
        raise UserError(f"{KEY}: needs bm25s: `pip install deltaray[search]`")
    if not is_hub_dataset(corpus.path):
        next(_texts(corpus))


def corpus_digest(corpus: Corpus) -> str:
    """Tells two corpora apart by their size, beginning and end, wherever they lie."""
    digest = hashlib.sha256(f"{corpus.text} {corpus.title} {version('bm25s')}".encode())
    for file in files_of(corpus.path, f"{KEY}.path", View(corpus.config, corpus.split)):
        digest.update(f" {file.suffix} ".encode())
        add_sampled(digest, file)
    return digest.hexdigest()[:16]


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "deltaray" / "search"
