"""lm-evaluation-harness through our engine: sample for sample what its own `hf` class says of the same models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, StudyRun
from harness_yaml import write_tasks

from deltaray.data.contracts import SAMPLES
from deltaray.data.store import Store, numbers_of
from deltaray.errors import UserError
from deltaray.evaluate.check import check_harness
from deltaray.evaluate.harness import missing_benchmarks, run_benchmarks
from deltaray.evaluate.results import evaluation_of
from deltaray.evaluate.samples import headline, values_by_document
from deltaray.recipe import Recipe, Study, expand
from deltaray.recipe.evaluation import HarnessTask
from deltaray.recipe.models import Teacher
from deltaray.recipe.suites import SUITES
from deltaray.runtime.session import Capacity

FAMILY = ROOT / "runs" / "miniature-family"
PROBLEMS, SHOTS, LONGEST = 40, 8, 12
TASKS = {
    "written": {"task": "add_written"},
    "shown": {"task": "add_written", "num_fewshot": 2, "limit": 10},
    "chosen": {"task": "add_chosen"},
    "sampled": {"task": "add_written", "chat": False, "samples": 2, "limit": 10},
}
TASKS["sampled"]["generation"] = {"do_sample": True, "temperature": 1.0}


def problems(name: str, count: int) -> list[dict[str, str]]:
    with (FAMILY / f"{name}.jsonl").open() as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]


def harness_study(folder: Path, **harness: Any) -> Study:
    recipe = {"name": "harness", "out": str(folder / "out"), "prompts": {"path": "prompts.jsonl"}, "teachers": {}}
    return expand(Recipe.model_validate({**recipe, "evaluation": {"harness": harness}}))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, study: StudyRun) -> str:
    folder = tmp_path_factory.mktemp("harness") / "tasks"
    return write_tasks(folder, problems("evaluation", PROBLEMS), problems("validation", SHOTS))


@pytest.fixture(scope="module")
def models(study: StudyRun) -> dict[str, str]:
    return {"student": str(FAMILY / "seed0" / "student"), "delta": str(study.out / "students" / "delta")}


Ran = tuple[Study, Store, dict[str, Teacher]]


@pytest.fixture(scope="module")
def ran(tasks: str, models: dict[str, str], ray_session: Any) -> Ran:
    """Two models, of which one was trained in this session, through four tasks and one engine."""
    study = harness_study(Path(tasks).parent, include=[tasks], tasks=TASKS)
    exact = {"dtype": "float32"}  # as the other side computes; with `auto` vLLM halves it
    answering = {name: Teacher.model_validate({"model": path, "engine": exact}) for name, path in models.items()}
    store = Store(study.recipe.out)
    said: list[str] = []
    units = missing_benchmarks(study, store, answering)
    run_benchmarks(store, units, Capacity(8, 0), lambda *_: None, said.append)
    assert len(units) == 8 and len(said) == 1 and said[0].startswith("pools at once: ") and "; then" not in said[0]
    return study, store, answering


def hugging_face(model: str, folder: str, task: str, shots: int = 0, limit: int | None = None) -> dict[str, Any]:
    """What the harness's own class for transformers makes of a task."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": shots, "limit": limit}
    found = simple_evaluate(
        HFLM(model, dtype="float32", device="cpu", batch_size=16), tasks=[task], task_manager=manager, **options
    )
    assert found is not None
    return dict(found)


def log_of(store: Store, model: str, task: str) -> list[dict[str, Any]]:
    with store.filesystem.open_input_file(f"{Store.samples(model, task)}.parquet") as file:
        table = pq.read_table(file)
    assert table.schema.equals(SAMPLES)
    return list(table.to_pylist())


