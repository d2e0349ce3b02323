"""Filters on prompts, worked out once for all pairings that share them: which prompt ids they remove.

What says the same is found in one pass over the stored prompts, in their order, so that the first always stays. The
n-grams of benchmark questions are looked up shard by shard on the cluster.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from deltaray.data.prompts.formats import files_of, open_rows, place
from deltaray.data.prompts.rows import prompt_row
from deltaray.data.prompts.turns import RowError
from deltaray.data.storage.shape import ANY
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe.filters import Contaminated, DuplicatePrompt
from deltaray.runtime.stream import map_units

BENCHMARKS = "filters.paths"
AT_ONCE = 2048
SHINGLE = 5
"""Words of the n-grams whose overlap makes two prompts near duplicates."""
PERMUTATIONS, SEED = 128, 42
MOST_TELLING = 0.5
"""An n-gram counts if more than this share of its words are longer than one character: formulas are alike anyway."""
_WORD = re.compile(r"\w+")

PromptFilter = DuplicatePrompt | Contaminated


def dropped_prompts(store: Store, item: PromptFilter) -> dict[str, list[str]]:
    """By shard the ids of the prompts that a filter removes; computed once for the same prompts and benchmarks."""
    record = Store.prompt_filter(item.kind, filter_digest(store, item))
    if store.exists(record):
        return dict(store.read_json(record, {ANY: [str]}))
    found = _duplicates(store, item.near) if isinstance(item, DuplicatePrompt) else _contaminated(store, item)
    store.write_json(record, found)
    return found


def filter_digest(store: Store, item: PromptFilter) -> str:
    """Tells apart what a filter on prompts is made from: its settings, the stored prompts, the benchmarks' content."""
    parts = [item.model_dump_json(exclude={"sources"})]
    parts.append(store.digest([Store.prompts]))
    if isinstance(item, Contaminated):
        parts += [_sha256(path) for path in item.paths]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    for file in files_of(path, BENCHMARKS):
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise UserError(f"{BENCHMARKS}: {file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _texts(store: Store, path: str) -> Iterator[tuple[str, str]]:
    """(id, what is asked) of each prompt of a shard: the turns of the user, joined."""
    table = store.read_table(path, ["prompt_id", "messages"])
    for batch in table.to_batches(AT_ONCE):
        for row in batch.to_pylist():
            asked = (turn["content"] for turn in row["messages"] if turn["role"] == "user")
            yield row["prompt_id"], "\n".join(asked)


# --- duplicates ---------------------------------------------------------------------------------------------------
def _duplicates(store: Store, near: float | None) -> dict[str, list[str]]:
    seen = _Seen(near)
    return {
        path: [key for key, text in _texts(store, path) if seen.has(text)] for path in store.committed(Store.prompts)
    }


class _Seen:
    """The texts so far: 16 bytes each, and with `near` half a kilobyte more."""

    def __init__(self, near: float | None) -> None:
        self.exact: set[bytes] = set()
        self.near = None if near is None else _Near(near)

    def has(self, text: str) -> bool:
        """Whether the text, or one like it, was there before; from now on it was."""
        digest = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
        if digest in self.exact:
            return True
        self.exact.add(digest)
        return self.near is not None and self.near.has(text)


class _Near:
    """Near duplicates by MinHash and locality-sensitive hashing, as the library `rensa` has them."""

    def __init__(self, threshold: float) -> None:
        try:
            import rensa
        except ImportError as error:
            raise UserError(f"duplicate_prompt with `near` needs `pip install deltaray[filters]`: {error}") from None
        self._minhash = partial(rensa.RMinHash, num_perm=PERMUTATIONS, seed=SEED)
        self._seen = rensa.RMinHashDeduplicator(threshold, PERMUTATIONS, True, seed=SEED)
        self._count = 0

    def has(self, text: str) -> bool:
        words = _WORD.findall(text.casefold())
        if not words:  # nothing to compare
            return False
        minhash = self._minhash()
        minhash.update(list(_ngrams(words, min(SHINGLE, len(words)))))
        self._count += 1
        return not self._seen.add(str(self._count), minhash)


def _ngrams(words: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(words[at : at + size]) for at in range(len(words) - size + 1))


# --- contamination ------------------------------------------------------------------------------------------------
def _contaminated(store: Store, item: Contaminated) -> dict[str, list[str]]:
    """The questions go through the store: the nodes of a cluster need not see the benchmark files."""
    questions = list(dict.fromkeys(question for path in item.paths for question in _questions(path)))
    path = Store.prompt_filter("questions", filter_digest(store, item))
    store.write_json(path, questions)
    common = {"questions": path, "ngram": item.ngram, "share": item.share}
    units = [{"shard": shard, **common} for shard in store.committed(Store.prompts)]
    return {it["shard"]: it["dropped"] for it in map_units(units, partial(contaminated_shard, store))}


def _questions(path: str) -> Iterator[str]:
    """What a benchmark file asks, whatever it calls its rows."""
    for number, raw in open_rows(path, BENCHMARKS):
        try:
            row = prompt_row(raw | {"id": None})
        except RowError as error:
            raise UserError(f"{place(path, number)}: {error}") from None
        yield "\n".join(turn["content"] for turn in row["messages"])


def contaminated_shard(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """The ids of a shard's prompts that give a benchmark away."""
    index = _stored_index(store.out, unit["questions"], unit["ngram"])
    found = [key for key, text in _texts(store, unit["shard"]) if is_contaminated(text, index, unit["share"])]
    return {"shard": unit["shard"], "dropped": found}


@lru_cache(maxsize=2)
def _stored_index(out: str, path: str, size: int) -> "Index":
    return index_of(Store(out).read_json(path, [str]), size)


@dataclass(frozen=True)
class Index:
    """The n-grams of benchmark questions."""

    holders: dict[str, list[int]]
    """n-gram -> the questions that hold it."""
    totals: list[int]
    """n-grams of each question."""
    size: int


def index_of(questions: Iterable[str], size: int) -> Index:
    """Pure."""
    index = Index({}, [], size)
    for number, question in enumerate(questions):
        grams = _grams(question, size)
        index.totals.append(len(grams))
        for gram in grams:
            index.holders.setdefault(gram, []).append(number)
    return index


def _grams(text: str, size: int) -> set[str]:
    """The telling n-grams of a text; one that is shorter than an n-gram is found only where it is all there is."""
    words = _WORD.findall(text.casefold())
    grams = _ngrams(words, size) if len(words) >= size else iter([" ".join(["=", *words])])
    return set(filter(_is_telling, grams))


def _is_telling(gram: str) -> bool:
    words = gram.split(" ")
    return sum(len(word) > 1 for word in words) > MOST_TELLING * len(words)


def is_contaminated(text: str, index: Index, share: float) -> bool:
    """Whether a prompt holds the share of some question's n-grams. Pure."""
    held = Counter(number for gram in _grams(text, index.size) for number in index.holders.get(gram, ()))
    return any(count >= share * index.totals[number] for number, count in held.items())
