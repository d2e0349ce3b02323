"""The worker of the reference stage: blocks of responses in, files of log-probabilities out."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from deltaray.data.contracts import REFERENCES, TOKENS
from deltaray.data.store import Store
from deltaray.data.tokens import load_tokenizer, turn_end
from deltaray.recipe.models import Student
from deltaray.recipe.training import Training
from deltaray.train.examples import cut
from deltaray.train.micro_batches import plan_passes
from deltaray.train.packing import Item, pack, pad
from deltaray.train.probe import settle
from deltaray.train.reference.blocks import Block
from deltaray.train.student import is_packed, load_module

Row = dict[str, Any]


class ReferenceWorker:
    """An actor with the untouched student loaded."""

    def __init__(self, store: Store, name: str, student: Student, training: Training) -> None:
        self.store, self.name, self.max_length = store, name, student.max_length
        self.budget = training.micro_batch_tokens
        self.end_id = turn_end(load_tokenizer(student, "student"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = load_module(student, training.dtype).eval().to(self.device)
        self.student, self.settled = student, False

    def __call__(self, row: Row) -> Row:
        """Commits the references of one block; returns the row."""
        block = Block(**row)
        keys = self.store.read_table(block.responses, ["prompt_id", "sample"]).slice(block.start, block.rows)
        tokens = self.store.read_table(block.tokens, schema=TOKENS).slice(block.start, block.rows)
        rows = [key | ids for key, ids in zip(keys.to_pylist(), tokens.to_pylist(), strict=True)]
        table = pa.Table.from_pylist(self.judge(rows), schema=REFERENCES)
        self.store.write_table(block.path(self.name), table, REFERENCES, made_from=block.source)
        return row

    def judge(self, responses: Sequence[Row]) -> list[Row]:
        """Rows of REFERENCES in the order of the responses (keys and TOKENS).

        Those that failed, or whose prompt is refused or leaves no room, are missing. Samples of one prompt that stand
        together share it.
        """
        if not self.settled:  # not while the actor starts: what it raises then reaches nobody whole
            settle(self.module, self.student, self.device)
            self.settled = True
        able = [row for row in responses if row["token_ids"] and len(row["prompt_token_ids"]) < self.max_length - 2]
        groups = [list(rows) for _, rows in groupby(able, key=lambda row: row["prompt_id"])]
        items = [self._item(rows) for rows in groups]
        costs = [len(prompt) + sum(map(len, responses)) for prompt, responses in items]
        plan = plan_passes(range(len(items)), costs, 1, self.budget, not is_packed(self.module)) if items else []
        found: dict[int, list[Row]] = {}
        for (share,) in plan:
            places = [place for place, _ in share]
            values = iter(self._log_probs([items[place] for place in places]))
            for place in places:
                found[place] = [
                    {"prompt_id": row["prompt_id"], "sample": row["sample"], "logp": logp, "tokens": tokens}
                    for row, (logp, tokens) in zip(groups[place], values, strict=False)
                ]
        return [row for place in range(len(items)) for row in found[place]]

    def _item(self, rows: list[Row]) -> Item:
        """Responses to one prompt, cut as training cuts them."""
        prompt = np.array(rows[0]["prompt_token_ids"], np.int32)
        room, end = self.max_length - len(prompt), self.end_id
        return prompt, [cut(np.array(row["token_ids"], np.int32), room, end) for row in rows]

    @torch.no_grad()
    def _log_probs(self, items: list[Item]) -> list[tuple[float, int]]:
        """(sum in nats, tokens) of every response, in the order of the items."""
        inputs = pack(items) if is_packed(self.module) else pad(items, self.end_id)
        inputs = inputs.to(self.device)
        return list(zip(self.module(**inputs.arguments()).tolist(), inputs.lengths.tolist(), strict=True))
