"""Numbers as people read them: percent on a 0..1 scale, a real minus sign, three digits elsewhere."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from .model import Evaluations

ABSENT = "–"


@dataclass(frozen=True)
class Scale:
    """How scores are written: as percent when all of them lie in 0..1, otherwise as they are."""

    percent: bool

    @classmethod
    def of(cls, evaluations: Evaluations) -> Scale:
        """The scale of all scores of a study together, so that its tasks compare."""
        measures = [item for model in evaluations.models for item in [*model.tasks.values(), model.mean]]
        return cls(all(0.0 <= item.mean <= 1.0 for item in measures if item.mean is not None))

    def digits(self, value: float | None) -> str:
        """A score, or the size of an error, without its unit."""
        if value is None:
            return ABSENT
        return _minus(f"{100 * value:.1f}" if self.percent else f"{value:.3g}")

    def score(self, value: float | None) -> str:
        """A score with its unit."""
        return self.digits(value) + (" %" if self.percent and value is not None else "")

    def signed(self, value: float) -> str:
        """A difference with its sign, in points of percent or of the score."""
        return _minus(f"{100 * value:+.1f}" if self.percent else f"{value:+.3g}")


def significant(value: float | None, digits: int = 3) -> str:
    """A number in `digits` figures; large ones whole, so that none needs an exponent."""
    if value is None or abs(value) >= 1000:
        return count(value)
    return _minus(f"{value:.{digits}g}")


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return ABSENT if value is None else _minus(f"{value:,.0f}")


def share(value: float | None) -> str:
    """A fraction as percent."""
    return ABSENT if value is None else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Wall time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(epoch: float | None) -> str:
    """A time of day in UTC, so that a report reads the same everywhere."""
    if epoch is None:
        return ABSENT
    return datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def listed(items: list[str] | tuple[str, ...]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
