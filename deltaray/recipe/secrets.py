"""Secrets have no place in a recipe: it is stored beside the results, shown in the report and sent with jobs."""

import re
from collections.abc import Iterator
from typing import Any

from deltaray.recipe.check_pairing import Problem
from deltaray.text.secrets import KEYS, LOGIN, QUERY, SHAPES, without_known

PLACES = (
    "take it out (and change it, if the file was shared); HF_TOKEN, AWS_ACCESS_KEY_ID and the like belong into the "
    "environment, an endpoint's key into the variable that `key_variable` names"
)

OUTSIDE = f"holds what looks like a key, in a comment or otherwise outside of all values: {PLACES}"
FREE = ("arguments", "body", "chat_template_arguments")
"""Sections that are passed on as they are."""


def secrets_in(node: Any, known: frozenset[str], at: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Every place of a recipe's tree that holds a secret, or looks as if. The messages do not quote it. Pure.

    Args:
        known: secrets that have no shape of their own, see `secrets_of`.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            if _secret("", str(name), known):
                yield at, f"one of its keys holds a secret, and a recipe is stored and shown: {PLACES}"
            else:
                yield from secrets_in(value, known, (*at, name))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from secrets_in(value, known, (*at, number))
    elif node is not None and not isinstance(node, bool):
        text = node.decode(errors="replace") if isinstance(node, bytes) else str(node)
        if what := _secret(_name(at), text, known):
            yield at, f"holds {what}, and a recipe is stored and shown: {PLACES}"


def _name(at: tuple[str | int, ...]) -> str:
    """The key that tells what a value is: its own or, in sections that take anything, a secret one above it."""
    names = [part for part in at if isinstance(part, str)]
    free = next((place for place, name in enumerate(names) if name in FREE), len(names))
    return next((name for name in names[free + 1 :] if KEYS.search(name)), names[-1] if names else "")


def named_variables(text: str) -> set[str]:
    """The environment variables that a text names as keys, whether or not it is YAML: what they hold is a secret."""
    return set(re.findall(r"key_variable[\"']?\s*[:=]\s*[\"']?([A-Za-z_]\w*)", text))


def variables_in(node: Any) -> set[str]:
    """Those that a recipe's tree names. Pure."""
    if isinstance(node, dict):
        own = {value for name, value in node.items() if name == "key_variable" and isinstance(value, str)}
        return own.union(*map(variables_in, node.values()))
    return set().union(*map(variables_in, node)) if isinstance(node, list) else set()


def line_with_secret(text: str, known: frozenset[str]) -> int | None:
    """The first line of a recipe's file, comments included, that holds a secret. Pure."""
    if not _looks_secret(text, known):
        return None
    return next((number for number, line in enumerate(text.splitlines(), start=1) if _looks_secret(line, known)), 1)


def _looks_secret(text: str, known: frozenset[str]) -> bool:
    return bool(SHAPES.search(text)) or without_known(text, known) != text


def _secret(name: str, value: str, known: frozenset[str]) -> str | None:
    if value and KEYS.search(name):
        return "a secret"
    if _looks_secret(value, known):
        return "what looks like a key"
    if "://" not in value:
        return None
    if LOGIN.search(value):
        return "credentials in an address"
    return "a key in an address" if QUERY.search(value) else None
