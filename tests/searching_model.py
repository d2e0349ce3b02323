"""A Llama built by hand that searches: it asks for the topic of the question and answers with the fact that it reads.

Which word follows depends on the word before, but for two: after <search> one head of attention copies the topic that
stands before it, after <answer> the fact. So what it answers is what it was shown, and nothing else.
"""

import math
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
TAGS = ["<search>", "</search>", "<result>", "</result>", "<answer>", "</answer>"]
TOPICS, FACTS = ["france", "italy", "japan", "spain"], ["paris", "rome", "tokyo", "madrid"]
WORDS = ["the", "capital", "of", "is", "what", "nothing", "was", "found", " ", "\n", "(", ")", "?", *"123456789"]
VOCABULARY = [*SPECIAL, *TAGS, *TOPICS, *FACTS, *WORDS]
TEMPLATE = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}<assistant>"
HIDDEN, HEAD = 64, 32
COPIES = 48
"""The first of the hidden dimensions in which attention writes the word it copies."""


def make_tokenizer():
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({token: n for n, token in enumerate(VOCABULARY)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?[a-z]+>|[a-z]+|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_searcher(folder: Path, again: float = 0.0) -> str:
    """`again`: how likely it searches once more after it has read a result, where it is sampled."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer().save_pretrained(folder)
    size = len(VOCABULARY)
    assert size <= COPIES
    config = LlamaConfig(
        vocab_size=size, hidden_size=HIDDEN, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=HEAD, max_position_embeddings=512, rope_theta=1e12, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    place = {word: n for n, word in enumerate(VOCABULARY)}
    follows = {"<assistant>": {"<search>": 1.0}, "\n": {"<search>": again, "<answer>": 1 - again}}
    follows |= {word: {"</search>": 1.0} for word in TOPICS} | {word: {"</answer>": 1.0} for word in FACTS}
    length = math.sqrt(HIDDEN)  # what the norms make of a single 1
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        layer, head = model.model.layers[0], model.lm_head.weight
        for norm in (model.model.norm, layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        attention = layer.self_attn
        # of a head's dimensions the last of each half turn least with the position
        for asking, words, channel in (("<search>", TOPICS, HEAD - 1), ("<answer>", FACTS, HEAD - 2)):
            attention.q_proj.weight[channel, place[asking]] = 4.0
            for word in words:
                copy = place[word] - place[TOPICS[0]]
                attention.k_proj.weight[channel, place[word]] = 4.0
                attention.v_proj.weight[copy, place[word]] = 1 / length
                attention.o_proj.weight[COPIES + copy, copy] = 1.0
                head[place[word], COPIES + copy] = 60 / length
        logits = torch.full((size, size), -30.0)  # [before, after]
        logits[:, place["<eos>"]] = 0.0
        for before, after in follows.items():
            logits[place[before], place["<eos>"]] = -30.0
            for word, share in after.items():
                logits[place[before], place[word]] = math.log(max(share, 1e-12))
        head[:, :size] += logits.T / length
    model.save_pretrained(folder)
    return str(folder)
