"""An existing preference data set, brought into the store as prompts and as responses of two teachers: its sides.

From there everything is as if two models had answered: pairings, scores, filters and reference log-probs need not know.
A prompt that occurs several times has several samples, in the order of the data set.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from deltaray.data.contracts import PROMPTS, RESPONSES, SCORES
from deltaray.data.prompts.answers import CALLS_TOOLS, NOT_UNICODE, Answer, split_side
from deltaray.data.prompts.formats import Say, open_rows, row_door, silent
from deltaray.data.prompts.rows import PromptRow, compact, prompt_row
from deltaray.data.prompts.seen import Seen
from deltaray.data.prompts.shards import prompt_table
from deltaray.data.prompts.source import reading_of
from deltaray.data.prompts.turns import RowError, same_beginning
from deltaray.data.prompts.view import View
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.recipe.recipe import Preferences

KEY = "preferences.path"
SIDES = ("chosen", "rejected")
SCORE_COLUMNS = {
    side: (f"{side}_score", f"score_{side}", f"{side}_rating", f"{side}-rating", f"rating_{side}") for side in SIDES
}
ABOUT_PROMPTS = ("id", "system", "tools", "answer", "source")
COLUMNS = ("prompt", *ABOUT_PROMPTS, *SIDES, *SCORE_COLUMNS["chosen"], *SCORE_COLUMNS["rejected"])
INSTEAD: dict[str, tuple[str, ...]] = {f"{side}_score": SCORE_COLUMNS[side] for side in SIDES}
"""A column of scores that the recipe names is the only one."""
PROMPT_REFUSED = "prompt refused"
READER = 2
"""Changes when the same rows are read in another way."""


class Preference(NamedTuple):
    """One row of a preference data set."""

    prompt: PromptRow
    answers: tuple[Answer, Answer]  # chosen, rejected
    scores: tuple[float | None, float | None]

    @property
    def texts(self) -> tuple[str, str]:
        return self.answers[0].text, self.answers[1].text


def read_preferences(section: Preferences, say: Say = silent) -> Iterator[Preference]:
    """The rows of a preference data set, each as soon as it is read and checked.

    Args:
        say: is told what the user should know of what is read.
    Raises:
        UserError: names the file, the row and what to do; raised when that row is reached, and at the end if most rows
            score their chosen side lower.
    """
    better = worse = rows = 0
    view, seen, failed = View.of(section), Seen(section.path), Counter[str]()
    for number, raw in open_rows(section.path, KEY, view.wanted_of(COLUMNS), view, say):
        with row_door(section.path, number):
            row = preference_row(view.row(raw, INSTEAD))
        seen.first(row.prompt, number)
        failed.update(_kind(row, answer) for answer in row.answers)
        if None not in row.scores:
            better += (row.scores[0] or 0) > (row.scores[1] or 0)
            worse += (row.scores[0] or 0) < (row.scores[1] or 0)
        yield row
        rows += 1
        if rows == section.limit:
            break
    if worse > better:
        raise UserError(
            f"{section.path}: chosen scores lower than rejected in {worse:,} of {better + worse:,} rows ({KEY}): the "
            "columns look exchanged; rename them"
        )
    if not rows:
        raise UserError(f"{section.path}: holds no rows ({KEY}); write `prompt`, `chosen` and `rejected`")
    _tell_failed(failed, 2 * rows, say)


def _kind(row: Preference, answer: Answer) -> str:
    """Under what an answer's failure is counted."""
    return PROMPT_REFUSED if row.prompt["error"] else str(answer.error).partition(":")[0]


def _tell_failed(failed: Counter[str], answers: int, say: Say) -> None:
    """What becomes of answers that are read and cannot be trained."""
    words = {CALLS_TOOLS: "call tools, which is not trained", NOT_UNICODE: "hold text that is not Unicode"}
    for kind, what in (words | {PROMPT_REFUSED: "belong to a prompt that is not Unicode"}).items():
        if failed[kind]:
            say(f"{KEY}: {failed[kind]:,} of {answers:,} answers {what}: the funnel counts their pairs ({kind!r})")


def preference_row(raw: dict[str, Any]) -> Preference:
    """A row in the forms of TRL and open-instruct: texts beside a `prompt`, turns beside one, or whole conversations.

    Raises:
        RowError: it is none of these.
    """
    for side in SIDES:
        if raw.get(side) is None:
            raise RowError(f"no `{side}`; the row has {', '.join(raw) or 'nothing'}")
    (before, chosen), (other, rejected) = (split_side(raw, side) for side in SIDES)
    if len(before) != len(other) or not same_beginning(before, other):
        raise RowError("chosen and rejected answer different conversations; they may differ in the last turn alone")
    prompt = prompt_row({key: raw.get(key) for key in ABOUT_PROMPTS} | {"messages": before})
    scores = [next((raw[name] for name in SCORE_COLUMNS[side] if raw.get(name) is not None), None) for side in SIDES]
    return Preference(prompt, (chosen, rejected), (_number(scores[0]), _number(scores[1])))


