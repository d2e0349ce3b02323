"""The pairing stage on Ray: scores and pairs follow the stored responses, whatever the shards."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny_model import save_tiny

from deltaray.data.contracts import PAIRS, RESPONSES, SCORES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store
from deltaray.pair.stage import is_paired, pair
from deltaray.recipe import Recipe, Study, expand
from deltaray.score.stage import missing_scores, score

PROMPTS = 42  # six shards of 7


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("student") / "student")


def study_at(out: Path, student: str) -> Study:
    pairing = {"chosen": "weak", "rejected": "weaker", "scorer": "exact"}
    return expand(
        Recipe.model_validate(
            {
                "name": "pairs",
                "out": str(out),
                "prompts": {"path": "unused.jsonl"},
                "teachers": {"weak": {"model": "unused"}, "weaker": {"model": "unused"}},
                "scorers": {"exact": {"kind": "exact_match"}},
                "pairings": {
                    "all": pairing,
                    "drawn": {**pairing, "limit": 13},
                    "better": {**pairing, "min_delta": 0.5},
                    "too-many": {**pairing, "limit": 10_000},
                },
                "student": {"model": student, "max_length": 64},
            }
        )
    )


def answer(store: Store, shard_size: int, prompts: int = PROMPTS) -> None:
    """`weak` answers every second prompt right, `weaker` every fourth and never with the same words when wrong."""
    rows: list[Any] = [
        {
            "prompt_id": f"p{n:03d}",
            "messages": [{"role": "user", "content": f"{n}+{n}="}],
            "answer": str(2 * n),
            "source": None,
            "error": None,
        }
        for n in range(prompts)
    ]
    store_prompts(store, rows, shard_size)
    for number, start in enumerate(range(0, prompts, shard_size)):
        for teacher, every in (("weak", 2), ("weaker", 4)):
            texts = {
                n: str(2 * n) if n % every == 0 else f"no {teacher}"
                for n in range(start, min(start + shard_size, prompts))
            }
            table = pa.Table.from_pylist(
                [
                    {
                        "prompt_id": f"p{n:03d}", "sample": 0, "teacher": teacher, "text": text,
                        "prompt_token_ids": [1], "token_ids": [1], "tokens": 1, "finish_reason": "stop",
                        "error": None, "reasoning": None,
                    }
                    for n, text in texts.items()
                ],
                schema=RESPONSES,
            )  # fmt: skip
            store.write_table(f"{Store.responses(teacher)}/part-{number:05d}-abc.parquet", table, RESPONSES)


def pairs_of(store: Store, name: str) -> list[dict[str, Any]]:
    return store.read_tables(Store.pairs(name), PAIRS).to_pylist()


@pytest.fixture(scope="module")
def stores(ray_session: Any, student: str, tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """The same responses in shards of 7 and of 42."""
    made = []
    for shard_size in (7, 42):
        out = tmp_path_factory.mktemp(f"shards-of-{shard_size}")
        store, study = Store(str(out)), study_at(out, student)
        answer(store, shard_size)
        assert score(study, store) == 2 * PROMPTS and not missing_scores(study, store)
        pair(study, store)
        made.append(store)
    return made


@pytest.mark.parametrize("pairing", ["all", "drawn", "better", "too-many"])
def test_shards_do_not_change_the_pairs(stores: list[Store], pairing: str) -> None:
    small, large = (pairs_of(store, pairing) for store in stores)
    assert small == large and small
    funnels = [store.read_json(f"{Store.pairs(pairing)}/_funnel.json") for store in stores]
    assert funnels[0] == funnels[1] and funnels[0][-1]["out"] == len(small)


def test_a_limit_draws_exactly_so_many(stores: list[Store]) -> None:
    everything = [row["prompt_id"] for row in pairs_of(stores[0], "all")]
    drawn = [row["prompt_id"] for row in pairs_of(stores[0], "drawn")]
    assert len(drawn) == 13 and set(drawn) < set(everything) and drawn != everything[:13]
    assert [row["prompt_id"] for row in pairs_of(stores[0], "too-many")] == everything


def test_scores_and_windows(stores: list[Store]) -> None:
    assert len(pairs_of(stores[0], "all")) == 31  # the eleven that both got right are identical
    assert {row["delta"] for row in pairs_of(stores[0], "better")} == {1.0}
    assert len(pairs_of(stores[0], "better")) == 10
    scores = stores[0].read_tables(Store.scores("exact", "weak"), SCORES).to_pylist()
    assert [row["score"] for row in sorted(scores, key=lambda row: row["prompt_id"])] == [1.0, 0.0] * 21


def test_new_responses_make_pairs_anew(stores: list[Store], student: str) -> None:
    study = study_at(Path(stores[0].out), student)
    assert all(is_paired(study, stores[0], name) for name in study.pairings)
    answer(stores[0], 7, PROMPTS + 7)
    assert not is_paired(study, stores[0], "all")
    score(study, stores[0])
    assert pair(study, stores[0])["all"] == 36


def test_samples_beyond_those_that_the_recipe_asks_for_take_no_part(stores: list[Store], student: str) -> None:
    store, study = stores[1], study_at(Path(stores[1].out), student)
    before = pairs_of(store, "all")
    for teacher in ("weak", "weaker"):
        table = store.read_table(f"{Store.responses(teacher)}/part-00000-abc.parquet", schema=RESPONSES)
        second = table.set_column(1, RESPONSES.field("sample"), pa.array([1] * len(table), pa.int32()))
        store.write_table(f"{Store.responses(teacher)}/part-00000-def.parquet", second, RESPONSES)
    score(study, store)
    assert not is_paired(study, store, "all") and pair(study, store)["all"] == len(before)
    assert pairs_of(store, "all") == before
