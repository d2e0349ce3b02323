"""The join at the heart of deltaray: two stored responses to one prompt become a candidate pair. Pure.

What is joined first are short columns alone (`OFFERS`): which responses there are and what they scored. Texts are
looked up afterwards, for the responses that became a side of a pair.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.contracts import MESSAGES, PAIRS
from deltaray.data.store import keys_of
from deltaray.pair.policies import Offer, Policy

OFFERS = ("prompt_id", "sample", "teacher", "finish_reason", "error", "score")
"""Columns of a table of responses that may be paired; `score:<reference>` of further scorers may follow."""
PICKS = pa.schema([("place", pa.int64()), ("chosen", pa.int64()), ("rejected", pa.int64())])
"""Pairs as the prompt's place among the prompts and the two sides' rows among the offers, in the prompts' order."""


def pick_by_sample(prompts: pa.Table, offers: pa.Table, chosen: str, rejected: str) -> pa.Table:
    """`PICKS` of sample i of one teacher against sample i of the other."""
    rows = pa.array(range(len(offers)), pa.int64())
    sides = [offers.append_column("row", rows).filter(pc.field("teacher") == name) for name in (chosen, rejected)]
    partner = pc.index_in(keys_of(sides[0]), value_set=keys_of(sides[1]).combine_chunks())
    found = pc.is_valid(partner)
    first, other = sides[0].filter(found), sides[1].take(partner.filter(found))
    place = _places(prompts, first)
    picks = pa.table({"place": place, "chosen": first["row"], "rejected": other["row"], "sample": first["sample"]})
    ordered = picks.filter(pc.is_valid(place)).sort_by([("place", "ascending"), ("sample", "ascending")])
    return ordered.select(PICKS.names).cast(PICKS)


def pick_from_pool(prompts: pa.Table, offers: pa.Table, policy: Policy, drop_truncated: bool) -> pa.Table:
    """`PICKS` that a policy makes of the responses that have a score, did not fail and, if asked, were not cut."""
    rows = offers.select(["teacher", "sample", "score"]).append_column("place", _places(prompts, offers))
    rows = rows.append_column("row", pa.array(range(len(offers)), pa.int64()))
    usable = pc.and_(pc.and_(pc.is_valid(rows["place"]), pc.is_valid(rows["score"])), pc.is_null(offers["error"]))
    if drop_truncated:
        usable = pc.and_(usable, pc.not_equal(offers["finish_reason"], "length"))
    rows = rows.filter(usable).sort_by([("place", "ascending"), ("row", "ascending")])
    columns = [rows[name].to_pylist() for name in ("place", "row", "teacher", "sample", "score")]
    ids = prompts["prompt_id"].to_pylist()
    picked = []
    for place, group in groupby(zip(*columns, strict=True), key=lambda row: row[0]):
        pick = policy(ids[place], [Offer(*rest) for _, *rest in group])
        picked += [] if pick is None else [{"place": place, "chosen": pick[0].row, "rejected": pick[1].row}]
    return pa.Table.from_pylist(picked, schema=PICKS)