def _number(value: Any) -> float | None:
    """A score; None where it is not finite, which is how tables say that there is none."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        raise RowError(f"a score must be a number, not {value!r}") from None
    return number if number is not None and math.isfinite(number) else None


# --- into the store ---------------------------------------------------------------------------------------------
def check_preferences(store: Store, section: Preferences, say: Say = silent) -> int:
    """Reads all rows and writes nothing; returns how many prompts there are.

    Raises:
        UserError: the first mistake in the file, or the store holds the rows of another.
    """
    if store.exists(Store.preferences):
        record = store.read_json(Store.preferences, {"reading": dict, "prompts": int})
        if record["reading"] == _reading(section):
            return int(record["prompts"])
        if record["reading"].get("reader") != READER:
            raise UserError(
                f"{store.out} was made by an earlier version of deltaray, which read {section.path} in another way; "
                "use another `out` (--set out=FOLDER)"
            )
        raise UserError(f"{store.out} belongs to another recipe: {section.path} has changed; use another `out`")
    return len({compact(row.prompt["prompt_id"]) for row in read_preferences(section, say)})


def _reading(section: Preferences) -> dict[str, Any]:
    """What decides which rows are read, and how."""
    asked = section.model_dump(mode="json", exclude={"path"})
    return {**asked, "reader": READER, "files": reading_of(section.path, KEY, View.of(section))}


def store_preferences(store: Store, section: Preferences, shard_size: int, unit_size: int) -> None:
    """Writes the prompts and both sides' responses; the record last, so that a kill costs another reading only."""
    if store.exists(Store.preferences):
        return
    reading = _reading(section)
    writer = _Writer(store, section, shard_size, unit_size)
    for row in read_preferences(section):
        writer.add(row)
    writer.flush()
    store.write_json(Store.preferences, {"reading": reading, "prompts": writer.prompts})


class _Writer:
    """Collects rows for one shard of prompts and writes them; a later sample of an earlier prompt goes to its shard."""

    def __init__(self, store: Store, section: Preferences, shard_size: int, unit_size: int) -> None:
        self.store, self.shard_size, self.unit_size = store, shard_size, unit_size
        self.names = (section.chosen, section.rejected)
        self.seen: dict[bytes, tuple[int, int]] = {}  # compact id -> (shard, samples so far)
        self.shard = self.prompts = self.rows = self.flushes = 0
        self.new: list[PromptRow] = []
        self.waiting: dict[int, list[tuple[int, Preference]]] = defaultdict(list)

    def add(self, row: Preference) -> None:
        key = compact(row.prompt["prompt_id"])
        shard, sample = self.seen.get(key, (self.shard, 0))
        self.seen[key] = shard, sample + 1
        if sample == 0:
            self.new.append(row.prompt)
        self.waiting[shard].append((sample, row))
        self.rows += 1
        if self.rows == self.shard_size:
            self.flush()

    def flush(self) -> None:
        if self.new:
            path = f"{Store.prompts}/part-{self.shard:05d}.parquet"
            self.store.write_table(path, prompt_table(self.new), PROMPTS, row_group_size=self.unit_size)
            self.prompts += len(self.new)
        for shard, rows in self.waiting.items():
            for side in (0, 1):
                self._write(f"part-{shard:05d}-{self.flushes:05d}.parquet", side, rows)
        self.shard += bool(self.new)
        self.flushes, self.rows, self.new = self.flushes + 1, 0, []
        self.waiting.clear()

    def _write(self, file: str, side: int, rows: list[tuple[int, Preference]]) -> None:
        name = self.names[side]
        responses = [_response(sample, row, side) for sample, row in rows]
        scores = [
            {"prompt_id": row.prompt["prompt_id"], "sample": sample, "score": row.scores[side]} for sample, row in rows
        ]
        self.store.write_table(f"{Store.given(name)}/{file}", pa.Table.from_pylist(scores, schema=SCORES), SCORES)
        table = pa.Table.from_pylist(responses, schema=RESPONSES)
        self.store.write_table(f"{Store.responses(name)}/{file}", table, RESPONSES)


def _response(sample: int, row: Preference, side: int) -> dict[str, Any]:
    """A row of `contracts.RESPONSES`; whose tokens these were is not known, so words stand in for their number."""
    answer, refused = row.answers[side], row.prompt["error"]
    return {
        "prompt_id": row.prompt["prompt_id"],
        "sample": sample,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "prompt_token_ids": [],
        "token_ids": [],
        "tokens": len(answer.text.split()) + len((answer.reasoning or "").split()),
        "finish_reason": "stop",
        "error": answer.error if refused is None else f"{PROMPT_REFUSED}: {refused}",
    }
