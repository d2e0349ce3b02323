"""One weight under the names that wrappers give it: a language model alone, or inside a model of images and text.

A text model calls a weight `model.layers.0.mlp.down_proj`, a wrapper `model.language_model.layers.0.mlp.down_proj`, and
its files often `language_model.model.layers.0.mlp.down_proj`.
"""

import re
from collections.abc import Iterable

WRAPPERS = re.compile(r"^(?:(?:model|transformer|language_model|text_model|llm)\.)+")
"""What may stand before the layers of the language model. Towers for images and sound keep their names."""


def inner_name(name: str) -> str:
    """A name without the wrappers around the language model."""
    return WRAPPERS.sub("", name)


def match_names(wanted: Iterable[str], there: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Finds modules among names of the same model in another wrapper.

    Returns:
        ({wanted: there}, those that are not found, or stand for several). What is there under its own name is that.
    """
    exact = set(there)
    inner: dict[str, list[str]] = {}
    for name in exact:
        inner.setdefault(inner_name(name), []).append(name)
    found, lost = {}, []
    for name in wanted:
        places = [name] if name in exact else inner.get(inner_name(name), [])
        if len(places) == 1:
            found[name] = places[0]
        else:
            lost.append(name)
    return found, lost
