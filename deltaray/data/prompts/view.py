"""How rows of somebody else's data become rows of ours: which part of a data set, which columns, which template."""

from dataclasses import dataclass, field
from typing import Any

from deltaray.data.prompts.rows import COLUMNS
from deltaray.data.prompts.turns import RowError
from deltaray.recipe.source import PLACE, Source
from deltaray.text.words import short

INSTEAD: dict[str, tuple[str, ...]] = {"prompt": ("messages",), "messages": ("prompt",)}
"""What a column that the recipe names takes the place of, besides one of its own name."""


@dataclass(frozen=True)
class View:
    """What `prompts`, `preferences` and tasks say of a data set besides its path."""

    config: str | None = None
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    answer: str | None = None
    answers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(source: Source) -> "View":
        return View(source.config, source.split, source.columns, source.template, source.answer, source.answers)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to read of prompts."""
        return self.wanted_of(COLUMNS)

    def wanted_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of our names, and what the recipe names."""
        return tuple(dict.fromkeys([*names, *self.columns.values()]))

    def row(self, raw: dict[str, Any], instead: dict[str, tuple[str, ...]] = INSTEAD) -> dict[str, Any]:
        """A row under our names, in the template: what the recipe names wins over what is there under our name.

        Raises:
            RowError: it has no such column, or no text to put into the template.
        """
        for ours, theirs in self.columns.items():
            if theirs not in raw:
                raise RowError(f"no column {theirs!r} (columns.{ours}); the row has {', '.join(raw)}")
        taken = {name: raw[theirs] for name, theirs in self.columns.items()}
        replaced = {it for name in taken for it in instead.get(name, ()) if it not in taken}
        gone = replaced.union(self.columns.values())
        row = {name: value for name, value in raw.items() if name not in gone} | taken
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
            raise RowError(f"the answer {short(given)!r} must be one of {', '.join(self.answers)} (answers)")
        return {"answer": self.answers[given]}


WHOLE = View()
