"""What one row raises stays with that row; what is failed too often ends a stage, however few rows there are."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from answered import ask, respond
from tiny_model import make_tokenizer

from deltaray.data.contracts import PROMPTS, RESPONSES, SCORES
from deltaray.data.prompts import store_prompts
from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.generate.answer import refuse_failed, work_of
from deltaray.generate.extend.multi_turn import Talk
from deltaray.generate.pools import _Progress
from deltaray.generate.requests import failed, sound
from deltaray.generate.search import engine as search_engine
from deltaray.generate.search.engine import Searching
from deltaray.generate.stage import responses_table
from deltaray.generate.units import Assignment, each_ids, load_unit
from deltaray.recipe import Recipe, expand
from deltaray.recipe.extensions import Extensions
from deltaray.recipe.models import Endpoint, Sampling, Teacher
from deltaray.recipe.recipe import Failures
from deltaray.recipe.scorers import Judge, RewardModel
from deltaray.recipe.search import Search
from deltaray.runtime.tally import Tally
from deltaray.score import judging
from deltaray.score import stage as score_stage
from deltaray.score.judging import forget_failed, score_judged, write_questions
from deltaray.score.response import Response, Score, scored
from deltaray.score.rewards import RewardWorker
from deltaray.score.stage import refuse_unscored, response_scoring, score_file


class PanicException(BaseException):
    """What Rust code raises: no `Exception`."""


EXPLOSIVE = "boom"
RAISED = [TypeError("no mapping"), RecursionError("too deep"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
          PanicException("index out of range")]  # fmt: skip


def explodes(text: str, error: BaseException) -> None:
    if EXPLOSIVE in text:
        raise error


# --- prompts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", RAISED)
def test_a_prompt_that_its_tokenizer_cannot_take_is_refused_alone(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    render = tokenizer.apply_chat_template

    def fragile(conversation: Any, **options: Any) -> Any:
        explodes(json.dumps(conversation), error)
        return render(conversation, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", fragile)
    chats = [[{"role": "user", "content": text}] for text in ("1", EXPLOSIVE, "2")]
    ids, refused = each_ids(tokenizer, chats)
    assert [bool(of) for of in ids] == [True, False, True]
    assert refused[0] is None and refused[2] is None and str(error.args[-1])[:3] in str(refused[1])
    assert type(error).__name__ in str(refused[1]) or "refuses" in str(refused[1])


def test_a_prompt_whose_turns_cannot_be_read_is_refused_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows: list[Any] = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], "answer": None, "source": None,
         "error": None}
        for name in ("a", "b")
    ]  # fmt: skip
    rows[1]["conversation"] = "{no JSON"
    store_prompts(store, rows, 8)
    teacher = Teacher(model="m", endpoint=Endpoint(url="http://localhost:1/v1"))
    [path] = store.committed(Store.prompts)
    planned = {"teacher": teacher.model_dump_json(), "prompts": path, "rows": [0, 1], "samples": [0], "sampling": "{}"}
    unit = load_unit(store, planned)
    assert unit["refused"][0] is None and "JSONDecodeError" in unit["refused"][1]


def test_answers_with_half_characters_can_be_stored() -> None:
    output = {**failed("odd \ud83d words"), "text": "half \ud83d", "reasoning": "\udc00"}
    made = {"name": "t", "samples": [0], "prompt_ids": ["p"], "token_ids": [[1]], "outputs": [[sound(output)]]}
    assert responses_table(made)["text"].to_pylist() == ["half \ufffd"]


class Echo:
    """An engine that says the same to all."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def generate(self, unit: Any) -> list[list[dict[str, Any]]]:
        answer = failed("") | {"text": self.text, "finish_reason": "stop", "error": None}
        return [[dict(answer) for _ in unit["samples"]] for _ in unit["prompt_ids"]]

    def close(self) -> None:
        pass


def test_a_conversation_that_cannot_be_gone_on_with_fails_alone() -> None:
    by = {"model": "m", "endpoint": {"url": "http://localhost:1/v1"}}
    section = Extensions.model_validate({"by": by, "self_talk": {"share": 1}})
    unit = {
        "destination": "x/kind=self_talk", "samples": [0], "prompt_ids": ["a", "b"], "tools": [None, None],
        "messages": [[{"role": "user", "content": "fine"}], [{"role": "user"}]],
    }  # fmt: skip
    [[good], [bad]] = asyncio.run(Talk(Echo("well"), section).generate(unit))
    assert good["error"] is None and bad["error"] == "KeyError: 'content'"


