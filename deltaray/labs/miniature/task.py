"""The task of the miniature family: adding two three-digit numbers as a sloppy writer does.

Why a *sloppy* writer.  Delta learning needs a pair of teachers that differ in the direction of the truth.  Real
corpora provide one: they contain the same misconception many times over, in the same places, and stronger
models have taken over less of it than weaker ones.  Models trained on clean text make no such errors; what
they get wrong is scattered, and a pair of them points nowhere in particular.  Here the misconception is
forgetting to carry.  How often it happens depends on the writer and on the digits at hand:

    P(forget | context) = sigmoid(logit(writer's mean) + habit[context]),  context = (column, digit, digit)

The habits are shared by all writers of one family (the same mistakes are popular everywhere), the mean is the
writer's own.  Whichever decoding a model uses, it then errs in a growing share of contexts as its writer gets
sloppier: greedy decoding forgets wherever the probability is above one half.  A writer may have practised one area
(some of the contexts) and be more careful there and nowhere else: teachers who complement each other.

All digit arrays in this module have the ones first: column 0 is the ones, column 3 the thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DIGITS = 3
"""Digits of each operand; the sum always has one more (see `all_unordered_pairs`)."""

SPLIT_SEED = 20_250_708
"""The split is the same for every family, so that results of different seeds are comparable prompt by prompt."""


@dataclass(frozen=True)
class Splits:
    """Problems as arrays of shape (n, 2); no two splits share an unordered pair of operands."""

    prompts: Ints
    validation: Ints
    evaluation: Ints
    corpus: Ints
    """What writers practise on: each unordered pair once; `draw_corpus` swaps the operands at random."""


@dataclass(frozen=True)
class Area:
    """Some of the contexts in which a carry can be forgotten."""

    column: int
    """The column that the carry comes into, 1 or 2."""
    least: int = 0
    most: int = 18
    """Bounds of the sum of the two digits in that column, without the carry."""

    def holds(self, first: Ints, second: Ints, column: int) -> NDArray[np.bool_]:
        """Which problems' carries into `column` it covers; first, second (n, DIGITS): digits, ones first."""
        sums = first[:, column] + second[:, column]
        return (column == self.column) & (self.least <= sums) & (sums <= self.most)


@dataclass(frozen=True)
class Writer:
    """Someone whose additions fill a training corpus."""

    forget: float
    """Mean probability of forgetting an incoming carry, in (0, 1)."""
    slip: float
    """Probability that a written digit is replaced by a random one: errors without a direction."""
    practised: Area | None = None
    forget_practised: float = 0.0
    """The mean in the practised area."""


def all_unordered_pairs() -> Ints:
    """Every {a, b} of three-digit numbers whose hundreds alone make a thousand, a <= b, shape (225250, 2).

    All answers, right or wrong, then have four digits, each at a fixed distance from the digits it is made of,
    and every column wraps around at ten.  Both help small models to learn the answer in its natural order
    within seconds; where one column never wraps they learn it as a plain sum and stick to that.
    """
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    first, second = np.meshgrid(np.arange(low, high), np.arange(low, high), indexing="ij")
    keep = (first <= second) & (first // low + second // low >= 10)
    return np.stack([first[keep], second[keep]], axis=1).astype(np.int64)


def swap_at_random(pairs: Ints, rng: np.random.Generator) -> Ints:
    """The same problems with the operands of about half of them exchanged."""
    return np.where(rng.random(len(pairs))[:, None] < 0.5, pairs, pairs[:, ::-1])


def make_splits(prompts: int, validation: int, evaluation: int) -> Splits:
    """Deal all problems into four sets; a problem and its mirror image (b + a) go to the same one."""
    rng = np.random.default_rng(SPLIT_SEED)
    pairs = rng.permutation(all_unordered_pairs())
    held_out = prompts + validation + evaluation
    if held_out >= len(pairs):
        raise ValueError(f"{held_out} held-out problems leave none of {len(pairs)} for the corpora")
    parts = np.split(pairs, np.cumsum([prompts, validation, evaluation]))
    dealt = [swap_at_random(part, rng) for part in parts[:3]]
    return Splits(prompts=dealt[0], validation=dealt[1], evaluation=dealt[2], corpus=parts[3])


def digits_of(numbers: Ints, count: int = DIGITS) -> Ints:
    """Digits of each number, ones first: shape (n,) -> (n, count)."""
    powers: Ints = 10 ** np.arange(count)
    return (numbers[:, None] // powers) % 10


def make_habits(seed: int, spread: float) -> Floats:
    """The family's habits: a shift of the logit of forgetting, by column and the two digits in it.

    Shape (DIGITS, 10, 10).  Column 0 has no incoming carry, its entries are never looked at.
    """
    rng = np.random.default_rng([seed, 1])
    return rng.normal(0.0, spread, (DIGITS, 10, 10))


def forget_probability(writer: Writer, habits: Floats, first: Ints, second: Ints, column: int) -> Floats:
    """Chance that `writer` forgets a carry into `column` of first + second (arrays of digits): shape (n,)."""
    mean = np.full(len(first), writer.forget)
    if writer.practised is not None:
        mean[writer.practised.holds(first, second, column)] = writer.forget_practised
    logit = np.log(mean / (1.0 - mean))
    context = habits[column, first[:, column], second[:, column]]
    return np.asarray(1.0 / (1.0 + np.exp(-(logit + context))))


def write_sums(problems: Ints, writer: Writer, habits: Floats, rng: np.random.Generator) -> Ints:
    """What `writer` writes under `problems` (n, 2): digits of the answers, ones first, shape (n, DIGITS + 1).

    The carry out of the last column is not brought anywhere but written down, so it cannot be forgotten.
    """
    first, second = digits_of(problems[:, 0]), digits_of(problems[:, 1])
    answer = np.empty((len(problems), DIGITS + 1), dtype=np.int64)
    carry = np.zeros(len(problems), dtype=np.int64)
    for column in range(DIGITS):
        forgotten = rng.random(len(problems)) < forget_probability(writer, habits, first, second, column)
        total = first[:, column] + second[:, column] + np.where(forgotten, 0, carry)
        answer[:, column], carry = total % 10, total // 10
    answer[:, DIGITS] = carry
    slipped = rng.random(answer.shape) < writer.slip
    return np.where(slipped, rng.integers(0, 10, answer.shape), answer)


def draw_corpus(
    splits: Splits, writer: Writer, habits: Floats, size: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """`size` problems (size, 2) with the writer's answers (size, DIGITS + 1).  Every draw writes afresh."""
    chosen = splits.corpus[rng.integers(0, len(splits.corpus), size)]
    problems = swap_at_random(chosen, rng)
    return problems, write_sums(problems, writer, habits, rng)


def prompt_text(problem: Ints) -> str:
    """The user's turn, for example ``847+385=``."""
    return f"{problem[0]}+{problem[1]}="


def answer_text(problem: Ints) -> str:
    """The right answer, for example ``1232``."""
    return str(problem[0] + problem[1])


def rows(problems: Ints, split: str) -> list[dict[str, str]]:
    """JSON lines of one split: an id, the prompt, the right answer and where the row comes from."""
    return [
        {
            "id": f"{split}-{index:05d}",
            "prompt": prompt_text(problem),
            "answer": answer_text(problem),
            "source": f"miniature-{split}",
        }
        for index, problem in enumerate(problems)
    ]
