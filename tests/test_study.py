"""The miniature study, every part real, through the command line; its claims recomputed from the files it left."""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import StudyRun, deltaray

from deltaray.data.contracts import METRICS, PAIRS, REFERENCES, RESPONSES, SCORES
from deltaray.recipe import shipped_recipe

TEACHERS = ("mini-m", "mini-xs")
TRAINED = ("delta", "reversed", "wrong", "sft")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def right_answer(prompt: str) -> str:
    """Worked out again, not read from the files."""
    first, second = re.fullmatch(r"(\d+)\+(\d+)=", prompt).groups()  # type: ignore[union-attr]
    return str(int(first) + int(second))


@pytest.fixture(scope="module")
def prompts(study: StudyRun) -> dict[str, str]:
    return {row["prompt_id"]: row["messages"][-1]["content"] for row in rows(study.out / "prompts")}


# --- interruption and exactly once ------------------------------------------------------------------------------
def test_interruption_and_kill_were_real(study: StudyRun) -> None:
    assert study.killed.code == -9
    assert study.interrupted.code == 130
    assert "run the same command again to resume" in study.interrupted.stderr


def test_the_resumed_run_did_only_the_rest(study: StudyRun) -> None:
    assert "generate: nothing to do (16,384 responses are stored)" in study.finished.stderr
    assert "pair: nothing to do" in study.finished.stderr


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_response_is_there_exactly_once(study: StudyRun, prompts: dict[str, str], teacher: str) -> None:
    tables = {"responses": RESPONSES, "scores/scorer=exact": SCORES, "references/student=student": REFERENCES}
    for kind, schema in tables.items():
        folder = f"{kind}/teacher={teacher}"
        found = rows(study.out / folder)
        assert Counter((row["prompt_id"], row["sample"]) for row in found) == Counter((i, 0) for i in prompts)
        assert all(pq.read_schema(file).equals(schema) for file in (study.out / folder).glob("*.parquet"))


def test_nothing_unfinished_is_left_visible(study: StudyRun) -> None:
    visible = [file for file in study.out.rglob("*.parquet") if not file.name.startswith(".")]
    assert visible and all(pq.read_metadata(file).num_rows >= 0 for file in visible)


def test_a_second_run_does_nothing_and_says_so(study: StudyRun) -> None:
    before = {file: file.stat().st_mtime_ns for file in study.out.rglob("*.parquet")}
    again = deltaray("run", str(shipped_recipe("miniature")), *study.arguments)
    assert again.code == 0 and again.stdout == study.finished.stdout
    for stage in ("generate", "score", "pair", "train", "evaluate", "report"):
        assert f"{stage}: nothing to do" in again.stderr
    assert before == {file: file.stat().st_mtime_ns for file in study.out.rglob("*.parquet")}