@pytest.mark.parametrize(("name", "task"), [("student", "written"), ("delta", "written"), ("delta", "shown")])
def test_written_answers_are_those_of_transformers(
    ran: Ran, tasks: str, models: dict[str, str], name: str, task: str
) -> None:
    _, store, _ = ran
    shots, documents = TASKS[task].get("num_fewshot", 0), TASKS[task].get("limit", PROBLEMS)
    wanted = hugging_face(models[name], tasks, "add_written", shots, documents)
    whole = {row["doc_id"]: row for row in wanted["samples"]["add_written"] if row["filter"] == "whole"}
    digits = {row["doc_id"]: row for row in wanted["samples"]["add_written"] if row["filter"] == "digits"}
    rows = log_of(store, name, task)
    assert [row["doc_id"] for row in rows] == list(range(documents))
    for row in rows:
        number = row["doc_id"]
        (ours,), theirs = row["answers"], whole[number]["resps"][0][0]
        # of answers without an end `hf` gives fewer tokens than it is asked for
        assert ours == theirs or (len(ours) == LONGEST and theirs and ours.startswith(theirs))
        assert row["prompt"] == whole[number]["arguments"][0][0]
        assert json.loads(row["filtered"]) == digits[number]["filtered_resps"]
        assert row["value"] == digits[number]["exact_match"] == numbers_of(row["metrics"])["exact_match,digits"]
        assert numbers_of(row["metrics"])["exact_match,whole"] == whole[number]["exact_match"]
        assert row["target"] == whole[number]["target"] and row["prompt"].count("<|user|>") == 1 + shots
    found, own = result_of(store, name, task), wanted["results"]["add_written"]
    assert found["metric"] == "exact_match,digits" and found["n"] == documents
    assert found["value"] == pytest.approx(own["exact_match,digits"])
    assert found["stderr"] == pytest.approx(own["exact_match_stderr,digits"])
    assert shots or 0 < found["metrics"]["exact_match,whole"]["value"] < 1


@pytest.mark.parametrize("name", ["student", "delta"])
def test_choices_and_their_log_probs_are_those_of_transformers(
    ran: Ran, tasks: str, models: dict[str, str], name: str
) -> None:
    _, store, _ = ran
    wanted = hugging_face(models[name], tasks, "add_chosen")
    rows = log_of(store, name, "chosen")
    assert len(rows) == 2 * PROBLEMS and len({row["sample_id"] for row in rows}) == 2 * PROBLEMS
    for row in rows:
        other = wanted["samples"][row["task"]][row["doc_id"]]
        assert row["continuations"] == [arguments[1] for arguments in other["arguments"]]
        assert row["logprobs"] == pytest.approx([reply[0][0] for reply in other["resps"]], abs=2e-4)
        assert (numbers_of(row["metrics"])["acc,none"], row["value"]) == (other["acc"], other["acc_norm"])
    found = result_of(store, name, "chosen")
    own = wanted["groups"]["add_chosen"]["acc_norm,none"]
    assert found["metric"] == "acc_norm" and found["value"] == pytest.approx(own)
    for task in ("add_near", "add_far"):
        assert found["results"][task]["acc,none"] == pytest.approx(wanted["results"][task]["acc,none"])


def result_of(store: Store, model: str, task: str) -> dict[str, Any]:
    return dict(store.read_json(Store.sample_results(model, task)))


