"""From pairs to tensors: reading, the order of an epoch, cutting a batch over workers, padding. Pure but for reading.

Every worker holds all examples and works out the same global batches by itself, so no row is lost to an uneven split
and what a batch's loss is divided by is known without communication.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaray.chat import conversation_ids, truncate
from deltaray.contracts import PAIRS, REFERENCES
from deltaray.errors import StageError
from deltaray.recipe.study import TrainingRun
from deltaray.store import Store
from deltaray.train.losses import LOSSES, Loss

Key = tuple[str, int]
"""(prompt_id, sample): a response of a given teacher."""


@dataclass(frozen=True)
class Example:
    """One pair in the student's tokens; references are sums over response tokens in nats."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference_chosen: float = 0.0
    reference_rejected: float = 0.0

    def length(self, both: bool) -> int:
        """Tokens of the longer sequence, which decides how far a batch is padded."""
        response = max(len(self.chosen), len(self.rejected)) if both else len(self.chosen)
        return len(self.prompt) + response

    def tokens(self, both: bool) -> int:
        """Tokens that go through the model."""
        return len(self.prompt) + len(self.chosen) + (len(self.prompt) + len(self.rejected) if both else 0)


# --- reading ----------------------------------------------------------------------------------------------------
def read_examples(store: Store, tokenizer: Any, run: TrainingRun, max_length: int) -> tuple[list[Example], int]:
    """(examples in the order of their keys, pairs dropped because their prompt leaves no room).

    Raises:
        StageError: a pair lacks its reference log-probabilities, or they were computed over other tokens.
    """
    pairs = store.read_tables(Store.pairs(run.pairing), PAIRS).to_pylist()
    pairs.sort(key=lambda pair: (pair["prompt_id"], pair["chosen_sample"], pair["rejected_sample"]))
    references = _References(store, run) if LOSSES[run.settings.loss].needs_reference else None
    examples = [_example(pair, tokenizer, max_length, references) for pair in pairs]
    kept = [example for example in examples if example is not None]
    return kept, len(examples) - len(kept)


def response_ids(
    tokenizer: Any, prompt: Sequence[dict[str, str]], text: str, max_length: int
) -> tuple[list[int], list[int]] | None:
    """(prompt ids, response ids cut to what fits); None if the prompt leaves no room."""
    ids, (response,) = conversation_ids(tokenizer, prompt, [text])
    cut = truncate(ids, response, max_length, tokenizer.eos_token_id)
    return None if cut is None else (ids, cut)


def _example(pair: dict[str, Any], tokenizer: Any, max_length: int, references: "_References | None") -> Example | None:
    chosen = response_ids(tokenizer, pair["prompt"], pair["chosen"][0]["content"], max_length)
    rejected = response_ids(tokenizer, pair["prompt"], pair["rejected"][0]["content"], max_length)
    if chosen is None or rejected is None:
        return None
    if references is None:
        return Example(chosen[0], chosen[1], rejected[1])
    key = pair["prompt_id"]
    return Example(
        chosen[0],
        chosen[1],
        rejected[1],
        references.logp(pair["chosen_model"], (key, pair["chosen_sample"]), len(chosen[1])),
        references.logp(pair["rejected_model"], (key, pair["rejected_sample"]), len(rejected[1])),
    )


class _References:
    """The reference log-probabilities that a run's pairs need, read teacher by teacher when first asked for."""

    def __init__(self, store: Store, run: TrainingRun) -> None:
        self.store = store
        self.student = run.student
        self.rows: dict[str, dict[Key, tuple[float, int]]] = {}

    def logp(self, teacher: str, key: Key, tokens: int) -> float:
        if teacher not in self.rows:
            table = self.store.read_tables(Store.references(self.student, teacher), REFERENCES)
            columns = [table[name].to_pylist() for name in REFERENCES.names]
            self.rows[teacher] = {(i, s): (logp, n) for i, s, logp, n in zip(*columns, strict=True)}
        found = self.rows[teacher].get(key)
        if found is None or found[1] != tokens:
            what = "is missing" if found is None else f"covers {found[1]} tokens, training would see {tokens}"
            where = Store.references(self.student, teacher)
            raise StageError(f"the reference of prompt {key[0]} sample {key[1]} {what}; remove {where} and run again")
        return found[0]


# --- order and slices -------------------------------------------------------------------------------------------
def batch_at(pairs: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of one optimizer step; an epoch's last batch may be smaller. No worker count in it."""
    per_epoch = math.ceil(pairs / batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(pairs)
    return [int(index) for index in order[position * batch_size : (position + 1) * batch_size]]


def micro_batches(pairs: int, workers: int, micro_batch_size: int) -> tuple[int, int]:
    """(rows per worker and forward pass, forward passes) that cover a batch with the least padding rows."""
    passes = math.ceil(pairs / (workers * micro_batch_size))
    return math.ceil(pairs / (workers * passes)), passes


def slice_batch(
    indices: Sequence[int], lengths: Sequence[int], workers: int, micro_batch_size: int
) -> list[list[list[tuple[int, float]]]]:
    """slices[forward pass][worker] = [(index, weight)]: every index once with weight 1, filled up with weight 0.

    All workers get the same number of forward passes and of rows, as collective calls demand. Rows of similar length
    are put together (across workers, too: they wait for each other); the longest come first, so that a lack of
    memory shows at once. `lengths` belongs to `indices`. A filler is the batch's shortest row.
    """
    rows, passes = micro_batches(len(indices), workers, micro_batch_size)
    ranked = sorted(zip(lengths, indices, strict=True), key=lambda item: (-item[0], item[1]))
    slots = [(index, 1.0) for _, index in ranked]
    slots += [(ranked[-1][1], 0.0)] * (rows * passes * workers - len(slots))
    cut = [slots[start : start + rows] for start in range(0, len(slots), rows)]
    return [cut[start : start + workers] for start in range(0, len(cut), workers)]


def denominator(loss: Loss, examples: Sequence[Example]) -> int:
    """What the summed losses of a global batch are divided by."""
    return len(examples) if loss.per == "pair" else sum(len(example.chosen) for example in examples)


# --- tensors ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Batch:
    """R = 2B rows (all chosen above all rejected) or, for losses on the chosen side alone, R = B rows."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, response_mask: [R, T], padded on the right
    reference: Tensor  # float32 [R], nats
    weights: Tensor  # float32 [B]: 1, or 0 for a row that only fills up

    def to(self, device: torch.device | str) -> "Batch":
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.reference.to(device), self.weights.to(device))


def collate(examples: Sequence[Example], weights: Sequence[float], pad_id: int, both: bool) -> Batch:
    """Pads B examples into one batch; `both`: rejected responses, too."""
    sequences = [(example.prompt, example.chosen) for example in examples]
    references = [example.reference_chosen for example in examples]
    if both:
        sequences += [(example.prompt, example.rejected) for example in examples]
        references += [example.reference_rejected for example in examples]
    return Batch(pad(sequences, pad_id), torch.tensor(references), torch.tensor(list(weights)))


def pad(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """The three inputs of `ResponseLogProbs`, each [R, T], from (prompt ids, response ids)."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    attention_mask, response_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        response_mask[row, len(prompt) : end] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


def pad_id_of(tokenizer: Any) -> int:
    """Padding is masked everywhere, so any id will do where a tokenizer names none."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
