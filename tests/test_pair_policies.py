"""Pairings on Ray over planted stores: policies, samples, draws, filters on prompts; everything recounted."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answered import ask, respond
from tiny_model import save_tiny

from deltaray.data.contracts import PAIRS
from deltaray.data.store import Store
from deltaray.errors import UserError
from deltaray.pair.describe import is_described
from deltaray.pair.removed import EXAMPLES, REMOVED, removed_table
from deltaray.pair.stage import is_paired, pair
from deltaray.recipe import Recipe, Study, expand
from deltaray.score.stage import score

PROMPTS, SAMPLES = 30, 3
TEACHERS = ("big", "mid", "low")
POOL = {"policy": "best_over_worst", "teachers": list(TEACHERS), "scorer": "words"}


def words(teacher: str, n: int, k: int) -> int:
    """How much a response says, which is its score here."""
    return 1 + (n * 5 + k * 3 + 7 * TEACHERS.index(teacher)) % 9


def text(teacher: str, n: int, k: int) -> str:
    if teacher == "mid" and n % 10 == 4:
        return ""  # failed
    cut = " …" if teacher == "big" and n % 10 == 7 else ""
    return " ".join(f"{teacher[0]}{n}x{k}" for _ in range(words(teacher, n, k))) + cut


def study_at(out: Path, student: str, pairings: dict[str, Any]) -> Study:
    return expand(
        Recipe.model_validate(
            {
                "name": "policies",
                "out": str(out),
                "prompts": {"path": "unused.jsonl"},
                "teachers": {name: {"model": "unused", "sampling": {"samples": SAMPLES}} for name in TEACHERS},
                "scorers": {"words": {"kind": "surface", "statistic": "words"}},
                "pairings": pairings,
                "student": {"model": student, "max_length": 256},
            }
        )
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="module")
def planted(ray_session: Any, student: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Study]:
    out = tmp_path_factory.mktemp("policies")
    benchmark = out / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"prompt": "please add these two numbers for me right now: prompt nine"}) + "\n")
    two = {"chosen": "big", "rejected": "low", "scorer": "words"}
    filters = [{"kind": "duplicate_prompt"}, {"kind": "contaminated", "paths": [str(benchmark)]}]
    pairings = {
        "samples": two,
        "part": {**two, "scorer": "words/characters"},
        "worst": POOL,
        "random": {**POOL, "policy": "best_over_random"},
        "reversed": {**POOL, "reverse": True},
        "drawn": {**POOL, "draw": {"of": 2, "weak": 1, "weak_teachers": ["low"]}},
        "self": {**POOL, "teachers": ["mid"]},
        "prompts": {**POOL, "filters": filters},
        "few": {**POOL, "limit": 8, "stratify": True, "max_per_source": 9},
    }
    store, study = Store(str(out / "out")), study_at(out / "out", student, pairings)
    contents = {9: "please add these two numbers for me right now: prompt nine", 21: "Number 20?", 20: "number  20?"}
    ask(store, PROMPTS, 12, content=lambda n: contents.get(n, f"{n}+{n}="), source=lambda n: "ab"[n % 3 == 0])
    for teacher in TEACHERS:
        respond(store, teacher, PROMPTS, 12, lambda n, k, teacher=teacher: text(teacher, n, k), SAMPLES)
    score(study, store)
    pair(study, store)
    return store, study


def pairs_of(store: Store, name: str) -> dict[str, dict[str, Any]]:
    return {row["prompt_id"]: row for row in store.read_tables(Store.pairs(name), PAIRS).to_pylist()}


def usable(n: int) -> list[tuple[int, str, int]]:
    """(score, teacher, sample) of the responses to a prompt that did not fail and were not cut."""
    offers = [(words(teacher, n, k), teacher, k) for teacher in TEACHERS for k in range(SAMPLES)]
    return [it for it in offers if text(it[1], n, it[2]) and not text(it[1], n, it[2]).endswith("…")]


def test_funnels_chain_from_prompts_to_pairs_also_with_samples(planted: tuple[Store, Study]) -> None:
    store, study = planted
    for name in study.pairings:
        funnel = store.read_json(f"{Store.pairs(name)}/_funnel.json")
        rows = store.count_rows(Store.pairs(name))
        assert funnel[0]["in"] == PROMPTS and funnel[-1]["out"] == rows > 0
        assert all(one["out"] == other["in"] for one, other in pairwise(funnel))
        for item in funnel:
            assert item["removed"] >= 0 and item["in"] - item["removed"] + item.get("added", 0) == item["out"]
        assert any("added" in item for item in funnel) == (name in ("samples", "part"))
        candidates = max(item["out"] for item in funnel)
        reasons = store.read_tables(Store.removed(name), REMOVED)["reason"].to_pylist()
        assert len(reasons) == candidates - rows
        assert {item["stage"]: item["removed"] for item in funnel[1:] if item["removed"]} == {
            reason: reasons.count(reason) for reason in set(reasons)
        }


def test_what_was_removed_brings_its_texts_along(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    rows = store.read_tables(Store.removed("samples"), REMOVED).to_pylist()
    assert {row["reason"] for row in rows} == {"truncated"}
    for row in rows:
        n, k = int(row["prompt_id"][1:]), row["chosen_sample"]
        assert row["prompt"] == [{"role": "user", "content": f"{n}+{n}="}]
        sides = {"chosen": "big", "rejected": "low"}
        assert all(row[side][0]["content"] == text(teacher, n, k) for side, teacher in sides.items())
        assert row["chosen_score"] == words("big", n, k)


def test_of_each_reason_only_some_bring_their_texts_along(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    [path, *_] = store.committed(Store.prompts)
    prompts = store.read_table(path)
    texts = pa.table({"row": [0, 1], "text": ["a", "b"], "refusal": [None, "it cannot"], "reasoning": [None] * 2})
    for name in ("prompt_token_ids", "token_ids"):
        texts = texts.append_column(name, pa.array([[1], [2]], pa.list_(pa.int32())))
    offers = pa.table({"teacher": ["x", "y"], "sample": pa.array([0, 0], pa.int32()), "score": [1.0, None]})
    picks = pa.table({"place": [3, 1], "chosen": [0, 0], "rejected": [1, 1]})
    found = removed_table(prompts, offers, picks, texts, [(1, "dull")] * 2 * EXAMPLES + [(0, "odd")]).to_pylist()
    with_texts = [row["reason"] for row in found if row["chosen"] is not None]
    assert with_texts == ["dull"] * EXAMPLES + ["odd"] and len(found) == 2 * EXAMPLES + 1
    assert (found[-1]["prompt_id"], found[-1]["rejected"]) == ("p003", [{"role": "assistant", "content": "b"}])


def test_samples_are_paired_one_by_one(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    rows = store.read_tables(Store.pairs("samples"), PAIRS).to_pylist()
    assert len(rows) == SAMPLES * sum(n % 10 != 7 for n in range(PROMPTS))
    assert all(row["chosen_sample"] == row["rejected_sample"] for row in rows)


def test_a_part_of_a_score_takes_its_place(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    rows = store.read_tables(Store.pairs("part"), PAIRS).to_pylist()
    assert rows and all(row["chosen_score"] == len(row["chosen"][0]["content"]) for row in rows)


def test_the_best_of_the_pool_stands_over_the_worst(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    pairs = pairs_of(store, "worst")
    for n in range(PROMPTS):
        scores = [it[0] for it in usable(n)]
        row = pairs[f"p{n:03d}"]
        assert (row["chosen_score"], row["rejected_score"]) == (max(scores), min(scores))
        assert row["chosen"][0]["content"] == text(row["chosen_model"], n, row["chosen_sample"])
        assert row["rejected"][0]["content"] == text(row["rejected_model"], n, row["rejected_sample"])
    rejected = {
        row["rejected_score"] - min(it[0] for it in usable(int(key[1:])))
        for key, row in pairs_of(store, "random").items()
    }
    assert len(rejected) > 2


def test_controls_and_draws(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    there, back = pairs_of(store, "worst"), pairs_of(store, "reversed")
    assert there.keys() == back.keys()
    assert all(
        back[key]["chosen"] == there[key]["rejected"] and back[key]["delta"] == -there[key]["delta"] for key in there
    )
    assert all(row["chosen_tokens"] == len(row["chosen_token_ids"]) for row in back.values())
    drawn = pairs_of(store, "drawn").values()
    assert {("low" in (row["chosen_model"], row["rejected_model"])) for row in drawn} == {True}
    assert {row["chosen_model"] for row in pairs_of(store, "self").values()} == {"mid"}
    few = pairs_of(store, "few").values()
    assert sorted(row["source"] for row in few) == ["a"] * 4 + ["b"] * 4  # nine of each source are left by the cap


def test_every_pairing_is_described_by_its_own_rows(planted: tuple[Store, Study]) -> None:
    store, study = planted
    for name in study.pairings:
        rows = store.read_tables(Store.pairs(name), PAIRS).to_pylist()
        found = store.read_json(f"{Store.pairs(name)}/_delta.json")
        deltas = [row["delta"] for row in rows]
        assert (found["pairs"], found["scored"]) == (len(rows), len(deltas))
        assert found["delta"]["mean"]["value"] == pytest.approx(sum(deltas) / len(deltas))
        assert found["delta"]["at"]["value"] == pytest.approx(deltas.count(0) / len(deltas))
        assert sum(found["delta"]["histogram"]["counts"]) == len(deltas)
        assert found["levels"]["generator"] + found["levels"]["selection"] == pytest.approx(sum(deltas) / len(deltas))
        largest = [it["delta"] for it in found["examples"]["largest"]]
        assert largest == sorted(deltas, reverse=True)[: len(largest)] and len(largest) == min(5, len(deltas))
        assert all(it["delta"] < 0 for it in found["examples"]["most_negative"])
        texts = {(row["prompt_id"], row["chosen_sample"]): row["chosen"] for row in rows}
        assert all(it["chosen"] == texts[it["prompt_id"], it["chosen_sample"]] for it in found["examples"]["largest"])


def test_statistics_of_both_sides_are_compared(planted: tuple[Store, Study]) -> None:
    """Recounted from the texts, a prompt at a time."""
    store, _ = planted
    found = store.read_json(f"{Store.pairs('samples')}/_delta.json")
    [row] = [row for row in found["differences"] if row["what"] == "words/characters"]
    gaps: dict[str, list[int]] = {}
    for it in store.read_tables(Store.pairs("samples"), PAIRS).to_pylist():
        sizes = [len(it[side][0]["content"]) for side in ("chosen", "rejected")]
        gaps.setdefault(it["prompt_id"], []).append(sizes[0] - sizes[1])
    means = [sum(of) / len(of) for of in gaps.values()]
    assert row["prompts"] == len(means) and row["difference"] == pytest.approx(sum(means) / len(means))
    assert row["effect"] == pytest.approx(row["difference"] / stdev(means))
    assert {row["what"] for row in found["differences"]} >= {"tokens", "words/words", "words/refusal"}
    everything = [words("big", n, k) for n in range(PROMPTS) for k in range(SAMPLES)]
    assert found["levels"]["teachers"]["big"]["responses"] == len(everything)


def test_a_description_follows_the_scores(planted: tuple[Store, Study]) -> None:
    store, study = planted
    assert all(is_described(study, store, name) for name in study.pairings)
    more = study.recipe.model_dump() | {
        "scorers": {"words": study.recipe.scorers["words"], "right": {"kind": "numeric"}}
    }
    study = expand(Recipe.model_validate(more))
    score(study, store, [("right", "mid")])
    assert is_paired(study, store, "self") and not is_described(study, store, "self")
    assert is_described(study, store, "samples")  # none of its teachers has another score


def test_duplicate_and_contaminated_prompts_go(planted: tuple[Store, Study]) -> None:
    store, _ = planted
    gone = pairs_of(store, "worst").keys() - pairs_of(store, "prompts").keys()
    assert gone == {"p009", "p021"}


def test_windows_that_leave_nothing_show_where_the_pairs_went(
    planted: tuple[Store, Study], student: str, tmp_path: Path
) -> None:
    store, _ = planted
    study = study_at(Path(store.out), student, {"none": {**POOL, "min_delta": 1000}})
    for _ in range(2):  # an empty pairing is not up to date
        with pytest.raises(UserError) as error:
            pair(study, store)
        assert "no pairs left" in str(error.value) and "-30 delta below min_delta" in str(error.value)


def test_pair_shards_open_as_a_data_set_of_preferences(planted: tuple[Store, Study], tmp_path: Path) -> None:
    store, _ = planted
    for path in store.committed(Store.pairs("worst")):
        assert pq.read_schema(Path(store.out) / path).equals(PAIRS)


def test_a_pool_is_referenced_as_a_whole(student: str, tmp_path: Path) -> None:
    from deltaray.train.reference.stage import references_needed

    study = study_at(tmp_path, student, {"worst": POOL})
    training = {"runs": {"delta": {"pairing": "worst", "learning_rate": 1e-5}}}
    study = expand(Recipe.model_validate({**study.recipe.model_dump(), "training": training}))
    assert references_needed(study, list(study.runs.values())) == {"student": list(TEACHERS)}
