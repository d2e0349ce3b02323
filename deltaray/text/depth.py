"""How deep data from outside is nested: what is too deep for Python's own recursion ends more than its row. Pure."""

from typing import Any

MOST_DEPTH = 100
"""Levels of lists and objects."""


def is_too_deep(value: Any) -> bool:
    """Whether it has more than `MOST_DEPTH` levels."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for item in level if isinstance(item, dict | list) for inner in _inside(item)]
        if not level:
            return False
    return True


def _inside(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item
