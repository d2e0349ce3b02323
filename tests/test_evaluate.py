"""Evaluation: tasks scored by any scorer, pass@k, comparisons, suites, and what is refused before anything runs."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from completions_server import completion, serving
from rich.console import Console
from test_recipe import GOOD, load, refusal

from deltaray.data.contracts import RESPONSES
from deltaray.data.prompts import store_source
from deltaray.data.store import Store
from deltaray.errors import StageError, UserError
from deltaray.evaluate import select
from deltaray.evaluate.check import check_answers
from deltaray.evaluate.compare import check_names, compare, compare_all, compare_two
from deltaray.evaluate.local import task_result, unscored_answers
from deltaray.evaluate.results import evaluation_of, summarise
from deltaray.evaluate.statistics import bootstrap_over_tasks, mean_and_stderr, paired_bootstrap, pass_at_k
from deltaray.evaluate.table import answers_text, comparison_table, result_table
from deltaray.evaluate.tasks import task_sources
from deltaray.evaluate.values import TaskValues
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.evaluation import Evaluation
from deltaray.recipe.suites import SUITES, expand_suites, missing_in
from deltaray.report import write_report
from deltaray.runtime.session import Capacity
from deltaray.score.stage import score_units


# --- statistics ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 4), (6, 5, 2), (7, 1, 7)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, correct: int, k: int) -> None:
    right = [True] * correct + [False] * (samples - correct)
    draws = list(itertools.combinations(right, k))
    assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_few_distinct_differences_and_many_have_the_same_interval() -> None:
    generator = np.random.default_rng(0)
    better, worse = generator.random(3000) < 0.6, generator.random(3000) < 0.5
    few = paired_bootstrap(better.astype(float), worse.astype(float))
    many = paired_bootstrap(better + generator.normal(0, 1e-6, 3000), worse.astype(float))
    assert few == pytest.approx(many, abs=1.5e-3) and 0 < few[1] < few[0] < few[2]


def test_one_task_is_the_ordinary_bootstrap_and_shared_prompts_are_drawn_together() -> None:
    generator = np.random.default_rng(1)
    values = {f"p{number:04d}": float(value) for number, value in enumerate(generator.normal(0.1, 1, 500))}
    array = np.array(list(values.values()))
    assert bootstrap_over_tasks([values]) == pytest.approx(paired_bootstrap(array, np.zeros(500)))
    assert bootstrap_over_tasks([values, values]) == pytest.approx(bootstrap_over_tasks([values]))
    cancelled = bootstrap_over_tasks([values, {prompt: -value for prompt, value in values.items()}])
    assert cancelled == pytest.approx((0, 0, 0), abs=1e-12)


def test_tasks_without_shared_prompts_have_the_error_of_independent_means() -> None:
    generator = np.random.default_rng(2)
    small = {f"a{number}": float(value) for number, value in enumerate(generator.normal(0.2, 1, 400))}
    large = {f"b{number}": float(value) for number, value in enumerate(generator.normal(0.0, 2, 2500))}
    difference, low, high = bootstrap_over_tasks([small, large])
    means = [mean_and_stderr(np.array(list(task.values()))) for task in (small, large)]
    assert difference == pytest.approx((means[0][0] + means[1][0]) / 2)
    error = np.hypot(means[0][1], means[1][1]) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)


# --- tasks of one's own -------------------------------------------------------------------------------------------
PROGRAMS = {"right": "```python\ndef f(x):\n    return x + 1\n```", "wrong": "```python\ndef f(x):\n    return x\n```"}
TASKS = """\
scorers:
  tests: {kind: python_tests}
  text: {kind: surface, statistic: words}
  judge: {kind: judge, by: {model: judge, endpoint: {url: URL, retries: 0}}, aspects: {all: good?}, against: student}
evaluation:
  tasks:
    code: {path: FOLDER/code.jsonl, scorer: tests, k: [1, 3], sampling: {samples: 4, temperature: 0.8}}
    sums: {path: FOLDER/sums.jsonl, metric: numeric}
    lines: {path: FOLDER/open.jsonl, scorer: text/lines}
    pairs: {path: FOLDER/open.jsonl, scorer: judge}
