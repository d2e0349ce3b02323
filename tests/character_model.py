"""Tiny random Llamas with one token per character, thinking marks included, and LoRA adapters for them."""

from pathlib import Path

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+=."
SPECIAL, MARKS = ["<pad>", "<bos>", "<eos>"], ["<think>", "</think>"]
BOS, EOS, FIRST = 1, 2, 3
PIECES = [*CHARACTERS, *MARKS]
THINK = FIRST + PIECES.index("<think>")


def encode(text: str) -> list[int]:
    return [BOS] + [FIRST + PIECES.index(letter) for letter in text]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[token - FIRST] for token in ids if token >= FIRST)


def make_tokenizer(special_marks: bool = False):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*SPECIAL, *PIECES])}, merges=[]))
    inner.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.add_tokens(MARKS, special_tokens=special_marks)
    return tokenizer


def make_model(path: Path, seed: int) -> str:
    """A model made so that its greedy answers are unambiguous.

    Its output layer is tied to its embedding: the one kind of model that vLLM's weight reload gets wrong on CPU.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer().save_pretrained(path)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(SPECIAL) + len(PIECES)
    config = LlamaConfig(vocab_size=vocabulary, head_dim=32, max_position_embeddings=256, **shape)
    config.update({"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})
    config.update({"initializer_range": 0.3, "tie_word_embeddings": True})
    LlamaForCausalLM(config).float().save_pretrained(path)
    return str(path)


def make_adapter(path: Path, model: str, seed: int, rank: int) -> str:
    """A LoRA adapter that does change its model: both factors are random, B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(path)
    return str(path)


def greedy_answers(model: str, prompts: list[str], tokens: int, adapter: str | None = None) -> list[list[int]]:
    """What transformers (and PEFT) answer, end token included."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, adapter) if adapter else base
    ids = [torch.tensor([encode(prompt)]) for prompt in prompts]
    answers = [loaded.generate(input_ids=one, max_new_tokens=tokens, do_sample=False) for one in ids]
    return [answer[0, one.shape[1] :].tolist() for answer, one in zip(answers, ids, strict=True)]
