"""A run's pairs as arrays: the stored token ids flat (four bytes a token), their places, and the reference log-probs.

Every worker holds them all and works out the same global batches by itself, so no row is lost to an uneven split.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from deltaray.data.contracts import PAIRS, REFERENCES
from deltaray.data.store import Store, keys_of
from deltaray.errors import StageError
from deltaray.recipe.models import Student
from deltaray.recipe.study import TrainingRun
from deltaray.train.losses import LOSSES
from deltaray.train.packing import Ids, Item

SIDES = ("chosen", "rejected")
KEY = ("prompt_id", "chosen_model", "chosen_sample", "rejected_model", "rejected_sample")
COLUMNS = [
    "prompt_id",
    *(f"{side}_{what}" for side in SIDES for what in ("model", "sample")),
    *(f"{part}_token_ids" for part in ("prompt", *SIDES)),
]


@dataclass(frozen=True)
class Ragged:
    """Lists of token ids of different lengths in one array."""

    values: Ids
    ends: NDArray[np.int64]

    @staticmethod
    def of(column: pa.ChunkedArray) -> "Ragged":
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        lengths = pc.list_value_length(column).to_numpy()
        return Ragged(np.concatenate([np.zeros(0, np.int32), *values]), np.cumsum(lengths, dtype=np.int64))

    def __getitem__(self, row: int) -> Ids:
        return self.values[self.ends[row - 1] if row else 0 : self.ends[row]]

    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True)
class Examples:
    """Pairs in the student's tokens, cut to `max_length`; `rows` says which of the arrays' rows, in which order."""

    prompts: Ragged
    responses: tuple[Ragged, Ragged]  # chosen, rejected; before any cut
    references: NDArray[np.float64]  # [2, rows of the arrays]: sums over response tokens in nats
    rows: NDArray[np.int64]
    max_length: int
    end_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, places: NDArray[np.int64]) -> "Examples":
        """Some of the pairs; the arrays are shared."""
        return replace(self, rows=self.rows[places])

    def item(self, place: int, both: bool = True) -> Item:
        """(prompt ids, [chosen ids, rejected ids]), or the chosen ids alone."""
        row = self.rows[place]
        return self.room_for(self.prompts[row], [side[row] for side in self.responses[: 2 if both else 1]])

    def room_for(self, prompt: Ids, responses: list[Ids]) -> Item:
        """A prompt with responses that may be those of another one, cut to what fits."""
        return prompt, [cut(response, self.max_length - len(prompt), self.end_id) for response in responses]

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int64]:
        return self.prompts.lengths()[self.rows]

    @cached_property
    def response_lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Response tokens of every pair, after the cut: chosen, rejected."""
        room = self.max_length - self.prompt_lengths
        chosen, rejected = (np.minimum(side.lengths()[self.rows], room) for side in self.responses)
        return chosen, rejected

    def costs(self, places: Sequence[int], both: bool) -> list[int]:
        """Tokens of pairs that go through the model: the prompt once, and its responses."""
        chosen, rejected = self.response_lengths
        costs = self.prompt_lengths + chosen + (rejected if both else 0)
        return [int(cost) for cost in costs[list(places)]]

    def reference(self, side: int, places: Sequence[int]) -> NDArray[np.float64]:
        """Reference log-probs of some pairs' responses; side 0: chosen, 1: rejected."""
        return self.references[side][self.rows[list(places)]]


def cut(response: Ids, room: int, end_id: int) -> Ids:
    """The response cut to what fits, its last token forced to the end token (the delta-learning code's rule)."""
    return response if len(response) <= room else np.append(response[: room - 1], np.int32(end_id))


# --- reading ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Data:
    """What a run trains on and is watched on, and what became of the pairs."""

    train: Examples
    heldout: Examples
    counts: dict[str, int]

    @cached_property
    def fingerprint(self) -> int:
        """Differs for other pairs, another order of them, or another cut."""
        found = 0
        for part in (self.train, self.heldout):
            values = [part.prompts.values, *(side.values for side in part.responses)]
            arrays: list[NDArray[Any]] = [*values, part.rows, *part.response_lengths]
            for array in arrays:
                found = zlib.crc32(array.tobytes(), found)
        return found


def read_data(store: Store, run: TrainingRun, student: Student, end_id: int, heldout_share: float) -> Data:
    """Reads a run's pairs in the order of their keys, with their references where its loss needs them.

    Args:
        heldout_share: of the prompts; the same ones for every run and pairing.

    Raises:
        StageError: a pair lacks its reference log-probabilities, or they were computed over other tokens.
    """
    table = read_pairs(store, run.pairings, COLUMNS)
    everything = _arrays(table, student.max_length, end_id)
    fits, counts = _fitting(everything, student)
    ordered = [row for row in _order(table) if fits[row]]
    held = _held_out(table["prompt_id"], heldout_share)
    train = np.array([row for row in ordered if not held[row]], dtype=np.int64)
    heldout = np.array([row for row in ordered if held[row]], dtype=np.int64)
    if run.settings.pairs is not None:  # a larger number holds all pairs of a smaller one
        drawn = np.random.default_rng(run.settings.seed).permutation(len(train))[: run.settings.pairs]
        train = train[np.sort(drawn)]
    if LOSSES[run.settings.loss].needs_reference:
        needed = np.concatenate([train, heldout])
        everything = replace(everything, references=_references(store, run.student, table, everything, needed))
    counts |= {"trained": len(train), "held_out": len(heldout)}
    return Data(replace(everything, rows=train), replace(everything, rows=heldout), counts)