def test_values_and_errors_can_be_recomputed_from_the_log(ran: Ran) -> None:
    study, store, models = ran
    for name in models:
        evaluation = evaluation_of(store, name, name, {}, study.recipe.evaluation.harness_tasks)  # type: ignore[union-attr]
        for task, entry in evaluation["tasks"].items():
            values = np.array([row["value"] for row in log_of(store, name, task)])
            assert entry["value"] == pytest.approx(values.mean()) and entry["n"] == len(values)
            assert entry["stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
            assert list(values_by_document(store, name, task).values()) == pytest.approx(
                [row["value"] for row in sorted(log_of(store, name, task), key=lambda row: row["sample_id"])]
            )
        assert evaluation["mean"] == pytest.approx(np.mean([entry["value"] for entry in evaluation["tasks"].values()]))


def test_samples_differ_and_an_answer_without_what_the_filter_wants_is_counted(ran: Ran) -> None:
    _, store, _ = ran
    rows = log_of(store, "student", "sampled")
    assert len(rows) == 10 and all(len(row["answers"]) == 2 and "<|user|>" not in row["prompt"] for row in rows)
    assert any(len(set(row["answers"])) == 2 for row in rows)
    found = result_of(store, "student", "sampled")["answers"]
    unparsable = sum("[invalid]" in row["filtered"] for row in rows)
    assert found["total"] == 20 and unparsable > 0
    assert found["notes"] == {"nothing found by the task's filter": unparsable}


def test_what_is_done_is_done_and_another_model_is_not_it(ran: Ran) -> None:
    study, store, models = ran
    assert missing_benchmarks(study, store, models) == []
    assert not store.listing(".deltaray/harness", suffix="") and not store.listing(".deltaray/units")
    swapped = missing_benchmarks(study, store, {"student": models["delta"]})
    assert [unit["task"] for unit in swapped] == list(TASKS)
    store.delete([Store.sample_results("delta", "chosen")])
    assert [(unit["model"], unit["task"]) for unit in missing_benchmarks(study, store, models)] == [("delta", "chosen")]


def test_rolling_log_likelihoods_are_those_of_transformers(models: dict[str, str]) -> None:
    """In windows: the text is longer than the room that the model is given."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from deltaray.data.tokens import load_tokenizer
    from deltaray.evaluate.harness_model import HarnessModel

    theirs = HFLM(models["student"], dtype="float32", device="cpu", batch_size=1, max_length=30)
    text = "".join(f"{number}+{number + 7}={2 * number + 7}\n" for number in range(100, 112))
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    tokenizer = load_tokenizer(Teacher(model=models["student"]), "student")
    noted = HarnessModel(tokenizer, 32)  # two less for context and answer are what 30 tokens at once leave
    noted.loglikelihood_rolling(asked)
    replies = {}
    for name, request in noted.requests.items():
        ids = torch.tensor([request["token_ids"]])
        with torch.no_grad():
            logs = theirs.model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        replies[name, 0] = {"logprob": float(logs[-request["scored"] :].sum()), "greedy": False}
    ours = HarnessModel(tokenizer, 32, replies=replies).loglikelihood_rolling(asked)
    assert len(replies) > 3 and ours == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)


# --- which metric, which tasks ------------------------------------------------------------------------------------
def test_the_headline_is_the_one_asked_for_or_the_first_of_the_last_filter() -> None:
    documents = [{"em,strict": 1.0, "em,loose": 1.0, "loss,loose": 2.0, "f1,loose": 0.5}] * 2
    found = {"higher_is_better": {"t": {"em": True, "loss": False, "f1": True}}}

    def chosen(**spec: Any) -> str:
        return headline("t", HarnessTask(task="t", **spec), documents, found)

    assert chosen() == "em,loose" and chosen(metric="em,strict") == "em,strict" and chosen(metric="f1") == "f1,loose"
    with pytest.raises(UserError, match="has no metric 'acc' with one number per document; write one of: em,strict"):
        chosen(metric="acc")
    grouped = {**found, "groups": {"t": {"f1,loose": 0.5}}}
    assert headline("t", HarnessTask(task="t"), documents, grouped) == "f1,loose"
    with pytest.raises(UserError, match="leave the task out"):
        headline("t", HarnessTask(task="t"), [{}, {}], found)


def test_tasks_that_do_not_exist_or_run_code_are_refused(tasks: str, tmp_path: Path) -> None:
    check_harness(harness_study(tmp_path, include=[tasks], tasks=TASKS))
    with pytest.raises(UserError, match=r"evaluation.harness.tasks.add_writen: .* did you mean 'add_written'"):
        check_harness(harness_study(tmp_path, include=[tasks], tasks={"add_writen": {}}))
    with pytest.raises(UserError, match=r"there is no folder nowhere; name one with YAML tasks"):
        check_harness(harness_study(tmp_path, include=["nowhere"], tasks=TASKS))
    with pytest.raises(UserError, match=r"tasks.mbpp: mbpp runs what the models write.*unsafe_code: true"):
        check_harness(harness_study(tmp_path, tasks={"mbpp": {}}))
    check_harness(harness_study(tmp_path, tasks={"mbpp": {}}, unsafe_code=True))


def test_the_harness_has_every_task_of_the_suites() -> None:
    from deltaray.evaluate.harness_tasks import task_manager

    known = set(task_manager((), "gsm8k").all_tasks)
    named = {task.task or name for suite in SUITES.values() for name, task in suite.harness.items()}
    assert len(named) == 10 and named <= known
