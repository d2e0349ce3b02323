"""A few pairs in a tiny student's tokens, without a store, and the forward pass that training makes of them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from tiny_model import make_tokenizer

from deltaray.data.tokens.chat import render_prompt
from deltaray.data.tokens.response_tokens import Written, response_ids
from deltaray.train.examples import Examples, Ragged
from deltaray.train.formulas import LossSettings
from deltaray.train.forward import Cutter, sides_of
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.losses import LOSSES, contribution
from deltaray.train.student import is_packed

TEXTS = [("1+1=", "2", "three"), ("12+34=", "46 i think", "4"), ("9+9=", "eighteen", "99"), ("5+50=", "55", "fifty")]


def examples(texts=TEXTS, max_length=64) -> Examples:
    """Pairs as `read_data` would have them, references zero."""
    tokenizer = make_tokenizer()
    ids = []
    for question, *answers in texts:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": question}])
        ids.append((prompt, [response_ids(tokenizer, prompt, Written(answer)) for answer in answers]))
    return examples_of([prompt for prompt, _ in ids], *zip(*(sides for _, sides in ids), strict=True), max_length)


def examples_of(prompts, chosen, rejected, max_length=64) -> Examples:
    """Pairs of given ids."""
    parts = [
        Ragged.of(pa.chunked_array([pa.array(list(part), pa.list_(pa.int32()))]))
        for part in (prompts, chosen, rejected)
    ]
    count = len(prompts)
    return Examples(parts[0], (parts[1], parts[2]), np.zeros((2, count)), np.arange(count), max_length, 1)


def cutter(name, module, rank=0, workers=1, budget=10_000) -> Cutter:
    return Cutter(LOSSES[name], rank, workers, budget, is_packed(module), 0)


def with_references(module: ResponseLogProbs, data: Examples) -> Examples:
    """The pairs with a model's log-probs as their references."""
    found = np.zeros((2, len(data)))
    for share in cutter("dpo", module).passes(data, range(len(data))):
        with torch.no_grad():
            sides = sides_of(module, data, share, next(module.parameters()).device)
        found[:, share.places] = [side.logp.cpu().numpy() for side in sides]
    return replace(data, references=found)


def loss_of(module, data, name, settings=None, kl=None, shares=None):
    """The loss of all pairs, or the part that some passes contribute to it."""
    cut = cutter(name, module)
    loss, places = LOSSES[name], range(len(data))
    total = torch.zeros(())
    for share in cut.passes(data, places) if shares is None else shares:
        values = loss(*sides_of(module, data, share, "cpu"), settings or LossSettings(**loss.defaults), kl)
        total = total + contribution(values, share.weights, cut.divisors(data, places))
    return total


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
