"""Prompts: from the user's file to normalised, identified rows."""

from deltaray.prompts.read import PromptRow, is_hub_dataset, read_prompts
from deltaray.prompts.shards import refuse_changed_prompts, store_prompts

__all__ = ["PromptRow", "is_hub_dataset", "read_prompts", "refuse_changed_prompts", "store_prompts"]