"""


def rows_file(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_study(folder: Path, url: str) -> tuple[Study, Store]:
    rows_file(folder / "code.jsonl", [{"id": "c0", "prompt": "f", "answer": ["assert f(1) == 2"]}])
    rows_file(folder / "sums.jsonl", [{"id": f"s{n}", "prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(6)])
    rows_file(folder / "open.jsonl", [{"id": f"o{n}", "prompt": f"say {n}"} for n in range(2)])
    text = GOOD.partition("scorers:")[0].replace("runs/study", str(folder / "out"))
    text += TASKS.replace("FOLDER", str(folder)).replace("URL", url) + "student: {model: models/student}\n"
    study = expand(load(folder, text))
    store = Store(study.recipe.out)
    for name, source in task_sources(study).items():
        store_source(store, source, 100, 10, Store.evaluation_prompts(name))
    return study, store


def answer(store: Store, model: str, task: str, said: dict[str, list[str]], error: str | None = None) -> None:
    fixed = {"teacher": model, "prompt_token_ids": [], "token_ids": [], "tokens": 1}
    rows = [
        {"prompt_id": prompt, "sample": sample, "text": text, **fixed}
        | {"finish_reason": "length" if text == "cut" else "stop", "error": "empty answer" if not text else None}
        for prompt, texts in said.items()
        for sample, text in enumerate(texts)
    ]
    path = f"{Store.evaluation_responses(model, task)}/part-00000-0abc.parquet"
    store.write_table(path, pa.Table.from_pylist(rows, schema=RESPONSES), RESPONSES)


def verdict(body: dict[str, Any], attempt: int) -> Any:
    """Whoever says `zebra` wins in both orders: the first of the two stands before the second."""
    question = body["messages"][-1]["content"]
    zebra, mule = question.find("zebra"), question.find("mule")
    return completion(f"Verdict: {'A' if -1 < zebra < mule else 'B' if zebra > mule else 'tie'}")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, ray_session: Any) -> tuple[Study, Store]:
    """Two models' answers to four tasks, scored on Ray by functions, the sandbox and a judge."""
    with serving(verdict) as (_, url):
        study, store = make_study(tmp_path_factory.mktemp("tasks"), url)
        for model, right in {"student": 1, "weak": 3}.items():
            answer(store, model, "code", {"c0": [PROGRAMS["right"]] * right + [PROGRAMS["wrong"]] * (4 - right)})
        answer(store, "student", "sums", {f"s{n}": [str(n + 1)] for n in range(6)})
        answer(store, "weak", "sums", {f"s{n}": [text] for n, text in enumerate(["1", "", "cut", "no idea", "5", "7"])})
        answer(store, "student", "lines", {"o0": ["a"], "o1": ["a\nb"]})
        answer(store, "weak", "lines", {"o0": ["a\nb\nc"], "o1": ["a"]})
        answer(store, "student", "pairs", {"o0": ["mule"], "o1": ["mule"]})
        answer(store, "weak", "pairs", {"o0": ["zebra"], "o1": ["mule"]})
        units = [
            unit
            for model in ("student", "weak")
            for name, task in study.recipe.evaluation.tasks.items()  # type: ignore[union-attr]
            for unit in unscored_answers(study, store, model, name, task)
        ]
        assert len(units) == 8
        score_units(study, store, units, Capacity(8, 0), lambda *_: None, lambda _: None)
    return study, store


def result(scored: tuple[Study, Store], model: str, task: str) -> dict[str, Any]:
    study, store = scored
    assert study.recipe.evaluation is not None
    return task_result(store, model, task, study.recipe.evaluation.tasks[task])


