"""Pair: joins the stored responses shard by shard, applies the rules, commits the pair shards and the funnel."""

import hashlib
import json
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import TemplateError

from deltaray.chat import conversation_ids, load_tokenizer
from deltaray.contracts import PAIRS, PROMPTS, RESPONSES, SCORES
from deltaray.pair.join import JOIN_KEYS, join_responses
from deltaray.pair.rules import Rule, draw_key, rules
from deltaray.prompts.shards import shard_name
from deltaray.recipe.deltas import Pairing
from deltaray.recipe.models import Student
from deltaray.recipe.study import Study
from deltaray.runtime.stream import map_units
from deltaray.store import Store, keys_of


def inputs_of(study: Study, store: Store, name: str) -> str:
    """A digest of the files that a pairing is made from: pairs are made anew when responses or scores are added."""
    pairing = study.pairings[name]
    folders = [Store.responses(pairing.chosen), Store.responses(pairing.rejected)]
    if pairing.scorer:
        folders += [Store.scores(pairing.scorer, teacher) for teacher in (pairing.chosen, pairing.rejected)]
    files = [path for folder in folders for path in store.committed(folder)]
    return hashlib.sha256("\n".join([*files, str(_samples(study, name))]).encode()).hexdigest()[:16]


def _samples(study: Study, name: str) -> dict[str, int]:
    """How many samples of each side take part; an earlier recipe may have asked for more."""
    pairing = study.pairings[name]
    return {teacher: study.teachers[teacher].sampling.samples for teacher in (pairing.chosen, pairing.rejected)}


def is_paired(study: Study, store: Store, name: str) -> bool:
    record = f".deltaray/pairs/{name}.json"
    return store.exists(record) and store.read_json(record)["inputs"] == inputs_of(study, store, name)


def pair(study: Study, store: Store) -> dict[str, int]:
    """Makes the pairs of every pairing that is not up to date; returns the number of pairs by pairing."""
    todo = [name for name in study.pairings if not is_paired(study, store, name)]
    ceilings = _draw_ceilings(study, store, [name for name in todo if study.pairings[name].limit])
    units = [unit for name in todo for unit in _units(study, store, name, ceilings.get(name), write=True)]
    funnels: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
    for result in map_units(units, partial(pair_shard, store)):
        funnels[result["pairing"]].append(result)
    counts = {}
    for name, results in funnels.items():
        funnel = merge_funnels([result["funnel"] for result in results])
        store.write_json(f"{Store.pairs(name)}/funnel.json", funnel)
        store.write_json(f".deltaray/pairs/{name}.json", {"inputs": inputs_of(study, store, name)})
        counts[name] = funnel[-1]["out"]
    return counts


def _units(study: Study, store: Store, name: str, ceiling: int | None, write: bool) -> list[dict[str, Any]]:
    student = study.students[study.student_of(name)]
    return [
        {
            "pairing": name,
            "prompts": path,
            "spec": study.pairings[name].model_dump(mode="json"),
            "samples": _samples(study, name),
            "student": student.model_dump(mode="json"),
            "ceiling": ceiling,
            "write": write,
        }
        for path in store.committed(Store.prompts)
    ]


def _draw_ceilings(study: Study, store: Store, names: list[str]) -> dict[str, int]:
    """For pairings with a limit: the draw key below which exactly `limit` pairs lie."""
    units = [unit for name in names for unit in _units(study, store, name, None, write=False)]
    keys: dict[str, list[int]] = {name: [] for name in names}
    for result in map_units(units, partial(pair_shard, store)):
        keys[result["pairing"]] += result["draw_keys"]
    ceilings = {}
    for name in names:
        limit = study.pairings[name].limit or 0
        ordered = sorted(keys[name])
        ceilings[name] = ordered[limit - 1] if len(ordered) >= limit else 2**64
    return ceilings


