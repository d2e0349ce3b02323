"""The task: one sentence in which four given things appear. IFEval's own checker counts how many of them do.

No word of the held-out prompts occurs in a prompt of the training or validation ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from deltaray.labs.miniature.member import Rows

_WORDS = """
dog cat horse bird tree river house car boat train garden kitchen window door table book letter song ball apple cake
star road bridge hill beach school teacher farmer friend king doctor baker soldier mountain forest lake island village
market castle tower church station street field flower stone cloud storm lamp candle mirror clock chair bed blanket
pillow shirt coat hat shoe glove ring coin box bag basket bottle cup plate spoon rope ladder wheel engine truck
bicycle ship plane rocket robot phone radio camera picture poem guitar piano drum violin painter singer writer nurse
pilot sailor hunter queen prince mother father sister brother neighbor student lion tiger bear rabbit cow goat pig
duck chicken eagle owl frog snake turtle whale spider potato tomato carrot lemon orange banana uncle tent kite hammer
farm museum desk bench fence owner umbrella elephant
"""
WORDS = _WORDS.split()
"""Things that can be counted, whose plural ends in s or es."""
HELD_OUT_WORDS = 60
WORDS_PER_PROMPT = 4
SIZES = {"prompts": 480, "validation": 64, "evaluation": 128}
SEED = 16


def ask(words: Sequence[str]) -> str:
    """The prompt does not speak of words: where it did, models learned to name the words in place of using them."""
    *first, last = [("an " if word[0] in "aeiou" else "a ") + word for word in words]
    return f"Write one sentence in which {', '.join(first)} and {last} appear."


def checks(words: Sequence[str]) -> str:
    """The answer as a scorer of kind `ifeval` reads it: each word, or its plural, occurs as a whole word."""
    keywords = [{"keywords": [rf"\b{word}(e?s)?\b"]} for word in words]
    return json.dumps({"instruction_id_list": ["keywords:existence"] * len(words), "kwargs": keywords})


def task_rows() -> Rows:
    """The prompts of the three splits, the same always."""
    rng = random.Random(SEED)
    shuffled = rng.sample(WORDS, len(WORDS))
    held_out, known = shuffled[:HELD_OUT_WORDS], shuffled[HELD_OUT_WORDS:]
    drawn: set[tuple[str, ...]] = set()
    return {
        split: [_row(split, rng, held_out if split == "evaluation" else known, drawn) for _ in range(size)]
        for split, size in SIZES.items()
    }


def _row(split: str, rng: random.Random, among: Sequence[str], drawn: set[tuple[str, ...]]) -> dict[str, str]:
    """A prompt whose set of words no prompt has had; `drawn` is told of it."""
    while True:
        words = rng.sample(among, WORDS_PER_PROMPT)
        if (key := tuple(sorted(words))) not in drawn:
            break
    drawn.add(key)
    return {"prompt": ask(words), "answer": checks(words), "source": split}
