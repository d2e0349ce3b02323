"""Answers of the student while it is trained: how long they are, and how good. Collective, like all of training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from deltaray.data.store import Store
from deltaray.data.tokens import turn_end
from deltaray.recipe.training import Generation
from deltaray.score.response import Response, ScoreFunction, scored, unscored
from deltaray.train.examples import Examples, read_pairs
from deltaray.train.packing import Ids
from deltaray.train.student import is_packed

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A held-out prompt."""

    ids: Ids
    messages: list[dict[str, str]]
    answer: str | None


def heldout_questions(store: Store, pairings: Sequence[str], heldout: Examples, count: int) -> list[Question]:
    """The first prompts of the held-out pairs, each once."""
    table = read_pairs(store, pairings, ["prompt", "answer"]).take(heldout.rows)
    first: dict[str, int] = {}
    for place, key in enumerate(table["prompt_id"].to_pylist()):
        if len(first) < count:
            first.setdefault(key, place)
    rows = table.take(list(first.values())).to_pylist()
    return [
        Question(heldout.prompts[heldout.rows[place]], row["prompt"], row["answer"])
        for place, row in zip(first.values(), rows, strict=True)
    ]


class Answering:
    """Greedy decoding by transformers under DeepSpeed, the questions spread over the workers."""

    def __init__(
        self, asked: Generation, questions: Sequence[Question], tokenizer: Any, budget: int, score: ScoreFunction | None
    ) -> None:
        """`budget`: tokens that a worker's batch may come to."""
        self.questions, self.tokenizer, self.score = questions, tokenizer, score
        longest = max(len(question.ids) for question in questions)
        self.at_once = max(1, budget // (longest + asked.max_tokens))
        self.max_tokens = asked.max_tokens

    def __call__(self, engine: Any) -> Metrics:
        """Mean length in tokens, end token included, and mean score of the answers; null where none has a score."""
        sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
        with answering_model(engine) as model, torch.no_grad():
            own = self._own()
            for start in range(0, len(own), self.at_once):
                batch = own[start : start + self.at_once]
                answers = self.answers(model, [question for question, _ in batch], engine.device)
                for (question, weight), ids in zip(batch, answers, strict=True):
                    score = self._scored(question, ids) if weight else None
                    scored = [0.0, 0.0] if score is None else [1.0, score]
                    sums += torch.tensor([weight, weight * len(ids), *scored], dtype=torch.float64).to(sums)
        dist.all_reduce(sums)
        count, tokens, scored_count, score_sum = sums.tolist()
        found: Metrics = {"generated_tokens": tokens / count}
        if self.score is not None:
            found["generated_score"] = score_sum / scored_count if scored_count else None
        return found

    def _own(self) -> list[tuple[Question, float]]:
        """This worker's questions with their weights; all get the same number, the last ones to fill up (weight 0)."""
        rank, workers = dist.get_rank(), dist.get_world_size()
        own = [(question, 1.0) for question in self.questions[rank::workers]]
        missing = -(-len(self.questions) // workers) - len(own)
        return own + [(self.questions[0], 0.0)] * missing

    def answers(self, model: Any, questions: Sequence[Question], device: Any) -> list[list[int]]:
        """Token ids of the answers to a batch, end token included where the answer came to its end."""
        ends = _end_ids(model, self.tokenizer)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_tokens, eos_token_id=ends, pad_token_id=ends[0]
        )
        width = max(len(question.ids) for question in questions)
        ids = torch.full((len(questions), width), ends[0], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            ids[row, width - len(question.ids) :] = torch.from_numpy(question.ids.astype("int64"))
            mask[row, width - len(question.ids) :] = 1
        # ZeRO 3 gathers weights in every forward pass: all workers go on until all are done
        several = dist.get_world_size() > 1
        found = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, synced_gpus=several
        )
        return [_until_end(row, ends) for row in found[:, width:].tolist()]

    def _scored(self, question: Question, ids: list[int]) -> float | None:
        if self.score is None:
            return None
        try:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return scored(self.score, Response("student", text, question.answer, question.messages)).value
        except BaseException as error:  # of one answer; the other workers would wait for this one
            return unscored(error).value


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The end of the template's turn first, then the tokenizer's, and what else the model's own settings stop at."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    others = stated if isinstance(stated, list) else [stated]
    ends = (turn_end(tokenizer), tokenizer.eos_token_id, *others)
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    at = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: at + 1]


@contextmanager
def answering_model(engine: Any) -> Iterator[Any]:
    """The model without dropout and checkpointing, taking rows of a batch instead of packed ones, for a while."""
    model = engine.module.model
    packed = is_packed(engine.module)
    engine.eval()
    engine.module.take(packed=False)
    try:
        yield model
    finally:
        engine.module.take(packed)
        engine.train()
