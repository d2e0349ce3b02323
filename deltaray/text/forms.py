"""Secrets in somebody else's text, whatever they were dressed in: found by what is left when the dress is off.

A server may quote its key as it is, with another case, in Base64, in hexadecimal digits, backwards, and each of these
percent-encoded, as JSON's or HTML's escapes, in pieces with blanks or line breaks between. A key that is encrypted,
compressed or of which only a part is there cannot be told.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import quote

SHORTEST = 8
"""Characters of a secret that can be told from words in any text."""
SHORT = 3
"""Characters of one that can be told as a word of its own, where no text of value is changed by a mistake."""
LOOSE = 12
"""Characters from which on a secret is also found in another case and with other characters between its own."""
LONGEST = 100_000
"""Characters of a text in which a dressed secret is looked for; a longer one is replaced as a whole (time)."""
ROUNDS = 3
"""How many times a text may have been escaped."""

_PLAIN = "".join(map(chr, [*range(48, 58), *range(65, 91), *range(97, 123)]))
_DROPPED = bytes(code for code in range(128) if chr(code) not in _PLAIN)
_AGAIN = re.compile(r"\\{2,}|%(?:25)+(?=[0-9a-f]{2})", re.IGNORECASE)
"""Backslashes and percent signs that were themselves escaped."""
_CODE = r"(?:%|\\u(?:00|\{0{0,6})|\\x|&\#x0{0,6})"
"""What stands before the two hexadecimal digits of an escaped character."""
_NUMBER = r"&\#0{0,6}"
_ESCAPED = re.compile(rf"{_CODE}([2-7][0-9a-f])[;}}]?|{_NUMBER}(\d{{2,3}});?|\\([bfnrt/\"'])", re.IGNORECASE)


_OTHERS = (
    rf"(?:{_CODE}(?:2[0-9a-f]|3[a-f]|40|5[b-f]|60|7[b-e])"
    rf"|{_NUMBER}(?:3[2-9]|4[0-7]|5[89]|6[0-4]|9[1-6]|12[3-6]))[;}}]?"
)
"""Escapes of signs that are not letters or digits."""
_OWN = (
    rf"{_CODE}(?:3[0-9]|4[1-9a-f]|5[0-9a]|6[1-9a-f]|7[0-9a])"
    rf"|{_NUMBER}(?:4[89]|5[0-7]|6[5-9]|[78][0-9]|90|9[7-9]|1[01][0-9]|12[0-2])"
)
"""Escapes of letters and digits."""
_BETWEEN = rf"(?>(?:{_OTHERS}|\\[bfnrt]|(?!{_OWN})[^A-Za-z0-9])*)"
"""What may stand between two characters of a secret: anything else than letters and digits, escaped or not."""


class Cleaner:
    """Takes secrets out of texts. One instance serves many texts."""

    def __init__(self, secrets: Iterable[str], mark: str = "[key]", short: bool = False) -> None:
        """A cleaner for good.

        Args:
            secrets: those shorter than `SHORTEST` are left alone.
            mark: what stands in a secret's place.
            short: also take out those from `SHORT` characters on, where they stand as words of their own.
        """
        self.mark, secrets = mark, set(secrets)
        words = "|".join(re.escape(it) for it in secrets if short and SHORT <= len(it) < SHORTEST)
        self._words = re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])") if words else None
        told = {it for it in secrets if len(it) >= SHORTEST}
        forms = {form for it in told for form in (it, json.dumps(it)[1:-1], quote(it, safe=""))}
        self._plain = sorted(forms, key=len, reverse=True)
        needles = (needle for secret in sorted(told) for needle in _needles(secret))
        self._needles = list(dict.fromkeys(needles))

    def holds(self, text: str) -> bool:
        """Whether one of the secrets is in a text."""
        if self._words and self._words.search(text):
            return True
        return bool(self._plain) and any(self._found_in(view) for view in _views(text))

    def clean(self, text: str) -> str:
        """The text without the secrets. One that shows that it holds one, but not where, is replaced as a whole."""
        if not self.holds(text):
            return text
        text = self._words.sub(self.mark, text) if self._words else text
        for secret in self._plain:
            text = text.replace(secret, self.mark)
        if len(text) <= LONGEST and (needles := {it for view in _views(text) for it in self._needles_in(view)}):
            text = _once(text)
            for needle in sorted(needles):
                text = _dressed(needle).sub(self.mark, text)
        return self.mark if self.holds(text) else text

    def clean_all(self, value: Any) -> Any:
        """Parsed JSON, cleaned in every text and key; the same object where nothing was found."""
        if not self.holds("\n".join(_texts(value))):
            return value
        return self._cleaned(value)

    def _cleaned(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, dict):
            return {self.clean(name): self._cleaned(item) for name, item in value.items()}
        return [self._cleaned(item) for item in value] if isinstance(value, list) else value

    def _found_in(self, view: str) -> bool:
        return any(secret in view for secret in self._plain) or bool(self._needles_in(view))

    def _needles_in(self, view: str) -> list[bytes]:
        packed = _packed(view)
        return [needle for needle in self._needles if needle in packed]


def _needles(secret: str) -> Iterator[bytes]:
    """What of a secret's forms is left in `_packed` texts."""
    raw = secret.encode(errors="surrogatepass")
    loose = [_packed(secret), _packed(secret[::-1])]
    yield from (needle for needle in loose if len(needle) >= LOOSE)
    coded = [_packed(raw.hex()), *(_packed(_base64_core(raw, before)) for before in range(3))]
    yield from (needle for needle in coded if len(needle) >= SHORTEST)


def _base64_core(raw: bytes, before: int) -> str:
    """What Base64 makes of the bytes, whatever stands around them, if `before` bytes (modulo 3) stand before them."""
    text = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
    whole = (before + len(raw)) * 8 // 6  # characters made of nothing that comes later
    return text[-(-before * 8 // 6) : whole]


def _packed(text: str) -> bytes:
    """Letters and digits alone, in lower case."""
    return text.encode("ascii", "ignore").lower().translate(None, _DROPPED)


def _views(text: str) -> Iterator[str]:
    """The text, and what it says once its escapes are resolved, again and again."""
    yield text
    for _ in range(ROUNDS):
        if not any(sign in text for sign in "%\\&"):
            return
        before, text = text, _ESCAPED.sub(_character, _once(text))
        if text == before:
            return
        yield text


def _once(text: str) -> str:
    """The text with what was escaped several times escaped once."""
    return _AGAIN.sub(lambda found: found[0][0], text)


def _character(found: re.Match[str]) -> str:
    code, decimal, _ = found.groups()
    if code:
        return chr(int(code, 16))
    return chr(int(decimal)) if decimal else " "


@lru_cache(maxsize=64)
def _dressed(needle: bytes) -> re.Pattern[str]:
    """A pattern of a text that `_packed` makes a needle of."""
    return re.compile(_BETWEEN.join(map(_letter, needle.decode())), re.IGNORECASE)


def _letter(letter: str) -> str:
    """A pattern of one letter or digit, escaped or not."""
    low, high = ord(letter), ord(letter.upper())
    return rf"(?>{letter}|(?:{_CODE}(?:{low:02x}|{high:02x})|{_NUMBER}(?:{low}|{high}))[;}}]?)"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
