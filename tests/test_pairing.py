"""Policies, draws and filters: planted rows, recounted."""

import random
import re
import sys
from collections import Counter
from typing import Any

import pytest

from deltaray.errors import UserError
from deltaray.pair.draw import Survey, choose, draw_rules, shares
from deltaray.pair.filters import claims_other_identity, language_of
from deltaray.pair.policies import POLICIES, Offer, draw_offers, policy_of
from deltaray.pair.prompts import _Seen, index_of, is_contaminated
from deltaray.pair.rules import rules
from deltaray.recipe.check_pairing import check_pairing
from deltaray.recipe.pairing import Draw, Pairing
from deltaray.recipe.scorers import Judge, Surface
from deltaray.score.surface import is_repetitive, repeated_phrases, repeated_sentences

TEACHERS = ("s1", "s2", "s3", "w1", "w2", "w3")


def offers(prompt: int, samples: int = 2) -> list[Offer]:
    """Scores 0 … 4 that differ from prompt to prompt."""
    keys = [(teacher, sample) for teacher in TEACHERS for sample in range(samples)]
    return [Offer(row, *key, score=float((row * 7 + prompt) % 5)) for row, key in enumerate(keys)]


def pool(**settings: Any) -> Pairing:
    return Pairing(teachers=list(TEACHERS), scorer="judge", **settings)


# --- policies -----------------------------------------------------------------------------------------------------
def test_best_over_worst_is_the_largest_difference_there_is() -> None:
    for prompt in range(50):
        chosen, rejected = POLICIES["best_over_worst"](f"p{prompt}", offers(prompt))
        assert chosen.score == 4 and rejected.score == 0


def test_ties_prefer_no_teacher() -> None:
    equal = [Offer(row, teacher, 0, 1.0) for row, teacher in enumerate(TEACHERS)]
    picks = [POLICIES["best_over_worst"](f"p{n}", equal) for n in range(600)]
    assert all(chosen.row != rejected.row for chosen, rejected in picks)
    for side in (0, 1):
        counts = Counter(pick[side].teacher for pick in picks)
        assert len(counts) == 6 and min(counts.values()) > 60


def test_best_over_random_takes_any_other() -> None:
    picks = [POLICIES["best_over_random"](f"p{n}", offers(0)) for n in range(300)]
    assert {chosen.score for chosen, _ in picks} == {4} and {rejected.score for _, rejected in picks} == {0, 1, 2, 3, 4}
    assert all(chosen.row != rejected.row for chosen, rejected in picks)


def test_a_draw_has_exactly_its_weak_ones_and_is_the_same_in_any_order() -> None:
    draw = Draw(of=4, weak=2, weak_teachers=["w1", "w2", "w3"])
    seen: Counter[str] = Counter()
    for prompt in range(200):
        drawn = draw_offers(f"p{prompt}", offers(prompt), draw)
        assert sum(offer.teacher.startswith("w") for offer in drawn) == 2
        assert len({offer.teacher for offer in drawn}) == len(drawn) == 4
        assert drawn == draw_offers(f"p{prompt}", offers(prompt)[::-1], draw)
        seen.update(offer.teacher for offer in drawn)
    assert min(seen.values()) > 100  # of 133 expected
    without = [offer for offer in offers(0) if offer.teacher not in ("w1", "w2")]
    assert not draw_offers("p", without, draw)
    assert policy_of(pool(policy="best_over_worst", draw=draw))("p", without) is None


def candidate(**changes: Any) -> dict[str, Any]:
    base = {
        "prompt_id": "a", "chosen": [{"content": "This is right."}], "rejected": [{"content": "That is not."}],
        "chosen_model": "s1", "rejected_model": "w1", "chosen_sample": 0, "rejected_sample": 1, "chosen_score": 1.0,
        "rejected_score": 0.0, "delta": 1.0, "chosen_finish": "stop", "rejected_finish": "stop", "chosen_tokens": 5,
        "rejected_tokens": 9, "prompt_tokens": 10, "chosen_error": None, "rejected_error": None, "refusal": None,
        "source": None, "scores": {}, "chosen_reasoning": None, "rejected_reasoning": None, "same_tokens": False,
    }  # fmt: skip
    return base | changes


def removed_by(pairing: Pairing, pair: dict[str, Any], dropped: Any = None) -> str:
    return next((name for name, rule in rules(pairing, 100, dropped) if not rule(pair)), "")


