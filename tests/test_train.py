"""Training and the reference pass for real: Ray Data, Ray Train with two workers, DeepSpeed ZeRO 3, on the CPU.

One study is trained once for all tests; a plain PyTorch loop in this process says what should have come out.
"""

import json
import math
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tokenizer, save_tiny

from deltaray.data.contracts import METRICS, PAIRS, PROMPTS, REFERENCES, RESPONSES
from deltaray.data.store import Store
from deltaray.data.tokens.chat import render_prompt
from deltaray.data.tokens.response_tokens import Written, response_ids
from deltaray.errors import StageError
from deltaray.recipe import Recipe, expand
from deltaray.train.examples import read_data
from deltaray.train.micro_batches import batch_at
from deltaray.train.reference.blocks import missing_blocks
from deltaray.train.reference.stage import reference, references_needed
from deltaray.train.schedule import learning_rate
from deltaray.train.stage import in_groups, train
from deltaray.train.staleness import outdated
from deltaray.train.student import load_module

PROMPT_COUNT, HELD_OUT, STEPS = 25, 5, 4  # two batches of 10 pairs, twice


def recipe_for(out, model):
    run = {"pairing": "delta", "batch_size": 10, "epochs": 2, "learning_rate": 1e-3, "weight_decay": 0.01}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "out": str(out),
            "prompts": {"path": "unused.jsonl"},
            "teachers": {"big": {"model": "unused"}, "small": {"model": "unused"}},
            "scorers": {"text": {"kind": "surface", "statistic": "characters"}},
            "pairings": {"delta": {"chosen": "big", "rejected": "small"}},
            "student": {"model": model, "max_length": 64},
            "training": {
                "workers": 2,
                "dtype": "float32",
                "micro_batch_tokens": 60,  # several passes, some with a pair that only fills up
                "checkpoint_steps": 3,
                "heldout": 0.25,
                "heldout_evaluations": 2,
                "generation": {"prompts": 3, "max_tokens": 4, "scorer": "text"},
                "runs": {
                    "delta": {**run, "loss": "dpo_norm", "beta": 5.0, "intermediate_checkpoints": [2]},
                    "sft": {**run, "loss": "sft"},
                    "further": {**run, "loss": "dpo", "lora": {"rank": 4, "alpha": 8}, "after": "lora"},
                    "lora": {**run, "loss": "dpo", "lora": {"rank": 4, "alpha": 8}},
                    "kto": {**run, "loss": "kto"},
                },
            },
        }
    )


def fill_store(store):
    """25 prompts in two shards, with responses and pairs as generation and pairing would leave them."""
    for shard, numbers in enumerate((range(15), range(15, PROMPT_COUNT))):
        name = f"part-{shard:05d}"
        ids = [f"p{number:03d}" for number in numbers]
        messages = [[{"role": "user", "content": f"{number}+{number * 7}="}] for number in numbers]
        texts = {
            "big": [str(number * 8) for number in numbers],
            "small": [f"i guess {number}" * (1 + number % 3) for number in numbers],
        }
        prompts = {
            "prompt_id": ids,
            "messages": messages,
            "answer": texts["big"],
            "source": ["test"] * len(ids),
            "error": [None] * len(ids),
            "conversation": [None] * len(ids),
        }
        store.write_table(f"{Store.prompts}/{name}.parquet", pa.table(prompts, schema=PROMPTS), PROMPTS)
        for teacher, answers in texts.items():
            rows = [_response(teacher, *item) for item in zip(ids, answers, strict=True)]
            table = pa.Table.from_pylist(rows, schema=RESPONSES)
            store.write_table(f"{Store.responses(teacher)}/{name}-0abc.parquet", table, RESPONSES)
        pairs = [_pair(*item) for item in zip(ids, messages, texts["big"], texts["small"], strict=True)]
        table = pa.Table.from_pylist(pairs, schema=PAIRS)
        store.write_table(f"{Store.pairs('delta')}/{name}.parquet", table, PAIRS)


def _response(teacher, prompt_id, text):
    ids = {
        "prompt_token_ids": [],
        "token_ids": [],
        "tokens": 0,
        "finish_reason": "stop",
        "error": None,
        "reasoning": None,
    }
    return {"prompt_id": prompt_id, "sample": 0, "teacher": teacher, "text": text, **ids}


