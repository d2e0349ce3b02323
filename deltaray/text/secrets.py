"""Which values are secrets, what keys of well-known services look like, and messages without either."""

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from deltaray.text.forms import SHORTEST, Cleaner

_NAMES = (
    r"(?:api[_-]?key|passw(?:or)?d|passphrase|secret|credentials?|authorization"
    r"|(?:private|secret|access|account)[_-]?key|(?:hf|auth|access|api|bearer|refresh|session)[_-]?token)"
)
KEYS = re.compile(rf"(?:^|[_-]){_NAMES}$", re.IGNORECASE)
"""Names of keys and variables that hold a secret."""
_QUERY_NAMES = r"(?:key|sig|signature|token|x-amz-(?:signature|credential|security-token))"
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-(?:(?=[A-Za-z_-]{0,99}[0-9])[A-Za-z0-9_-]{16,}|[A-Za-z0-9]{20,})"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|xox[abp]-[\w-]{10,}|AIza[\w-]{35}|glpat-[\w-]{20}|eyJ[\w-]{10,999}\.eyJ[\w-]{10,9999}\."
    r"|nvapi-[\w-]{20,}|gsk_\w{20,}|tgp_v1_[\w-]{20,}|wandb_v1_\w{20,}|r8_\w{20,}|npm_\w{20,}|dckr_pat_[\w-]{20,}"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----|Bearer {1,9}(?=\S{0,99}\d)\S{8,})"
)
"""What keys of well-known services look like."""
LOGIN = re.compile(
    r"([a-z][a-z0-9+.-]{0,30}://)(?:[^/?#\s\"'<>@:]{0,200}:(?!\d+(?:[/?#\s\"']|$))[^\s\"'<>]{0,1000}|[^/?#\s\"'<>@]{0,200})"
    r"@(?=[^/\s])",
    re.IGNORECASE,
)
"""The credentials in an address, behind its scheme; a password may hold any sign, also where it should not."""
QUERY = re.compile(rf"([?&;#](?:[\w-]{0, 60}[_-])?(?:{_NAMES}|{_QUERY_NAMES})=)[^&;#\s\"'<>]+", re.IGNORECASE)
"""A key in an address, behind its name."""
_ASSIGNED = re.compile(
    rf"({_NAMES}[\"']?(?:\s*=\s*|\s*:\s*(?=[\"'])|:[ \t]*(?=\S+$)))(?!…)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}\]\"'`]+)",
    re.IGNORECASE | re.MULTILINE,
)
"""`api_key=…`, `"password": "…"`, and a line that ends with `hf_token: …`; behind the name."""
LONG = 12
"""A shorter value of a variable that nobody has named as a secret may stand in a text by chance."""
HIDDEN = "…"

_named: set[str] = set()
"""Variables that a recipe or a command of this process has named as secrets."""


def keep_secret(variables: Iterable[str]) -> None:
    """What these environment variables hold is a secret in this process from now on."""
    _named.update(variables)


def known_secrets(variables: Iterable[str] = ()) -> frozenset[str]:
    """The secrets of this process's environment that have no shape of their own."""
    return secrets_of(os.environ, {*_named, *variables})


def secrets_of(environment: Mapping[str, str], named: Iterable[str] = ()) -> frozenset[str]:
    """The values of the named variables, and of those whose own names say that they are secrets. Pure."""
    of_name = {value.strip() for name in named if (value := environment.get(name))}
    telling = {value for name, value in environment.items() if KEYS.search(name) or name.endswith("_TOKEN")}
    return frozenset(
        {value for value in of_name if len(value) >= SHORTEST} | {value for value in telling if len(value) >= LONG}
    )


def without_secrets(text: str, known: frozenset[str] | None = None) -> str:
    """A message without what is a secret, or looks like one. `known`: see `known_secrets`; None: its own."""
    text = without_known(text, known, HIDDEN)
    text = LOGIN.sub(rf"\1{HIDDEN}@", SHAPES.sub(HIDDEN, text))
    return _ASSIGNED.sub(rf"\1{HIDDEN}", QUERY.sub(rf"\1{HIDDEN}", text))


def without_known(text: str, known: frozenset[str] | None = None, mark: str = "[key]") -> str:
    """A text without the known secrets; what only looks like one stays, so that results are what they are."""
    return _cleaner(known_secrets() if known is None else known, mark).clean(text)


@lru_cache(maxsize=8)
def _cleaner(known: frozenset[str], mark: str) -> Cleaner:
    return Cleaner(known, mark)