def _arrays(table: pa.Table, max_length: int, end_id: int) -> Examples:
    prompts, chosen, rejected = (Ragged.of(table[f"{part}_token_ids"]) for part in ("prompt", *SIDES))
    rows = np.arange(len(table))
    return Examples(prompts, (chosen, rejected), np.zeros((2, len(table))), rows, max_length, end_id)


def _fitting(examples: Examples, student: Student) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which rows can be trained on, and how many were dropped or will be cut."""
    room = student.max_length - examples.prompts.lengths()
    longest = np.maximum(*(side.lengths() for side in examples.responses))
    fits = (room > 2) & (examples.prompts.lengths() > 0)
    long = fits & (longest > room)
    counts = {"pairs": len(examples), "prompt_too_long": int((~fits).sum()), "cut": 0, "response_too_long": 0}
    if student.overlong == "drop":
        return fits & ~long, counts | {"response_too_long": int(long.sum())}
    return fits, counts | {"cut": int(long.sum())}


def read_pairs(store: Store, pairings: Sequence[str], columns: Sequence[str]) -> pa.Table:
    """The rows of all pairings, a pair that several of them hold once, always in the same order."""
    wanted = list(dict.fromkeys([*KEY, *columns]))
    table = pa.concat_tables([store.read_tables(Store.pairs(pairing), PAIRS, wanted) for pairing in pairings])
    if len(pairings) == 1:  # within one every pair is there once
        return table
    numbered = table.append_column("row", pa.array(np.arange(len(table))))
    first = numbered.group_by(list(KEY)).aggregate([("row", "min")])["row_min"]
    return table.take(np.sort(first.to_numpy()))


def _order(table: pa.Table) -> list[int]:
    return list(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in KEY]).to_pylist())


def _held_out(ids: pa.ChunkedArray, share: float) -> NDArray[np.bool_]:
    if not share:
        return np.zeros(len(ids), dtype=np.bool_)
    return np.array([zlib.crc32(key.encode()) < share * 2**32 for key in ids.to_pylist()])


# --- references -------------------------------------------------------------------------------------------------
def _references(
    store: Store, student: str, table: pa.Table, examples: Examples, needed: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[2, rows]: reference log-probs of the needed rows, zero elsewhere."""
    found = np.zeros((2, len(table)))
    whole = replace(examples, rows=np.arange(len(table)))
    for side, name in enumerate(SIDES):
        models = np.array(table[f"{name}_model"].to_pylist(), dtype=object)
        lengths = whole.response_lengths[side]
        responses = pa.table({"prompt_id": table["prompt_id"], "sample": table[f"{name}_sample"]})
        for teacher in sorted(set(models[needed])):
            rows = needed[models[needed] == teacher]
            keys = keys_of(responses.take(rows))
            found[side][rows] = _of_teacher(store, student, teacher, keys, lengths[rows])
    return found


def _of_teacher(
    store: Store, student: str, teacher: str, keys: pa.ChunkedArray, lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    folder = Store.references(student, teacher)
    table = store.read_tables(folder, REFERENCES)
    places = pc.index_in(keys, value_set=keys_of(table).combine_chunks())
    if places.null_count:
        raise StageError(_mismatch(keys[pc.index(pc.is_null(places), True).as_py()].as_py(), "is missing", folder))
    logp, tokens = (table[name].take(places).to_numpy() for name in ("logp", "tokens"))
    other = np.flatnonzero(tokens != lengths)
    if len(other):
        at = int(other[0])
        what = f"covers {tokens[at]} tokens, training would see {lengths[at]}"
        raise StageError(_mismatch(keys[at].as_py(), what, folder))
    return np.asarray(logp)


def _mismatch(key: str, what: str, folder: str) -> str:
    prompt, _, sample = key.rpartition("#")
    return f"the reference of prompt {prompt} sample {sample} {what}; remove {folder} and run again"


def check_vocabulary(data: Data, vocabulary: int, student: str) -> None:
    """StageError if the pairs hold ids that the student's embedding does not have."""
    arrays: list[Any] = [data.train.prompts.values, *(side.values for side in data.train.responses)]
    most = max((int(values.max()) for values in arrays if len(values)), default=0)
    if most >= vocabulary:
        raise StageError(
            f"{student}: its tokenizer writes token {most} but the model knows only {vocabulary}: "
            "tokenizer and weights do not belong together"
        )
