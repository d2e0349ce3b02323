"""Candidates that a rule removed: kept with the reason, and some with their texts, so that a reader can judge the rule.
Pure.
"""

from collections import Counter

import pyarrow as pa

from deltaray.data.contracts import PAIRS
from deltaray.pair.join import pair_table

EXAMPLES = 32
"""Of each rule and shard, so many removed candidates bring their texts along."""

_KEYS = ("prompt_id", "chosen_model", "chosen_sample", "rejected_model", "rejected_sample")
_SHORT = (*_KEYS, "chosen_score", "rejected_score")
_TEXTS = ("prompt", "chosen", "rejected")

REMOVED = pa.schema(
    [
        *((name, PAIRS.field(name).type) for name in _SHORT),
        ("reason", pa.string()),
        *((name, PAIRS.field(name).type) for name in _TEXTS),
    ]
)
"""The sides as they were before a reversal; the texts are null but for the first `EXAMPLES` of each reason."""

Removed = list[tuple[int, str]]
"""(place among the picks, the rule that removed it)."""


def removed_table(prompts: pa.Table, offers: pa.Table, picks: pa.Table, texts: pa.Table, removed: Removed) -> pa.Table:
    """Rows of `REMOVED`, in the order of `removed`; the tables are those that `join.pair_table` takes."""
    left = picks.take(pa.array([pick for pick, _ in removed], pa.int64()))
    columns = {"prompt_id": prompts["prompt_id"].take(left["place"])}
    for side in ("chosen", "rejected"):
        rows = offers.take(left[side])
        columns |= {f"{side}_{name}": rows[of] for name, of in _OF_OFFER.items()}
    columns["reason"] = pa.array([reason for _, reason in removed], pa.string())
    shown = _first_of_each(removed)
    examples = pair_table(prompts, offers, left.take(pa.array(shown, pa.int64())), texts)
    place_of = {row: place for place, row in enumerate(shown)}
    places = pa.array([place_of.get(row) for row in range(len(removed))], pa.int64())
    columns |= {name: examples[name].take(places) for name in _TEXTS}
    return pa.table({name: columns[name] for name in REMOVED.names}).cast(REMOVED)


_OF_OFFER = {"model": "teacher", "sample": "sample", "score": "score"}


def _first_of_each(removed: Removed) -> list[int]:
    seen = Counter[str]()
    found = []
    for row, (_, reason) in enumerate(removed):
        if seen[reason] < EXAMPLES:
            found.append(row)
        seen[reason] += 1
    return found