def _pair(prompt_id, messages, chosen, rejected):
    tokenizer = make_tokenizer()
    prompt = render_prompt(tokenizer, messages)
    ids = [response_ids(tokenizer, prompt, Written(text)) for text in (chosen, rejected)]
    sides = {"chosen": chosen, "rejected": rejected}
    turns = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    empty = dict.fromkeys(("chosen_score", "rejected_score", "delta", "source", "answer", "conversation"))
    return {
        "prompt_id": prompt_id, "prompt": messages, **turns, "chosen_model": "big", "rejected_model": "small", **empty,
        "chosen_tokens": len(ids[0]), "rejected_tokens": len(ids[1]), "chosen_sample": 0, "rejected_sample": 0,
        "prompt_token_ids": prompt, "chosen_token_ids": ids[0], "rejected_token_ids": ids[1],
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(ray_session, tmp_path_factory):
    """(study, store, progress events, names that `train` returned)."""
    folder = tmp_path_factory.mktemp("train")
    study = expand(recipe_for(folder / "out", save_tiny(folder / "student", vocabulary=2048)))
    store, events = Store(study.recipe.out), []
    fill_store(store)
    for student, teachers in references_needed(study, study.runs.values()).items():
        reference(study, store, student, teachers, lambda *event: events.append(event))
    names = train(study, store, list(study.runs.values()), lambda *event: events.append(event), print)
    return study, store, events, names


def read_run(study, store, name):
    student = study.students["student"]
    return read_data(store, study.runs[name], student, make_tokenizer().eos_token_id, 0.25)


def metrics_of(store, name):
    path = store.local / Store.training(name) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_training(study, store, name):
    """The same run in one process, from the definitions: (loss and gradient norm of each step, the model)."""
    from transformers import AutoModelForCausalLM

    run = study.runs[name].settings
    examples = read_run(study, store, name).train
    model = AutoModelForCausalLM.from_pretrained(study.students["student"].model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=run.adam_betas, weight_decay=run.weight_decay)
    history = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(run, step, STEPS)
        loss = plain_loss(model, examples, batch_at(len(examples), 10, run.seed, step), run)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        history.append((loss.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return history, model


def plain_loss(model, examples, places, run):
    def log_probs(place, side):
        prompt, responses = examples.item(place)
        ids = torch.tensor([*prompt, *responses[side]])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(dim=-1)[range(len(responses[side])), ids[len(prompt) :]]

    chosen = [log_probs(place, 0) for place in places]
    if run.loss == "sft":
        return -torch.cat(chosen).mean()
    margins = []
    for place, good in zip(places, chosen, strict=True):
        bad = log_probs(place, 1)
        ratios = [ids.sum() - examples.reference(side, [place])[0] for side, ids in enumerate((good, bad))]
        if run.loss == "dpo_norm":
            ratios = [ratio / len(ids) for ratio, ids in zip(ratios, (good, bad), strict=True)]
        margins.append(ratios[0] - ratios[1])
    return -torch.nn.functional.logsigmoid(run.beta * torch.stack(margins)).mean()


# --- reference ------------------------------------------------------------------------------------------------
def test_only_losses_that_compare_ask_for_references(trained):
    study = trained[0]
    assert references_needed(study, [study.runs["sft"]]) == {}
    assert references_needed(study, study.runs.values()) == {"student": ["big", "small"]}


def test_every_response_has_one_reference_in_files_named_after_theirs(trained):
    _, store, events, _ = trained
    for teacher in ("big", "small"):
        names = [path.rpartition("/")[2] for path in store.committed(Store.references("student", teacher))]
        assert names == ["part-00000-0abc-00000000.parquet", "part-00001-0abc-00000000.parquet"]
        table = store.read_tables(Store.references("student", teacher), REFERENCES)
        assert table["prompt_id"].to_pylist() == [f"p{number:03d}" for number in range(PROMPT_COUNT)]
        assert missing_blocks(store, "student", teacher) == []
        assert (teacher, PROMPT_COUNT, PROMPT_COUNT) in events


# --- training -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["delta", "sft"])
def test_two_workers_under_zero_3_train_as_one_plain_process_does(trained, name):
    from transformers import AutoModelForCausalLM

    study, store, _, _ = trained
    history, expected = plain_training(study, store, name)
    lines = metrics_of(store, name)
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in history], rel=2e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx([norm for _, norm in history], rel=2e-3)
    assert lines[0]["loss"] == pytest.approx(history[0][0], rel=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(history[0][1], rel=1e-5)
    student, info = AutoModelForCausalLM.from_pretrained(
        store.local_folder(Store.student(name)), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    untouched = AutoModelForCausalLM.from_pretrained(study.students["student"].model, dtype=torch.float32)
    weights = zip(student.parameters(), expected.parameters(), untouched.parameters(), strict=True)
    for found, wanted, before in weights:
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-5)
        assert (found - before).abs().max() > 1e-3


def test_the_first_loss_against_a_reference_is_ln_2(trained):
    assert metrics_of(trained[1], "delta")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_kto_starts_at_one_half(trained):
    lines = metrics_of(trained[1], "kto")
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert lines[-1]["loss"] < 0.45


def _reloaded(study, store, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = study.students["student"].model if name == "lora" else store.local_folder(Store.student(name))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, store.local_folder(Store.adapter("lora"))) if name == "lora" else model


@pytest.mark.parametrize("name", ["delta", "lora"])
def test_what_was_saved_has_the_held_out_loss_that_was_measured(trained, name):
    """Reloaded by transformers and PEFT, and asked by the definition: nothing was saved empty or stale."""
    study, store, _, _ = trained
    data, model = read_run(study, store, name), _reloaded(study, store, name)
    with torch.no_grad():
        loss = plain_loss(model, data.heldout, range(len(data.heldout)), study.runs[name].settings)
    measured = [line for line in metrics_of(store, name) if "heldout_loss" in line]
    assert [line["step"] for line in measured] == [2, 4]
    assert measured[-1]["heldout_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert measured[-1]["heldout_loss"] < measured[0]["heldout_loss"]
    assert len(data.heldout) == HELD_OUT and data.counts["held_out"] == HELD_OUT


@pytest.mark.parametrize("name", ["delta", "lora"])
def test_answers_while_training_are_those_of_what_was_saved(trained, name):
    """Lengths of greedy answers to the first held-out prompts; what they say is compared in `test_engines.py`."""
    study, store, _, _ = trained
    model = _reloaded(study, store, name)
    heldout, tokens = read_run(study, store, name).heldout, []
    for place in range(3):
        prompt = torch.tensor(heldout.item(place)[0])[None].long()
        found = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=4, eos_token_id=1, pad_token_id=0)
        tokens.append(found.shape[1] - prompt.shape[1])
    assert metrics_of(store, name)[-1]["generated_tokens"] == pytest.approx(sum(tokens) / 3)


def test_an_early_student_is_that_of_its_step(trained):
    """The held-out loss measured after step 2, from the student that was kept there."""
    study, store, _, _ = trained
    data = read_run(study, store, "delta")
    with torch.no_grad():
        loss = plain_loss(_reloaded(study, store, "delta-step2"), data.heldout, range(5), study.runs["delta"].settings)
    assert metrics_of(store, "delta")[1]["heldout_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert study.runs["delta"].intermediate_checkpoints == {2: "delta-step2"}


def test_a_run_after_another_starts_from_its_adapter_and_keeps_the_untouched_reference(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    study, store, _, _ = trained
    run, examples = study.runs["further"].settings, read_run(study, store, "further").train
    model = AutoModelForCausalLM.from_pretrained(study.students["student"].model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, store.local_folder(Store.adapter("lora")))
    with torch.no_grad():
        loss = plain_loss(model, examples, batch_at(len(examples), 10, run.seed, 0), run)
    found = [metrics_of(store, name) for name in ("lora", "further")]
    assert found[1][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found[1][-1]["loss"] < found[1][0]["loss"] < found[0][0]["loss"]


def test_a_run_after_another_starts_from_its_weights(trained):
    study, store, _, _ = trained
    start = store.local_folder(Store.student("delta"))
    found, untouched = (load_module(study.students["student"], "float32", None, it).model for it in (start, None))
    stored = load_file(f"{start}/model.safetensors")["model.norm.weight"]
    assert torch.equal(found.model.norm.weight, stored)
    assert not torch.equal(untouched.model.norm.weight, stored)


def test_a_run_of_several_pairings_takes_a_pair_once(trained):
    study, store, _, _ = trained
    table = store.read_tables(Store.pairs("delta"), PAIRS)
    turned = table.rename_columns([turn_over(name) for name in table.column_names]).select(PAIRS.names)
    more = pa.concat_tables([table.slice(20), turned.slice(0, 3)])
    store.write_table(f"{Store.pairs('more')}/part-00000.parquet", more, PAIRS)
    run = replace(study.runs["sft"], pairings=("delta", "more"))
    data = read_data(store, run, study.students["student"], make_tokenizer().eos_token_id, 0)
    assert data.counts["pairs"] == data.counts["trained"] == len(data.train) == PROMPT_COUNT + 3
    alone = read_data(store, study.runs["sft"], study.students["student"], make_tokenizer().eos_token_id, 0).train
    pairs = [[[*prompt], *map(list, sides)] for prompt, sides in map(data.train.item, range(len(data.train)))]
    known = [[[*prompt], *map(list, sides)] for prompt, sides in map(alone.item, range(len(alone)))]
    assert sorted(pairs) == sorted([*known, *([prompt, bad, good] for prompt, good, bad in known[:3])])


def turn_over(column):
    sides = ("chosen", "rejected")
    found = next((side for side in sides if column.startswith(side)), None)
    return column if found is None else column.replace(found, sides[1 - sides.index(found)])


def test_an_adapter_leaves_no_student_and_a_student_no_adapter(trained):
    store = trained[1]
    assert [store.trained(name) for name in ("delta", "lora")] == ["students/delta", "adapters/lora"]


def test_every_step_has_a_line_with_every_key(trained):
    _, store, _, _ = trained
    for name in ("delta", "sft"):
        lines = metrics_of(store, name)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        heldout = {"heldout_loss", "heldout_accuracy", "heldout_margin"}
        generated = {"generated_tokens", "generated_score"}
        more = [generated, heldout | generated, set(), heldout | generated]
        assert [set(line) - {*METRICS, "samples"} for line in lines] == more
        assert all({*METRICS, "samples"} <= set(line) for line in lines)
        assert [line["samples"] for line in lines] == [10] * STEPS
        assert lines[-1]["epoch"] == pytest.approx(2.0)
        null = {key for key in METRICS if lines[0][key] is None}
        rewards = {key for key in METRICS if key.startswith("rewards_")}
        assert null == (rewards | {"logps_rejected"} if name == "sft" else set())
    last = metrics_of(store, "delta")[-1]
    assert last["rewards_margin"] == pytest.approx(last["rewards_chosen"] - last["rewards_rejected"], abs=1e-5)
    assert last["rewards_accuracy"] > 0.5


def test_progress_is_told_and_nothing_hidden_stays(trained):
    _, store, events, names = trained
    assert names == ["delta", "sft", "lora", "further", "kto"]
    for name in names:
        steps = [event[1:3] for event in events if event[0] == name]
        assert (steps[0], steps[-1]) == ((0, STEPS), (STEPS, STEPS))
    students = sorted(path.name for path in (store.local / "students").iterdir())
    assert students == ["delta", "delta-step2", "kto", "sft"]
    assert [path for path in (store.local / ".deltaray" / "checkpoints").rglob("*") if path.is_file()] == []


def test_a_student_is_a_whole_model_folder(trained):
    files = {path.name for path in (trained[1].local / Store.student("delta")).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert "chat_template.jinja" in files


def test_trained_students_are_not_trained_again(trained):
    study, store, _, _ = trained
    assert train(study, store, list(study.runs.values()), lambda *_: None, print) == []
    reference(study, store, "student", ["big", "small"], lambda *_: pytest.fail("nothing is missing"))


def test_a_student_whose_pairs_changed_is_told_of(trained):
    study, store, _, _ = trained
    assert outdated(store, study.runs["delta"]) is None
    record = store.local / ".deltaray" / "pairs" / "delta.json"
    record.parent.mkdir()
    record.write_text('{"inputs": "others"}')
    found = outdated(store, study.runs["delta"])
    shutil.rmtree(record.parent)
    assert found == "delta was trained before the pairs of delta changed; remove students/delta to train it again"


def test_groups_share_the_runs_and_keep_chains_together(trained):
    runs = trained[0].runs
    named = {name: [[run.name for run in group] for group in in_groups(list(runs.values()), most)]
             for name, most in (("one", 1), ("two", 2), ("many", 9))}  # fmt: skip
    assert named["one"] == [["lora", "further", "delta", "sft", "kto"]]
    assert named["two"] == [["lora", "further", "kto"], ["delta", "sft"]]
    assert named["many"] == [["lora", "further"], ["delta"], ["sft"], ["kto"]]


def test_a_pair_without_its_reference_is_refused(trained, tmp_path):
    study = trained[0]
    store = Store(str(tmp_path))
    fill_store(store)
    with pytest.raises(StageError, match="reference of prompt p000 sample 0 is missing"):
        read_run(study, store, "delta")
