"""The worker of the reference stage: files of responses in, files of log-probabilities out."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from deltaray.chat import load_tokenizer
from deltaray.contracts import REFERENCES
from deltaray.prompts.shards import shard_name
from deltaray.recipe.models import Student
from deltaray.recipe.training import Training
from deltaray.store import Store
from deltaray.train.batches import pad, pad_id_of, response_ids
from deltaray.train.student import load_module

Row = dict[str, Any]


class ReferenceWorker:
    """An actor with the untouched student loaded."""

    def __init__(self, store: Store, name: str, student: Student, training: Training) -> None:
        self.store, self.name, self.max_length = store, name, student.max_length
        self.batch_size = training.reference_batch_size
        self.tokenizer = load_tokenizer(student, "student")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = load_module(student, training.dtype).eval().to(self.device)

    def __call__(self, row: Row) -> Row:
        """Commits the references of the responses file `row["file"]` of `row["teacher"]`; returns the row."""
        folder, columns = Store.responses(row["teacher"]), ["prompt_id", "sample", "text", "finish_reason"]
        responses = self.store.read_table(f"{folder}/{row['file']}", columns).to_pylist()
        prompts = self._prompts(row["file"])
        judged = self.judge([item for item in responses if item["finish_reason"] != "error"], prompts)
        table = pa.Table.from_pylist(judged, schema=REFERENCES)
        self.store.write_table(f"{Store.references(self.name, row['teacher'])}/{row['file']}", table, REFERENCES)
        return row

    def _prompts(self, file: str) -> dict[str, Any]:
        """Messages by prompt_id of the shard that a file of responses (`<shard>-<unit>.parquet`) answers."""
        shard = shard_name(file).rpartition("-")[0]
        table = self.store.read_table(f"{Store.prompts}/{shard}.parquet", ["prompt_id", "messages"])
        return dict(zip(table["prompt_id"].to_pylist(), table["messages"].to_pylist(), strict=True))

    def judge(self, responses: Sequence[Row], prompts: dict[str, Any]) -> list[Row]:
        """Rows of REFERENCES in the order of the responses; those whose prompt leaves no room are missing."""
        texts = [(prompts[item["prompt_id"]], item["text"]) for item in responses]
        ids = [response_ids(self.tokenizer, prompt, text, self.max_length) for prompt, text in texts]
        sequences = {number: pair for number, pair in enumerate(ids) if pair is not None}
        # Similar lengths together waste least on padding; the longest first, so that a lack of memory shows at once.
        order = sorted(sequences, key=lambda number: (-sum(map(len, sequences[number])), number))
        values: dict[int, tuple[float, int]] = {}
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            values |= dict(zip(numbers, self._log_probs([sequences[number] for number in numbers]), strict=True))
        return [
            {"prompt_id": item["prompt_id"], "sample": item["sample"], "logp": values[n][0], "tokens": values[n][1]}
            for n, item in enumerate(responses)
            if n in values
        ]

    @torch.no_grad()
    def _log_probs(self, sequences: list[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """(sum in nats, tokens) of each (prompt ids, response ids)."""
        inputs = pad(sequences, pad_id_of(self.tokenizer))
        logp, tokens = self.module(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return list(zip(logp.tolist(), tokens.tolist(), strict=True))
