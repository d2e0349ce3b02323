"""Packed, prefix-shared, padded, single: one number. And a control that shows that leakage would be noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_examples import examples_of, gradients
from tiny_model import make_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from deltaray.train.attention import PACKED
from deltaray.train.attention_layout import Layout
from deltaray.train.examples import cut
from deltaray.train.logprobs import ResponseLogProbs
from deltaray.train.packing import pack, pad

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": lambda: make_model(),
    "qwen3": lambda: Qwen3(Qwen3Config(**SIZES)),
    "mistral with a window of 7": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "gemma3, two of three layers with a window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=MIXED)
    ),
}


def items(seed=0, pairs=9, longest=40):
    """Prompts and responses of 1 to `longest` tokens, one of each side as short as can be."""
    chance = np.random.default_rng(seed)

    def ids():
        return chance.integers(2, 60, chance.integers(1, longest)).astype(np.int32)

    return [(ids()[:1], [ids()[:1], ids()]), *((ids(), [ids(), ids()]) for _ in range(pairs))]


def module_of(name):
    torch.manual_seed(0)
    return ResponseLogProbs(MODELS[name]().eval())


def run(module, inputs, packed):
    module.model.set_attn_implementation(PACKED if packed else "sdpa")
    return module(**inputs.arguments())


def single(module, some):
    """Every response by itself, through transformers' own attention."""
    alone = [pad([(prompt, [response])], 0) for prompt, responses in some for response in responses]
    return torch.cat([run(module, inputs, packed=False) for inputs in alone])


def plain(model, some):
    """From the model's own logits: the definition."""
    found = []
    for prompt, responses in some:
        for response in responses:
            ids = torch.tensor([*prompt, *response])
            table = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
            found.append(sum(table[at - 1, ids[at]] for at in range(len(prompt), len(ids))))
    return torch.stack(found)


@pytest.mark.parametrize("name", list(MODELS))
def test_packed_shared_padded_and_single_are_one(name):
    module, some = module_of(name), items()
    expected = plain(module.model, some)
    for found in (
        single(module, some),
        run(module, pad(some, 0), packed=False),
        run(module, pack(some, shared=False), packed=True),
        run(module, pack(some), packed=True),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_are_one_too(name):
    found = []
    for packed in (False, True):
        module = module_of(name)
        values = run(module, pack(items()) if packed else pad(items(), 0), packed)
        (values * torch.linspace(-1, 1, len(values))).sum().backward()
        found.append(gradients(module.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_prompt_goes_through_the_model_once():
    some = items()
    responses = sum(len(response) for _, both in some for response in both)
    assert pack(some).tokens == sum(len(prompt) for prompt, _ in some) + responses
    assert pack(some, shared=False).tokens == 2 * sum(len(prompt) for prompt, _ in some) + responses


@pytest.mark.parametrize("shared", [True, False])
def test_no_token_hears_of_another_pair_or_of_the_other_response(shared):
    """All other tokens are replaced: not a bit of a response's log-probability changes."""
    module, some = module_of("llama"), items()
    found = []
    for order in (1, -1):
        others = [(prompt[::order].copy(), [ids[::order].copy() for ids in both]) for prompt, both in some]
        prompt, (chosen, _) = some[4]
        others[4] = (prompt, [chosen, others[4][1][1]])
        found.append(run(module, pack(others, shared), packed=True))
    assert found[0][8] == found[1][8]
    assert (found[0] != found[1]).sum() == len(found[0]) - 1 - 1  # the shortest pair's one token reads both ways


@pytest.mark.parametrize("side", [1, 2])
def test_a_leak_would_be_noticed(side):
    """A layout in which the chosen (or the rejected) responses see all tokens before them: far from the truth."""
    module, some = module_of("llama"), items()
    inputs = pack(some)
    layout = inputs.layout
    everything = torch.arange(inputs.tokens)
    starts = np.cumsum([0, *layout.query_counts])
    firsts = [0 if number % 3 == side else starts[number] for number in range(len(layout.query_counts))]
    keys = [everything[first:end] for first, end in zip(firsts, starts[1:], strict=True)]
    leaky = Layout(layout.query_counts, [len(row) for row in keys], torch.cat(keys))
    found = run(module, replace(inputs, layout=leaky), packed=True)
    assert (found - single(module, some)).abs()[side - 1 :: 2].max() > 0.1


def test_a_model_that_drops_the_layout_is_refused():
    model = make_model()
    model.set_attn_implementation(PACKED)
    with pytest.raises(ValueError, match="does not hand the layout"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


# --- the output layer -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [1, 3, 1024])
def test_chunks_of_the_output_layer_change_nothing(tokens):
    found = []
    for at_once in (tokens, 10_000):
        module = ResponseLogProbs(make_model(), chunk=64 * at_once)
        values = module(**pad(items(), 0).arguments())
        values.sum().backward()
        found.append((values.detach(), gradients(module.model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)


# --- lengths ----------------------------------------------------------------------------------------------------
def test_a_response_is_cut_to_what_fits_and_ends_with_the_end_token():
    data = examples_of([[5, 6, 7]], [[8] * 20], [[9, 1]], max_length=10)
    prompt, (chosen, rejected) = data.item(0)
    assert [*prompt, *chosen] == [5, 6, 7, *[8] * 6, 1]
    assert [*rejected] == [9, 1]
    assert [lengths.tolist() for lengths in data.response_lengths] == [[7], [2]]
    assert data.costs([0], both=True) == [12]
    assert cut(np.array([3, 1], np.int32), 2, 1).tolist() == [3, 1]
