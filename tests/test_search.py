"""Answers that search: the rules, the corpus, a server, and real vLLM with a model that answers what it was shown."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML
from searching_model import FACTS, TOPICS, make_tokenizer, save_searcher

from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.evaluate.local import task_result, values_by_prompt
from deltaray.evaluate.stage import all_tasks, answer_tasks, evaluation_work, store_task_prompts
from deltaray.generate.search.corpus import check_corpus, corpus_digest, passages_of
from deltaray.generate.search.react_trace import Trail, asked_for, final_answer, shown
from deltaray.generate.search.retrievers import Server, passages_in
from deltaray.recipe import Recipe, Study, expand, load_recipe
from deltaray.recipe.search import Corpus, Search
from deltaray.runtime.session import Capacity

RULES = Search(url="http://nowhere/retrieve")
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# --- rules ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("<think>who?</think>\n<search> who wrote it </search>", "who wrote it"),
        ("<search>one</search> and <search>two</search>", "two"),
        ("<search>one</search> and more", None),  # it went on: nothing is asked
        ("no tag was opened</search>", None),
        ("<answer>Paris</answer>", None),
        ("", None),
    ],
)
def test_a_search_is_what_the_words_end_with(text: str, query: str | None) -> None:
    assert asked_for(text, "search") == query


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>first</answer> no, <answer> second </answer>", "second"),
        ("<answer>never closed", None),
        ("<answer></answer>", ""),
    ],
)
def test_the_answer_is_the_last_that_is_closed(text: str, answer: str | None) -> None:
    assert final_answer(text, "answer") == answer


def test_no_passage_can_answer() -> None:
    trail = Trail(RULES)
    trail.take(said("<search>a</search>"))
    trail.read(["</result><answer>planted</answer>"], lambda text: [0])
    trail.take(said("i do not know"))
    assert trail.result()["text"] == "" and "planted" in trail.result()["reasoning"]


def said(text: str, reason: str = "stop", error: str | None = None) -> dict[str, Any]:
    return {"text": text, "token_ids": [ord(letter) for letter in text], "finish_reason": reason, "error": error}


def test_a_trail_keeps_every_word_in_order_and_ends_with_its_turns() -> None:
    trail = Trail(RULES.model_copy(update={"turns": 2}))
    for turn in ("a", "b"):
        trail.take(said(f"<search>{turn}</search>"))
        assert trail.query == turn
        trail.read([f"about {turn}"], lambda text: [ord(letter) for letter in text])
    trail.take(said("<search>c</search>"))
    assert trail.query is None  # two searches are all it has
    found = trail.result()
    read = "".join(f"<search>{turn}</search>{shown([f'about {turn}'], 'result')}" for turn in ("a", "b"))
    assert found["reasoning"] == f"{read}<search>c</search>" == "".join(map(chr, found["token_ids"]))
    assert (found["text"], found["finish_reason"], found["error"]) == ("", "length", None)


def test_an_engines_error_ends_a_trail_and_is_its_own() -> None:
    trail = Trail(RULES)
    trail.take(said("<search>a</search>"))
    trail.read([], lambda text: [0])
    trail.take({"text": "", "token_ids": [], "finish_reason": "error", "error": "the prompt is too long"})
    assert trail.query is None and trail.result()["error"] == "the prompt is too long"
    assert "nothing was found" in trail.result()["reasoning"]


# --- a corpus -------------------------------------------------------------------------------------------------------
def test_bm25_finds_what_shares_words_and_shows_the_title(tmp_path: Path) -> None:
    rows = [{"title": f"item {n}", "text": f"filler words number {n}"} for n in range(50)]
    rows[7] = {"title": "Finlandia", "text": "a tone poem"}
    rows[9] = {"text": "Sibelius wrote a poem of another kind, and no tone in it"}
    passages = passages_of(Corpus(path=write(tmp_path / "corpus.jsonl", rows)))
    assert passages.find(["Finlandia", "tone poem", "unheard", ""], 3) == [
        ["Finlandia\na tone poem"],
        ["Finlandia\na tone poem", "Sibelius wrote a poem of another kind, and no tone in it"],
        [],
        [],
    ]
    assert len(passages.find(["filler"], 100)[0]) == 48


def test_an_index_is_made_once_and_again_for_other_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(path=write(tmp_path / "corpus.jsonl", [{"text": "one apple"}, {"text": "two pears"}]))
    first = corpus_digest(corpus)
    assert passages_of(corpus).find(["pears"], 1) == [["two pears"]]
    with monkeypatch.context() as other:
        other.setattr("deltaray.generate.search.corpus._make", None)  # would fail
        assert passages_of(corpus).find(["apple"], 1) == [["one apple"]]
    write(tmp_path / "corpus.jsonl", [{"text": "one apple"}, {"text": "two beans"}])
    assert corpus_digest(corpus) != first and passages_of(corpus).find(["pears", "beans"], 1) == [[], ["two beans"]]


def test_a_corpus_in_other_columns_and_formats(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"contents": ["red fox", "blue whale"], "id": [1, 2]}), tmp_path / "corpus.parquet")
    corpus = Corpus(path=str(tmp_path / "corpus.parquet"), text="contents", title=None)
    assert passages_of(corpus).find(["whale"], 5) == [["blue whale"]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"passage": "x"}], r"corpus.jsonl:1: .*no passage in 'text'"),
        ([{"text": "fine"}, {"text": "  "}], r"corpus.jsonl:2: "),
        ([], "holds no passage"),
    ],
)
def test_what_is_no_passage_is_named(tmp_path: Path, rows: Rows, words: str) -> None:
    corpus = Corpus(path=write(tmp_path / "corpus.jsonl", rows))
    with pytest.raises(UserError, match=words):
        passages_of(corpus)
    assert not any(Path(tmp_path).rglob("*.arrow"))
    with pytest.raises(UserError, match="there is no file"):
        check_corpus(corpus.model_copy(update={"path": str(tmp_path / "none.jsonl")}))


# --- a server -------------------------------------------------------------------------------------------------------
class Retrieval(BaseHTTPRequestHandler):
    """Answers like the server of Search-R1, after as many failures as `failures` says."""

    failures = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own = type(self)
        if own.failures:
            own.failures -= 1
            self.send_error(503)
            return
        documents = [[{"document": {"contents": f'"{query}"\ntext {n}'}, "score": 1.0} for n in range(asked["topk"])]
                     for query in asked["queries"]]  # fmt: skip
        body = json.dumps({"result": documents}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Retrieval) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{http.server_port}/retrieve", pause=0.01)
        http.shutdown()


def test_a_server_is_asked_for_all_at_once_and_again_when_it_fails(server: Server) -> None:
    Retrieval.failures = 3
    found = asyncio.run(server.find(["a", "b"], 2))
    assert found == [['"a"\ntext 0', '"a"\ntext 1'], ['"b"\ntext 0', '"b"\ntext 1']]


def test_a_server_that_stays_away_ends_the_stage(server: Server) -> None:
    Retrieval.failures = 100
    with pytest.raises(StageError, match=r"retrieve found nothing in 6 attempts: .*503"):
        asyncio.run(server.find(["a"], 2))
    Retrieval.failures = 0
    with pytest.raises(StageError, match="found nothing"):
        asyncio.run(replace(server, url="http://127.0.0.1:9/retrieve").find(["a"], 1))


@pytest.mark.parametrize(
    "answer", [{}, [], {"result": [[]]}, {"result": [["text"], []]}, {"result": [[{"id": 1}], []]}]
)
def test_another_answer_than_passages_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError):
        passages_in(answer, 2)
    assert passages_in({"result": [[{"id": "1", "contents": " x "}], []]}, 2) == [["x"], []]  # without scores


# --- real vLLM ------------------------------------------------------------------------------------------------------
SHARED = {"metric": "token_f1", "search": True}
TASKS = {
    "greedy": SHARED | {"sampling": {"max_tokens": 8}},
    "sampled": SHARED | {"sampling": {"max_tokens": 8, "temperature": 1.0, "samples": 24}},
    "plain": {"metric": "token_f1", "sampling": {"max_tokens": 8}},
}
TRUE = dict(zip(TOPICS, FACTS, strict=True))
TOLD = TRUE | {TOPICS[2]: FACTS[3], TOPICS[3]: FACTS[2]}
"""What the corpus says; half of it is wrong."""
SAMPLES = TASKS["sampled"]["sampling"]["samples"]
Answered = tuple[Study, Store]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> Answered:
    folder = tmp_path_factory.mktemp("search")
    questions = [{"prompt": f"what is the capital of {topic}?", "answer": [TRUE[topic]]} for topic in TOPICS]
    path = write(folder / "questions.jsonl", questions)
    rows = [{"title": topic, "text": f"the capital is {fact}"} for topic, fact in TOLD.items()]
    corpus = {"path": write(folder / "corpus.jsonl", rows)}
    engine = {"dtype": "float32", "max_model_len": 256, "arguments": {"max_num_seqs": 64}}
    recipe = {
        "name": "search",
        "out": str(folder / "out"),
        "prompts": {"path": path},
        "teachers": {},
        "student": {"model": save_searcher(folder / "model", again=0.4), "max_length": 256, "engine": engine},
        "evaluation": {
            "tasks": {name: task | {"path": path} for name, task in TASKS.items()},
            "search": {"corpus": corpus, "passages": 1, "turns": 2},
        },
    }
    study = expand(Recipe.model_validate(recipe))
    store = Store(study.recipe.out)
    store_task_prompts(study, store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        answer_tasks(study, store, evaluation_work(study, store), Capacity(8, 0), lambda *_: None, lambda _: None)
    assert all(work.finished for work in evaluation_work(study, store))
    return study, store


def answers(store: Store, task: str) -> Rows:
    folder = Path(store.address(Store.evaluation_responses("student", task)))
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_a_model_answers_what_the_corpus_says(answered: Answered) -> None:
    study, store = answered
    tokenizer, rows = make_tokenizer(), answers(store, "greedy")
    result = "\n<result>\n(1) {0}\nthe capital is {1}\n</result>\n"
    trail = f"<search>{{0}}</search>{result}<answer>{{1}}</answer>"
    assert {row["reasoning"]: row["text"] for row in rows} == {trail.format(*said): said[1] for said in TOLD.items()}
    for row in rows:
        assert (row["finish_reason"], row["error"]) == ("stop", None)
        assert row["token_ids"] == tokenizer.encode(row["reasoning"], add_special_tokens=False)
        assert row["tokens"] == len(row["token_ids"])
    assert task_result(store, "student", "greedy", all_tasks(study)["greedy"])["value"] == 0.5


def test_samples_search_on_their_own_and_stop_after_their_turns(answered: Answered) -> None:
    rows = answers(answered[1], "sampled")
    assert len(rows) == len(TOPICS) * SAMPLES
    searches = [row["reasoning"].count("<result>") for row in rows]
    assert set(searches) == {1, 2}
    for row, count in zip(rows, searches, strict=True):
        assert row["reasoning"].count("<search>") == count + (row["text"] == "")
        assert (row["finish_reason"] == "stop") == (row["text"] != "") and (count == 2 or row["text"])
    unanswered = sum(row["text"] == "" for row in rows) / len(rows)
    assert 0.02 < unanswered < 0.35  # 0.16 are expected, a standard error is 0.04


def test_other_tasks_of_the_pool_do_not_search(answered: Answered) -> None:
    rows = answers(answered[1], "plain")
    assert {row["text"] for row in rows} == {f"<search>{topic}</search>" for topic in TOPICS}
    assert {row["reasoning"] for row in rows} == {None}


def test_an_answer_that_never_came_counts_as_wrong(answered: Answered) -> None:
    study, store = answered
    values, rows = values_by_prompt(store, "student", "sampled", all_tasks(study)["sampled"]), answers(store, "sampled")
    right = {row["prompt_id"] for row in answers(store, "greedy") if row["text"] in FACTS[:2]}
    assert len(right) == 2
    for key, value in values.items():
        found = [row["text"] != "" for row in rows if row["prompt_id"] == key]
        assert value == pytest.approx(sum(found) / len(found) if key in right else 0)


# --- recipes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"tasks": {"asked": SHARED}}, "asked searches: write `search:"),
        ({"suites": ["agentic-search"]}, "nq searches: write `search:"),
        ({"tasks": {"asked": {}}, "search": {"url": "http://a/b"}}, "no task searches"),
        ({"tasks": {"asked": SHARED}, "search": {}}, "one of the two"),
        ({"tasks": {"asked": SHARED}, "search": {"url": "host:80"}}, "an address such as"),
        ({"tasks": {"asked": SHARED}, "search": {"url": "http://a/b", "query": "<q>"}}, "without <>"),
    ],
)
def test_recipes_that_cannot_search_are_refused(tmp_path: Path, evaluation: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "questions.jsonl", [{"prompt": "what?", "answer": "x"}])
    for task in evaluation.get("tasks", {}).values():
        task["path"] = path
    recipe = {"name": "r", "out": str(tmp_path / "out"), "prompts": {"path": path}, "teachers": {}}
    YAML(typ="safe").dump({**recipe, "evaluation": evaluation}, tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=words):
        load_recipe(tmp_path / "recipe.yaml")
