"""Prompts: from the user's file to checked, identified rows in shards, with bounded memory."""

from deltaray.data.prompts.formats import is_hub_dataset
from deltaray.data.prompts.read import read_prompts
from deltaray.data.prompts.rows import PromptRow
from deltaray.data.prompts.shards import read_rows, refuse_changed_prompts, store_prompts
from deltaray.data.prompts.source import PromptSource, check_source, store_source

__all__ = [
    "PromptRow",
    "PromptSource",
    "check_source",
    "is_hub_dataset",
    "read_prompts",
    "read_rows",
    "refuse_changed_prompts",
    "store_prompts",
    "store_source",
]
