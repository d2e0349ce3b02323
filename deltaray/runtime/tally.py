"""How many rows of one name failed, what is said of it, and when it is too many. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SHOWN = 3
"""Reasons that are shown, and kept."""


@dataclass
class Tally:
    """Rows of a teacher, a model or a scorer."""

    name: str
    unit: str = "responses"
    rows: int = 0
    failed: int = 0
    reasons: list[str] = field(default_factory=list)
    """The first different ones."""

    def add(self, rows: int, failed: int, reasons: Iterable[str]) -> None:
        self.rows += rows
        self.failed += failed
        if len(self.reasons) < SHOWN:
            self.reasons = list(dict.fromkeys([*self.reasons, *reasons]))[:SHOWN]

    def note(self) -> str:
        """For a line of progress; empty where nothing failed."""
        if not self.failed:
            return ""
        return f"{self.rows - self.failed:,} answered, {self.failed:,} failed (first reason: {self.reasons[0]})"

    def is_too_much(self, max_share: float) -> bool:
        """All rows, or more than the share, however few there are."""
        return self.failed > 0 and (self.failed == self.rows or self.failed > max_share * self.rows)

    def told(self) -> str:
        return f"{self.name}: {self.failed:,} of {self.rows:,} {self.unit} failed"

    def line(self) -> str:
        """What failed, in one line."""
        return f"{self.told()}: {'; '.join(self.reasons)}{' …' if self.failed > len(self.reasons) else ''}"


def broken(tallies: Sequence[Tally], max_share: float, remedy: str) -> str:
    """What ends a stage in which too much failed."""
    lines = []
    for tally in tallies:
        more = f", more than failures.max_share {max_share:g} allows" if tally.failed < tally.rows else ""
        lines += [f"{tally.told()}{more}; the first reasons:", *(f"  {reason}" for reason in tally.reasons)]
    return "\n".join([*lines, remedy])
