"""Which rows a file has had so far, by what they are called: 16 bytes each, and as many for what they ask."""

from deltaray.data.prompts.formats import place
from deltaray.data.prompts.rows import PromptRow, compact, content
from deltaray.errors import UserError

_NUMBER_BYTES = 6


class Seen:
    """The rows of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._rows: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def first(self, row: PromptRow, number: int) -> int:
        """Where the first row with this row's id is, which may be this one.

        Raises:
            UserError: that one asks something else.
        """
        asked = content(row["messages"], None, row.get("conversation"))[:10]
        own = number.to_bytes(_NUMBER_BYTES) + asked
        before = self._rows.setdefault(compact(row["prompt_id"]), own)
        first = int.from_bytes(before[:_NUMBER_BYTES])
        if before[_NUMBER_BYTES:] != asked:
            raise UserError(
                f"{place(self.path, number)}: the same id as {place(self.path, first)} with another prompt: "
                f"{row['prompt_id']}; give each prompt its own id (ids are compared as text), or leave the column out "
                "and they are made from the prompts"
            )
        return first