def test_programs_are_scored_in_the_sandbox_and_pass_at_k_is_estimated(scored: tuple[Study, Store]) -> None:
    student, weak = result(scored, "student", "code"), result(scored, "weak", "code")
    assert student["metric"] == "pass@1" and student["n"] == 1 and student["answers"]["total"] == 4
    assert (student["value"], weak["value"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert student["pass_at_k"]["3"]["value"] == pytest.approx(0.75)  # of the 4 draws of 3, one has no right one


def test_garbage_counts_as_wrong_and_is_told(scored: tuple[Study, Store]) -> None:
    weak = result(scored, "weak", "sums")
    assert (weak["value"], weak["n"], weak["metric"]) == (pytest.approx(2 / 6), 6, "numeric")
    assert weak["answers"] == {"total": 6, "failed": 1, "cut": 1, "unscored": 0, "notes": {"no number": 3}}
    assert result(scored, "student", "sums")["stderr"] == 0


def test_a_part_of_a_score_can_be_the_value(scored: tuple[Study, Store]) -> None:
    assert [result(scored, model, "lines")["value"] for model in ("student", "weak")] == [1.5, 2.0]


def test_a_judge_compares_the_answers_of_two_evaluated_models(scored: tuple[Study, Store]) -> None:
    weak = result(scored, "weak", "pairs")
    assert weak["value"] == pytest.approx((1 + 0.5) / 2) and weak["answers"]["unscored"] == 0
    assert result(scored, "student", "pairs")["value"] == 0.5  # with itself


def test_what_is_scored_is_not_scored_again(scored: tuple[Study, Store]) -> None:
    study, store = scored
    assert study.recipe.evaluation is not None
    for name, task in study.recipe.evaluation.tasks.items():
        assert unscored_answers(study, store, "weak", name, task) == []


def test_a_task_without_any_score_stops_with_the_reasons(scored: tuple[Study, Store]) -> None:
    study, store = scored
    assert study.recipe.evaluation is not None
    with pytest.raises(StageError, match="nobody on sums: none of its 0 answers has a score"):
        task_result(store, "nobody", "sums", study.recipe.evaluation.tasks["sums"])


def test_scorers_that_only_tasks_name_leave_responses_alone(scored: tuple[Study, Store]) -> None:
    assert scored[0].response_scorers() == []


# --- comparisons --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def summary(scored: tuple[Study, Store]) -> dict[str, Any]:
    study, store = scored
    assert study.recipe.evaluation is not None
    for name in ("student", "weak"):
        found = evaluation_of(store, name, name, study.recipe.evaluation.tasks)
        assert found["mean"] == pytest.approx(np.mean([task["value"] for task in found["tasks"].values()]))
        store.write_json(Store.evaluation(name), found)
    store.write_json("evaluation/summary.json", made := summarise(study, store))
    return made


def test_models_are_compared_on_every_task_and_better_only_where_the_interval_says_so(
    scored: tuple[Study, Store], summary: dict[str, Any]
) -> None:
    rows = {row["task"]: row for row in summary["differences"]}
    assert list(rows) == ["code", "sums", "lines", "pairs", "mean"]
    assert all((row["first"], row["second"]) == ("student", "weak") for row in rows.values())
    assert rows["sums"]["difference"] == pytest.approx(4 / 6) and rows["sums"]["verdict"] == "better"
    assert rows["pairs"]["verdict"] == rows["mean"]["verdict"] == "open"
    assert rows["mean"]["difference"] == pytest.approx(np.mean([rows[task]["difference"] for task in list(rows)[:-1]]))
    for row in rows.values():
        assert (row["verdict"] == "better") == (row["low"] > 0) and row["low"] <= row["difference"] <= row["high"]
    study, store = scored
    assert compare_two(study, store, "student", "weak") == summary["differences"]
    turned = {row["task"]: row for row in compare_two(study, store, "weak", "student")}
    assert turned["sums"]["verdict"] == "worse"


def test_the_terminal_and_the_report_say_the_same(scored: tuple[Study, Store], summary: dict[str, Any]) -> None:
    store = scored[1]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(result_table(summary))
    console.print(comparison_table("student", "weak", summary["differences"]))
    text = console.export_text()
    assert "33.3 ± 21.1 ▼" in text and "student is better" in text and "not told apart" in text
    results = {name: store.read_json(Store.evaluation(name)) for name in ("student", "weak")}
    told = answers_text(results)
    assert "weak on sums: of 6 answers 1 failed, 1 cut at max_tokens, 3 no number" in told
    assert not any("student on sums" in line for line in told)
    page = Path(write_report(store)).read_text()
    assert "Models against models" in page and "student is better" in page and "3 no number" in page
    assert "could not be read" not in page and 'class="sortable"' in page


def test_names_to_compare_must_exist(scored: tuple[Study, Store]) -> None:
    with pytest.raises(UserError, match="there is no evaluated model 'weakk'; did you mean 'weak'"):
        check_names(scored[0], ("student", "weakk"))
    with pytest.raises(UserError, match="weaker is not evaluated yet"):
        compare_two(*scored, "student", "weaker")


def test_many_models_are_compared_with_the_untouched_student_alone(scored: tuple[Study, Store]) -> None:
    study, store = scored
    result = store.read_json(Store.evaluation("student"))
    names = ["student", *(f"model{number}" for number in range(12))]
    values = TaskValues(study, store, {name: {**result, "selected": "student"} for name in names})
    rows = compare_all(study, values, names, values.results)
    assert {(row["first"], row["second"]) for row in rows} == {(name, "student") for name in names[1:]}
    assert compare(study, values, ["student"], ["model1"])["difference"] == 0


# --- refused before anything runs ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "line", "problem"),
    [
        ("numeric", '{"prompt": "2+2="}', "it has no `answer`; numeric compares with one"),
        ("numeric", '{"prompt": "2+2=", "answer": "four"}', "the answer holds no number; numeric"),
        ("multiple_choice", '{"prompt": "2+2=", "answer": "four"}', "the answer is not a letter A to J"),
        ("refusal", '{"prompt": "2+2=", "answer": "no"}', "the answer is neither `refuse` nor `comply`"),
    ],
)
def test_a_missing_answer_is_named_with_its_line(tmp_path: Path, task: str, line: str, problem: str) -> None:
    good = {"numeric": "3", "multiple_choice": "B", "refusal": "comply"}[task]
    file = tmp_path / "held_out.jsonl"
    file.write_text(f"{json.dumps({'prompt': '1+2=', 'answer': good})}\n\n{line}\n")
    text = GOOD.replace("held_out.jsonl}", f"held_out.jsonl, metric: {task}}}").replace("held_out.jsonl", str(file))
    study = expand(load(tmp_path, text))
    source = task_sources(study)["held_out"]
    with pytest.raises(UserError) as caught:
        check_answers(study, "held_out", source, list(source.rows()))
    assert str(caught.value).startswith(f"{file}:3: evaluation.tasks.held_out.path: {problem}")


def test_scorers_that_need_no_answer_take_prompts_without(tmp_path: Path) -> None:
    rows_file(tmp_path / "open.jsonl", [{"prompt": "say"}])
    text = GOOD.replace("held_out.jsonl}", f"{tmp_path}/open.jsonl, scorer: text}}")
    study = expand(load(tmp_path, text.replace("scorers:", "scorers:\n  text: {kind: surface}")))
    source = task_sources(study)["held_out"]
    check_answers(study, "held_out", source, list(source.rows()))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("held_out.jsonl}", "held_out.jsonl, scorer: exactt}", "there is no scorer 'exactt'; did you mean 'exact'"),
        ("held_out.jsonl}", "held_out.jsonl, scorer: exact, metric: numeric}", "write one of the two"),
        ("held_out.jsonl}", "held_out.jsonl, k: [4]}", "pass@4 takes so many samples"),
        ("held_out.jsonl}", "held_out.jsonl, k: [1, 1]}", "every one once"),
        ("held_out.jsonl}", "held_out.jsonl, sampling: {samples: 2}}", "samples of temperature 0 are all the same"),
        ("held_out.jsonl}", "held_out.jsonl, answer: a, answers: {a: b}}", "leave one of the two out"),
        (
            "  tasks:",
            "  suites: [delta-lerning]\n  tasks:",
            "there is no suite 'delta-lerning'; did you mean 'delta-learning'",
        ),
        ("  tasks:", "  suites: [agentic-search]\n  tasks:", "nq searches: write `search:"),
        ("  tasks:", "  harness: {tasks: {held_out: {}}}\n  tasks:", "another task has this name"),
        ("  tasks:", "  harness: {tasks: {mean: {}}}\n  tasks:", "is what the mean of all tasks is called"),
        ("    validation:", "    held_out:", "a task of `evaluation.tasks` has this name"),
    ],
)
def test_impossible_evaluations_are_refused_with_their_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    message = refusal(tmp_path, GOOD.replace(old, new))
    assert problem in message and message.startswith("recipe.yaml:")


