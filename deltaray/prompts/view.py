"""How rows of somebody else's data become rows of prompts: which part of a data set, which columns, which template."""

from dataclasses import dataclass, field
from typing import Any

from deltaray.prompts.rows import COLUMNS
from deltaray.prompts.turns import RowError, short
from deltaray.recipe.source import PLACE, Source


@dataclass(frozen=True)
class View:
    """What `prompts` and tasks say of a data set besides its path."""

    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    answer: str | None = None
    answers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(source: Source) -> "View":
        return View(source.config, source.split, source.columns, source.template, source.answer, source.answers)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to read; `COLUMNS` itself where all have our names."""
        return tuple(dict.fromkeys([*COLUMNS, *self.columns.values()])) if self.columns else COLUMNS

    def row(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A row under our names, in the template.

        Raises:
            RowError: it has no such column, or no text to put into the template.
        """
        for ours, theirs in self.columns.items():
            if theirs not in raw:
                raise RowError(f"no column {theirs!r} (columns.{ours}); the row has {', '.join(raw)}")
        taken = {name: raw[theirs] for name, theirs in self.columns.items()}
        row = {name: value for name, value in raw.items() if name not in self.columns.values()} | taken
        row |= self._answer(row)
        if self.template is None:
            return row
        if not isinstance(row.get("prompt"), str):
            raise RowError("`template` goes around a text in `prompt`, and there is none")
        return row | {"prompt": self.template.replace(PLACE, row["prompt"])}

    def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.answer is not None:
            return {"answer": self.answer}
        if not self.answers:
            return {}
        given = str(row.get("answer"))
        if given not in self.answers:
            raise RowError(f"the answer {short(given)!r} is none of {', '.join(self.answers)} (answers)")
        return {"answer": self.answers[given]}


WHOLE = View()
