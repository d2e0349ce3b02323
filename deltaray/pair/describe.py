"""Describes pairings: `pairs/pairing=<name>/_delta.json`, from the short columns of the pairs and the stored scores.

Every shard of pairs is a task that returns sums; the texts that are read are those of the few examples.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.contracts import PAIRS, SCORES
from deltaray.data.paths import PAIRS_PREFIX
from deltaray.data.prompts.shards import read_rows, shard_name
from deltaray.data.store import Store, keys_of, number_of
from deltaray.pair.delta_report import EXAMPLES, EXTREMES, Collected, Difference, Place, first_of, numbers_of
from deltaray.pair.rules import draw_key
from deltaray.pair.sums import Floats, Histogram, Moments, features, resampled
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units

CLIP = 2000
"""Characters of a text that `_delta.json` holds of an example."""
SIDES = ("chosen", "rejected")
SHORT = [f"{side}_{what}" for side in SIDES for what in ("model", "sample", "score", "tokens")]


def delta_path(pairing: str) -> str:
    return f"{Store.pairs(pairing)}/_delta.json"


def is_described(study: Study, store: Store, name: str) -> bool:
    path = delta_path(name)
    return store.exists(path) and store.read_json(path, {"inputs": str})["inputs"] == _inputs(study, store, name)


def _inputs(study: Study, store: Store, name: str) -> str:
    """Tells apart what a description is made from: the pairs, and all scores of their teachers."""
    folders = [Store.pairs(name)]
    folders += [Store.scores(scorer, teacher) for scorer in study.scorers for teacher in study.pairings[name].names]
    return store.digest(folders)


def describe(study: Study, store: Store, names: list[str]) -> None:
    """Writes `_delta.json` of these pairings."""
    inputs = {name: _inputs(study, store, name) for name in names}
    units = [
        {
            "pairing": name,
            "pairs": path,
            "scorer": study.pairings[name].scorer,
            "scorers": list(study.scorers),
            "teachers": list(dict.fromkeys(study.pairings[name].names)),
        }
        for name in names
        for path in store.committed(Store.pairs(name))
    ]
    found = {name: Collected() for name in names}
    for result in map_units(units, partial(describe_shard, store)):
        found[result["pairing"]] += _collected(result)
    for name, collected in found.items():
        told = {"inputs": inputs[name], "scorer": study.pairings[name].scorer, **numbers_of(collected)}
        store.write_json(delta_path(name), told | {"examples": _examples(store, collected)})


# --- in a task --------------------------------------------------------------------------------------------------
def describe_shard(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """What a shard of pairs contributes, as JSON."""
    pairs = store.read_table(unit["pairs"], ["prompt_id", *SHORT], PAIRS)
    prompts = pc.rank(pairs["prompt_id"], tiebreaker="dense").to_numpy().astype(np.int64) - 1
    chosen, rejected = (_floats(pairs[f"{side}_score"]) for side in SIDES)
    tokens = [_floats(pairs[f"{side}_tokens"]) for side in SIDES]
    shard = shard_name(unit["pairs"]).removeprefix(PAIRS_PREFIX)
    numbers = [("tokens", tokens), *_numbers(store, unit, pairs, shard)]
    differences = {name: Difference.of(sides[0], sides[1], prompts) for name, sides in numbers}
    sums = resampled(features(chosen, rejected, tokens[0] - tokens[1]), prompts, f"{unit['pairing']} {shard}")
    delta = chosen - rejected
    return {
        "pairing": unit["pairing"],
        "sums": sums.tolist(),
        "prompts": int(prompts.max(initial=-1)) + 1,
        "deltas": _histogram_json(Histogram.of(delta[np.isfinite(delta)])),
        "between": [[*pair, *_plain(it)] for pair, it in _between(pairs, delta).items()],
        "teachers": [[teacher, *_plain(it)] for teacher, it in _teachers(store, unit, shard)],
        "differences": {name: asdict(it) for name, it in differences.items()},
        "extremes": _extremes(pairs, delta, unit["pairs"]),
    }


def _floats(column: pa.ChunkedArray) -> Floats:
    """Null is NaN."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


def _plain(it: Moments) -> list[float]:
    return [it.count, it.mean, it.squares]


def _histogram_json(it: Histogram) -> list[Any]:
    return [it.exponent, list((it.counts or {}).items())]


def _between(pairs: pa.Table, delta: Floats) -> dict[tuple[str, str], Moments]:
    known = np.isfinite(delta)
    names = pa.table({side: pairs[f"{side}_model"] for side in SIDES}).filter(pa.array(known))
    found = {}
    for row in names.group_by(list(SIDES)).aggregate([]).to_pylist():
        mine = pc.and_(*(pc.equal(names[side], row[side]) for side in SIDES)).to_numpy()
        found[row["chosen"], row["rejected"]] = Moments.of(delta[known][mine])
    return found


