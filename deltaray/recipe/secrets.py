"""Secrets have no place in a recipe: it is stored beside the results, shown in the report and sent with jobs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from deltaray.recipe.check_pairing import Problem

KEYS = re.compile(
    r"(^|[_-])(api[_-]?key|passw(or)?d|secret|credentials?|authorization|(private|secret|access|account)[_-]?key"
    r"|(hf|auth|access|api|bearer|refresh|session)[_-]?token)$",
    re.IGNORECASE,
)
QUERY_KEYS = re.compile(r"^(key|sig|signature|token|x-amz-(signature|credential|security-token))$", re.IGNORECASE)
SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|(AKIA|ASIA)[A-Z0-9]{16}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|xox[abp]-[\w-]{10,}|AIza[\w-]{35}|glpat-[\w-]{20}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\."
    r"|nvapi-[\w-]{20,}|gsk_\w{20,}|tgp_v1_[\w-]{20,}|wandb_v1_\w{20,}|r8_\w{20,}|npm_\w{20,}|dckr_pat_[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|Bearer +\S{8,}"
)
"""What keys of well-known services look like."""
SHORTEST = 12
"""A shorter value of a variable may stand in a recipe by chance."""
PLACES = (
    "take it out (and change it, if the file was shared); HF_TOKEN, AWS_ACCESS_KEY_ID and the like belong into the "
    "environment, an endpoint's key into the variable that `key_variable` names"
)


def secrets_in(node: Any, known: frozenset[str], at: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Every place of a recipe's tree that holds a secret, or looks as if. The messages do not quote it. Pure.

    Args:
        known: secrets that have no shape of their own, see `secrets_of`.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            if _looks_secret(name, known):
                yield at, f"one of its keys holds a secret, and a recipe is stored and shown: {PLACES}"
            else:
                yield from secrets_in(value, known, (*at, name))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from secrets_in(value, known, (*at, number))
    elif isinstance(node, str) and (what := _secret(str(at[-1]) if at else "", node, known)):
        yield at, f"holds {what}, and a recipe is stored and shown: {PLACES}"


def secrets_of(environment: Mapping[str, str]) -> frozenset[str]:
    """The values of those variables whose names say that they are secrets."""
    named = {name: value for name, value in environment.items() if KEYS.search(name) or name.endswith("_TOKEN")}
    return frozenset(value for value in named.values() if len(value) >= SHORTEST)


def without_secrets(text: str, known: frozenset[str]) -> str:
    """Somebody's words, fit for a message."""
    for secret in known:
        text = text.replace(secret, "…")
    return SHAPES.sub("…", text)


def _looks_secret(text: str, known: frozenset[str]) -> bool:
    return bool(SHAPES.search(text)) or any(secret in text for secret in known)


def _secret(name: str, value: str, known: frozenset[str]) -> str | None:
    if value and KEYS.search(name):
        return "a secret"
    if _looks_secret(value, known):
        return "what looks like a key"
    if "://" not in value:
        return None
    try:
        parts = urlsplit(value)
    except ValueError:  # no address, which those who need one will say
        return "credentials in an address" if "@" in value else None
    if "@" in parts.netloc:
        return "credentials in an address"
    named = [key for key, _ in parse_qsl(parts.query) if KEYS.search(key) or QUERY_KEYS.match(key)]
    return "a key in an address" if named else None
