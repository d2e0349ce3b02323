"""Tokenizers as their files say: loaded and compared with `tokenizer.json`; and the control tokens of templates."""

from deltaray.data.tokens.control import control_tokens, kept_with_template, plain_ids, turn_end, turn_end_ids
from deltaray.data.tokens.load import CLOCK, load_tokenizer

__all__ = ["CLOCK", "control_tokens", "kept_with_template", "load_tokenizer", "plain_ids", "turn_end", "turn_end_ids"]
