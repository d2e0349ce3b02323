"""In the process beside: regular expressions that others wrote, whose search may take exponential time."""

import re
from collections.abc import Sequence


def found(pattern: str, text: str) -> bool:
    """Whether the expression is found in a text, upper or lower case."""
    return re.search(pattern, text, re.IGNORECASE) is not None  # `re` keeps the last few hundred compiled


def full_matches(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that the whole expression matches: PEFT's rule for `target_modules` that is one text."""
    return [name for name in names if re.fullmatch(pattern, name)]


def keys_of(keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """PEFT's and vLLM's rule for `rank_pattern` and `alpha_pattern`: for each name the first key that is the name or
    its end from a dot on; names without one are left out."""
    first = ((name, next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)) for name in names)
    return {name: key for name, key in first if key is not None}
