"""vLLM loads tokenizers by itself: how it is given the one that a model's files say."""

from collections.abc import Mapping
from typing import Any

from deltaray.data.tokens.load import TEKKEN, as_the_files_say, is_replaced, model_file
from deltaray.recipe.models import Model

CHOSEN = frozenset({"tokenizer", "tokenizer_mode", "skip_tokenizer_init"})
"""Engine arguments with which a recipe decides by itself."""


def tokenizer_arguments(arguments: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """vLLM's arguments for the tokenizer, beside those that an engine has; none where it gets the right one anyway.

    A tokenizer that transformers, and so vLLM, would build otherwise is saved into `folder`, which must stay as long
    as the engine. Every node does this by itself, from the model's files.
    """
    if CHOSEN & arguments.keys():
        return {}
    given = {name: arguments[name] for name in ("model", "revision", "trust_remote_code") if name in arguments}
    model = Model(**given)
    tokenizer = as_the_files_say(model, "the engine")
    if is_replaced(tokenizer):
        tokenizer.save_pretrained(folder)
        return {"tokenizer": folder, "tokenizer_mode": "hf"}
    return {"tokenizer_mode": "hf"} if model_file(model, TEKKEN) else {}