def test_a_search_that_cannot_be_read_fails_its_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Search.model_validate({"url": "http://localhost:1/retrieve"})

    class Tokens:
        def encode(self, text: str, **_: Any) -> list[int]:
            explodes(text, PanicException("a span outside the text"))
            return [1]

    class Found:
        async def find(self, queries: list[str], count: int) -> list[list[str]]:
            return [[EXPLOSIVE if "b" in query else "a fact"] for query in queries]

    class Asking(Echo):
        async def generate(self, unit: Any) -> list[list[dict[str, Any]]]:
            asked = [f"<{rules.query}>{name}</{rules.query}>" for name in unit["prompt_ids"]]
            return [[failed("") | {"text": text, "finish_reason": "stop", "error": None}] for text in asked]

    monkeypatch.setattr(search_engine, "tokenizer_of", lambda teacher: Tokens())
    unit = {
        "search": True, "samples": [0], "prompt_ids": ["a", "b"], "messages": [[], []], "tools": [None, None],
        "token_ids": [[1], [1]], "sampling": "{}", "teacher": Teacher(model="m").model_dump_json(),
    }  # fmt: skip
    [[good], [bad]] = asyncio.run(Searching(Asking(""), rules, Found()).generate(unit))
    assert good["error"] is None and bad["error"] == "PanicException: a span outside the text"


# --- scores -------------------------------------------------------------------------------------------------------
def study_of(tmp_path: Path, **scorers: Any) -> Any:
    recipe = {
        "name": "rows", "out": str(tmp_path), "prompts": {"path": "unused.jsonl"}, "scorers": scorers,
        "teachers": {"weak": {"model": "unused"}, "weaker": {"model": "unused"}},
    }  # fmt: skip
    return expand(Recipe.model_validate(recipe))


def scores_of(store: Store, scorer: str) -> list[dict[str, Any]]:
    return store.read_tables(Store.scores(scorer, "weak"), SCORES).to_pylist()


