"""Text of others on a terminal: what would move the cursor, recolour, reorder or ring is written out. Pure."""

import re

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but tab and line break, what turns the direction of writing round, and halves of characters."""


def printable(text: str) -> str:
    """The text without colours, every other control character written out (`\\x1b`); a file's name stays legible."""
    return _UNSEEN.sub(_escape, _COLOURS.sub("", text))


def one_line(text: str) -> str:
    """As `printable`, in one line: somebody's words must not look like a line of ours."""
    return printable(" ".join(text.split()))


def json_escaped(text: str) -> str:
    """JSON that means the same and holds no such characters, which `json.dumps` leaves in."""
    return re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
