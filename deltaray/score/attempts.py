"""Gives up the responses whose scoring ends the process that scores them, again and again.

Ray starts a task whose worker has died again, without end. What was under way when it died is noted in the store, so
that the next try, in whatever process, knows: from the third try at a file on, one note per response.
"""

from collections import Counter

from deltaray.data.store import Store
from deltaray.score.files import Key, Unit
from deltaray.score.response import SCORER_FAILED, Response, Score, ScoreFunction, scored

TRIES = 2
"""So often may a process die over a file before its responses are noted, and then over each of these."""


class Attempts:
    """The tries at one file of responses; nothing is left of them when it is scored, or fails with a message."""

    def __init__(self, store: Store, unit: Unit) -> None:
        self.store, self.path = store, Store.attempts(unit["destination"])
        found = store.read_json(self.path) if store.exists(self.path) else {}
        self.begun, self.died = found.get("begun", 0) + 1, Counter[str](found.get("died", {}))
        if found.get("under_way") is not None:
            self.died[found["under_way"]] += 1
        self._note(None)

    def scored(self, function: ScoreFunction, key: Key, response: Response) -> Score:
        """The function's score, or none where its process has died over this response too often."""
        name = f"{key[0]}#{key[1]}"
        if self.died[name] >= TRIES:
            return Score(None, f"{SCORER_FAILED}: its process died {self.died[name]} times over this response")
        if self.begun > TRIES:
            self._note(name)
        return scored(function, response)

    def _note(self, under_way: str | None) -> None:
        self.store.write_json(self.path, {"begun": self.begun, "died": dict(self.died), "under_way": under_way})

    def over(self) -> None:
        self.store.delete([self.path])