def test_a_pool_keeps_positive_deltas_unless_others_are_asked_for() -> None:
    tied = candidate(delta=0.0)
    assert removed_by(pool(policy="best_over_worst"), tied) == "delta not positive"
    assert removed_by(pool(policy="best_over_worst", min_delta=0), tied) == ""
    assert removed_by(pool(policy="best_over_worst", keep="tied"), tied) == ""
    two = Pairing(chosen="s1", rejected="w1", scorer="judge")
    assert removed_by(two, candidate(delta=-1.0)) == "" == removed_by(two, tied)
    assert removed_by(two.model_copy(update={"keep": "tied"}), candidate()) == "not tied"


# --- filters ------------------------------------------------------------------------------------------------------
LOOP = "I will now go on with it. " * 12
PHRASES = " ".join(f"one two three four five six seven eight {n}." for n in range(60))


@pytest.mark.parametrize(
    ("item", "changes", "removed"),
    [
        ({"kind": "repetition"}, {"chosen": LOOP}, True),
        ({"kind": "repetition"}, {"chosen": PHRASES}, True),
        ({"kind": "repetition"}, {"chosen": f"```\n{LOOP}\n```"}, False),
        ({"kind": "repetition", "side": "chosen"}, {"rejected": LOOP}, False),
        ({"kind": "cjk"}, {"rejected": "你好 this is text"}, True),
        ({"kind": "cjk", "share": 0.5}, {"rejected": "你好 this is text"}, False),
        ({"kind": "identity", "side": "chosen"}, {"chosen": "Hello! I am Claude."}, True),
        ({"kind": "identity", "side": "chosen"}, {"rejected": "Hello! I am Claude."}, False),
        ({"kind": "keywords", "patterns": ["unsafe", r"\bkill"]}, {"rejected": "This is UNSAFE."}, True),
        ({"kind": "keywords", "patterns": [r"\bkill"]}, {"rejected": "a skill"}, False),
        ({"kind": "refusal", "side": "chosen"}, {"chosen": "I'm sorry, but no."}, True),
        ({"kind": "language", "side": "rejected"}, {"rejected": "Dies ist ein längerer deutscher Satz."}, True),
        ({"kind": "length", "max_tokens": 8, "side": "chosen"}, {}, False),
        ({"kind": "length", "max_tokens": 8}, {}, True),
        ({"kind": "length", "min_tokens": 6}, {}, True),
        ({"kind": "length_gap", "max_tokens": 3}, {}, True),
        ({"kind": "length_gap", "max_tokens": 3, "sources": ["chat"]}, {}, False),
        ({"kind": "length_gap", "max_tokens": 3, "sources": ["chat"]}, {"source": "chat"}, True),
        ({"kind": "correctness", "scorer": "v"}, {"scores": {"v": (1, 0)}}, False),
        ({"kind": "correctness", "scorer": "v"}, {"scores": {"v": (1, 1)}}, True),
        ({"kind": "correctness", "scorer": "v"}, {"scores": {"v": (0.5, 0)}}, True),
        ({"kind": "correctness", "scorer": "v"}, {"scores": {"v": (1, None)}}, True),
        ({"kind": "correctness", "scorer": "v", "rejected": "any"}, {"scores": {"v": (1, None)}}, False),
        ({"kind": "correctness", "scorer": "v", "rejected": "any", "min_gap": 0.6}, {"scores": {"v": (1, 0.5)}}, True),
        ({"kind": "duplicate_prompt"}, {}, True),
        ({"kind": "duplicate_prompt"}, {"prompt_id": "b"}, False),
    ],
)
def test_each_filter_removes_what_was_planted(item: dict[str, Any], changes: dict[str, Any], removed: bool) -> None:
    texts = {side: [{"content": changes[side]}] for side in ("chosen", "rejected") if side in changes}
    pairing = Pairing.model_validate({"chosen": "s1", "rejected": "w1", "filters": [item]})
    name = removed_by(pairing, candidate(**{**changes, **texts}), {0: {"a"}})
    assert name.startswith(f"filter {item['kind']}") if removed else name == ""