def _places(prompts: pa.Table, offers: pa.Table) -> pa.ChunkedArray:
    place = pc.index_in(offers["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    return place.cast(pa.int64())


def candidates(
    prompts: pa.Table,
    offers: pa.Table,
    picks: pa.Table,
    texts: pa.Table,
    max_length: int,
    references: Sequence[str] = (),
    at_once: int = 2048,
) -> Iterator[list[dict[str, Any]]]:
    """What the rules look at of each candidate pair, in the order of the picks, in lists of at most `at_once`.

    Token ids and prompts stay in Arrow: as Python objects they cost more than all rules together.

    Args:
        prompts: rows of `contracts.PROMPTS`.
        texts: `row` (of the offers), `text`, `reasoning` and `contracts.TOKENS` of every picked response.
        max_length: the student's, to which both sides will be cut.
        references: the scorers whose `score:<reference>` columns go to `scores`.
    Returns:
        the short columns of `contracts.PAIRS`, the two texts, `pick` (the place among the picks), `finish` and `error`
        of both sides, `scores`, `prompt_tokens`, `refusal` and `same_tokens` (whether training would see the same ids
        on both sides).
    """
    for start in range(0, len(picks), at_once):
        part = picks.slice(start, at_once)
        asked = prompts.select(["prompt_id", "source"]).take(part["place"]).to_pylist()
        sides = [_side(offers, texts, part[name]) for name in ("chosen", "rejected")]
        places = range(start, start + len(part))
        rows = zip(places, asked, sides[0], sides[1], strict=True)
        found = [_candidate(*row, references) for row in rows]
        for pair, chosen, rejected in zip(found, *sides, strict=True):
            pair["same_tokens"] = _same_tokens(texts, chosen, rejected, max_length - pair["prompt_tokens"])
        yield found


def _side(offers: pa.Table, texts: pa.Table, rows: pa.ChunkedArray) -> list[dict[str, Any]]:
    places = _places_of(rows, texts)
    side = offers.take(rows).append_column("text_row", places)
    for name in ("text", "reasoning", "refusal"):
        side = side.append_column(name, texts[name].take(places))
    for name in ("prompt_token_ids", "token_ids"):
        side = side.append_column(name, pc.list_value_length(texts[name]).take(places))
    return list(side.to_pylist())


def _same_tokens(texts: pa.Table, chosen: dict[str, Any], rejected: dict[str, Any], room: int) -> bool:
    """Whether two responses are the same ids once both are cut to what fits; see `examples.cut`."""
    lengths = [side["token_ids"] for side in (chosen, rejected)]
    left = min(lengths[0], room)
    if left < 1 or left != min(lengths[1], room):
        return False
    compared = left - (max(lengths) > room)  # the last token of what is cut is made the end token
    ids = [texts["token_ids"][side["text_row"]].values[:compared] for side in (chosen, rejected)]
    return bool(ids[0].equals(ids[1]))


def _places_of(rows: pa.ChunkedArray, texts: pa.Table) -> pa.ChunkedArray:
    return pc.index_in(rows, value_set=texts["row"].combine_chunks())


def _candidate(
    pick: int, prompt: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any], references: Sequence[str]
) -> dict[str, Any]:
    scores = chosen["score"], rejected["score"]
    return {
        "pick": pick,
        "prompt_id": prompt["prompt_id"],
        "source": prompt["source"],
        "prompt_tokens": chosen["prompt_token_ids"],
        "chosen": _turn(chosen["text"]),
        "rejected": _turn(rejected["text"]),
        "chosen_reasoning": chosen["reasoning"],
        "rejected_reasoning": rejected["reasoning"],
        "chosen_tokens": chosen["token_ids"],
        "rejected_tokens": rejected["token_ids"],
        "refusal": chosen["refusal"] or rejected["refusal"],
        "chosen_model": chosen["teacher"],
        "rejected_model": rejected["teacher"],
        "chosen_score": scores[0],
        "rejected_score": scores[1],
        "delta": None if None in scores else scores[0] - scores[1],
        "chosen_sample": chosen["sample"],
        "rejected_sample": rejected["sample"],
        "chosen_finish": chosen["finish_reason"],
        "rejected_finish": rejected["finish_reason"],
        "chosen_error": chosen["error"],
        "rejected_error": rejected["error"],
        "scores": {name: (chosen[f"score:{name}"], rejected[f"score:{name}"]) for name in references},
    }


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- what is written --------------------------------------------------------------------------------------------
def pair_table(
    prompts: pa.Table, offers: pa.Table, picks: pa.Table, texts: pa.Table, reverse: bool = False
) -> pa.Table:
    """The picks as rows of `contracts.PAIRS`; no text becomes a Python object.

    Args:
        reverse: exchange the sides of every pair.
    """
    asked = prompts.take(picks["place"])
    columns = {name: asked[name] for name in PAIRS.names if name in asked.column_names}
    columns["prompt"] = asked["messages"]
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        rows = picks[other if reverse else side]
        columns |= _side_columns(side, offers.take(rows), texts.take(_places_of(rows, texts)))
    columns["delta"] = pc.subtract(columns["chosen_score"], columns["rejected_score"])
    return pa.table({name: columns[name] for name in PAIRS.names}).cast(PAIRS)


def _side_columns(side: str, offers: pa.Table, texts: pa.Table) -> dict[str, Any]:
    """One side's columns; the prompt's ids are the same on both."""
    return {
        side: _turns(texts["text"]),
        f"{side}_reasoning": texts["reasoning"],
        f"{side}_model": offers["teacher"],
        f"{side}_sample": offers["sample"],
        f"{side}_score": offers["score"],
        f"{side}_token_ids": texts["token_ids"],
        f"{side}_tokens": pc.list_value_length(texts["token_ids"]),
        "prompt_token_ids": texts["prompt_token_ids"],
    }


def _turns(column: pa.ChunkedArray) -> pa.Array:
    """Each text as the one turn of an assistant."""
    text = column.combine_chunks()
    turn = list(MESSAGES.value_type)
    roles = pa.repeat(pa.scalar("assistant"), len(text))
    struct = pa.StructArray.from_arrays([roles, text], fields=turn)
    return pa.ListArray.from_arrays(pa.array(range(len(text) + 1), pa.int32()), struct, type=MESSAGES)
