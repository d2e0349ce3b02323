"""Pairing is a join, then rules; the funnel's counts chain and the draw does not depend on shards."""

from typing import Any

import pyarrow as pa
import pytest

from deltaray.data.contracts import PAIRS, PROMPTS
from deltaray.data.tokens.response_tokens import THOUGHTS
from deltaray.pair.funnel import merge_funnels, stage
from deltaray.pair.join import candidates, pick_by_sample
from deltaray.pair.rules import draw_key, rules
from deltaray.recipe.pairing import Pairing


def prompts(ids: str) -> pa.Table:
    rows = [{"prompt_id": i, "messages": [{"role": "user", "content": i}], "answer": i, "source": None} for i in ids]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def responses(teacher: str, texts: dict[str, str], score: float | None = None, samples: int = 1) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": i,
                "sample": n,
                "teacher": teacher,
                "text": f"{text}{n or ''}",
                "finish_reason": "stop",
                "error": None,
                "score": score,
            }
            for i, text in texts.items()
            for n in range(samples)
        ],
        schema=pa.schema(
            [
                ("prompt_id", pa.string()),
                ("sample", pa.int32()),
                ("teacher", pa.string()),
                ("text", pa.string()),
                ("finish_reason", pa.string()),
                ("error", pa.string()),
                ("score", pa.float64()),
            ]
        ),
    )


def join(asked: pa.Table, chosen: pa.Table, rejected: pa.Table) -> list[list[dict[str, Any]]]:
    offers = pa.concat_tables([chosen, rejected])
    texts = pa.table({"row": pa.array(range(len(offers)), pa.int64()), "text": offers["text"]})
    ids = pa.array([[1]] * len(offers), pa.list_(pa.int32()))
    none = pa.nulls(len(offers), pa.string())
    for name, column in {"prompt_token_ids": ids, "token_ids": ids, "refusal": none, "reasoning": none}.items():
        texts = texts.append_column(name, column)
    picks = pick_by_sample(asked, offers, *(table["teacher"][0].as_py() for table in (chosen, rejected)))
    return list(candidates(asked, offers.drop_columns(["text"]), picks, texts, 100))


def candidate(**changes: Any) -> dict[str, Any]:
    base = {
        "prompt_id": "a", "chosen_sample": 0, "chosen": [{"content": "x"}], "rejected": [{"content": "y"}],
        "chosen_score": 1.0, "rejected_score": 0.0, "delta": 1.0, "chosen_finish": "stop", "rejected_finish": "stop",
        "chosen_tokens": 5, "rejected_tokens": 9, "prompt_tokens": 10, "chosen_error": None, "rejected_error": None,
        "refusal": None, "source": None, "scores": {}, "chosen_reasoning": None, "rejected_reasoning": None,
        "same_tokens": False,
    }  # fmt: skip
    return base | changes


def passes(pairing: Pairing, pair: dict[str, Any], max_length: int = 100) -> str:
    """The name of the first rule that removes the pair; empty if it stays."""
    return next((name for name, rule in rules(pairing, max_length) if not rule(pair)), "")


