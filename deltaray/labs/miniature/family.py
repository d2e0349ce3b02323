"""The families of miniature models.

Capacity and the sloppiness of the corpus rise and fall together, as they do in real model families.  The
student stands above every rung.  All models, the student too, are trained until the learning rate has decayed
to zero: a student that was merely stopped early would profit from any gentle step, whatever its direction.

The specialists are models of one size, each of which has practised another area of the task beyond the weakest rung:
each is a teacher of one skill over that rung, and nothing else tells the two apart but size.

The other families serve the controlled experiments: a student of another architecture, a student's earlier self, and
models of two other tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedConfig, Qwen3Config

from deltaray.labs.miniature.member import SPLIT_SIZES, Batch, Member, Rows, Training
from deltaray.labs.miniature.sections import Outliner
from deltaray.labs.miniature.strings import Scribe
from deltaray.labs.miniature.task import Area, Splits, Writer, draw_corpus, make_habits, make_splits, rows
from deltaray.labs.miniature.tokenizer import PROMPT_LENGTH, RESPONSE_LENGTH, encode_problems


@cache
def family_splits() -> Splits:
    """The split of all problems that every family uses."""
    return make_splits(SPLIT_SIZES.prompts, SPLIT_SIZES.validation, SPLIT_SIZES.evaluation)


@dataclass(frozen=True)
class ModelSpec(Member):
    """A model that adds."""

    forget: float
    """How often the writer of its corpus forgets a carry (see `task.Writer`)."""

    @property
    def longest(self) -> int:
        return 2 * RESPONSE_LENGTH

    def writer(self, slip: float) -> Writer:
        """Who has written its corpus."""
        return Writer(self.forget, slip)

    def batches(self, seed: int, training: Training) -> Iterator[Batch]:
        """Freshly written sums. The habits depend on the seed alone, what is drawn and forgotten on the model too."""
        habits = make_habits(seed, training.habit_spread)
        writer, rng = self.writer(training.slip), self.rng(seed, 2)
        while True:
            problems = draw_corpus(family_splits(), writer, habits, training.batch, rng)
            ids = torch.from_numpy(encode_problems(*problems))
            yield ids, ids[:, PROMPT_LENGTH:]

    def rows(self) -> Rows:
        splits = family_splits()
        return {split: rows(getattr(splits, split), split) for split in ("prompts", "validation", "evaluation")}


@dataclass(frozen=True)
class Specialist(ModelSpec):
    """A member whose writer has practised one area."""

    practised: Area
    forget_practised: float

    def writer(self, slip: float) -> Writer:
        return Writer(self.forget, slip, self.practised, self.forget_practised)


@dataclass(frozen=True)
class Qwen3(ModelSpec):
    """A model that adds, of Qwen3's architecture: its queries and keys are normalised."""

    architecture: str = "qwen3"

    def config(self, training: Training) -> PreTrainedConfig:
        return Qwen3Config(**self.shape(training))


@dataclass(frozen=True)
class Earlier(ModelSpec):
    """What another member was after some of its steps."""

    of: str
    after: int

    @property
    def origin(self) -> str:
        return self.of

    @property
    def last_step(self) -> int:
        return self.after


LADDER = (
    ModelSpec("mini-xs", hidden=64, layers=2, intermediate=160, forget=0.92, steps=500),
    ModelSpec("mini-s", hidden=64, layers=2, intermediate=192, forget=0.82, steps=500),
    ModelSpec("mini-m", hidden=64, layers=2, intermediate=256, forget=0.68, steps=500),
    ModelSpec("mini-l", hidden=64, layers=2, intermediate=320, forget=0.55, steps=500),
)
"""Teachers, weakest first."""
STUDENT = ModelSpec("student", hidden=64, layers=3, intermediate=256, forget=0.42, steps=700)
AREAS = {"tens-low": Area(1, most=8), "tens-high": Area(1, least=9), "hundreds": Area(2)}
"""Carries into the tens whose own digits make none, into those that make or pass one, and into the hundreds."""
SPECIALISTS = tuple(
    Specialist(f"mini-{name}", 64, 2, 256, forget=0.92, steps=500, practised=area, forget_practised=0.5)
    for name, area in AREAS.items()
)
STUDENT_QWEN3 = Qwen3("student-qwen3", hidden=64, layers=3, intermediate=256, forget=0.42, steps=700)
STUDENT_EARLIER = Earlier(
    "student-earlier", hidden=64, layers=3, intermediate=256, forget=0.42, steps=700, of="student", after=100
)
OUTLINERS = (
    Outliner("two", hidden=64, layers=2, intermediate=160, steps=100, sections=2),
    Outliner("three", hidden=64, layers=2, intermediate=160, steps=100, sections=3),
    Outliner("student", hidden=64, layers=2, intermediate=256, steps=120, mean=6.0),
)
SCRIBES = (
    Scribe("mini-xs", hidden=64, layers=2, intermediate=160, steps=500, misread=0.92),
    Scribe("mini-m", hidden=64, layers=2, intermediate=256, steps=500, misread=0.68),
    Scribe("student", hidden=64, layers=3, intermediate=256, steps=700, misread=0.42),
)
TOP = ModelSpec("mini-xl", hidden=64, layers=2, intermediate=384, forget=0.42, steps=500)
"""A fifth teacher, as careful as the student and smaller: with it the ladder's deltas reach further."""
FAMILY = (*LADDER, STUDENT)
FAMILIES: Mapping[str, tuple[Member, ...]] = {
    "ladder": FAMILY,
    "specialists": (LADDER[0], *SPECIALISTS, STUDENT),
    "landscape": (*LADDER, TOP, STUDENT),
    "qwen3": (*LADDER, STUDENT_QWEN3),
    "earlier": (LADDER[2], STUDENT_EARLIER, STUDENT),
    "sections": OUTLINERS,
    "strings": SCRIBES,
}
"""By the name in a recipe. Members of two families are one model, but for those of other tasks, the last two."""
