"""The worker of the reference stage: blocks of responses in, files of log-probabilities out."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jinja2 import TemplateError

from deltaray.chat import conversation_ids, load_tokenizer
from deltaray.contracts import REFERENCES
from deltaray.prompts.shards import shard_name
from deltaray.recipe.models import Student
from deltaray.recipe.training import Training
from deltaray.reference.blocks import Block
from deltaray.store import Store
from deltaray.train.examples import cut
from deltaray.train.packing import Item, pack, pad
from deltaray.train.passes import plan_passes
from deltaray.train.student import is_packed, load_module

Row = dict[str, Any]


class ReferenceWorker:
    """An actor with the untouched student loaded."""

    def __init__(self, store: Store, name: str, student: Student, training: Training) -> None:
        self.store, self.name, self.max_length = store, name, student.max_length
        self.budget = training.tokens_per_pass
        self.tokenizer = load_tokenizer(student, "student")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = load_module(student, training.dtype).eval().to(self.device)

    def __call__(self, row: Row) -> Row:
        """Commits the references of one block; returns the row."""
        block = Block(**row)
        columns = ["prompt_id", "sample", "text", "finish_reason"]
        responses = self.store.read_table(block.responses, columns).slice(block.start, block.rows).to_pylist()
        judged = self.judge([item for item in responses if item["finish_reason"] != "error"], self._prompts(block))
        table = pa.Table.from_pylist(judged, schema=REFERENCES)
        self.store.write_table(block.path(self.name), table, REFERENCES)
        return row

    def _prompts(self, block: Block) -> dict[str, Any]:
        """Messages by prompt_id of the shard that a file of responses (`<shard>-<unit>.parquet`) answers."""
        shard = shard_name(block.responses).rpartition("-")[0]
        table = self.store.read_table(f"{Store.prompts}/{shard}.parquet", ["prompt_id", "messages"])
        return dict(zip(table["prompt_id"].to_pylist(), table["messages"].to_pylist(), strict=True))

    def judge(self, responses: Sequence[Row], prompts: dict[str, Any]) -> list[Row]:
        """Rows of REFERENCES in the order of the responses; those whose prompt leaves no room are missing.

        Samples of one prompt that stand together share it.
        """
        groups = [list(rows) for _, rows in groupby(responses, key=lambda item: item["prompt_id"])]
        items = [self._item(prompts[rows[0]["prompt_id"]], [row["text"] for row in rows]) for rows in groups]
        places = [place for place, item in enumerate(items) if item is not None]
        found: dict[int, list[Row]] = {}
        known = [item for item in items if item is not None]
        costs = [len(prompt) + sum(map(len, texts)) for prompt, texts in known]
        for (share,) in plan_passes(places, costs, 1, self.budget, not is_packed(self.module)) if places else []:
            numbers = [place for place, _ in share]
            values = iter(self._log_probs([item for place in numbers if (item := items[place]) is not None]))
            for place in numbers:
                found[place] = [
                    {"prompt_id": row["prompt_id"], "sample": row["sample"], "logp": logp, "tokens": tokens}
                    for row, (logp, tokens) in zip(groups[place], values, strict=False)
                ]
        return [row for place in places for row in found[place]]

    def _item(self, prompt: Any, texts: list[str]) -> Item | None:
        """Cut as training cuts it; None if the template refuses the prompt or it leaves no room."""
        try:
            ids, responses = conversation_ids(self.tokenizer, prompt, texts)
        except TemplateError:
            return None
        room = self.max_length - len(ids)
        if room <= 2 or not ids:
            return None
        end = self.tokenizer.eos_token_id
        return np.array(ids, np.int32), [cut(np.array(response, np.int32), room, end) for response in responses]

    @torch.no_grad()
    def _log_probs(self, items: list[Item]) -> list[tuple[float, int]]:
        """(sum in nats, tokens) of every response, in the order of the items."""
        inputs = pack(items) if is_packed(self.module) else pad(items, self.tokenizer.eos_token_id)
        inputs = inputs.to(self.device)
        return list(zip(self.module(**inputs.arguments()).tolist(), inputs.lengths.tolist(), strict=True))