def unit_of(study: Any, store: Store, scorer: str) -> dict[str, Any]:
    [responses] = store.committed(Store.responses("weak"))
    return asdict(response_scoring(study, scorer, "weak")) | {
        "responses": responses,
        "destination": f"{Store.scores(scorer, 'weak')}/part-00000-abc.parquet",
        "made_from": store.content(responses),
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Five responses, the third of which is explosive."""
    store = Store(str(tmp_path))
    ask(store, 5, 8)
    respond(store, "weak", 5, 8, lambda n, _: EXPLOSIVE if n == 2 else str(2 * n))
    return store


@pytest.mark.parametrize("error", RAISED)
def test_a_response_that_a_scorer_cannot_take_has_a_note(
    store: Store, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(section: Any) -> Callable[[Response], Score]:
        def function(response: Response) -> Score:
            explodes(response.text, error)
            return Score(1.0)

        return function

    monkeypatch.setitem(score_stage.SCORERS, "exact_match", fragile)
    study = study_of(tmp_path, exact={"kind": "exact_match"})
    assert score_file(store, unit_of(study, store, "exact"))["unscored"] == {"scorer failed": 1}
    rows = scores_of(store, "exact")
    assert [row["score"] for row in rows] == [1, 1, None, 1, 1]
    assert rows[2]["note"].startswith(f"scorer failed: {type(error).__name__}: ")
    forget_failed(store, [("exact", "weak")])
    assert not scores_of(store, "exact")


def test_what_is_wrong_for_every_response_still_ends_the_stage() -> None:
    def unusable(_: Response) -> Score:
        raise UserError("lm-eval is not installed")

    with pytest.raises(UserError):
        scored(unusable, Response("t", "x"))
    note = scored(lambda _: Score("high"), Response("t", "x")).note  # type: ignore[arg-type]
    assert note is not None and note.startswith("scorer failed: TypeError")


def test_a_reward_model_skips_what_its_template_or_its_model_refuses(store: Store, tmp_path: Path) -> None:
    worker = object.__new__(RewardWorker)
    worker.spec = RewardModel(kind="reward_model", model="unused", batch_size=2)
    worker.tokenizer = make_tokenizer()
    worker.tokenizer.template_arguments = {}
    worker.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
        + worker.tokenizer.chat_template
    )

    def batch(ids: list[list[int]]) -> list[float]:
        if any(len(row) > 20 for row in ids):
            raise RuntimeError("position embeddings end at 20")
        return [float(len(row)) for row in ids]

    worker._batch = batch  # type: ignore[method-assign]
    turns = [[{"role": "user", "content": text}] for text in ("1", "2" * 30, "12")]
    scores = worker.scores([*turns, [{"role": "system", "content": "1"}, *turns[0]]])
    assert [score.value is None for score in scores] == [False, True, False, True]
    assert scores[1].note == "scorer failed: RuntimeError: position embeddings end at 20"
    assert scores[3].note == "scorer failed: TemplateError: no system turns here"


def test_a_question_that_cannot_be_asked_of_a_judge_is_noted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = judging.questions_of

    def fragile(spec: Judge, messages: Any, text: str, other: Any = None) -> Any:
        explodes(text, KeyError("content"))
        return questions(spec, messages, text, other)

    monkeypatch.setattr(judging, "questions_of", fragile)
    by = {"model": "j", "endpoint": {"url": "http://localhost:1/v1"}}
    study = study_of(tmp_path, judge={"kind": "judge", "by": by, "aspects": {"truth": "?"}})
    unit = unit_of(study, store, "judge")
    write_questions(store, 8, unit)
    assert len(store.read_tables(unit["questions"], PROMPTS)) == 4
    score_judged(store, unit)
    assert scores_of(store, "judge")[2]["note"] == "judge failed: KeyError: 'content'"


# --- how much may fail --------------------------------------------------------------------------------------------
def responses(store: Store, name: str, errors: list[str | None]) -> Any:
    rows = [
        {"prompt_id": f"p{n}", "sample": 0, "teacher": name, "text": "", "reasoning": None, "prompt_token_ids": [],
         "token_ids": [], "tokens": 0, "finish_reason": "stop", "error": error}
        for n, error in enumerate(errors)
    ]  # fmt: skip
    store.write_table(f"{Store.responses(name)}/part-00000-a.parquet", RESPONSES.empty_table().from_pylist(
        rows, schema=RESPONSES), RESPONSES)  # fmt: skip
    teacher = Teacher(model="m", sampling=Sampling())
    return work_of(store, Assignment(name, teacher, Store.prompts, Store.responses(name), "identity", 2))


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([None] * 4, False),
        (["engine error: the server ended the answer: oops"] * 4, True),
        ([None, None, None, "prompt refused: too long"], True),
        ([None] * 9 + ["prompt refused: too long"], False),
        (["empty answer"], True),
    ],
)
def test_few_rows_count_as_many_do(tmp_path: Path, errors: list[str | None], ends: bool) -> None:
    store, said = Store(str(tmp_path)), list[str]()
    work = responses(store, "weak", errors)
    if not ends:
        refuse_failed(store, [work], Failures(), said.append)
        assert said == ([] if None in errors[-1:] else ["weak: 1 of 10 responses failed: prompt refused: too long"])
        return
    with pytest.raises(StageError) as met:
        refuse_failed(store, [work], Failures(), said.append)
    assert errors[-1] is not None and errors[-1] in str(met.value) and "--retry-failed" in str(met.value)
    assert f"weak: {len(errors) - errors.count(None)} of {len(errors)} responses failed" in str(met.value)


def test_all_that_fail_are_too_many_whatever_is_tolerated(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(StageError):
        refuse_failed(store, [responses(store, "a", ["x", "y"])], Failures(max_share=1), print)
    refuse_failed(store, [responses(store, "b", ["x", None])], Failures(max_share=1), print)
    mute = responses(store, "c", ["empty answer", "empty answer"])
    refuse_failed(store, [mute], Failures(), print, counts=lambda error: not error.startswith("empty"))


def test_progress_tells_answers_from_failures() -> None:
    told: list[tuple[Any, ...]] = []
    unit = {"name": "weak", "rows": [0, 1, 2], "samples": [0, 1]}
    progress = _Progress([unit], Failures(max_share=0.2, after=4), lambda *seen: told.append(seen))
    summary = {"name": "weak", "rows": 3, "tokens": 5, "failed": 1, "errors": ["engine error: eos"], "retry": False}
    progress.add(summary)
    assert told[-1] == ("weak", 3, 6, 5, "2 answered, 1 failed (first reason: engine error: eos)")
    progress.add(summary | {"retry": True})  # second attempts mostly fail again
    with pytest.raises(StageError, match="weak: 3 of 9 responses failed"):
        progress.add(summary)


def test_scores_that_all_fail_end_the_stage(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def put(scorer: str, *rows: tuple[float | None, str | None]) -> dict[str, str]:
        folder = Store.scores(scorer, "weak")
        table = [
            {"prompt_id": f"p{n}", "sample": 0, "score": score, "note": note, "parts": []}
            for n, (score, note) in enumerate(rows)
        ]
        store.write_table(f"{folder}/part-00000.parquet", SCORES.empty_table().from_pylist(table, SCORES), SCORES)
        return {f"{scorer} weak": folder}

    said: list[str] = []
    template = (None, "scorer failed: TemplateError: no system turns")
    skipped = (None, "failed response")
    for scorer, rows in {
        "all": [template, template, skipped],
        "most": [template, template, (1.0, None)],
        "babble": [(None, "unparsable: truth"), (None, "unparsable: truth")],
        "mixed": [(None, "unparsable: truth"), (None, "judge failed: HTTP 500")],
    }.items():
        folders = put(scorer, *rows)
        with pytest.raises(StageError, match=rf"{scorer} weak: 2 of \d scores failed"):
            refuse_unscored(store, folders, Failures(), said.append)
    with pytest.raises(StageError):
        refuse_unscored(store, folders, Failures(), said.append, again=True)
    assert not store.committed(folders["mixed weak"])
    few = put("few", *[(1.0, None)] * 9, template, skipped)
    unread = put("unread", (None, "unparsable: truth"), (1.0, None))
    unanswered = put("unanswered", (None, "no answer to compare with"))
    refuse_unscored(store, few | unread | unanswered, Failures(), said.append)
    assert said == ["few weak: 1 of 10 scores failed: scorer failed: TemplateError: no system turns"]


def test_what_is_said_of_many_reasons_is_short() -> None:
    tally = Tally("weak")
    for number in range(100):
        tally.add(1, 1, [f"reason {number}"])
    assert tally.line() == "weak: 100 of 100 responses failed: reason 0; reason 1; reason 2 …"
