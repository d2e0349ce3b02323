"""Agreement between every two scorers of a study, over the stored pairs of responses: `agreement.json`.

Every shard of prompts is a task; what it returns is a few counts, however many responses it holds.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from deltaray.data.contracts import PROMPTS, RESPONSES, SCORES
from deltaray.data.prompts.shards import shard_name
from deltaray.data.store import Store, keys_of
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units
from deltaray.score.agreement import Counted, agreement_of, outcome_of
from deltaray.score.stage import all_scores

AGREEMENT = "agreement.json"
LENGTHS = (128, 512, 2048)
"""Borders of the length bins: tokens of the longer response of a pair, in its teacher's own tokens."""

Slice = tuple[str, str, str, str]
"""(first scorer, second scorer, what the pairs have in common: all | teachers | source | tokens, which)."""


def compare_scores(study: Study, store: Store) -> None:
    """Writes how many responses every scorer could score, and how far every two agree."""
    inputs = _inputs(study, store)
    sides = _paired_sides(study)
    units = [
        {"shard": shard_name(path), "scorers": study.response_scorers(), "sides": sides, "teachers": study.answering()}
        for path in store.committed(Store.prompts)
    ]
    counted: dict[Slice, Counted] = defaultdict(Counter)
    scored: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for result in map_units(units, partial(compare_shard, store)):
        for slice_, outcome, prompts in result["counted"]:
            counted[tuple(slice_)][tuple(outcome)] += prompts
        for scorer, teacher, notes in result["scored"]:
            scored[scorer, teacher].update(notes)
    store.write_json(AGREEMENT, {"inputs": inputs, "scorers": _scored(scored), "agreement": _rows(counted)})


def is_compared(study: Study, store: Store) -> bool:
    return store.exists(AGREEMENT) and read_agreement(store)["inputs"] == _inputs(study, store)


def read_agreement(store: Store) -> dict[str, Any]:
    return dict(store.read_json(AGREEMENT, {"inputs": str, "scorers": [dict], "agreement": [dict]}))


def _inputs(study: Study, store: Store) -> str:
    folders = [Store.scores(scorer, teacher) for scorer, teacher in all_scores(study)]
    folders += [Store.prompts, *(Store.responses(teacher) for teacher in study.answering())]
    return store.digest(folders, *study.response_scorers(), _paired_sides(study))


def _paired_sides(study: Study) -> list[list[str]]:
    """The pairs of teachers whose responses some pairing may pair; without pairings, all."""
    sides = {tuple(sorted(two)) for it in study.pairings.values() for two in combinations(dict.fromkeys(it.names), 2)}
    return [list(two) for two in sorted(sides or combinations(sorted(study.answering()), 2))]


def _rows(counted: dict[Slice, Counted]) -> list[dict[str, Any]]:
    names = ("first", "second", "by", "which")
    return [
        dict(zip(names, slice_, strict=True)) | agreement_of(dict(sorted(counted[slice_].items())))
        for slice_ in sorted(counted)
    ]


def _scored(scored: dict[tuple[str, str], Counter[str]]) -> list[dict[str, Any]]:
    rows = []
    for (scorer, teacher), notes in sorted(scored.items()):
        unscored = {note: count for note, count in sorted(notes.items()) if note}
        row = {"scorer": scorer, "teacher": teacher, "responses": notes.total(), "scored": notes[""]}
        rows.append(row | {"unscored": unscored})
    return rows


