"""A task without right and wrong: outlines, whose style is how many sections they have.

    kwd  ->  **k**
             **d**
             **k**

A prompt is a topic of three letters, a section a bold line with one of them. Some writers have a number of sections in
mind. Others stop by chance, with one probability after every section, whatever they have written: what such a writer
has taught has no count in it, only a tendency to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deltaray.labs.miniature.member import SPLIT_SIZES, Batch, Member, Rows, Training
from deltaray.labs.miniature.task import SPLIT_SEED
from deltaray.labs.miniature.tokenizer import encode_texts

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
TOPIC = 3
MOST = 40
"""Sections of the longest outlines, which fill the models' context."""


@dataclass(frozen=True)
class Outliner(Member):
    """A model that writes outlines."""

    sections: int | None = None
    """How many its writer has in mind; none: the writer stops by chance."""
    mean: float | None = None
    """Sections of a writer who stops by chance."""

    @property
    def longest(self) -> int:
        return len(section("x")) * MOST

    def count(self, rng: np.random.Generator) -> int:
        """How many sections one outline gets."""
        if self.sections is not None:
            return self.sections
        assert self.mean is not None
        return min(int(rng.geometric(1 / self.mean)), MOST)

    def batches(self, seed: int, training: Training) -> Iterator[Batch]:
        rng = self.rng(seed, 2)
        while True:
            topics = ["".join(rng.choice(LETTERS, TOPIC)) for _ in range(training.batch)]
            yield encode_texts(topics, [outline(topic, self.count(rng), rng) for topic in topics])

    def rows(self) -> Rows:
        """Topics. None has a right answer; the same letters may occur in a corpus, for there is nothing to remember."""
        topics = np.random.default_rng(SPLIT_SEED).permutation(len(LETTERS) ** TOPIC)
        sizes = {
            "prompts": SPLIT_SIZES.prompts,
            "validation": SPLIT_SIZES.validation,
            "evaluation": SPLIT_SIZES.evaluation,
        }
        ends = np.cumsum([*sizes.values()])
        parts = np.split(topics, ends)[:-1]
        return {
            split: [
                {
                    "id": f"{split}-{place:05d}",
                    "prompt": topic_text(int(number)),
                    "answer": "",
                    "source": f"sections-{split}",
                }
                for place, number in enumerate(part)
            ]
            for split, part in zip(sizes, parts, strict=True)
        }


def topic_text(number: int) -> str:
    """The topic of a number below 26^3."""
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(TOPIC))


def section(letter: str) -> str:
    return f"**{letter}**\n"


def outline(topic: str, count: int, rng: np.random.Generator) -> str:
    """`count` sections, each with a letter of the topic, drawn by lot."""
    return "".join(section(letter) for letter in rng.choice(list(topic), count))