def test_nothing_to_evaluate_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("  tasks:\n    held_out: {path: held_out.jsonl}\n", "")
    assert "has no task: write `tasks`" in refusal(tmp_path, text)


# --- suites -------------------------------------------------------------------------------------------------------
def test_a_suite_is_written_out_and_own_tasks_win() -> None:
    own = {"gsm8k": {"path": "mine.jsonl"}}
    evaluation = expand_suites(Evaluation.model_validate({"suites": ["delta-learning"], "tasks": own}))
    assert "gsm8k" not in evaluation.harness_tasks and evaluation.tasks["gsm8k"].path == "mine.jsonl"
    assert set(evaluation.names) == {"gsm8k", "popqa", "mmlu", "math", "ifeval", "bbh", "drop", "truthfulqa"}
    assert set(missing_in(evaluation)) == {"alpaca_eval", "humaneval", "humaneval_plus"}
    assert evaluation.harness_tasks["drop"].num_fewshot == 3 and evaluation.harness_tasks["bbh"].chat is True


def test_programs_are_run_only_with_consent() -> None:
    given = {"suites": ["delta-learning"], "harness": {"unsafe_code": True, "limit": 5}}
    evaluation = expand_suites(Evaluation.model_validate(given))
    assert set(missing_in(evaluation)) == {"alpaca_eval"} and evaluation.harness_tasks["humaneval"].limit == 5
    assert len({*evaluation.names, *missing_in(evaluation)}) == 11


