"""What can be counted in a text without understanding it, for scorers and filters. Pure, and linear in the text."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from deltaray.recipe.scorers import Surface
from deltaray.score.answers import fenced_blocks
from deltaray.score.response import Response, Score, ScoreFunction

_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]{1,300}\*\*")
_BOLD_SECTION = re.compile(r"^[ \t]*(?:\d{1,3}[.)][ \t]+)?\*\*(?=\S)[^*\n]{1,300}\*\*", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_TABLE = re.compile(r"^[ \t]*(?:\|[ \t]*)?:?-{3,}:?[ \t]*\|", re.MULTILINE)
_WORD = re.compile(r"\w+")
_CJK = re.compile("[\u4e00-\u9fff]")
_FENCED = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_ENDS = ".!?。！？\n"
_SENTENCE_END = re.compile(rf"(?<=[{_ENDS[:-1]}])\s+|\n+")
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'t|not| not)|won't|will not|must decline)"
    r"|as an ai\b|i apologi[sz]e|unfortunately,? i (?:can|am))",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 200
"""Characters from the start: a refusal says so at once, a passing `I can't` comes later."""
PHRASE = 8
"""Words of a phrase whose repetitions count."""
SHORTEST = 12
"""Characters of a sentence or paragraph that counts as repeated: `Yes.` does not."""


def cjk_share(text: str) -> float:
    """Share of Chinese characters (U+4E00 … U+9FFF) among all that are not white space."""
    if text.isascii():
        return 0.0
    visible = sum(len(part) for part in text.split())
    return len(_CJK.findall(text)) / visible if visible else 0.0


def is_refusal(text: str) -> bool:
    return bool(_REFUSAL.search(text[:_REFUSAL_WITHIN].replace("’", "'")))


def repeated_sentences(text: str) -> int:
    """How often the most frequent sentence or paragraph occurs; code blocks do not count."""
    return _most(_sentences(_prose(text)))


def repeated_phrases(text: str) -> int:
    """How often the most frequent phrase of `PHRASE` words occurs; code blocks do not count."""
    words = _WORD.findall(_prose(text).lower())
    return _most(_phrases(words, Counter(words), 1))


def is_repetitive(text: str, sentences: int, phrases: int) -> bool:
    """Whether a sentence or paragraph occurs `sentences` times, or a phrase `phrases` times.

    Most texts have fewer sentences, and no word so often, and are not searched any further.
    """
    prose = _prose(text)
    if 1 + sum(map(prose.count, _ENDS)) >= sentences and _most(_sentences(prose)) >= sentences:
        return True
    words = _WORD.findall(prose.lower())
    counts = Counter(words)
    return max(counts.values(), default=0) >= phrases and _most(_phrases(words, counts, phrases)) >= phrases


def _prose(text: str) -> str:
    return _FENCED.sub("\n", text) if "```" in text else text


def _sentences(prose: str) -> Iterator[str]:
    """Sentences, and paragraphs of several lines."""
    yield from _SENTENCE_END.split(prose)
    yield from (part for part in prose.split("\n\n") if "\n" in part.strip())


def _phrases(words: Sequence[str], counts: Mapping[str, int], least: int) -> Iterator[str]:
    """The phrases that may occur `least` times: their first word does."""
    starts = (at for at in range(len(words) - PHRASE + 1) if counts[words[at]] >= least)
    return (" ".join(words[at : at + PHRASE]) for at in starts)


def _most(parts: Iterable[str]) -> int:
    counts = Counter(stripped for part in parts if len(stripped := part.strip()) >= SHORTEST)
    return max(counts.values(), default=0)


def _distinct_words(text: str) -> float:
    words = _WORD.findall(text.lower())
    return len(set(words)) / len(words) if words else 0.0


STATISTICS: dict[str, Callable[[str], float]] = {
    "characters": len,
    "words": lambda text: len(_WORD.findall(text)),
    "lines": lambda text: len(text.splitlines()),
    "headings": lambda text: len(_HEADING.findall(text)),
    "bold": lambda text: len(_BOLD.findall(text)),
    "bold_sections": lambda text: len(_BOLD_SECTION.findall(text)),
    "list_items": lambda text: len(_LIST_ITEM.findall(text)),
    "code_blocks": lambda text: len(fenced_blocks(text)),
    "tables": lambda text: len(_TABLE.findall(text)),
    "repetition": repeated_sentences,
    "distinct_words": _distinct_words,
    "cjk": cjk_share,
    "refusal": is_refusal,
    "questions": lambda text: text.count("?"),
}
"""By the names that a recipe may use (`recipe.scorers.Statistic`)."""


def surface_scorer(spec: Surface) -> ScoreFunction:
    def function(response: Response) -> Score:
        parts = {name: float(count(response.text)) for name, count in STATISTICS.items()}
        return Score(parts[spec.statistic], parts=parts)

    return function