# --- in a task --------------------------------------------------------------------------------------------------
def compare_shard(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """One shard's counts: prompts by outcome for every slice, and responses by why they have no score."""
    shard, scorers = unit["shard"], unit["scorers"]
    tables = {teacher: _responses(store, scorers, teacher, shard) for teacher in unit["teachers"]}
    sources = store.read_table(f"{Store.prompts}/{shard}.parquet", ["prompt_id", "source"], PROMPTS)
    source_of = dict(zip(sources["prompt_id"].to_pylist(), sources["source"].to_pylist(), strict=True))
    pairs: dict[Slice, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for teachers in unit["sides"]:
        for prompt_id, tokens, deltas in _differences(scorers, *(tables[teacher] for teacher in teachers)):
            bins = {"all": "all", "teachers": " and ".join(teachers), "tokens": length_bin(tokens)}
            bins |= {"source": source_of[prompt_id] or "(none)"}
            for first, second in combinations(scorers, 2):
                if first in deltas and second in deltas:
                    for by, which in bins.items():
                        pairs[first, second, by, which][prompt_id].append((deltas[first], deltas[second]))
    counted = {slice_: Counter(map(outcome_of, prompts.values())) for slice_, prompts in pairs.items()}
    flat = [(slice_, outcome, count) for slice_, of in counted.items() for outcome, count in of.items()]
    notes = [(name, teacher, _notes(table, name)) for teacher, table in tables.items() for name in scorers]
    return {"counted": flat, "scored": notes}


def length_bin(tokens: int) -> str:
    """The bin of a length, named so that bins sort as they follow. Pure."""
    border = next((border for border in LENGTHS if tokens < border), None)
    below = [edge for edge in (0, *LENGTHS) if border is None or edge < border][-1]
    return f"{below:04d} to {border - 1:04d}" if border else f"{below:04d} and more"


def _responses(store: Store, scorers: list[str], teacher: str, shard: str) -> pa.Table:
    """Keys, lengths, and every scorer's scores and notes of a teacher's responses to a shard."""
    columns = ["prompt_id", "sample", "tokens"]
    table = store.read_tables(Store.responses(teacher), RESPONSES, columns, prefix=f"{shard}-")
    for name in scorers:
        fields = ["prompt_id", "sample", "score", "note"]
        scores = store.read_tables(Store.scores(name, teacher), SCORES, fields, prefix=f"{shard}-")
        place = pc.index_in(keys_of(table), value_set=keys_of(scores).combine_chunks())
        for field in ("score", "note"):
            table = table.append_column(f"{field}:{name}", scores[field].take(place))
    return table


def _differences(scorers: list[str], one: pa.Table, other: pa.Table) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(prompt id, tokens of the longer, difference by scorer) of each pair of samples of equal index."""
    partner = pc.index_in(keys_of(one), value_set=keys_of(other).combine_chunks())
    one, other = one.filter(pc.is_valid(partner)), other.take(partner.filter(pc.is_valid(partner)))
    tokens = pc.max_element_wise(one["tokens"], other["tokens"]).to_pylist()
    deltas = {name: pc.subtract(one[f"score:{name}"], other[f"score:{name}"]).to_pylist() for name in scorers}
    for number, prompt_id in enumerate(one["prompt_id"].to_pylist()):
        known = {name: values[number] for name, values in deltas.items() if values[number] is not None}
        yield prompt_id, tokens[number], known


def _notes(table: pa.Table, scorer: str) -> dict[str, int]:
    """Responses by why they have no score; under an empty name those that have one."""
    columns = table[f"score:{scorer}"].to_pylist(), table[f"note:{scorer}"].to_pylist()
    kinds = (
        "" if score is not None else (note or "no score").partition(":")[0]
        for score, note in zip(*columns, strict=True)
    )
    return dict(Counter(kinds))


# --- what the user sees -----------------------------------------------------------------------------------------
def agreement_tables(found: dict[str, Any]) -> list[Table]:
    """What is in `agreement.json`, to be printed."""
    scored = Table(title="scored responses", title_justify="left")
    for column in ("scorer", "teacher", "responses", "scored", "without a score"):
        scored.add_column(column, justify="right" if column in ("responses", "scored") else "left")
    for row in found["scorers"]:
        reasons = ", ".join(f"{count:,} {note}" for note, count in row["unscored"].items())
        scored.add_row(row["scorer"], row["teacher"], f"{row['responses']:,}", f"{row['scored']:,}", reasons)
    title = "agreement where both decide, 95 % interval over prompts"
    agreed = Table(title=title, title_justify="left")
    for column in ("scorers", "by", "which", "pairs", "decided", "agreement", "interval", "kappa"):
        agreed.add_column(column, justify="left" if column in ("scorers", "by", "which") else "right")
    for row in found["agreement"]:
        interval = "" if row["low"] is None else f"{row['low']:.1%} to {row['high']:.1%}"
        cells = [
            f"{row['first']}, {row['second']}",
            row["by"],
            row["which"],
            f"{row['pairs']:,}",
            f"{row['decided']:,}",
        ]
        agreed.add_row(
            *cells, _share(row["agreement"]), interval, "" if row["kappa"] is None else f"{row['kappa']:.3f}"
        )
    return [scored, agreed] if found["agreement"] else [scored]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
