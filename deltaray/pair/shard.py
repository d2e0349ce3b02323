"""One shard of prompts: which responses are paired, which pairs pass, what is written. Runs on any node."""

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deltaray.data.contracts import PAIRS, PROMPTS, RESPONSES, SCORES, TOKENS
from deltaray.data.prompts.shards import shard_name
from deltaray.data.store import Store, keys_of, number_of
from deltaray.pair.draw import Survey, draw_rules
from deltaray.pair.filters import Candidate
from deltaray.pair.funnel import Funnel, Stage, merge_funnels, stage
from deltaray.pair.join import OFFERS, candidates, pair_table, pick_by_sample, pick_from_pool
from deltaray.pair.policies import policy_of
from deltaray.pair.removed import REMOVED, Removed, removed_table
from deltaray.pair.rules import Named, rules
from deltaray.recipe.pairing import Pairing

AT_ONCE = 2048
"""Candidates that are Python objects at the same time."""

REASONS = 8
"""Reasons for refusals that a shard reports, the most frequent first."""

ROW_GROUP = 512
"""Pairs that a reader who wants one of them must read."""

Unit = dict[str, Any]
"""A shard to pair: pairing (its name), spec (its section), prompts (the shard's file), samples (by teacher, how many
take part), tokens (by teacher, files), max_length (the student's), dropped (by filter, ids of prompts), chosen (what
`draw.choose` decided), write."""


def pair_shard(store: Store, unit: Unit) -> dict[str, Any]:
    """Joins and filters one shard of prompts; writes its pairs unless only a survey of them is asked for."""
    pairing = Pairing(**unit["spec"])
    prompts = store.read_table(unit["prompts"], PROMPTS.names)
    shard = shard_name(unit["prompts"])
    offers = _offers(store, pairing, unit["samples"], shard)
    picks = _picks(pairing, prompts, offers)
    texts = _texts(store, unit["tokens"], offers, picks, shard)
    dropped = {int(place): set(ids) for place, ids in unit["dropped"].items()}
    filters = rules(pairing, unit["max_length"], dropped) + draw_rules(unit["chosen"])
    left, found = _Left(pairing, (prompts, offers, picks, texts)), [apply_rules([], filters)[1]]
    refusals, thoughts = Counter[str](), 0
    for part in candidates(prompts, offers, picks, texts, unit["max_length"], pairing.scorers, AT_ONCE):
        kept, funnel = apply_rules(part, filters, left.removed)
        found.append(funnel)
        refusals.update(pair["refusal"] for pair in part if pair["refusal"])
        thoughts += sum(bool(pair["chosen_reasoning"] or pair["rejected_reasoning"]) for pair in kept)
        left.add(kept, unit["write"])
    if not unit["write"]:
        return {"pairing": unit["pairing"], "survey": vars(left.survey)}
    left.write(store, unit["pairing"], shard)
    beginning = _beginning(pairing, unit["samples"], prompts, picks)
    noted = {"refusals": dict(refusals.most_common(REASONS)), "thoughts": thoughts}
    return {"pairing": unit["pairing"], "funnel": [*beginning, *merge_funnels(found)], **noted}


# --- what is joined ---------------------------------------------------------------------------------------------
def _offers(store: Store, pairing: Pairing, samples: dict[str, int | None], shard: str) -> pa.Table:
    """The short columns of all responses to a shard that take part, with their scores."""
    return pa.concat_tables([_of_teacher(store, pairing, name, most, shard) for name, most in samples.items()])


def _of_teacher(store: Store, pairing: Pairing, teacher: str, samples: int | None, shard: str) -> pa.Table:
    """One teacher's, with `at`: the place of each among the rows of its files."""
    columns = [name for name in OFFERS if name not in ("teacher", "score")]
    table = store.read_tables(Store.responses(teacher), RESPONSES, columns, prefix=f"{shard}-")
    table = table.append_column("teacher", pa.repeat(teacher, len(table)))
    table = table.append_column("at", pa.array(range(len(table)), pa.int64()))
    score = _scores(store, pairing.scorer, teacher, shard, table)
    table = table.append_column("score", score)
    for reference in pairing.scorers:
        column = score if reference == pairing.scorer else _scores(store, reference, teacher, shard, table)
        table = table.append_column(f"score:{reference}", column)
    return table if samples is None else table.filter(pc.field("sample") < samples)


