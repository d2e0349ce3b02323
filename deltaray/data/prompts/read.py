"""Reads prompts one by one, checks every row, and refuses a file that cannot be used."""

from collections.abc import Iterator

from deltaray.data.prompts.formats import Say, open_rows, place, row_door, silent
from deltaray.data.prompts.rows import PromptRow, prompt_row
from deltaray.data.prompts.seen import Seen
from deltaray.data.prompts.view import WHOLE, View
from deltaray.errors import UserError


def read_prompts(
    path: str,
    key: str,
    limit: int | None = None,
    drop_duplicates: bool = False,
    view: View = WHOLE,
    say: Say = silent,
) -> Iterator[PromptRow]:
    """The prompts of a file, each as soon as it is read and checked; 32 bytes of each stay in memory.

    Args:
        path: the file or dataset id. `key`: the recipe's key that names it, for messages. `limit`: rows to use.
        drop_duplicates: keep the first row of an id or text instead of refusing the second.
        view: how a data set is read that was not made for us.
        say: is told what the user should know of what is read.
    Raises:
        UserError: names the file, the row (its line where the format has lines) and what to do; raised when that row
            is reached. One id with two prompts is always refused.
    """
    seen = Seen(path)
    for number, raw in open_rows(path, key, view.wanted, view, say):
        with row_door(path, number):
            row = prompt_row(view.row(raw))
        first = seen.first(row, number)
        if first == number:
            yield row
            if len(seen) == limit:
                return
        elif not drop_duplicates:
            kind = "id" if view.row(raw).get("id") is not None else "prompt"
            raise UserError(
                f"{place(path, number)}: the same {kind} as {place(path, first)}; keep one, or give each its own id"
            )
    if not len(seen):
        raise UserError(f"{path}: holds no prompts ({key}); write one JSON object per line with `prompt` or `messages`")
