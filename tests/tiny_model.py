"""A tiny Llama with a character tokenizer, made in a second: real files for the tests of training."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = [*SPECIAL, *string.digits, *"+=? ", *string.ascii_lowercase]
    inner = Tokenizer(models.WordLevel({token: number for number, token in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


def make_model(seed: int = 0, vocabulary: int = 64, tied: bool = False) -> LlamaForCausalLM:
    """Random weights, float32. With 2,048 tokens some exceed 1e5 elements: only such ZeRO 3 really partitions."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **SMALL)
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, seed: int = 0, vocabulary: int = 64) -> str:
    make_model(seed, vocabulary).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_capped(folder: Path, vocabulary: int = 64) -> str:
    """A Gemma 2, whose logits a soft cap bends well within their range; embeddings are tied."""
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=vocabulary, query_pre_attn_scalar=32, final_logit_softcapping=3.0, **SMALL)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
