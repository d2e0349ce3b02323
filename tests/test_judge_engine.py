"""A judge on real vLLM: what it samples, nonsense among it, is read, counted and never guessed at."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from answered import ask, respond
from character_model import BOS, EOS, FIRST, PIECES, SPECIAL, make_tokenizer

from deltaray.data.contracts import RESPONSES, SCORES
from deltaray.data.store import Store
from deltaray.recipe import Recipe, Study, expand
from deltaray.runtime.session import Capacity
from deltaray.score.compare import compare_scores, read_agreement
from deltaray.score.stage import all_scores, missing_scores, score

PROMPTS, SHARD, NONSENSE = 120, 50, 0.3
ASPECTS = {"truth": "Is it so?", "style": "Is it nice?"}
TEACHERS = ("weak", "weaker")


def save_judge(folder: Path) -> str:
    """A Llama whose layers do nothing: each letter follows from the one before, as `FOLLOWS` says.

    The chat template ends in `+`, after which it begins `rating=<1 to 5>` or, three times of ten, babbles.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1]['content'] }}+"
    tokenizer.save_pretrained(folder)
    size = len(SPECIAL) + len(PIECES)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    places = {letter: FIRST + place for place, letter in enumerate(PIECES)}
    follows: dict[str, dict[str, float]] = {
        "+": {"r": 1 - NONSENSE, "x": NONSENSE}, "=": {str(n): 0.2 for n in range(1, 6)},
    }  # fmt: skip
    follows |= {a: {b: 1.0} for a, b in zip("rating", "ating=", strict=True)}
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        scale = math.sqrt(64)  # what the norm makes of a single 1 among 64 numbers
        logits = torch.full((size, size), -30.0)
        logits[:, EOS] = 0.0
        for letter, shares in follows.items():
            logits[places[letter], EOS] = -30.0
            for following, share in shares.items():
                logits[places[letter], places[following]] = math.log(share)
        model.lm_head.weight[:, :size] = logits.T / scale
    model.save_pretrained(folder)
    return str(folder)


def study_at(out: Path, judge: str) -> Study:
    engine = {"dtype": "float32", "max_model_len": 2048, "arguments": {"max_num_seqs": 64}}
    by = {"model": judge, "sampling": {"temperature": 1.0, "max_tokens": 12}, "engine": engine}
    return expand(
        Recipe.model_validate(
            {
                "name": "judged", "out": str(out), "unit_size": 50, "prompts": {"path": "unused.jsonl"},
                "teachers": {name: {"model": "unused"} for name in TEACHERS},
                "scorers": {"judge": {"kind": "judge", "by": by, "aspects": ASPECTS}},
                "pairings": {"delta": {"chosen": "weak", "rejected": "weaker", "scorer": "judge"}},
                "student": {"model": "unused"},
            }
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def judged(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Store]:
    study = study_at(tmp_path_factory.mktemp("judged"), save_judge(tmp_path_factory.mktemp("judge")))
    store = Store(study.recipe.out)
    ask(store, PROMPTS, SHARD)
    for teacher in TEACHERS:
        respond(store, teacher, PROMPTS, SHARD, lambda n, _: str(2 * n))
    assert score(study, store, all_scores(study), Capacity(8, 0)) == len(TEACHERS) * PROMPTS
    compare_scores(study, store)
    return study, store


def test_every_score_is_what_the_judge_wrote_about_that_response(judged: tuple[Study, Store]) -> None:
    _, store = judged
    for teacher in TEACHERS:
        written: dict[str, dict[str, str]] = {}
        for row in store.read_tables(Store.judgements("judge", teacher), RESPONSES).to_pylist():
            prompt, _, aspect, _ = row["prompt_id"].split("#")
            assert row["error"] is None and re.fullmatch(r"rating=[1-5]|x", row["text"]), row["text"]
            assert aspect not in written.setdefault(prompt, {})
            written[prompt][aspect] = row["text"]
        scores = store.read_tables(Store.scores("judge", teacher), SCORES).to_pylist()
        assert len(scores) == len(written) == PROMPTS
        for row in scores:
            told = written[row["prompt_id"]]
            if missing := [aspect for aspect in ASPECTS if told[aspect] == "x"]:
                assert row["score"] is None and row["note"] == f"unparsable: {', '.join(missing)}"
            else:
                assert row["score"] == sum(int(text[-1]) for text in told.values()) / len(ASPECTS)


def test_nonsense_comes_as_often_as_the_model_makes_it_and_is_counted(judged: tuple[Study, Store]) -> None:
    _, store = judged
    texts = Counter(
        row["text"]
        for teacher in TEACHERS
        for row in store.read_tables(Store.judgements("judge", teacher), RESPONSES).to_pylist()
    )
    asked = len(TEACHERS) * PROMPTS * len(ASPECTS)
    spread = 4 * math.sqrt(NONSENSE * (1 - NONSENSE) / asked)  # seeded, so that it is within once and for all
    assert sum(texts.values()) == asked and abs(texts["x"] / asked - NONSENSE) < spread
    for told in read_agreement(store)["scorers"]:
        rows = store.read_tables(Store.scores("judge", told["teacher"]), SCORES).to_pylist()
        assert told["unscored"] == {"unparsable": sum(row["score"] is None for row in rows)}


def test_nothing_is_left_to_ask(judged: tuple[Study, Store]) -> None:
    study, store = judged
    assert not missing_scores(study, store, all_scores(study))
    assert score(study, store, all_scores(study), Capacity(8, 0)) == 0