# --- ids in, ids out ----------------------------------------------------------------------------------------------
def test_ids_sent_to_vllm_are_the_chat_templates_with_one_bos(study: StudyRun, prompts: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(study.out / "students" / "delta")
    for teacher in TEACHERS:
        for row in rows(study.out / f"responses/teacher={teacher}")[::50]:
            messages = [{"role": "user", "content": prompts[row["prompt_id"]]}]
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert row["prompt_token_ids"] == expected
            assert row["prompt_token_ids"].count(tokenizer.bos_token_id) == 1
            assert row["token_ids"][-1] == tokenizer.eos_token_id or row["finish_reason"] == "length"


def test_training_sees_the_ids_that_vllm_wrote(study: StudyRun) -> None:
    """All models of the family share one tokenizer; few answers hold a control token, which their text leaves out."""
    wrote = {(it["prompt_id"], name): it for name in TEACHERS for it in rows(study.out / f"responses/teacher={name}")}
    pairs, same = rows(study.out / "pairs/pairing=delta"), 0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            response = wrote[pair["prompt_id"], pair[f"{side}_model"]]
            assert pair["prompt_token_ids"] == response["prompt_token_ids"] and response["finish_reason"] == "stop"
            same += pair[f"{side}_token_ids"] == response["token_ids"]
            assert pair[f"{side}_token_ids"] == response["token_ids"] or len(response["text"]) + 1 < response["tokens"]
    assert same > 0.99 * 2 * len(pairs)


# --- pairs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pairing", ["delta", "reversed", "wrong"])
def test_pairs_and_funnel_keep_the_contract(study: StudyRun, prompts: dict[str, str], pairing: str) -> None:
    folder = study.out / f"pairs/pairing={pairing}"
    pairs, funnel = rows(folder), json.loads((folder / "_funnel.json").read_text())
    assert funnel[0]["in"] == len(prompts) and funnel[-1]["out"] == len(pairs) > 1000
    assert all(one["out"] == other["in"] for one, other in pairwise(funnel))
    assert all(stage["in"] - stage["out"] == stage["removed"] for stage in funnel)
    assert all(pq.read_schema(file).equals(PAIRS) for file in folder.glob("*.parquet"))
    assert len({pair["prompt_id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        answer = right_answer(pair["prompt"][-1]["content"])
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert pair["chosen_score"] == float(chosen == answer) and pair["rejected_score"] == float(rejected == answer)
        assert pair["delta"] == pair["chosen_score"] - pair["rejected_score"]
        assert pair["chosen_tokens"] == len(chosen) + 1 and pair["rejected_tokens"] == len(rejected) + 1


def test_a_pairing_is_a_join_of_stored_responses(study: StudyRun) -> None:
    texts = {t: {row["prompt_id"]: row["text"] for row in rows(study.out / f"responses/teacher={t}")} for t in TEACHERS}
    strong, weak = texts["mini-m"], texts["mini-xs"]
    delta = {p["prompt_id"]: (p["chosen"][0]["content"], p["rejected"][0]["content"])
             for p in rows(study.out / "pairs/pairing=delta")}  # fmt: skip
    assert delta == {i: (strong[i], weak[i]) for i in strong if strong[i] != weak[i]}
    turned = {p["prompt_id"]: (p["rejected"][0]["content"], p["chosen"][0]["content"])
              for p in rows(study.out / "pairs/pairing=reversed")}  # fmt: skip
    assert turned == delta
    wrong = {p["prompt_id"] for p in rows(study.out / "pairs/pairing=wrong")}
    scores = {row["prompt_id"]: row["score"] for row in rows(study.out / "scores/scorer=exact/teacher=mini-m")}
    assert wrong == {i for i in delta if scores[i] == 0}


# --- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TRAINED)
def test_metrics_are_complete_and_start_at_ln_2(study: StudyRun, name: str) -> None:
    lines = [json.loads(line) for line in (study.out / f"training/{name}/metrics.jsonl").read_text().splitlines()]
    assert all(set(METRICS) <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["samples"] for line in lines) == len(rows(study.out / f"pairs/pairing={PAIRING[name]}"))
    if name != "sft":
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert lines[0]["rewards_margin"] == pytest.approx(0, abs=1e-4)
        assert np.mean([line["rewards_accuracy"] for line in lines[-20:]]) > 0.6


PAIRING = {"delta": "delta", "reversed": "reversed", "wrong": "wrong", "sft": "delta"}


def test_pair_shards_train_in_trl_unconverted(study: StudyRun, tmp_path: Path) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    shards = str(study.out / "pairs/pairing=delta/*.parquet")
    pairs = load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    student = load_student(study)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), loss_type="sigmoid_norm", beta=5.0, learning_rate=1e-5, max_steps=2,
            per_device_train_batch_size=8, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
        ),
        train_dataset=pairs.select(range(64)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-4)


def load_student(study: StudyRun) -> str:
    return study.recipe.student.model.replace("{seed}", "0")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["student", "delta", "sft"])
def test_students_answer_alike_in_transformers_and_vllm(study: StudyRun, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evaluation = json.loads((study.out / f"evaluation/{name}.json").read_text())
    stored = evaluation.get("selected", name)
    answers = {
        r["prompt_id"]: r["text"] for r in rows(study.out / f"evaluation/responses/model={stored}/task=addition")
    }
    path = load_student(study) if name == "student" else study.out / "students" / name
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for row in rows(study.out / "evaluation/prompts/task=addition")[:64]:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == answers[row["prompt_id"]]


# --- evaluation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["student", *TRAINED, *TEACHERS])
def test_evaluations_are_what_the_stored_answers_say(study: StudyRun, name: str) -> None:
    evaluation = json.loads((study.out / f"evaluation/{name}.json").read_text())
    values = []
    for task, result in evaluation["tasks"].items():
        questions = {
            r["prompt_id"]: r["messages"][-1]["content"] for r in rows(study.out / f"evaluation/prompts/task={task}")
        }
        answers = rows(study.out / f"evaluation/responses/model={evaluation.get('selected', name)}/task={task}")
        right = np.array([row["text"] == right_answer(questions[row["prompt_id"]]) for row in answers], float)
        assert result["n"] == len(right) == len(questions) and result["metric"] == "exact_match"
        assert result["value"] == pytest.approx(right.mean())
        assert result["stderr"] == pytest.approx(right.std(ddof=1) / math.sqrt(len(right)))
        values.append(right.mean())
    assert evaluation["mean"] == pytest.approx(np.mean(values)) and evaluation["model"] == name


def test_held_out_prompts_are_held_out(study: StudyRun, prompts: dict[str, str]) -> None:
    texts = {
        folder.name: {r["messages"][-1]["content"] for r in rows(folder)}
        for folder in (study.out / "evaluation/prompts").iterdir()
    }
    assert not texts["task=addition"] & set(prompts.values())
    assert not texts["task=addition"] & texts["task=validation"]


def test_delta_learning_happens(study: StudyRun) -> None:
    summary = json.loads((study.out / "evaluation/summary.json").read_text())
    means = {name: entry["mean"]["mean"] for name, entry in summary["names"].items()}
    assert means["delta"] > means["student"] > means["mini-m"] > means["mini-xs"]
    assert means["delta"] > means["sft"] and means["student"] > means["reversed"]
    for claim in summary["comparisons"]:
        assert claim["holds"] == (claim["low"] > 0)
        assert claim["difference"] == pytest.approx(means[claim["better"]] - means[claim["worse"]])
    assert all(claim["holds"] for claim in summary["comparisons"])


def test_the_best_of_the_grid_was_chosen_on_the_selection_tasks(study: StudyRun) -> None:
    chosen = json.loads((study.out / "evaluation/sft.json").read_text())
    assert set(chosen["selection"]) == {"sft-lr0.0001", "sft-lr0.001"}
    assert chosen["selected"] == max(chosen["selection"], key=chosen["selection"].get)
    weights = [
        (study.out / "students" / name / "model.safetensors").read_bytes() for name in ("sft", chosen["selected"])
    ]
    assert weights[0] == weights[1]


# --- what a user sees -------------------------------------------------------------------------------------------------
def test_results_on_stdout_progress_on_stderr_chatter_in_the_log(study: StudyRun) -> None:
    run = study.finished
    assert "delta" in run.stdout and str(study.out / "report.html") in run.stdout
    assert "train delta" not in run.stdout and "train" in run.stderr
    log = re.search(r"goes to (\S+\.log)", run.stderr)
    assert log and Path(log[1]).is_file()
    for chatter in ("WARNING", "INFO", "raylet", "Traceback", "it/s"):
        assert chatter not in run.stdout + run.stderr


def test_status_and_plan_say_that_all_is_done(study: StudyRun) -> None:
    status = json.loads(deltaray("status", str(study.out), "--json").stdout)
    plan = json.loads(deltaray("plan", str(shipped_recipe("miniature")), *study.arguments, "--json").stdout)
    for stages in (status["stages"], plan["stages"]):
        assert [stage["stage"] for stage in stages] == ["generate", "score", "pair", "train", "evaluate", "report"]
        assert all(stage["finished"] for stage in stages)


def test_the_report_holds_the_study(study: StudyRun) -> None:
    html = (study.out / "report.html").read_text()
    assert "mini-m" in html and "pairing" in html and len(html) > 1_000_000


def test_an_out_of_another_recipe_is_refused(study: StudyRun) -> None:
    recipe = str(shipped_recipe("miniature"))
    run = deltaray("run", recipe, *study.arguments, "--set", "teachers.mini-m.sampling.temperature=0.5")
    assert run.code == 2 and "belongs to another recipe" in run.stderr
    assert "responses/teacher=mini-m: temperature was 1.0 and is now 0.5" in run.stderr
