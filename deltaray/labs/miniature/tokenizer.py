"""A character tokenizer with chat roles, and the same encoding for whole batches of problems at once.

A conversation reads

    <|bos|><|system|>...<|user|>847+385=<|assistant|>1232<|eos|>

The template writes the BOS itself and the tokenizer adds nothing, so text and token ids cannot disagree about
it.  An assistant turn always ends in EOS: a rendered conversation therefore has its own generation prompt as a
prefix, token by token, which is what masking the loss to the response relies on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltaray.labs.miniature.task import DIGITS, Ints, digits_of

PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL = (PAD, BOS, EOS, UNKNOWN, *ROLES)
CHARACTERS = ("\n", *(chr(code) for code in range(32, 127)))
VOCABULARY_SIZE = 128
"""A multiple of 64, filled up with reserved tokens so that every id a model can emit has a text."""

PROMPT_LENGTH = 2 * DIGITS + 5
"""BOS, user, digits, plus, digits, equals, assistant."""
RESPONSE_LENGTH = DIGITS + 2
"""Digits of the sum and EOS."""
MAX_LENGTH = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Token -> id: special tokens, characters, then reserved ones up to `VOCABULARY_SIZE`."""
    known = (*SPECIAL, *CHARACTERS)
    reserved = tuple(f"<|reserved-{index}|>" for index in range(VOCABULARY_SIZE - len(known)))
    return {token: index for index, token in enumerate((*known, *reserved))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every model of the family, ready to be saved beside its weights."""
    table = vocabulary()
    backend = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    reserved = [token for token in table if token.startswith("<|reserved-")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[*ROLES, *reserved],
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_problems(problems: Ints, answers: Ints) -> Ints:
    """Token ids of conversations of one problem and one answer each, the template written out in numpy.

    problems (n, 2); answers (n, DIGITS + 1), ones first, as `task.write_sums` returns them.  The result has shape
    (n, PROMPT_LENGTH + RESPONSE_LENGTH): all conversations are equally long, so batches need no padding.
    """
    table = vocabulary()
    zero, count = table["0"], len(problems)

    def same(*tokens: str) -> Ints:
        return np.tile(np.array([table[token] for token in tokens], dtype=np.int64), (count, 1))

    parts: list[Ints] = [
        same(BOS, "<|user|>"),
        digits_of(problems[:, 0])[:, ::-1] + zero,
        same("+"),
        digits_of(problems[:, 1])[:, ::-1] + zero,
        same("=", "<|assistant|>"),
        answers[:, ::-1] + zero,
        same(EOS),
    ]
    return np.concatenate(parts, axis=1)


def encode_texts(prompts: Sequence[str], responses: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of conversations of one prompt and one response each, as `member.Batch` has them.

    All prompts are equally long; shorter responses are padded.
    """
    table = vocabulary()
    asked = [[table[BOS], table["<|user|>"], *map(table.__getitem__, text), table["<|assistant|>"]] for text in prompts]
    answered = [[*map(table.__getitem__, text), table[EOS]] for text in responses]
    longest = max(map(len, answered))
    ids = torch.tensor(
        [[*ask, *answer, *[table[PAD]] * (longest - len(answer))] for ask, answer in zip(asked, answered, strict=True)]
    )
    targets = ids[:, -longest:].clone()
    targets[torch.arange(longest) >= torch.tensor([[len(answer)] for answer in answered])] = -100
    return ids, targets
