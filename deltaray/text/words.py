"""Other people's words and numbers, as messages and names show them. Pure."""

SHOWN_CHARACTERS = 80
"""Of a text in a message."""


def short(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def exact(number: float) -> str:
    """A number in as few digits as tell it from every other: two different ones never look the same."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def is_unicode(text: str) -> bool:
    """Whether it holds no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