def _teachers(store: Store, unit: dict[str, Any], shard: str) -> Iterator[tuple[str, Moments]]:
    """The scores that the pairing's scorer gives all responses of its teachers."""
    for teacher in unit["teachers"] if unit["scorer"] else []:
        scorer, _, part = unit["scorer"].partition("/")
        columns = ["parts" if part else "score"]
        table = store.read_tables(Store.scores(scorer, teacher), SCORES, columns, prefix=f"{shard}-")
        values = _floats(number_of(table["parts"], part) if part else table["score"])
        yield teacher, Moments.of(values[np.isfinite(values)])


def _numbers(store: Store, unit: dict[str, Any], pairs: pa.Table, shard: str) -> Iterator[tuple[str, list[Floats]]]:
    """Every score and part of a score of both responses of each pair; NaN where there is none."""
    keys = {side: _side_keys(pairs, side) for side in SIDES}
    for scorer in unit["scorers"]:
        found: dict[str, list[Floats]] = {}
        for teacher in unit["teachers"]:
            table = store.read_tables(Store.scores(scorer, teacher), SCORES, prefix=f"{shard}-")
            if not len(table):
                continue
            columns = {scorer: table["score"]} | {
                f"{scorer}/{part}": number_of(table["parts"], part) for part in _parts(table)
            }
            for number, side in enumerate(SIDES):
                mine = pc.equal(pairs[f"{side}_model"], teacher).to_numpy()
                place = pc.index_in(keys[side].filter(pa.array(mine)), value_set=keys_of(table).combine_chunks())
                for name, column in columns.items():
                    sides = found.setdefault(name, [np.full(len(pairs), np.nan) for _ in SIDES])
                    sides[number][mine] = _floats(column.take(place))
        score = found.pop(scorer, [])
        if not any(np.array_equal(score, part, equal_nan=True) for part in found.values()):  # surface: it is a part
            found[scorer] = score
        yield from ((name, sides) for name, sides in found.items() if sides)


def _side_keys(pairs: pa.Table, side: str) -> pa.ChunkedArray:
    return keys_of(pa.table({"prompt_id": pairs["prompt_id"], "sample": pairs[f"{side}_sample"]}))


def _parts(table: pa.Table) -> list[str]:
    return sorted(pc.unique(pc.struct_field(pc.list_flatten(table["parts"]), "key")).to_pylist())


def _extremes(pairs: pa.Table, delta: Floats, path: str) -> dict[str, list[Place]]:
    """Of equal deltas all are looked at: the lot among them must not depend on their order in the shard."""
    known = np.flatnonzero(np.isfinite(delta))
    orders = {"largest": -delta[known], "most_negative": delta[known], "nearest_zero": abs(delta[known])}
    found = {}
    for name, order in orders.items():
        border = np.sort(order)[:EXAMPLES].max(initial=-np.inf)
        rows = known[order <= border]
        keys = pairs.select(["prompt_id", "chosen_sample"]).take(pa.array(rows, pa.int64())).to_pylist()
        places = [(float(delta[row]), draw_key(key, 0), path, int(row)) for row, key in zip(rows, keys, strict=True)]
        found[name] = first_of(name, places)
    return found


# --- in the driver ----------------------------------------------------------------------------------------------
def _collected(result: dict[str, Any]) -> Collected:
    exponent, counts = result["deltas"]
    return Collected(
        np.array(result["sums"]),
        result["prompts"],
        Histogram(exponent, Counter(dict(map(tuple, counts)))),
        {(chosen, rejected): Moments(*it) for chosen, rejected, *it in result["between"]},
        {teacher: Moments(*it) for teacher, *it in result["teachers"]},
        {name: _difference(it) for name, it in result["differences"].items()},
        {name: [(it[0], it[1], it[2], it[3]) for it in places] for name, places in result["extremes"].items()},
    )


def _difference(it: dict[str, Any]) -> Difference:
    apart, chosen, rejected = (Moments(**it[name]) for name in ("difference", *SIDES))
    return Difference(apart, chosen, rejected, it["higher"], it["lower"])


def _examples(store: Store, collected: Collected) -> dict[str, list[dict[str, Any]]]:
    return {name: [_example(store, place) for place in collected.extremes[name]] for name in EXTREMES}


def _example(store: Store, place: Place) -> dict[str, Any]:
    [row] = read_rows(store, place[2], [place[3]], ["prompt_id", "prompt", *SIDES, *SHORT, "delta"]).to_pylist()
    for name in ("prompt", *SIDES):
        row[name] = [turn | {"content": _clipped(turn["content"])} for turn in row[name]]
    return dict(row)


def _clipped(text: str) -> str:
    return text if len(text) <= CLIP else f"{text[:CLIP]} …"
