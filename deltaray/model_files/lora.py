"""What a PEFT LoRA adapter's folder consists of, and what its configuration says of modules and ranks."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltaray.errors import UserError
from deltaray.untrusted import OverLimitError, RaisedError, limited

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LORA = re.compile(r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
BASE_COPY = re.compile(r".+\.base_layer\.weight")
"""A copy of the base's embedding, which PEFT saves beside a LoRA of it."""
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Numbers of adapter_config.json by regular expressions on the modules' names."""
MATCH_SECONDS = 2.0
"""Of computing for all modules of an adapter; the patterns of ordinary ones take milliseconds."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be."""


def pattern_values(folder: Path, config: Mapping[str, Any], key: str, modules: Iterable[str]) -> dict[str, Any]:
    """What one of `PATTERNS` says of the modules, by name; modules of which it says nothing are left out.

    Raises:
        UserError: its regular expressions are none, or take too long; vLLM and PEFT would try the same ones.
    """
    values = config.get(key) or {}
    if not values:
        return {}
    try:
        asked = limited("deltaray.untrusted.patterns", MATCH_SECONDS)
        return {name: values[found] for name, found in asked.call("keys_of", list(values), list(modules)).items()}
    except (OverLimitError, RaisedError) as error:
        raise UserError(
            f"{folder / CONFIG}: {key}: cannot be matched with the names of its modules: {error}; write the ends of "
            "the names there, such as q_proj"
        ) from None


def lora_rank(folder: str) -> int:
    """The largest rank in a PEFT LoRA adapter's folder.

    Raises:
        UserError: the folder is not a LoRA adapter, or one that vLLM cannot serve on top of its base.
    """
    try:
        config = json.loads(Path(folder, CONFIG).read_text())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: no PEFT LoRA adapter: adapter_config.json: {error!r}") from error
    if reason := _not_served(folder, config, rank):
        raise UserError(f"{folder}: {reason}; merge the adapter into its model and name that as `model`")
    return int(rank)


def _not_served(folder: str, config: Mapping[str, Any], rank: int) -> str | None:
    """Why vLLM cannot serve an adapter, as far as its files tell."""
    if config.get("peft_type") != "LORA":
        return f"vLLM serves LoRA adapters, not {config.get('peft_type')}"
    if config.get("use_dora"):
        return "vLLM does not serve DoRA adapters"
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        return "vLLM does not serve adapters with modules_to_save or biases of their own"
    if not Path(folder, WEIGHTS).is_file():
        return f"it has no {WEIGHTS}"
    return None if rank <= LORA_RANKS[-1] else f"vLLM serves ranks up to {LORA_RANKS[-1]}, not {rank}"