def pair_shard(store: Store, unit: dict[str, Any]) -> dict[str, Any]:
    """Joins and filters one shard of prompts; writes its pairs unless only their draw keys are asked for."""
    pairing, student = Pairing(**unit["spec"]), Student(**unit["student"])
    prompts = store.read_table(unit["prompts"], PROMPTS.names)
    shard = shard_name(unit["prompts"])
    sides = [
        _scored_responses(store, pairing.scorer, side, shard).filter(pc.field("sample") < unit["samples"][side])
        for side in (pairing.chosen, pairing.rejected)
    ]
    filters = rules(pairing, student.max_length)
    if unit["write"] and pairing.limit:
        filters.append(("limit", lambda pair: draw_key(pair, 0) <= unit["ceiling"]))
    tables, funnels, keys = [PAIRS.empty_table()], [], []
    for candidates in join_responses(prompts, *sides):
        _tokenize(candidates, student)
        kept, funnel = apply_rules(candidates, filters)
        funnels.append(funnel)
        if unit["write"]:
            tables.append(pa.Table.from_pylist(kept, schema=PAIRS))
        else:
            keys += [draw_key(pair, 0) for pair in kept]
    if not unit["write"]:
        return {"pairing": unit["pairing"], "draw_keys": keys}
    store.write_table(f"{Store.pairs(unit['pairing'])}/{shard}.parquet", pa.concat_tables(tables), PAIRS)
    later = merge_funnels([apply_rules([], filters)[1], *funnels])
    answered = sum(funnel[0]["in"] for funnel in funnels)
    return {
        "pairing": unit["pairing"],
        "funnel": [_stage("answered by both teachers", len(prompts), answered), *later],
    }


def apply_rules(
    candidates: list[dict[str, Any]], filters: list[tuple[str, Rule]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the candidates that pass all rules, the funnel). Pure."""
    funnel = []
    for name, rule in filters:
        kept = [pair for pair in candidates if rule(pair)]
        funnel.append(_stage(name, len(candidates), len(kept)))
        candidates = kept
    return candidates, funnel


def _scored_responses(store: Store, scorer: str | None, teacher: str, shard: str) -> pa.Table:
    columns = [*JOIN_KEYS, "teacher", "text", "finish_reason", "error"]
    responses = store.read_tables(Store.responses(teacher), RESPONSES, columns, prefix=f"{shard}-")
    if scorer is None:
        return responses.append_column("score", pa.nulls(len(responses), pa.float64()))
    scores = store.read_tables(Store.scores(scorer, teacher), SCORES, prefix=f"{shard}-")
    place = pc.index_in(keys_of(responses), value_set=keys_of(scores).combine_chunks())
    return responses.append_column("score", scores["score"].take(place))


@lru_cache(maxsize=8)
def _tokenizer(student: str) -> Any:
    return load_tokenizer(Student(**json.loads(student)), "student")


def _tokenize(candidates: list[dict[str, Any]], student: Student) -> None:
    """Adds the ids and lengths in the student's tokens, end token included, and whether its template refuses them."""
    tokenizer = _tokenizer(student.model_dump_json())
    for pair in candidates:
        texts = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        try:
            prompt, (chosen, rejected) = conversation_ids(tokenizer, pair["prompt"], texts)
            pair["refused"] = False
        except TemplateError:
            prompt, chosen, rejected, pair["refused"] = [], [], [], True
        pair |= {"prompt_token_ids": prompt, "chosen_token_ids": chosen, "rejected_token_ids": rejected}
        pair |= {f"{part}_tokens": len(pair[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected")}


def _stage(name: str, before: int, after: int) -> dict[str, Any]:
    return {"stage": name, "in": before, "out": after, "removed": before - after}


def merge_funnels(funnels: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Adds up the shards' funnels, stage by stage."""
    return [
        _stage(stages[0]["stage"], sum(item["in"] for item in stages), sum(item["out"] for item in stages))
        for stages in zip(*funnels, strict=True)
    ]