def _scores(store: Store, reference: str | None, teacher: str, shard: str, responses: pa.Table) -> pa.ChunkedArray:
    """What a scorer (`NAME`, or `NAME/PART`) says of each response; null where it says nothing."""
    if reference is None:
        return pa.chunked_array([pa.nulls(len(responses), pa.float64())])
    name, _, part = reference.partition("/")
    columns = ["prompt_id", "sample", "parts" if part else "score"]
    table = store.read_tables(Store.scores(name, teacher), SCORES, columns, prefix=f"{shard}-")
    values = table["score"] if not part else number_of(table["parts"], part)
    place = pc.index_in(keys_of(responses), value_set=keys_of(table).combine_chunks())
    return values.take(place)


def _picks(pairing: Pairing, prompts: pa.Table, offers: pa.Table) -> pa.Table:
    if pairing.policy == "by_sample":
        return pick_by_sample(prompts, offers, pairing.chosen, pairing.rejected)
    return pick_from_pool(prompts, offers, policy_of(pairing), pairing.drop_truncated)


def _texts(store: Store, tokens: dict[str, list[str]], offers: pa.Table, picks: pa.Table, shard: str) -> pa.Table:
    """`row`, `text`, `reasoning` and `TOKENS` of the picked responses; one teacher's column is in memory at a time."""
    rows = pc.unique(pa.chunked_array([*picks["chosen"].chunks, *picks["rejected"].chunks], pa.int64()))
    wanted = offers.select(["teacher", "at"]).take(rows).append_column("row", rows)
    texts = ["text", "reasoning"]
    tables = [pa.schema([("row", pa.int64()), *((name, pa.string()) for name in texts), *TOKENS]).empty_table()]
    for teacher, files in tokens.items():
        mine = wanted.filter(pc.field("teacher") == teacher)
        columns = {"row": mine["row"]}
        found = store.read_tables(Store.responses(teacher), RESPONSES, texts, prefix=f"{shard}-")
        columns |= {name: found[name].take(mine["at"]) for name in found.column_names}
        for name in TOKENS.names:
            column = pa.concat_tables(
                [TOKENS.empty_table().select([name]), *(store.read_table(it, [name]) for it in files)]
            )
            columns[name] = column[name].take(mine["at"])
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _beginning(pairing: Pairing, samples: dict[str, int | None], prompts: pa.Table, picks: pa.Table) -> Funnel:
    """From prompts to candidate pairs: prompts without any, then what several samples of a prompt add."""
    answered = pc.count_distinct(picks["place"]).as_py()
    if pairing.policy != "by_sample":
        return [stage("enough scored responses", len(prompts), answered)]
    found = [stage("answered by both teachers", len(prompts), answered)]
    alone = any(most == 1 for most in samples.values())
    return found if alone else [*found, stage("a pair per sample", answered, len(picks))]


# --- what passes ------------------------------------------------------------------------------------------------
def apply_rules(
    pairs: list[Candidate], rules: Sequence[Named], removed: Removed | None = None
) -> tuple[list[Candidate], Funnel]:
    """(the candidates that pass all rules, the funnel); whose rule removed which goes to `removed`."""
    funnel: list[Stage] = []
    for name, rule in rules:
        passed = [rule(pair) for pair in pairs]
        if removed is not None:
            removed += [(pair["pick"], name) for pair, passes in zip(pairs, passed, strict=True) if not passes]
        kept = list(compress(pairs, passed))
        funnel.append(stage(name, len(pairs), len(kept)))
        pairs = kept
    return pairs, funnel


# --- what is written --------------------------------------------------------------------------------------------
class _Left:
    """What is left of a shard's candidates, slice by slice, and what is not."""

    def __init__(self, pairing: Pairing, joined: tuple[pa.Table, pa.Table, pa.Table, pa.Table]) -> None:
        self.pairing, self.joined = pairing, joined
        self.tables, self.removed, self.survey = [PAIRS.empty_table()], Removed(), Survey()

    def add(self, kept: list[Candidate], write: bool) -> None:
        if not write:
            return self.survey.add(kept)
        prompts, offers, picks, texts = self.joined
        picks = picks.take(pa.array([pair["pick"] for pair in kept], pa.int64()))
        self.tables.append(pair_table(prompts, offers, picks, texts, self.pairing.reverse))

    def write(self, store: Store, name: str, shard: str) -> None:
        store.write_table(f"{Store.removed(name)}/{shard}.parquet", removed_table(*self.joined, self.removed), REMOVED)
        pairs = pa.concat_tables(self.tables)
        store.write_table(Store.pair_shard(name, shard), pairs, PAIRS, row_group_size=ROW_GROUP)