def test_every_suite_says_what_it_is() -> None:
    assert set(SUITES) == {"delta-learning", "safety", "knowledge-reasoning", "agentic-search"}
    for suite in SUITES.values():
        assert suite.about and (suite.harness or suite.local)


def test_labels_become_answers(tmp_path: Path) -> None:
    rows_file(tmp_path / "rows.jsonl", [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}])
    task = {"path": str(tmp_path / "rows.jsonl"), "columns": {"answer": "label"}, "metric": "refusal"}
    recipe = {"name": "s", "out": "o", "prompts": {"path": "p.jsonl"}, "teachers": {}}
    mapped = {**task, "answers": {"safe": "comply", "unsafe": "refuse"}}
    constant = {key: value for key, value in task.items() if key != "columns"} | {"answer": "refuse"}
    tasks = {"mapped": mapped, "constant": constant, "wrong": {**task, "answers": {"safe": "comply"}}}
    sources = task_sources(expand(Recipe.model_validate({**recipe, "evaluation": {"tasks": tasks}})))
    assert [row["answer"] for row in sources["mapped"].rows()] == ["comply", "refuse"]
    assert [row["answer"] for row in sources["constant"].rows()] == ["refuse", "refuse"]
    with pytest.raises(UserError, match=r"rows.jsonl:2: the answer 'unsafe' must be one of safe \(answers\)"):
        list(sources["wrong"].rows())


# --- grids --------------------------------------------------------------------------------------------------------
def test_when_another_candidate_wins_it_takes_the_grids_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"path": "unused.jsonl"}
    sections: dict[str, Any] = {
        "pairings": {"pairs": {"chosen": "a", "rejected": "b"}},
        "teachers": {"a": {"model": "m"}, "b": {"model": "m"}},
        "prompts": task,
        "student": {"model": "m"},
        "training": {"runs": {"sft": {"pairing": "pairs", "loss": "sft", "learning_rate": [1e-4, 1e-3]}}},
        "evaluation": {"tasks": {"sums": task}, "selection": {"choice": task}},
    }
    study = expand(Recipe.model_validate({"name": "grid", "out": str(tmp_path / "out"), **sections}))
    store, means = Store(study.recipe.out), {"sft-lr0.0001": 0.1, "sft-lr0.001": 0.2}
    for name in means:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        store.put_folder(tmp_path / name, Store.student(name))
        store.write_bytes(f"{Store.training(name)}/metrics.jsonl", name.encode())
    monkeypatch.setattr(select, "evaluation_of", lambda store, name, *_: {"mean": means[name]})

    def taken() -> tuple[str, bytes, bytes]:
        chosen = select.choose_candidates(study, store)["sft"]
        store.write_json(Store.evaluation("sft"), {"model": "sft", "tasks": {}, "mean": 0.3} | chosen)
        files = (f"{Store.student('sft')}/weights", f"{Store.training('sft')}/metrics.jsonl")
        return chosen["selected"], store.read_bytes(files[0]), store.read_bytes(files[1])

    for winner in ("sft-lr0.001", "sft-lr0.0001"):
        assert taken() == taken() == (winner, winner.encode(), winner.encode())
        means["sft-lr0.0001"] = 0.3
