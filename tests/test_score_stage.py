"""The scoring stage on Ray: every response once by every scorer, judges and reward models among them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from answered import ask, respond
from completions_server import completion, prompt_of, refusal, serving
from tiny_model import make_tokenizer

from deltaray.data.contracts import RESPONSES, SCORES
from deltaray.data.store import Store, numbers_of
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.scorers import RewardModel
from deltaray.runtime.session import Capacity
from deltaray.score.compare import AGREEMENT, agreement_tables, compare_scores, is_compared, read_agreement
from deltaray.score.judging import _judged_slices, forget_failed
from deltaray.score.rewards import RewardWorker
from deltaray.score.stage import all_scores, missing_scores, response_scoring, score

PROMPTS, SHARD = 24, 10
NONSENSE = 7
"""Every so many answers the judge says nothing that means anything."""
BROKEN = 4
"""What the fragile judge fails at until it is mended."""
MENDED: list[bool] = []


def judge_script(request: dict[str, Any], attempt: int) -> Any:
    """Rates a right sum 5 and any other 2; prefers A where it is right; sometimes babbles."""
    text = prompt_of(request)
    number = int(text.partition("[user]\n")[2].partition("+")[0])
    right = [f"\n{2 * number}\n" in part for part in text.split("<response")[1:]]
    if number == BROKEN and request["model"] == "the-fragile-judge" and not MENDED:
        return refusal(400, "no")
    if number % NONSENSE == 3:
        return completion("As a language model I like both.")
    if len(right) == 2:
        return completion(f"Verdict: {'tie' if right[0] == right[1] else 'A' if right[0] else 'B'}")
    return completion(f"Rating: {5 if right[0] else 2}")


def save_reward_model(folder: Path) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def study_at(out: Path, url: str, reward: str) -> Study:
    judge = {"model": "the-judge", "endpoint": {"url": url}}
    return expand(
        Recipe.model_validate(
            {
                "name": "scores",
                "out": str(out),
                "unit_size": 4,
                "prompts": {"path": "unused.jsonl"},
                "teachers": {"weak": {"model": "unused"}, "weaker": {"model": "unused"}},
                "scorers": {
                    "size": {"kind": "size", "sizes": {"weak": 3, "weaker": 1.5}},
                    "exact": {"kind": "exact_match"},
                    "surface": {"kind": "surface"},
                    "judge": {"kind": "judge", "by": judge, "aspects": {"truth": "Is it so?", "style": "Is it nice?"}},
                    "versus": {"kind": "judge", "by": judge, "against": "weaker", "sources": ["even"]},
                    "reward": {"kind": "reward_model", "model": reward, "batch_size": 3},
                },
                "pairings": {"delta": {"chosen": "weak", "rejected": "weaker", "scorer": "judge/truth"}},
                "student": {"model": "unused"},
            }
        )
    )


@pytest.fixture(scope="module")
def scored(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`weak` is right half of the time, `weaker` a third; the last response of `weak` has failed."""
    out = tmp_path_factory.mktemp("scores")
    reward = save_reward_model(tmp_path_factory.mktemp("reward"))
    store = Store(str(out))
    ask(store, PROMPTS, SHARD, source=lambda n: "even" if n % 2 == 0 else "odd")
    respond(store, "weak", PROMPTS, SHARD, lambda n, _: "" if n == PROMPTS - 1 else str(2 * n if n % 2 == 0 else 1))
    respond(store, "weaker", PROMPTS, SHARD, lambda n, _: str(2 * n if n % 3 == 0 else 1))
    with serving(judge_script) as (server, url):
        study = study_at(out, url, reward)
        looked_at = score(study, store, all_scores(study), Capacity(8, 0))
        compare_scores(study, store)
    return store, study, looked_at, server


def scores_of(store: Store, scorer: str, teacher: str) -> dict[str, dict[str, Any]]:
    return {row["prompt_id"]: row for row in store.read_tables(Store.scores(scorer, teacher), SCORES).to_pylist()}


def test_every_response_is_looked_at_once_by_every_scorer(scored: Any) -> None:
    store, study, looked_at, _ = scored
    assert looked_at == 6 * 2 * PROMPTS and not missing_scores(study, store, all_scores(study))
    for scorer, teacher in all_scores(study):
        names = [path.rpartition("/")[2] for path in store.committed(Store.scores(scorer, teacher))]
        assert names == [path.rpartition("/")[2] for path in store.committed(Store.responses(teacher))]
        assert len(scores_of(store, scorer, teacher)) == PROMPTS
    assert scores_of(store, "exact", "weak")[f"p{PROMPTS - 1:03d}"]["note"] == "failed response"


def test_a_judges_nonsense_is_counted_and_not_guessed(scored: Any) -> None:
    store, *_ = scored
    rated = scores_of(store, "judge", "weaker")
    for n in range(PROMPTS):
        row = rated[f"p{n:03d}"]
        if n % NONSENSE == 3:
            assert row["score"] is None and row["note"] == "unparsable: truth, style"
        else:
            assert row["score"] == (5 if n % 3 == 0 else 2) and numbers_of(row["parts"]).keys() == {"truth", "style"}
    [told] = [row for row in read_agreement(store)["scorers"] if (row["scorer"], row["teacher"]) == ("judge", "weaker")]
    assert (told["responses"], told["scored"], told["unscored"]) == (PROMPTS, PROMPTS - 3, {"unparsable": 3})


