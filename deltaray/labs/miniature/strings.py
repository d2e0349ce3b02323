"""A second domain: words of five letters to be copied, turned round or sorted, by a scribe who misreads letters.

    flip kdqab  ->  baqdk        who misreads d and q writes  bapbk

As with the sums the errors have a direction: some letters are taken for others, never the other way round, and where
that is likely is the same for all scribes of one family. How likely depends on the scribe:

    P(misread | context) = sigmoid(logit(scribe's mean) + habit[context]),  context = (operation, letter, place)

The operation is done on the true letters; what is misread is written wrong and not moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deltaray.labs.miniature.member import SPLIT_SIZES, Batch, Member, Rows, Training
from deltaray.labs.miniature.task import SPLIT_SEED, Floats, Ints
from deltaray.labs.miniature.tokenizer import encode_texts

OPERATIONS = ("copy", "flip", "sort")
LETTERS = 26
LENGTH = 5
MISREAD = {"d": "b", "q": "p", "n": "m", "v": "u", "j": "i", "z": "s"}
"""Letter -> what it is taken for."""
HELD_OUT = {"evaluation": 0, "validation": 1, "prompts": 2}
"""A word belongs to a split by the sum of its letters modulo `GROUPS`; all others are for the corpora."""
GROUPS = 8


@dataclass(frozen=True)
class Scribe(Member):
    """A model that transforms words."""

    misread: float
    """Mean probability that its scribe misreads a letter that can be misread."""

    @property
    def longest(self) -> int:
        return 2 * LENGTH

    def batches(self, seed: int, training: Training) -> Iterator[Batch]:
        habits = np.random.default_rng([seed, 1]).normal(0.0, training.habit_spread, (len(OPERATIONS), LETTERS, LENGTH))
        rng = self.rng(seed, 2)
        while True:
            words = draw_words(training.batch, rng, range(len(HELD_OUT), GROUPS))
            operations = rng.integers(0, len(OPERATIONS), len(words))
            answers = written(operations, transformed(operations, words), self.misread, habits, training.slip, rng)
            yield encode_texts(prompt_texts(operations, words), texts(answers))

    def rows(self) -> Rows:
        rng = np.random.default_rng(SPLIT_SEED)
        return {split: split_rows(split, getattr(SPLIT_SIZES, split), rng) for split in HELD_OUT}


def split_rows(split: str, size: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """JSON lines of one split, no two of them alike."""
    words = np.unique(draw_words(2 * size, rng, [HELD_OUT[split]]), axis=0)
    words = rng.permutation(words)[:size]
    operations = rng.integers(0, len(OPERATIONS), size)
    rows = zip(prompt_texts(operations, words), texts(transformed(operations, words)), operations.tolist(), strict=True)
    return [
        {"id": f"{split}-{place:05d}", "prompt": prompt, "answer": answer, "source": OPERATIONS[operation]}
        for place, (prompt, answer, operation) in enumerate(rows)
    ]


def draw_words(count: int, rng: np.random.Generator, groups: range | list[int]) -> Ints:
    """`count` words of some groups: (count, LENGTH), letters from 0."""
    drawn = rng.integers(0, LETTERS, (4 * GROUPS * count // len(groups), LENGTH))
    return drawn[np.isin(drawn.sum(axis=1) % GROUPS, groups)][:count]


def transformed(operations: Ints, words: Ints) -> Ints:
    """The right answers: (n,) and (n, LENGTH) -> (n, LENGTH)."""
    all_of_them = np.stack([words, words[:, ::-1], np.sort(words, axis=1)])
    return np.asarray(all_of_them[operations, np.arange(len(words))])


def written(
    operations: Ints, answers: Ints, misread: float, habits: Floats, slip: float, rng: np.random.Generator
) -> Ints:
    """What a scribe writes for the right answers (n, LENGTH); slips are errors without a direction."""
    taken_for = np.arange(LETTERS)
    for letter, other in MISREAD.items():
        taken_for[ord(letter) - ord("a")] = ord(other) - ord("a")
    logit = np.log(misread / (1.0 - misread)) + habits[operations[:, None], answers, np.arange(LENGTH)]
    misreads = rng.random(answers.shape) < 1.0 / (1.0 + np.exp(-logit))
    found = np.where(misreads, taken_for[answers], answers)
    slips = rng.random(answers.shape) < slip
    return np.where(slips, rng.integers(0, LETTERS, answers.shape), found)


def texts(words: Ints) -> list[str]:
    return ["".join(chr(ord("a") + letter) for letter in word) for word in words.tolist()]


def prompt_texts(operations: Ints, words: Ints) -> list[str]:
    """For example ``flip kdqab``."""
    return [f"{OPERATIONS[it]} {word}" for it, word in zip(operations.tolist(), texts(words), strict=True)]