def test_the_join_keeps_the_order_of_prompts_whatever_the_order_of_responses() -> None:
    chosen = responses("weak", {"c": "C", "a": "A", "b": "B"}, 1.0)
    rejected = responses("weaker", {"b": "b", "a": "a"}, 0.0)
    [pairs] = join(prompts("abcd"), chosen, rejected)
    assert [(pair["prompt_id"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("a", "A", "a"),
        ("b", "B", "b"),
    ]
    assert {pair["delta"] for pair in pairs} == {1.0} and pairs[0]["chosen_model"] == "weak"


def test_swapping_the_teachers_swaps_the_pair_and_the_sign_of_its_delta() -> None:
    one, other = responses("weak", {"a": "A"}, 0.9), responses("weaker", {"a": "a"}, 0.4)
    [[there]], [[back]] = join(prompts("a"), one, other), join(prompts("a"), other, one)
    assert there["chosen"] == back["rejected"] and there["rejected"] == back["chosen"]
    assert there["delta"] == -back["delta"] == pytest.approx(0.5)


def test_samples_are_paired_index_by_index() -> None:
    one, other = responses("weak", {"a": "A"}, samples=3), responses("weaker", {"a": "a"}, samples=2)
    [pairs] = join(prompts("a"), one, other)
    assert [(pair["chosen_sample"], pair["rejected_sample"]) for pair in pairs] == [(0, 0), (1, 1)]
    assert pairs[0]["delta"] is None  # unscored


@pytest.mark.parametrize(
    ("pairing", "changes", "removed_by"),
    [
        ({"sources": ["*/repeat"]}, {"source": "chat/repeat"}, ""),
        ({"sources": ["*/repeat", "code"]}, {"source": "chat"}, "of another source"),
        ({"sources": ["chat"]}, {"source": None}, "of another source"),
        ({}, {}, ""),
        ({}, {"chosen": [{"content": "y"}]}, "identical"),
        ({"drop_identical": False}, {"chosen": [{"content": "y"}]}, ""),
        ({}, {"rejected_finish": "length"}, "truncated"),
        ({"drop_truncated": False}, {"rejected_finish": "length"}, ""),
        ({}, {"chosen_error": "engine error: out of memory", "chosen_finish": "error"}, "engine error"),
        ({}, {"rejected_error": "prompt refused: invalid UTF-8 at byte 3"}, "prompt refused"),
        ({}, {"rejected_error": "empty answer"}, "empty answer"),
        ({}, {"refusal": "it cannot"}, "refused by the student's template"),
        ({}, {"refusal": THOUGHTS}, "thoughts where the student must not think"),
        ({}, {"same_tokens": True}, "identical in the student's tokens"),
        ({}, {"rejected_error": "the answer calls tools"}, "another failure"),
        ({}, {"prompt_tokens": 98}, "prompt too long for the student"),
        ({}, {"prompt_tokens": 97}, ""),
        ({"keep": "chosen_wrong"}, {}, "chosen not wrong"),
        ({"keep": "chosen_wrong"}, {"chosen_score": 0.0}, ""),
        ({"keep": "chosen_wrong"}, {"chosen_score": None}, "chosen not wrong"),
        ({"keep": "chosen_right"}, {"chosen_score": 0.0}, "chosen not right"),
        ({"min_delta": 1.0}, {}, ""),
        ({"min_delta": 1.5}, {}, "delta below min_delta"),
        ({"min_delta": -5}, {"delta": None}, "delta below min_delta"),
        ({"max_delta": 0.5}, {}, "delta above max_delta"),
        ({"max_length_gap": 4}, {}, ""),
        ({"max_length_gap": 3}, {}, "length gap"),
    ],
)
def test_each_rule_removes_what_it_says(pairing: dict[str, Any], changes: dict[str, Any], removed_by: str) -> None:
    assert passes(Pairing(chosen="weak", rejected="weaker", **pairing), candidate(**changes)) == removed_by


def test_the_draw_is_seeded_and_spreads() -> None:
    pairs = [candidate(prompt_id=str(n)) for n in range(2000)]
    keys = [draw_key(pair, 0) for pair in pairs]
    assert keys == [draw_key(pair, 0) for pair in pairs] and len(set(keys)) == 2000
    assert keys != [draw_key(pair, 1) for pair in pairs]
    assert 0.45 < sum(key < 2**63 for key in keys) / 2000 < 0.55


def test_merged_funnels_chain() -> None:
    shard = [stage("a", 5, 4), stage("b", 4, 2)]
    merged = merge_funnels([shard, shard])
    assert merged == [{"stage": "a", "in": 10, "out": 8, "removed": 2}, {"stage": "b", "in": 8, "out": 4, "removed": 4}]


def test_a_stage_that_adds_says_so_and_removes_nothing() -> None:
    assert stage("samples", 4, 12) == {"stage": "samples", "in": 4, "out": 12, "removed": 0, "added": 8}
    [merged] = merge_funnels([[stage("samples", 4, 12)], [stage("samples", 3, 2)]])
    assert merged["in"] - merged["removed"] + merged["added"] == merged["out"] == 14


def test_pair_columns_are_the_contract() -> None:
    names = "prompt_id prompt chosen rejected chosen_model rejected_model chosen_score rejected_score delta"
    assert PAIRS.names[:12] == [*names.split(), "chosen_tokens", "rejected_tokens", "source"]