def test_repetitive_is_what_the_counts_say() -> None:
    chance = random.Random(0)
    parts = ["one", "two", "three four", "stop.", "stop. ", "\n", "\n\n", "```", "no! ", "done。"]
    found = Counter[bool]()
    for _ in range(2000):
        text = " ".join(chance.choices(parts, k=chance.randrange(40))) * chance.choice([1, 3, 12])
        sentences, phrases = chance.randrange(2, 13), chance.randrange(2, 40)
        repeated = repeated_sentences(text) >= sentences or repeated_phrases(text) >= phrases
        assert is_repetitive(text, sentences, phrases) == repeated
        found[repeated] += 1
    assert min(found.values()) > 300


def test_a_truncated_rejected_response_counts_as_incomplete() -> None:
    settings = {"chosen": "s1", "rejected": "w1", "drop_truncated": False}
    pairing = Pairing.model_validate({**settings, "filters": [{"kind": "correctness", "scorer": "v"}]})
    assert removed_by(pairing, candidate(rejected_finish="length", scores={"v": (1, None)})) == ""


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("I'm ChatGPT, a large language model trained by OpenAI.", True),
        ("As an AI language model developed by Google, I cannot", True),
        ("My name is Gemini.", True),
        ("I was created by Alibaba Cloud.", True),
        ("Ask Qwen about it.", True),
        ("Google was founded in 1998, and I am glad to tell you more.", False),
        ("As you can see on Google, it is so.", False),
        ("I am a fan of Claude Monet.", False),
        ("GPT-4 was trained by OpenAI.", False),
        ("I am an assistant.", False),
    ],
)
def test_assistants_that_name_themselves(text: str, claims: bool) -> None:
    assert claims_other_identity(text) == claims


def test_languages_are_told_apart() -> None:
    assert language_of("This is a sentence in plain English.") == "en"
    assert language_of("Ceci est une phrase en français, assez longue.") == "fr"


def test_duplicates_are_found_and_the_first_stays() -> None:
    texts = ["What is  delta learning?", "what is delta LEARNING?", "Explain it."]
    exact = _Seen(None)
    assert [exact.has(text) for text in texts] == [False, True, False]
    near, words = _Seen(0.7), [f"word{n}" for n in range(200)]
    changed = [*words[:100], "other", *words[101:]]
    assert [near.has(" ".join(text)) for text in (words, changed, words[::-1])] == [False, True, False]


def test_a_prompt_is_contaminated_when_it_holds_half_of_a_question() -> None:
    question = " ".join(f"term{n}" for n in range(24))
    index = index_of([question, "Short question here", "1 + 1 = 2 and a b c d e f g"], 8)
    words = question.split()
    assert is_contaminated(f"Please solve: {question} Thanks!", index, 0.5)
    assert is_contaminated("And now " + " ".join(words[:17]), index, 0.5)  # 10 of 17 n-grams
    assert not is_contaminated(" ".join(words[:14]), index, 0.5)  # 7 of 17
    assert is_contaminated("short question HERE?", index, 0.5)
    assert not is_contaminated("A short question here is fine", index, 0.5)
    assert not is_contaminated("x 1 + 1 = 2 and a b c d e f g", index, 0.5)  # formulas are alike anyway


# --- draws --------------------------------------------------------------------------------------------------------
def survey_of(sources: str) -> tuple[list[dict[str, Any]], Survey]:
    pairs = [candidate(prompt_id=str(n), source=source, delta=n / len(sources)) for n, source in enumerate(sources)]
    survey = Survey()
    survey.add(pairs)
    return pairs, survey


def kept(pairing: Pairing, pairs: list[dict[str, Any]], survey: Survey) -> list[dict[str, Any]]:
    for _, rule in draw_rules(choose(pairing, survey)):
        pairs = [pair for pair in pairs if rule(pair)]
    return pairs