def test_a_pairwise_judge_is_asked_in_both_orders(scored: Any) -> None:
    store, *_ = scored
    for n in range(0, PROMPTS, 2):
        row = scores_of(store, "versus", "weak")[f"p{n:03d}"]
        expected = None if n % NONSENSE == 3 else 0.5 if n % 3 == 0 else 1
        assert row["score"] == expected, row
    assert scores_of(store, "versus", "weak")["p001"]["note"] == "other source"
    assert scores_of(store, "versus", "weaker")["p000"]["score"] == 0.5


def test_questions_go_and_answers_stay(scored: Any) -> None:
    store, _, _, server = scored
    assert not store.committed(Store.questions("judge", "weak"))
    kept = store.read_tables(Store.judgements("judge", "weak"), RESPONSES)
    assert len(kept) == 2 * (PROMPTS - 1)
    assert len(server.requests) == 2 * (2 * PROMPTS - 1) + PROMPTS  # two aspects; two orders for half of the prompts


def test_a_second_run_asks_nobody(scored: Any) -> None:
    store, study, _, _ = scored  # the judge's server is gone by now
    assert score(study, store, all_scores(study), Capacity(8, 0)) == 0 and is_compared(study, store)


def test_what_is_lost_is_scored_again_from_the_kept_answers(scored: Any) -> None:
    store, study, _, _ = scored
    before = scores_of(store, "judge", "weak")
    store.delete(store.committed(Store.scores("judge", "weak"))[:1])
    assert score(study, store, [("judge", "weak")], Capacity(8, 0)) == SHARD
    assert scores_of(store, "judge", "weak") == before


def test_agreement_is_what_the_scores_say(scored: Any) -> None:
    store, *_ = scored
    rows = {(row["first"], row["second"], row["by"], row["which"]): row for row in read_agreement(store)["agreement"]}
    deltas = {}
    for name in ("size", "exact"):
        left, right = (scores_of(store, name, teacher) for teacher in ("weak", "weaker"))
        known = [key for key in left if None not in (left[key]["score"], right[key]["score"])]
        deltas[name] = {key: left[key]["score"] - right[key]["score"] for key in known}
    exact = list(deltas["exact"].values())
    row = rows["size", "exact", "all", "all"]
    assert row["pairs"] == PROMPTS - 1 and row["decided"] == sum(it != 0 for it in exact)
    assert row["agreement"] == pytest.approx(sum(it > 0 for it in exact) / row["decided"])
    assert row["ties"] == {"first": 0, "second": sum(it == 0 for it in exact), "both": 0}
    assert row["low"] <= row["agreement"] <= row["high"]
    by_source = [rows["size", "exact", "source", which]["pairs"] for which in ("even", "odd")]
    assert sum(by_source) == row["pairs"] and ("size", "exact", "teachers", "weak and weaker") in rows
    assert store.exists(AGREEMENT) and len(agreement_tables(read_agreement(store))) == 2


def test_the_company_in_a_batch_does_not_change_a_reward(scored: Any) -> None:
    store, study, *_ = scored
    spec = study.scorers["reward"]
    assert isinstance(spec, RewardModel)
    asked = [[{"role": "user", "content": f"{n}+{n}="}, {"role": "assistant", "content": "1" * n}] for n in range(1, 9)]
    together = RewardWorker(store, spec, "scorers.reward").rewards(asked)
    alone = RewardWorker(store, spec.model_copy(update={"batch_size": 1}), "scorers.reward").rewards(asked)
    assert together == pytest.approx(alone, abs=1e-5) and len({round(value, 6) for value in alone}) > 4
    stored = scores_of(store, "reward", "weaker")["p001"]
    one = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "1"}]
    assert stored["score"] == pytest.approx(RewardWorker(store, spec, "scorers.reward").rewards([one])[0], abs=1e-5)


def test_answers_about_other_words_do_not_count(scored: Any) -> None:
    store, study, *_ = scored
    responses = store.committed(Store.responses("weak"))[0]
    unit = asdict(response_scoring(study, "judge", "weak")) | {"responses": responses, "destination": "unused.parquet"}
    before = [score.value for part in _judged_slices(store, unit) for _, score in part]
    changed = f"{Store.responses('changed')}/{unit['responses'].rpartition('/')[2]}"
    table = store.read_table(unit["responses"], schema=RESPONSES)
    texts = pa.array(["other" if n == 0 else text for n, text in enumerate(table["text"].to_pylist())])
    store.write_table(changed, table.set_column(RESPONSES.get_field_index("text"), "text", texts), RESPONSES)
    after = [score.value for part in _judged_slices(store, {**unit, "responses": changed}) for _, score in part]
    assert before[0] is not None and after[0] is None and after[1:] == before[1:]


def test_what_a_judge_failed_at_is_asked_again_only_when_asked(scored: Any) -> None:
    store, before, _, _ = scored
    with serving(judge_script) as (server, url):
        by = {"model": "the-fragile-judge", "endpoint": {"url": url, "retries": 0}}
        fragile = {"fragile": {"kind": "judge", "by": by, "aspects": {"truth": "?"}}}
        study = expand(Recipe.model_validate({**before.recipe.model_dump(), "scorers": fragile, "pairings": {}}))
        sides, capacity = [("fragile", "weaker")], Capacity(8, 0)
        score(study, store, sides, capacity)
        row = scores_of(store, "fragile", "weaker")[f"p{BROKEN:03d}"]
        assert row["score"] is None and row["note"].startswith("judge failed: ")
        asked = len(server.requests)
        MENDED.append(True)
        assert score(study, store, sides, capacity) == 0 and len(server.requests) == asked
        forget_failed(store, sides)
        assert score(study, store, sides, capacity, retry_failed=True) == SHARD
        assert len(server.requests) == asked + 1
        assert scores_of(store, "fragile", "weaker")[f"p{BROKEN:03d}"]["score"] == 2
