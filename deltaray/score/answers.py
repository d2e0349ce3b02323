"""Where in a response its final answer stands: numbers, letters, JSON, code. Pure.

Every pattern is linear: a response of a megabyte of one character costs milliseconds.
"""

import re
from fractions import Fraction

_CUE = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)+[\s*:]*", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+−])?\\[dt]?frac\{[-+−]?\d{1,40}\}\{\d{1,40}\}"  # \frac{3}{4}
    r"|(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3}){1,12}|\d{1,60})(?:\.\d{1,60})?(?:[eE][-+]?\d{1,3}(?!\d))?"
    r"(?:\s?/\s?\d{1,40})?"
    r"|(?:(?<![\w)])[-+−])?\.\d{1,60}"
)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([-+]?\d+)\}\{(\d+)\}")
_FENCE = re.compile(r"[ \t]*```[ \t]*([A-Za-z0-9_+.-]*)")
_LETTER = re.compile(r"(?:\\text\{)?[(\[*\s]{0,4}([A-J])(?![A-Za-z0-9'])")
_ALONE = re.compile(r"^[\s(\[*]{0,4}([A-J])[\s)\].:*]{0,4}$", re.MULTILINE)


def final_number(text: str) -> tuple[Fraction, bool] | None:
    """(the number that a response ends with, whether it is in per cent); None if there is none.

    It is looked for in the last \\boxed{}, after the last ####, after the last `answer is` or `answer:`, and then
    anywhere, from the end.
    """
    for place in _places(text):
        found = list(_NUMBER.finditer(place))
        if found:
            number = found[0] if place is not text else found[-1]
            value = _value(number[0])
            if value is not None:
                return value, place[number.end() :].lstrip().startswith(("%", "\\%"))
    return None


def final_letter(text: str) -> str | None:
    """The choice A … J that a response settles on; a letter inside a sentence is none."""
    *marked, _ = _places(text)
    for place in marked:
        if found := _LETTER.match(place):
            return found[1]
    alone = _ALONE.findall(text)
    return alone[-1] if alone else None


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language in lower case, content) of each ``` block; one that is never closed is none."""
    blocks: list[tuple[str, str]] = []
    language, inside = None, list[str]()
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line)
        if language is None:
            language, inside = (fence[1].lower() if fence else None), []
        elif fence and line.strip() == "```":
            blocks.append((language, "".join(inside)))
            language = None
        else:
            inside.append(line)
    return blocks


def python_programs(text: str) -> list[str]:
    """The programs in a response, the last of which is meant: its fenced Python blocks, or else all of the text.

    Whether one compiles is found out where it runs: text that breaks a compiler would end this process.
    """
    return [content for language, content in fenced_blocks(text) if language in ("", "python", "py", "python3")] or [
        text
    ]


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…}, braces balanced."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin, depth = text.index("{", start) + 1, 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def _places(text: str) -> list[str]:
    """Where a final answer may stand, the most telling first; the last is all of the text."""
    inside, (_, hashes, after) = boxed(text), text.rpartition("####")
    cues = list(_CUE.finditer(text))
    inside = inside and inside.rpartition("=")[2]  # of x = 5 the 5
    marked = [inside, after if hashes else None, text[cues[-1].end() :] if cues else None]
    return [*(place.strip() for place in marked if place is not None), text]


def _value(number: str) -> Fraction | None:
    text = number.replace("−", "-").replace(",", "").replace(" ", "")
    if found := _FRACTION.fullmatch(text):
        text = f"{found[1]}{found[2]}/{found[3]}".replace("+-", "-").replace("--", "")
    above, slash, below = text.partition("/")
    try:
        return Fraction(above) / Fraction(below) if slash else Fraction(above)
    except (ValueError, ZeroDivisionError):
        return None