def test_caps_limits_and_quantiles_keep_exactly_what_they_say() -> None:
    pairs, survey = survey_of("a" * 500 + "b" * 100 + "c" * 10)
    two = Pairing(chosen="s1", rejected="w1", scorer="judge")

    def counts(**settings: Any) -> dict[str, int]:
        return dict(Counter(pair["source"] for pair in kept(two.model_copy(update=settings), pairs, survey)))

    assert counts(max_per_source=50) == {"a": 50, "b": 50, "c": 10}
    assert sum(counts(limit=61).values()) == 61
    assert counts(limit=61, stratify=True) == {"a": 50, "b": 10, "c": 1}
    assert counts(limit=10_000, stratify=True) == counts(limit=10_000) == {"a": 500, "b": 100, "c": 10}
    assert sum(counts(max_per_source=50, limit=55).values()) == 55
    middle = kept(two.model_copy(update={"min_quantile": 0.25, "max_quantile": 0.75}), pairs, survey)
    assert len(middle) in (304, 305, 306) and {pair["delta"] >= 0.24 for pair in middle} == {True}


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    pairs, survey = survey_of("ab" * 300)
    two = Pairing(chosen="s1", rejected="w1", stratify=True)
    draws = [kept(two.model_copy(update={"limit": limit}), pairs, survey) for limit in (40, 90)]
    small, large = ({pair["prompt_id"] for pair in draw} for draw in draws)
    assert small < large and (len(small), len(large)) == (40, 90)


def test_shares_add_up() -> None:
    assert shares([5, 3, 2], 7) == [4, 2, 1] and shares([1, 1, 1], 2) == [1, 1, 0] and shares([2, 1], 9) == [2, 1]


POOL = {"policy": "best_over_worst", "teachers": ["s1", "w1"], "scorer": "judge"}


# --- the recipe ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pairing", "message"),
    [
        ({"chosen": "s1"}, "rejected: is missing"),
        ({"chosen": "s1", "rejected": "w9"}, "there is no teacher 'w9'"),
        ({"chosen": "s1", "rejected": "s1"}, "use `teachers: [s1]`"),
        ({"policy": "best_over_worst", "scorer": "judge"}, "teachers: is missing"),
        ({"policy": "best_over_worst", "teachers": ["s1", "w1"]}, "scorer: is missing"),
        (
            {"policy": "best_over_worst", "teachers": ["s1"], "chosen": "s1", "scorer": "judge"},
            "list all in `teachers`",
        ),
        ({"chosen": "s1", "rejected": "w1", "scorer": "jugde"}, "did you mean 'judge'"),
        ({"chosen": "s1", "rejected": "w1", "scorer": "text/headdings"}, "did you mean 'headings'"),
        ({"chosen": "s1", "rejected": "w1", "min_delta": 1}, "need scores"),
        ({"chosen": "s1", "rejected": "w1", "stratify": True}, "add `limit: N`"),
        ({"chosen": "s1", "rejected": "w1", "filters": [{"kind": "length"}]}, "filters.0: write max_tokens"),
        (
            {
                "policy": "best_over_worst",
                "teachers": ["s1", "w1"],
                "scorer": "judge",
                "draw": {"weak_teachers": ["w1"]},
            },
            "cannot be drawn",
        ),
    ],
)
def test_impossible_pairings_are_refused(pairing: dict[str, Any], message: str) -> None:
    scorers = {
        "judge": Judge.model_validate({"kind": "judge", "by": {"model": "m"}}),
        "text": Surface(kind="surface"),
    }
    found = check_pairing(Pairing.model_validate(pairing), list(TEACHERS), scorers)
    lines = [f"{'.'.join(map(str, at))}: {text}" for at, text in found]
    assert any(re.search(re.escape(message), line) for line in lines), lines


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(UserError, match=r"deltaray\[filters\]"):
        _Seen(0.8)


def test_what_is_missing_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaray.recipe import Recipe, expand
    from deltaray.study.checks import check_deltas

    def study(*filters: dict[str, Any], **scorers: dict[str, Any]) -> Any:
        two = {"chosen": "a", "rejected": "b", "filters": list(filters)}
        sections = {"scorers": scorers, "pairings": {"delta": two}, "student": {"model": "m"}}
        teachers = {name: {"model": "m"} for name in "ab"}
        return expand(
            Recipe.model_validate({"name": "x", "out": "x", "prompts": {"path": "p"}, "teachers": teachers, **sections})
        )

    with pytest.raises(UserError, match=r"pairings.delta.filters.1.paths: there is no file gone.jsonl"):
        check_deltas(study({"kind": "cjk"}, {"kind": "contaminated", "paths": ["gone.jsonl"]}))
    for package in ("py3langid", "lm_eval.tasks.ifeval.utils"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"deltaray\[filters\]"):
        check_deltas(study({"kind": "language"}))
    with pytest.raises(UserError, match=r"deltaray\[ifeval\]"):
        check_deltas(study(follows={"kind": "ifeval"}))
